"""What a server can read from a client's update: an image, who was in the training set, how many of each class.

Three known attacks on this project's own training of LeNet. Each is made on single updates as they travel, on the
mean of three (all that secure aggregation shows), and on single updates with differential privacy.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from federation.attacks import class_counts, images, membership
from federation.attacks.gradient_inversion import psnr
from federation.attacks.updates import Clients, mean
from federation.client.options import add_dataset_flags
from federation.console import Parser, PublicError, fail, say
from federation.partition import shares
from federation.privacy.accounting import noise_for
from federation.process import write_content
from federation.results.tables import in_columns
from federation.results.theme import LIGHT, canvas
from federation.task.task import DataError, TaskError, open_task

import numpy as np
import torch

import model

NUMBER = 3  # of clients
EPSILON, DELTA = 8.0, 1e-5
RATE, PEAK = 0.1, 1.0  # of DP-SGD: with which a step draws an image; greatest learning rate
MEMBERS, STRANGERS = 1_000, 2_000  # images of each client, and of nobody
PASSES, FEW = 30, 10
COUNTED = 6_000  # images of all clients together whose classes are counted
HEIGHTS = {"image": 4.2, "members": 4.0, "classes": 5.0}  # of the pictures, in inches
EPILOG = """\
attacks:
  image      an image out of one step on it: gradient inversion
  members    who was in the training set: their loss is smaller
  classes    how many images of each class a client has: many move the last layer further

examples:
  python leak.py                               all three, on CIFAR-10: about two minutes
  python leak.py image --dataset synthetic     one of them, without any download

Each attack prints a table and draws DIR/ATTACK.png. docs/privacy.md says what they show, and what nobody has shown.
"""
Result = tuple[list[list[str]], Callable[[Any], None]]  # cells of a table, the first row its head; what draws it


def with_epsilon(noise: float) -> str:
    return f"epsilon {EPSILON:g} (noise {noise:.2f})"


# An image


def image(clients: Clients) -> Result:
    """Of clients that make one step on one image each. Of the mean of all, all images are sought at once."""
    noise = noise_for(EPSILON, DELTA, rate=1, number=1)
    pixels, labels = clients.load(clients.draw(NUMBER))
    say(f"{NUMBER} images, each from the update of one training step on it alone")
    examples = [(pixels[[i]], labels[[i]]) for i in range(NUMBER)]
    plain = [images.gradient_of_update(clients, each) for each in examples]
    private = [clients.private_gradient(each, noise) for each in examples]
    summed = [torch.stack(each).mean(0) for each in zip(*plain, strict=True)]
    mixed = images.find(clients, summed, NUMBER, title="all images from the mean")
    head = ["image", "mean colour", "one update", f"mean of {NUMBER}", with_epsilon(noise)]
    cells, shown = [head], []
    for i, (truth, label) in enumerate(zip(pixels.float(), labels.tolist(), strict=True)):
        (single,) = images.find(clients, plain[i], 1, title=f"image {i + 1} from one update")
        (hidden,) = images.find(clients, private[i], 1, private=True, title=f"image {i + 1} with {with_epsilon(noise)}")
        closest = max(mixed, key=lambda found: psnr(found[0], truth))
        found = [single, closest, hidden]
        colour = psnr(torch.tensor(model.MEAN).view(3, 1, 1).expand_as(truth), truth)
        told = [f"{clients.classes[guess]}, {psnr(seen, truth):.1f} dB" for seen, guess in found]
        cells.append([clients.classes[label], f"{colour:.1f} dB", *told])
        shown.append([truth, *(seen for seen, _ in found)])

    def draw(figure: Any) -> None:
        every = figure.subplots(NUMBER, 4, squeeze=False)
        for axes, one in zip(every.flat, [each for row in shown for each in row], strict=True):
            axes.imshow(one.clamp(0, 255).byte().permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_axis_off()
        for axes, title in zip(every[0], ["trained on", *head[2:]], strict=True):
            axes.set_title(title.partition(" (")[0], fontsize=10)

    return cells, draw


# Who was in the training set


def members(clients: Clients) -> Result:
    """Few images and many passes, as this needs a network that knows its images by heart; then fewer passes.

    Differential privacy has the fewer, as its noise grows with them. So only the last two rows tell what it does.
    """
    noise = noise_for(EPSILON, DELTA, RATE, round(FEW / RATE))
    *rows, others = np.split(clients.draw(MEMBERS * NUMBER + STRANGERS), [MEMBERS * (i + 1) for i in range(NUMBER)])
    parts, strangers = [clients.load(each) for each in rows], clients.as_inputs(clients.load(others))
    test = clients.load(np.arange(clients.task.size(clients.dataset, "test", clients.seed)), "test")
    say(f"members of the training sets of {NUMBER} clients with {MEMBERS:,} images each")
    single = [clients.update(part, PASSES, client) for client, part in enumerate(parts)]
    views = {f"one update, {PASSES} passes": single, f"mean of {NUMBER}, {PASSES} passes": [mean(single)] * NUMBER}
    views[f"one update, {FEW} passes"] = [clients.update(part, FEW, client) for client, part in enumerate(parts)]
    views[f"{with_epsilon(noise)}, {FEW} passes"] = [
        clients.private_update(part, RATE, round(FEW / RATE), noise, PEAK) for part in parts
    ]
    cells, curves = [["", "members told from strangers (AUC)", "accuracy on test images"]], {}
    for view, networks in views.items():
        pairs = [
            (membership.losses(network, clients.as_inputs(part)), membership.losses(network, strangers))
            for network, part in zip(networks, parts, strict=True)
        ]
        auc = np.mean([membership.members_found(*pair) for pair in pairs])
        right = np.mean([clients.task.evaluate(each, test, clients.recipe)["accuracy"] for each in networks])
        cells.append(
            [view, f"{auc:.3f}", f"{right:.3f}{'' if right > 1.5 / len(clients.classes) else ', has learned nothing'}"]
        )
        curves[f"{view}: {auc:.2f}"] = membership.curve(*pairs[0])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for (label, curve), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=True):
            axes.plot(*curve, style, label=label, linewidth=2)
        axes.plot([0, 1], [0, 1], color=LIGHT.faint, linewidth=1)
        axes.set(xlabel="strangers taken for members", ylabel="members found")
        axes.legend(frameon=False, fontsize=9, loc="lower right")

    return cells, draw


# Class counts


def classes(clients: Clients) -> Result:
    """Of clients with unequal mixes, after one pass over their images.

    Read in two ways, as each kind of training hides one of them: logit adjustment the biases, noise the rows.
    """
    noise = noise_for(EPSILON, DELTA, RATE, round(1 / RATE))
    rows = clients.draw(COUNTED)
    labels = clients.labels[rows]
    parts, _ = shares(labels, labels, NUMBER, "dirichlet", 0.1, clients.seed)
    examples = [clients.load(rows[part]) for part in parts]
    say(f"classes of {NUMBER} clients of unequal mixes (Dirichlet 0.1), {len(rows):,} images in all, one pass")
    single = [clients.update(each, 1, client) for client, each in enumerate(examples)]
    private = [clients.private_update(each, RATE, round(1 / RATE), noise, PEAK) for each in examples]
    views = {"one update": single, f"mean of {NUMBER}": [mean(single)] * NUMBER, with_epsilon(noise): private}
    counts = [np.bincount(truth.numpy(), minlength=len(clients.classes)) for _, truth in examples]
    cells = [["rank correlation with its counts", *(f"client {i}" for i in range(NUMBER))]]
    for view, networks in views.items():
        for what, read in READINGS.items():
            told = [
                class_counts.rank_correlation(read(clients.start, network), count)
                for network, count in zip(networks, counts, strict=True)
            ]
            cells.append([f"{view}, {what}", *(f"{each:.2f}" for each in told)])

    def draw(figure: Any) -> None:
        every, at = figure.subplots(NUMBER, 1, sharex=True), np.arange(len(clients.classes))
        for client, axes in enumerate(every):
            rows = class_counts.row_lengths(clients.start, single[client])
            biases = class_counts.bias_steps(clients.start, private[client])
            bars = {"images": (counts[client], LIGHT.federated)}
            bars["read from its update, rows"] = (rows, LIGHT.centralised)
            bars[f"with epsilon {EPSILON:g}, biases"] = (biases - biases.min(), LIGHT.alone)
            for place, (label, (values, colour)) in zip((-0.27, 0, 0.27), bars.items(), strict=True):
                axes.bar(at + place, values / values.max(), 0.27, color=colour, label=label)
            axes.set(ylabel=f"client {client}", yticks=[])
        every[-1].set_xticks(at, clients.classes, rotation=45, ha="right")
        figure.legend(
            *every[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9
        )

    return cells, draw


READINGS = {"rows": class_counts.row_lengths, "biases": class_counts.bias_steps}
ATTACKS: dict[str, Callable[[Clients], Result]] = {"image": image, "members": members, "classes": classes}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s [ATTACK ...] [options]", epilog=EPILOG)
    add = parser.add_argument
    add("attacks", nargs="*", metavar="ATTACK", help="image, members or classes (default: all)")
    add_dataset_flags(parser)
    add("--out", default="leaks", metavar="DIR", help="where the pictures go; they show training images")
    add("--seed", type=int, default=0, metavar="N", help="which images, and all randomness but privacy's noise")
    args = parser.parse_args(argv)
    for name in args.attacks:
        if name not in ATTACKS:
            parser.error(f"ATTACK must be one of {', '.join(ATTACKS)}, got {name!r}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be between 0 and 4294967295, got {args.seed}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # batches are so small that more only wait for each other
    try:
        task = open_task()
        dataset = task.open_dataset(args.dataset or task.default_dataset, args.data_dir, args.skip_damaged)
        for name in args.attacks or ATTACKS:
            began = time.monotonic()
            cells, draw = ATTACKS[name](Clients(task, dataset, "lenet", args.seed))
            say(in_columns(cells))
            png = io.BytesIO()
            with canvas(LIGHT, HEIGHTS[name], png) as figure:
                draw(figure)
            path = Path(args.out) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_content(path, png.getvalue())
            say(f"{path}, {time.monotonic() - began:.0f} s\n")
    except (DataError, TaskError, PublicError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"--out {args.out} can't be written ({error.strerror}); name another")


if __name__ == "__main__":
    main()

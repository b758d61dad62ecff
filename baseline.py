"""The same training without federation: one model on all the clients' images, and each client on its own alone."""

import argparse
import time

from federation.client.compute import find_device
from federation.client.options import add_device_flag
from federation.config import MAIN_METRIC, Recipe
from federation.console import Parser, fail, say
from federation.partition import shares
from federation.process import num_cores, write_whole
from federation.results.comparison import Baseline, Training, comparison, verdict
from federation.results.history import History, RoundRecord
from federation.results.tables import in_columns, score

import numpy as np
import torch

import evaluate
import model
from data import DataError, load

EPILOG = """\
Both get what a client gets: the recipe of the run, as many passes as its rounds made, and the same
schedule over all of them; all models are scored on the same whole test set after each round. The
results go to baseline.json in the run folder, and into accuracy.png and report.html.

example:
  python baseline.py --run runs/2026-11-22-140000 --dataset my-images
"""


class Trainer:
    """Trains one model after another on parts of the same images."""

    def __init__(self, recipe: Recipe, rounds: int, classes: int, device: str) -> None:
        self.recipe = recipe
        self.rounds = rounds
        self.classes = classes
        self.device = device
        self.train: tuple[torch.Tensor, torch.Tensor]  # images, labels
        self.test: tuple[torch.Tensor, torch.Tensor]

    def run(self, name: str, rows: np.ndarray, stream: int) -> Training:
        """Train on these rows of the images, and score after every round; the stream of randomness is a partition's."""
        network = model.build(self.recipe.model, self.classes, self.recipe.seed).to(self.device)
        images, labels = (tensor[torch.from_numpy(rows)] for tensor in self.train)
        records = [self._score(network, 0, 0.0)]
        for number in range(1, self.rounds + 1):
            began = time.monotonic()
            title = f"{name}, round {number}"
            model.train_round(network, images, labels, self.recipe, stream, number, title=title)
            record = self._score(network, number, time.monotonic() - began)
            records.append(record)
            main = f"{MAIN_METRIC} {score(record.metrics[MAIN_METRIC], MAIN_METRIC)}"
            say(f"{title}: {len(rows):,} images in {record.seconds:.1f} s, {main}")
        return Training(len(rows), records)

    def _score(self, network: torch.nn.Module, number: int, seconds: float) -> RoundRecord:
        return RoundRecord(number, model.evaluate(network, *self.test), seconds=round(seconds, 3))


def clients_images(dataset, recipe: Recipe, history: History) -> list[np.ndarray]:
    """Which training images each client had. Exits with 2 and one line where this data set can't be what they had."""
    if recipe.partitioner == "local":
        fail("the clients of this run brought images of their own (--partitioner local); only they have them", 2)
    labels, test_labels = (dataset.labels(split, recipe.seed) for split in ("train", "test"))
    parts, _ = shares(
        labels,
        test_labels,
        history.config["clients"],
        partitioner=recipe.partitioner,
        alpha=recipe.alpha,
        seed=recipe.seed,
    )
    for partition, counts in history.config.get("class_counts", {}).items():
        if np.bincount(labels[parts[int(partition)]], minlength=len(counts)).tolist() != counts:
            fail(f"--dataset holds other images than client {partition} had; give the data set of the clients", 2)
    return parts


def compare(args: argparse.Namespace, device: str) -> None:
    folder, history, recipe, dataset = evaluate.open_run(args)
    rounds = history.by_round()[-1].round
    if rounds < 1:
        fail(f"--run {args.run} has not finished its first round; there is nothing to compare with", 2)
    trainer = Trainer(recipe, rounds, len(dataset.classes), device)
    try:
        parts = clients_images(dataset, recipe, history)
        everybodys = np.sort(np.concatenate(parts))
        trainer.train = load(dataset, "train", everybodys, recipe.seed)
        trainer.test = load(dataset, "test", np.arange(len(dataset.labels("test", recipe.seed))), recipe.seed)
    except (DataError, ValueError) as error:
        fail(str(error))
    fraction = history.config.get("fraction_fit", 1.0)
    if fraction < 1:
        say(f"in each round of the federation {fraction:g} of the clients trained; here all do, in every round")
    # One past the last partition: a stream of randomness of its own.
    centralised = trainer.run("centralised", np.arange(len(everybodys)), stream=len(parts))
    alone = []
    for partition, part in enumerate(parts):
        one = trainer.run(f"client {partition} alone", np.searchsorted(everybodys, part), stream=partition)
        one.partition = partition
        alone.append(one)
    baseline = Baseline(len(trainer.test[1]), torch.get_num_threads(), device, centralised, alone)
    say(f"\n{in_columns(comparison(history, baseline))}\n\n{verdict(history, baseline)}\n{baseline.about_times()}\n")
    for name in set(history.metric_names()) - {MAIN_METRIC, "loss"}:
        say(f"{name}:\n{in_columns(comparison(history, baseline, name))}\n")
    try:
        write_whole(folder.path / "baseline.json", lambda file: file.write(baseline.to_json().encode()))
        evaluate.draw(folder)
    except OSError as error:
        fail(f"{folder.path} can't be written ({error.strerror})")


def main() -> None:
    parser = Parser(__doc__, usage="%(prog)s --run RUN_DIR [options]", epilog=EPILOG)
    evaluate.add_run_flags(parser)
    add_device_flag(parser)
    parser.add_argument("--threads", type=int, default=num_cores(), metavar="N", help="CPU threads")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    torch.set_num_threads(args.threads)
    compare(args, find_device(args.device))


if __name__ == "__main__":
    main()

"""What it brings and costs that images of rare classes come repeatedly in an epoch (REPEATS of model.py).

Accuracy on training images held out, and how well members of rare classes are told from strangers by their loss.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.attacks.membership import losses, members_found
from federation.config import Recipe
from federation.task.task import open_task

import numpy as np
import torch
from common import InMemory, add_images, federate, machine, save

import model

HELD_OUT, MOST, ROUNDS = 5_000, [0, 2, 3, 8], 3
DIRICHLET = {"partitioner": "dirichlet", "alpha": 0.1}
FREQUENT, RARE = 3_000, 47  # images that a client has of each of five classes, and of the others
STRANGERS = 400  # images of each rare class that it has not


class HeldOut(InMemory):
    """The training images alone, some of which are the test images."""

    def __init__(self, path: str):
        super().__init__(path)
        order = np.random.default_rng(7).permutation(len(self._labels["train"]))
        rows = {"test": np.sort(order[:HELD_OUT]), "train": np.sort(order[HELD_OUT:])}
        self._images = {split: self._images["train"][chosen] for split, chosen in rows.items()}
        self._labels = {split: self._labels["train"][chosen] for split, chosen in rows.items()}


def members(dataset: InMemory, recipe: Recipe) -> list[float]:
    """The mean over the rare classes of members_found after each epoch of a client that trains alone."""
    task, rng, labels = open_task(), np.random.default_rng(recipe.seed), dataset.labels("train", 0)
    recipe = task.complete(recipe)
    order, (frequent, rare) = rng.permutation(len(labels)), rng.permutation(len(dataset.classes)).reshape(2, -1)
    of_class = {int(c): order[labels[order] == c] for c in (*frequent, *rare)}
    rows = np.concatenate([of_class[c][:FREQUENT] for c in frequent] + [of_class[c][:RARE] for c in rare])
    network = task.build({"classes": dataset.classes, "input_shape": [3, 32, 32]}, recipe)

    def read(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(dataset.images("train", rows, 0)), torch.from_numpy(labels[rows]).long()

    def losses_of(rows: np.ndarray) -> torch.Tensor:
        images, truth = read(rows)
        return losses(network, (model.to_input(images, torch.device("cpu")), truth))

    found = []
    for server_round in range(1, recipe.rounds + 1):
        task.train_round(network, read(rows), recipe, recipe.part(0, server_round))
        pairs = [(of_class[c][:RARE], of_class[c][FREQUENT : FREQUENT + STRANGERS]) for c in rare]
        found.append(statistics.mean(members_found(losses_of(one), losses_of(other)) for one, other in pairs))
    return found


def by_repeats(name: str, run: Callable[[int], list[float]], args: argparse.Namespace) -> dict[str, list[list[float]]]:
    """What run(seed) finds after each round, for each number of repeats: by seed; their means are printed."""
    found = {}
    for most in args.most:
        model.REPEATS = most
        found[f"{name} {most}"] = by_seed = [run(seed) for seed in args.seeds]
        means = [statistics.mean(column) for column in zip(*by_seed, strict=True)]
        print(f"{name:<13} {most}  " + "  ".join(f"{value:.4f}" for value in means), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_images(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the recipe (0 1 2)")
    parser.add_argument("--most", type=int, nargs="+", default=MOST, metavar="N", help=f"values of REPEATS ({MOST})")
    args = parser.parse_args()
    results: dict = {"machine": machine(), "seeds": args.seeds, "members": {}}
    dataset = HeldOut(args.images)

    def found(network: str) -> Callable[[int], list[float]]:
        return lambda seed: members(dataset, Recipe(model=network, rounds=ROUNDS, seed=seed))

    def accuracies(seed: int) -> list[float]:
        return [step.accuracy for step in federate(dataset, Recipe(model="cnn", rounds=ROUNDS, seed=seed, **DIRICHLET))]

    print("members of rare classes told from strangers (AUC) after each epoch, means over the seeds")
    for network in ("cnn", "lenet"):
        results["members"] |= by_repeats(network, found(network), args)
    print(f"\naccuracy on {HELD_OUT:,} held-out images after each round, means over the seeds")
    results["accuracy"] = by_repeats("dirichlet 0.1", accuracies, args)
    save("repeats", results)


if __name__ == "__main__":
    main()

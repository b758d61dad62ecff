"""Accuracy of the default recipes, three clients and three rounds, by network and split; and what training costs."""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.config import Recipe
from federation.protocol import Assignment

import torch
from common import Client, InMemory, add_images, federate, machine, save

CASES = [  # network, name of the split, recipe
    ("cnn", "even", {}),
    ("cnn", "dirichlet 0.5", {"partitioner": "dirichlet", "alpha": 0.5}),
    ("cnn", "dirichlet 0.1", {"partitioner": "dirichlet", "alpha": 0.1}),
    ("cnn-large", "even", {}),
    ("lenet", "even", {}),
]
GOALS = {"cnn": 4.5, "cnn-large": 10.0, "lenet": 1.0}  # processor time of training, at most so many times lenet's
ROUNDS = 3


def accuracies(dataset: InMemory, seeds: list[int], cases: list) -> list[dict]:
    """Accuracy on the whole test set after every round, for each case: by seed, and their mean."""
    print(
        f"{'network':<9} {'split':<14} {'seed':>4}  " + "  ".join(f"round {i}" for i in range(ROUNDS + 1)), flush=True
    )
    results = []
    for network, split, changes in cases:
        by_seed = {}
        for seed in seeds:
            recipe = Recipe(model=network, rounds=ROUNDS, seed=seed, **changes)
            by_seed[seed] = [step.accuracy for step in federate(dataset, recipe)]
            print(row(network, split, str(seed), by_seed[seed]), flush=True)
        mean = [statistics.mean(column) for column in zip(*by_seed.values(), strict=True)]
        print(row(network, split, "mean", mean), flush=True)
        results.append({"network": network, "split": split, "by_seed": by_seed, "mean": mean})
    return results


def row(network: str, split: str, seed: str, values: list[float]) -> str:
    return f"{network:<9} {split:<14} {seed:>4}  " + "  ".join(f"{value:>7.4f}" for value in values)


def training_times(dataset: InMemory, repeat: int) -> dict[str, list[float]]:
    """Processor seconds of one client's local epoch in each round, on one thread: medians of `repeat` runs.

    The networks take turns, so that what else the machine does meets both alike.
    """
    runs = {name: [] for name in GOALS}
    for _ in range(repeat):
        clients = {name: Client(dataset, Assignment(0, 3, Recipe(model=name, rounds=ROUNDS))) for name in runs}
        torch.set_num_threads(1)
        times = {name: [] for name in runs}
        for server_round in range(1, ROUNDS + 1):
            for name, client in clients.items():
                began = time.process_time()
                part = client.recipe.part(0, server_round)
                client.task.train_round(client.network, client.train_set, client.recipe, part)
                times[name].append(time.process_time() - began)
        for name in runs:
            runs[name].append(times[name])
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_images(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the recipe (0 1 2)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of the time measurement (3)")
    parser.add_argument("--cases", type=int, default=len(CASES), metavar="N", help="of network and split, the first N")
    args = parser.parse_args()
    where = machine()
    dataset = InMemory(args.images)
    sizes = {split: len(dataset.labels(split, 0)) for split in ("train", "test")}
    results = {"machine": where, "images": sizes, "seeds": args.seeds, "clients": 3, "local_epochs": 1}
    print(f"{sizes['train']:,} training images in 3 shares; accuracy on all {sizes['test']:,} test images\n")
    times = training_times(dataset, args.repeat)  # first: it is short, and its ratio tells whether the rest is worth it
    ratios = {name: sum(values) / sum(times["lenet"]) for name, values in times.items()}
    print("processor seconds of a client's local epoch, one thread, by round:")
    for name, values in times.items():
        by_round = "  ".join(f"{value:>6.2f}" for value in values)
        print(f"{name:<9} {by_round}   together {sum(values):.2f}, {ratios[name]:.2f} times lenet's ({GOALS[name]:g})")
    print()
    results["epoch_seconds_by_round"] = times
    results["training_time_ratios"] = ratios
    results["accuracy"] = accuracies(dataset, args.seeds, CASES[: args.cases])
    save("accuracy", results)


if __name__ == "__main__":
    main()

"""How far honest clients' steps lie apart, round by round: what --outlier-factor must never leave out."""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.aggregation.steps import excess, measure
from federation.aggregation.strategy import STRATEGIES, CheckedStrategy
from federation.aggregation.validation import Update
from federation.config import Recipe
from federation.protocol import Assignment
from federation.server.settings import ServerSettings

import numpy as np
import torch
from common import Client, InMemory, add_images, machine, save

CASES = [("lenet", 3, 10_000), ("lenet", 10, 10_000), ("cnn", 3, 3000), ("cnn", 10, 5000)]  # network, clients, images
SPLITS = ("iid", "quantity-skew", "dirichlet", "shards")
ALPHA = 0.1


class Some(InMemory):
    """So many of the training images, drawn by the seed."""

    def take(self, number: int, seed: int) -> None:
        self.rows = np.random.default_rng(seed).permutation(len(super().labels("train", 0)))[:number]

    def labels(self, split: str, seed: int) -> np.ndarray:
        labels = super().labels(split, seed)
        return labels[self.rows] if split == "train" else labels[:100]

    def images(self, split: str, indices: np.ndarray, seed: int) -> np.ndarray:
        return super().images(split, self.rows[indices] if split == "train" else indices, seed)


def excesses(dataset: Some, recipe: Recipe, num_clients: int) -> list[float]:
    """The greatest step of each round, as a multiple of the round's median."""
    clients = [Client(dataset, Assignment(number, num_clients, recipe)) for number in range(num_clients)]
    weights, positions = clients[0].get_parameters({}), clients[0].buffer_positions
    strategy = CheckedStrategy(STRATEGIES["fedavg"], ServerSettings(), weights, positions)
    found = []
    for server_round in range(1, recipe.rounds + 1):
        answers = [client.fit(weights, {"server_round": server_round}) for client in clients]
        updates = [Update(p, *answer) for p, answer in enumerate(answers)]
        steps = measure(updates, [weights] * num_clients, positions)
        found.append(max(excess(step, steps) for step in steps))
        weights = strategy.aggregate(weights, updates)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_images(parser)
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="seeds 0 to N - 1 (10)")
    parser.add_argument(
        "--cases", type=int, default=len(CASES), metavar="N", help="of network and clients, the first N"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    where, dataset, results = machine(), Some(args.images), []
    for network, clients, images in CASES[: args.cases]:
        for split in SPLITS:
            values = []
            for seed in range(args.seeds):
                dataset.take(images, seed)
                values += excesses(dataset, Recipe(model=network, partitioner=split, alpha=ALPHA, seed=seed), clients)
            result = {"network": network, "clients": clients, "images": images, "split": split}
            results.append({**result, "most": max(values), "median": statistics.median(values)})
            print(
                f"{network:<6} {clients:>3} clients  {split:<14} at most {max(values):5.2f} times the median",
                flush=True,
            )
    save(
        "steps", {"machine": where, "seeds": args.seeds, "rounds": Recipe().rounds, "alpha": ALPHA, "results": results}
    )


if __name__ == "__main__":
    main()

"""What examples/xray reaches: three clients, plain and with private training, one place for all films, and alone.

In a single process, with the task's own functions and FedAvg's mean; the frozen layers see each film once. Noise and
draws of private training are the operating system's. Models are scored on 1,500 test films, as the example's 150 are
too few to tell such differences: theirs is given beside.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.config import Recipe
from federation.partition import shares
from federation.privacy.accounting import noise_for
from federation.privacy.dp_sgd import Plan, draws, train
from federation.privacy.noise import Source
from federation.task import classification
from federation.task.task import open_task
from federation.task.training import Examples
from federation.task.weights import keep_frozen

import numpy as np
import torch
from common import ROOT, machine, save  # first, as it finds federation/

DELTA, CLIP, ROUNDS = 1e-5, 1.0, 3
MORE = 10  # times the test films
TASK = open_task(str(ROOT / "examples/xray"))
HOSPITALS = dict(TASK.data.HOSPITALS)
SHIPPED = sum(train for train, *_ in HOSPITALS.values())  # films
Parts = list[np.ndarray]  # the rows of each client
Weights = dict[str, torch.Tensor]


def generated(split: str, times: float = 1) -> Examples:
    """The example's films of a split, or `times` as many; from each hospital in turn."""
    TASK.data.HOSPITALS.update(
        {name: (round(times * train), round(times * test), *rest) for name, (train, test, *rest) in HOSPITALS.items()}
    )
    dataset = TASK.open_dataset(TASK.data.DATASET)
    return TASK.load(dataset, split, np.arange(TASK.size(dataset, split, 0)), 0)


class Films:
    """To train with: the example's, or `times` as many."""

    def __init__(self, times: float, network: torch.nn.Module):
        _, self.train, _ = TASK.private_training(network, generated("train", times))
        self.size = len(self.train[1])
        ends = np.cumsum([round(times * number) for number, *_ in HOSPITALS.values()])
        self.hospitals = np.split(np.arange(self.size), ends[:-1])

    def shared_out(self, seed: int) -> Parts:
        labels = self.train[1].numpy()
        return shares(labels, labels, 3, "iid", 0.5, seed)[0]


class Federation:
    """One network, whose head is trained anew for each run."""

    def __init__(self) -> None:
        self.network = keep_frozen(TASK.build({"classes": TASK.data.CLASSES}, TASK.complete(Recipe())))
        self.head = self.network.head
        self.test, self.few = generated("test", MORE), generated("test")

    def run(self, films: Films, parts: Parts, recipe: Recipe, epsilon: float | None) -> dict[str, float]:
        """Metrics of the final model; without an epsilon of plain training."""
        torch.manual_seed(recipe.seed)
        self.head.reset_parameters()
        for number in range(1, ROUNDS + 1):
            start, mean = self._weights(), {name: torch.zeros_like(each) for name, each in self._weights().items()}
            for partition, rows in enumerate(parts):
                self.head.load_state_dict(start)
                examples = tuple(each[rows] for each in films.train)
                if epsilon:
                    update = self._private(examples, recipe, partition, number, epsilon)
                else:
                    update = self._plain(examples, recipe, partition, number)
                for name, each in update.items():
                    mean[name] += each * (len(rows) / sum(map(len, parts)))
            self.head.load_state_dict(mean)
        metrics = TASK.evaluate(self.network, self.test, recipe)
        return {**metrics, "auc_of_150": TASK.evaluate(self.network, self.few, recipe)["auc"]}

    def _weights(self) -> Weights:
        return {name: each.detach().clone() for name, each in self.head.named_parameters()}

    def _plain(self, examples: Examples, recipe: Recipe, partition: int, number: int) -> Weights:
        part = recipe.part(partition, number)
        torch.manual_seed(part.seed)
        classification.train_round(self.head, examples, recipe, part)
        return self._weights()

    def _private(self, examples: Examples, recipe: Recipe, partition: int, number: int, epsilon: float) -> Weights:
        rate, steps = draws(recipe, len(examples[0]))
        noise = noise_for(epsilon, DELTA, rate, steps * ROUNDS)
        plan = Plan.of(recipe, recipe.part(partition, number), len(examples[0]), noise, CLIP)
        return train(self.head, examples, classification.loss, plan, Source().bytes_of(partition, number))


def summarise(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """By metric, mean and standard deviation over the runs."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    return {name: [statistics.mean(each), statistics.stdev(each)] for name, each in columns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="two or more, from 0 on (default: 20)")
    parser.add_argument(
        "--films",
        type=int,
        nargs="+",
        default=[450, 900, 1350],
        metavar="N",
        help=f"to train with ({SHIPPED} and others)",
    )
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8, 3, 1], metavar="E")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where, federation, results = machine(), Federation(), {}
    print(f"{where}\n")

    def measure(films: Films, how: str, split: Callable[[int], list[Parts]], epsilon: float | None = None) -> None:
        """split: by seed, the clients of one run, or of several."""
        runs = []
        for seed in range(args.seeds):
            recipe = TASK.complete(Recipe(rounds=ROUNDS, seed=seed, private_training=bool(epsilon)))
            runs += [federation.run(films, parts, recipe, epsilon) for parts in split(seed)]
        name = f"{films.size} films, {how}, {f'epsilon {epsilon:g}' if epsilon else 'plain'}"
        results[name] = {"summary": summarise(runs), "runs": runs}
        words = ", ".join(f"{key} {mean:.3f} ± {spread:.3f}" for key, (mean, spread) in summarise(runs).items())
        print(f"{name}: {words}", flush=True)

    for number in args.films:
        films = Films(number / SHIPPED, federation.network)
        for epsilon in (None, *args.epsilons):
            measure(films, "shared out", lambda seed: [films.shared_out(seed)], epsilon)  # noqa: B023
        if number == SHIPPED:
            for epsilon in (None, *args.epsilons):
                measure(films, "a folder each", lambda seed: [films.hospitals], epsilon)  # noqa: B023
            measure(films, "centralised", lambda seed: [[np.arange(films.size)]])  # noqa: B023
            measure(films, "a third alone", lambda seed: [[part] for part in films.shared_out(seed)])  # noqa: B023
    save("xray", {"machine": where, "delta": DELTA, "clip": CLIP, "seeds": args.seeds, "results": results})


if __name__ == "__main__":
    main()

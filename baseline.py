"""The same training without federation: one model on all the clients' examples, and each client on its own alone."""

import argparse
import dataclasses
import time
from typing import Any

from federation.client.options import add_device_flag
from federation.config import LOSS, Recipe
from federation.console import Parser, fail, say
from federation.process import num_cores, write_content
from federation.results.comparison import Baseline, Training, comparison, verdict
from federation.results.history import History, RoundRecord
from federation.results.tables import in_columns, remarks, score
from federation.task.compute import find_device
from federation.task.task import DataError, Task, TaskError
from federation.task.weights import keep_frozen

import numpy as np
import torch

import evaluate

EPILOG = """\
Both get what a client gets: the recipe of the run, as many passes as its rounds made, and the same
schedule over all of them; all models are scored on the same whole test set after each round. The
results go to baseline.json in the run folder, and into accuracy.png and report.html.

example:
  python baseline.py --run runs/2026-11-22-140000 --dataset my-images
"""


class Trainer:
    """Trains one model after another on parts of the same data."""

    def __init__(self, task: Task, dataset: Any, recipe: Recipe, rounds: int, device: str) -> None:
        self.task = task
        self.dataset = dataset
        self.recipe = recipe
        self.rounds = rounds
        self.device = device
        self.schema = task.schema(dataset)
        self.test_size = task.size(dataset, "test", recipe.seed)
        self.test = task.load(dataset, "test", np.arange(self.test_size), recipe.seed)

    def run(self, name: str, rows: np.ndarray, stream: int) -> Training:
        """Train on these training examples, and score after every round; stream: of randomness, as a partition's."""
        network = keep_frozen(self.task.build(self.schema, self.recipe)).to(self.device)
        examples = self.task.load(self.dataset, "train", rows, self.recipe.seed)
        main = self.task.metrics[0]
        records = [self._score(network, 0, 0.0)]
        for number in range(1, self.rounds + 1):
            began = time.monotonic()
            title = f"{name}, round {number}"
            self.task.train_round(network, examples, self.recipe, self.recipe.part(stream, number, title))
            record = self._score(network, number, time.monotonic() - began)
            records.append(record)
            words = f"{main.name} {score(record.metrics[main.name], main)}"
            say(f"{title}: {len(rows):,} examples in {record.seconds:.1f} s, {words}")
        return Training(len(rows), records)

    def _score(self, network: torch.nn.Module, number: int, seconds: float) -> RoundRecord:
        metrics = self.task.evaluate(network, self.test, self.recipe)
        return RoundRecord(number, metrics, seconds=round(seconds, 3), main_metric=self.task.metrics[0].name)


def clients_examples(task: Task, dataset: Any, recipe: Recipe, history: History) -> list[np.ndarray]:
    """Which training examples each client had. Exits with 2 and one line where this data can't be what they had."""
    if recipe.partitioner == "local":
        fail("the clients of this run brought data of their own (--partitioner local); only they have it", 2)
    parts, _ = task.shares(dataset, recipe, history.config["clients"])
    labels = task.labels(dataset, "train", recipe.seed)
    for partition, counts in history.config.get("class_counts", {}).items():
        rows = parts[int(partition)]
        if labels is None or np.bincount(labels[rows], minlength=len(counts)).tolist() != counts:
            fail(f"--dataset holds other examples than client {partition} had; give the data set of the clients", 2)
    return parts


def compare(args: argparse.Namespace, device: str) -> None:
    folder, history, recipe, task, dataset = evaluate.open_run(args)
    if recipe.private_training:
        say(f"the run trained privately; here {recipe.model} trains by its ordinary recipe, without privacy")
        open_again: dict[str, Any] = dict.fromkeys(("local_epochs", "batch_size", "learning_rate", "own"))
        recipe = task.complete(dataclasses.replace(recipe, private_training=False, **open_again))
    rounds = history.by_round()[-1].round
    if rounds < 1:
        fail(f"--run {args.run} has not finished its first round; there is nothing to compare with", 2)
    try:
        parts = clients_examples(task, dataset, recipe, history)
        trainer = Trainer(task, dataset, recipe, rounds, device)
        fraction = history.config.get("fraction_fit", 1.0)
        if fraction < 1:
            say(f"in each round of the federation {fraction:g} of the clients trained; here all do, in every round")
        # One past the last partition: a stream of randomness of its own.
        centralised = trainer.run("centralised", np.sort(np.concatenate(parts)), stream=len(parts))
        alone = []
        for partition, part in enumerate(parts):
            one = trainer.run(f"client {partition} alone", part, stream=partition)
            one.partition = partition
            alone.append(one)
    except (DataError, TaskError, ValueError) as error:
        fail(str(error))
    baseline = Baseline(trainer.test_size, torch.get_num_threads(), device, centralised, alone)
    say(f"\n{in_columns(comparison(history, baseline))}\n\n{verdict(history, baseline)}\n{baseline.about_times()}\n")
    for name in sorted(set(history.metric_names()) - {history.main.name, LOSS.name}):
        say(f"{name}:\n{in_columns(comparison(history, baseline, name))}\n")
    for line in remarks(history):
        say(f"federated {line}\n")
    try:
        write_content(folder.path / "baseline.json", baseline.to_json().encode())
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

"""The same training without federation: one model on all the clients' images, and each client on its own alone."""

import argparse
import json
import sys
import time

from federation.recipe import Recipe
from federation.run_folder import History, write_whole
from federation.tables import TIMES, comparison, in_columns, verdict
from federation.words import fail, say

import numpy as np
import torch
from tqdm import tqdm

import evaluate
import model
from client import DEVICES, find_device, load, num_cores, round_seed, shares
from data import DataError

EPILOG = """\
Both get what a client gets: the recipe of the run, as many passes as its rounds made, and the same
schedule over all of them; all models are scored on the same whole test set after each round. The
results go to baseline.json in the run folder, and into accuracy.png and report.html.
"""


class Bench:
    """Trains one model after another on parts of the same images."""

    def __init__(self, recipe: Recipe, rounds: int, classes: int, device: str) -> None:
        self.recipe = recipe
        self.rounds = rounds
        self.classes = classes
        self.device = device
        self.train: tuple[torch.Tensor, torch.Tensor]  # images, labels
        self.test: tuple[torch.Tensor, torch.Tensor]

    def run(self, name: str, rows: np.ndarray, stream: int) -> dict:
        """Train on these rows of the images, and score after every round; the stream of randomness is a partition's."""
        recipe = self.recipe
        network = model.build(recipe.model, self.classes, recipe.seed).to(self.device)
        images, labels = (tensor[torch.from_numpy(rows)] for tensor in self.train)
        scores = [self._score(network, 0, 0.0)]
        for number in range(1, self.rounds + 1):
            began = time.monotonic()
            with tqdm(desc=f"{name}, round {number}", unit=" batches", leave=False, disable=None) as bar:

                def show(done: int, total: int, bar: tqdm = bar) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                model.train(
                    network,
                    images,
                    labels,
                    epochs=recipe.local_epochs,
                    batch_size=recipe.batch_size,
                    learning_rate=recipe.learning_rate,
                    start=(number - 1) / recipe.rounds,
                    end=number / recipe.rounds,
                    seed=round_seed(recipe.seed, stream, number),
                    on_batch=show,
                )
            scores.append(self._score(network, number, time.monotonic() - began))
            took, accuracy = scores[-1]["seconds"], scores[-1]["accuracy"]
            say(f"{name}, round {number}: {len(rows):,} images in {took:.1f} s, accuracy {accuracy:.4f}")
        return {"images": len(rows), "rounds": scores}

    def _score(self, network: torch.nn.Module, number: int, seconds: float) -> dict:
        loss, accuracy = model.evaluate(network, *self.test)
        return {"round": number, "accuracy": accuracy, "loss": loss, "seconds": round(seconds, 3)}


def clients_images(dataset, recipe: Recipe, history: History) -> list[np.ndarray]:
    """Which training images each client had. Exits with 2 and one line where this data set can't be what they had."""
    if recipe.partitioner == "whole":
        fail("the clients of this run brought images of their own (--partitioner whole); only they have them", 2)
    parts, _ = shares(dataset, history.config["clients"], recipe)
    labels = dataset.labels("train", recipe.seed)
    for partition, counts in history.config.get("class_counts", {}).items():
        if np.bincount(labels[parts[int(partition)]], minlength=len(counts)).tolist() != counts:
            fail(f"--dataset holds other images than client {partition} had; give the data set of the clients", 2)
    return parts


def compare(args: argparse.Namespace, device: str) -> None:
    folder, history, recipe, dataset = evaluate.open_run(args)
    rounds = history.by_round()[-1]["round"]
    if rounds < 1:
        fail(f"--run {args.run} has not finished its first round; there is nothing to compare with", 2)
    bench = Bench(recipe, rounds, len(dataset.classes), device)
    try:
        parts = clients_images(dataset, recipe, history)
        everybodys = np.sort(np.concatenate(parts))
        bench.train = load(dataset, "train", everybodys, recipe.seed)
        bench.test = load(dataset, "test", np.arange(len(dataset.labels("test", recipe.seed))), recipe.seed)
    except (DataError, ValueError) as error:
        fail(str(error))
    fraction = history.config.get("fraction_fit", 1.0)
    if fraction < 1:
        say(f"in each round of the federation {fraction:g} of the clients trained; here all do, in every round")
    # One past the last partition: a stream of randomness of its own.
    centralised = bench.run("centralised", np.arange(len(everybodys)), stream=len(parts))
    alone = []
    for partition, part in enumerate(parts):
        one = bench.run(f"client {partition} alone", np.searchsorted(everybodys, part), stream=partition)
        alone.append({"partition": partition, **one})
    baseline = {
        "test_images": len(bench.test[1]),
        "threads": torch.get_num_threads(),
        "device": device,
        "centralised": centralised,
        "alone": alone,
    }
    say(f"\n{in_columns(comparison(history, baseline))}\n\n{verdict(history, baseline)}\n{TIMES.format(**baseline)}\n")
    try:
        write_whole(folder.path / "baseline.json", lambda file: file.write(json.dumps(baseline, indent=1).encode()))
        evaluate.draw(folder)
    except OSError as error:
        fail(f"{folder.path} can't be written ({error.strerror})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    evaluate.add_run_flags(parser)
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to train (default: as client.py)")
    parser.add_argument(
        "--threads", type=int, default=num_cores(), metavar="N", help="CPU threads (default: all cores)"
    )
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    torch.set_num_threads(args.threads)
    compare(args, find_device(parser, args.device))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

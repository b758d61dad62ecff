"""What the benchmarks share: images in memory, a federation in one process, and results with where they are from."""

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.aggregation.means import mean_metrics
from federation.aggregation.strategy import STRATEGIES, CheckedStrategy
from federation.aggregation.validation import Score, Update
from federation.config import Recipe
from federation.console import fail
from federation.process import num_cores
from federation.protocol import Assignment
from federation.results.theme import LIGHT, Theme, canvas
from federation.server.settings import ServerSettings
from federation.task.compute import share_cores
from federation.task.task import DataError, open_task

import numpy as np

from client import TaskClient
from data import Folder

ROOT = Path(__file__).parent.parent
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or ROOT / "benchmarks/results").resolve()


class InMemory:
    """A folder of images, each decoded once, that any number of clients can share."""

    def __init__(self, path: str):
        try:
            folder = Folder(path)
            self.classes = folder.classes
            self._labels = {split: folder.labels(split, 0) for split in ("train", "test")}
            everything = {split: np.arange(len(labels)) for split, labels in self._labels.items()}
            self._images = {split: folder.images(split, indices, 0) for split, indices in everything.items()}
        except DataError as error:
            fail(str(error))

    def labels(self, split: str, seed: int) -> np.ndarray:
        return self._labels[split]

    def images(self, split: str, indices: np.ndarray, seed: int) -> np.ndarray:
        return self._images[split][indices]


class Client(TaskClient):
    """client.py's, on the project's own task, for many in one process: their images are read at once, and shared."""

    def __init__(self, dataset: object, assignment: Assignment) -> None:
        super().__init__(open_task(), dataset, assignment)
        self.train_set, self.test_set  # noqa: B018 (read now, and not in the first round)


@dataclass(frozen=True)
class Round:
    accuracy: float  # on the whole test set
    seconds: float  # of training and evaluation, and nothing else


def federate(dataset: InMemory, recipe: Recipe, num_clients: int = 3) -> Iterator[Round]:
    """Rounds 0 (untrained) to recipe.rounds, one client after the other, each on all cores."""
    share_cores(None, clients_on_host=1)
    clients = [Client(dataset, Assignment(number, num_clients, recipe)) for number in range(num_clients)]
    weights, positions = clients[0].get_parameters({}), clients[0].buffer_positions
    measured = clients[0].batchnorm_positions
    strategy = CheckedStrategy(STRATEGIES["fedavg"], ServerSettings(), weights, positions)
    for server_round in range(recipe.rounds + 1):
        config = {"server_round": server_round}
        began = time.perf_counter()
        if server_round:
            answers = [client.fit(weights, config) for client in clients]
            weights = strategy.aggregate(weights, [Update(p, *answer) for p, answer in enumerate(answers)])
            if measured:
                statistics = [Update(p, *client.measure(weights, config)) for p, client in enumerate(clients)]
                weights = strategy.with_statistics(weights, measured, statistics)
        scored = [client.evaluate(weights, config) for client in clients]
        seconds = time.perf_counter() - began
        scores = [Score(p, n, {"loss": loss, **metrics}) for p, (loss, n, metrics) in enumerate(scored)]
        yield Round(mean_metrics(scores)["accuracy"], seconds)


def machine() -> dict:
    """Where and when, with what: a figure without these means little."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": num_cores(),
        "load_before": round(os.getloadavg()[0], 2),  # far from 0: other programs were at work too
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "flwr", "numpy")},
    }


def processor_seconds() -> float:
    """Of all processes that this one has started and seen the end of, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, metavar="FOLDER", help="CIFAR-10 as train|test/<class>/* images")


def plot(name: str, *panels: Callable[[object, Theme], None]) -> None:
    """A picture beside the JSON: each panel(axes, theme) draws itself, one below the other."""
    png = io.BytesIO()
    with canvas(LIGHT, 3.2 * len(panels), png) as figure:
        for axes, panel in zip(np.ravel(figure.subplots(len(panels), 1)), panels, strict=True):
            panel(axes, LIGHT)
            axes.grid(True)
    (RESULTS / f"{name}.png").write_bytes(png.getvalue())


def save(name: str, results: dict) -> None:
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {path}")

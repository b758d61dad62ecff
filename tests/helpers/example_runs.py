"""Finished runs made up for tests: a folder of images, and a run folder such as a server leaves behind."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from federation import model_file
from federation.client.summary import about
from federation.config import Recipe
from federation.pieces import hash_arrays
from federation.privacy.disclosure import summarise
from federation.protocol import Assignment, as_stored, read_summary
from federation.results.comparison import Baseline, Training
from federation.results.history import History, RoundRecord
from federation.results.run_folder import RunFolder
from federation.security.audit import AuditLog
from federation.server.settings import ServerSettings
from federation.task.task import Task, open_task
from federation.task.weights import get_weights, travelling

import numpy as np
from PIL import Image

from client import TaskClient
from helpers.tasks import recipe as completed

CLASSES = ["blue", "green", "red"]
RECIPE = completed(model="lenet", rounds=2, batch_size=8, learning_rate=0.02)


def make_images(folder: Path, train: int = 24, test: int = 8) -> Path:
    """An image folder of three classes, so many images of each; a class is a colour in noise."""
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("test", test)):
        for channel, name in zip((2, 1, 0), CLASSES, strict=True):
            (folder / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 160, (32, 32, 3), np.uint8)
                pixels[..., channel] += 60
                Image.fromarray(pixels).save(folder / split / name / f"{i:02d}.png")
    return folder


def make_history(recipe: Recipe = RECIPE, clients: int = 2, classes: list[str] | None = None) -> History:
    """Accuracies 0.5 in round 0, then 0.25 more in each round; losses 1 / (round + 1)."""
    config = {
        **dataclasses.asdict(recipe),
        **dataclasses.asdict(ServerSettings(clients=clients)),
        "classes": classes or CLASSES,
    }
    history = History(config)
    for i in range(recipe.rounds + 1):
        accuracy = min(1.0, 0.5 + i / 4)
        record = RoundRecord(i, {"accuracy": accuracy, "loss": 1 / (i + 1)}, {"train_loss": 1 / i} if i else {})
        record.clients, record.seconds, record.bytes_received = clients, float(i), 1000 * i
        record.by_client = {"accuracy": {str(p): accuracy for p in range(clients)}}
        history.rounds.append(record)
    history.events.append({"time": 1e9, "event": "join", "partition": 0, "words": "client 0 joined"})
    return history


def make_baseline(history: History, images: int = 48) -> Baseline:
    """Centralised 0.9 in the end, client p alone 0.5 + p / 10; a second of training in each round, and half of it."""

    def train(share: int, accuracy: float, seconds: float, partition: int | None = None) -> Training:
        records = [
            RoundRecord(each.round, {**each.metrics, "accuracy": accuracy}, seconds=seconds if each.round else 0.0)
            for each in history.rounds
        ]
        return Training(share, records, partition)

    clients = history.config["clients"]
    alone = [train(images // clients, 0.5 + p / 10, 0.5, p) for p in range(clients)]
    return Baseline(test_images=24, threads=2, device="cpu", centralised=train(images, 0.9, 1.0), alone=alone)


def make_run(path: Path, dataset: Path, recipe: Recipe = RECIPE, clients: int = 2) -> RunFolder:
    """A finished run over these images, whose final model is the untrained one."""
    return make_task_run(path, open_task(), str(dataset), recipe, clients)


def make_task_run(
    path: Path, task: Task, source: str = "", recipe: Recipe | None = None, clients: int = 2
) -> RunFolder:
    """The same of any task; without classes its metrics are 0.5 and 0.25 more in each round, too."""
    recipe = recipe or task.complete(Recipe(rounds=2))
    dataset, history = task.open_dataset(source), make_history(recipe, clients)
    members = [TaskClient(task, dataset, Assignment(p, clients, recipe)) for p in range(clients)]
    counts = {str(p): member.class_counts for p, member in enumerate(members) if member.class_counts}
    history.config |= {**as_stored(read_summary(summarise(members[0]))), "class_counts": counts}
    history.config["classes"] = members[0].schema.get("classes", [])
    for record in history.rounds:
        accuracy, record.main_metric = record.metrics.pop("accuracy"), history.main.name
        record.metrics |= {metric.name: accuracy for metric in history.declared}
        record.by_client = {history.main.name: record.by_client["accuracy"]}
    folder = RunFolder(path)
    folder.create()
    folder.save_history(history)
    network = members[0].network
    folder.save_model(dict(zip(travelling(network), get_weights(network), strict=True)), about(members[0]))
    return folder


def add_records(run: RunFolder, client: Path) -> None:
    """Where the model comes from, and the records of the server and of client 0 with the final model alone."""
    history, (arrays, about) = run.load_history(), model_file.read(run.path / "model.safetensors")
    history.config["run_id"] = run_id = "0123456789abcdef"
    client.parent.mkdir()
    ours, theirs = AuditLog(run.path / "audit.jsonl", run_id), AuditLog(client, run_id, "client 0")
    sha256 = hash_arrays([arrays[name] for name, *_ in history.config["task"]["arrays"]])
    for log in (ours, theirs):
        log.write("model-to-evaluate", 2, sender="server", receiver="client 0", session="a", sha256=sha256, bytes=1)
    ours.write("model", 2, sha256=sha256)
    theirs.take(ours.told(), None, "server")
    origin = {"run_id": run_id, "arrays": model_file.hash_sorted(arrays), "audit_head": ours.sync()}
    for log in (ours, theirs):
        log.write("end", outcome="finished")
        log.close()
    history.config["provenance"], history.rounds[-1].weights_sha256 = origin, sha256
    run.save_history(history)
    run.save_model(arrays, {**about, "provenance": origin})


def call(main: Callable[[], int | None], *argv: object) -> int:
    """A program's main() in this process; returns its exit code."""
    with mock.patch.object(sys, "argv", [f"{main.__module__}.py", *map(str, argv)]):
        try:
            return main() or 0
        except SystemExit as end:
            return end.code

"""The folder of a run: history.json, two checkpoints, the final model.safetensors; each written whole or not at all."""

import argparse
import contextlib
import itertools
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from federation import model_file
from federation.console import command_line, fail, say
from federation.process import write_content, write_whole
from federation.results.history import History

import numpy as np

KEPT_CHECKPOINTS = 2
INITIAL = "initial.safetensors"


@dataclass
class Checkpoint:
    """All that the next round depends on."""

    server_round: int
    weights: list[np.ndarray]
    strategy_state: list[np.ndarray]
    history: History


class RunFolder:
    """Reads and writes one run's folder. Methods raise OSError where the disk won't take it."""

    def __init__(self, path: Path):
        self.path = path

    def create(self) -> None:
        """Make the folder, and take it before anybody else. Raises FileExistsError where it already holds a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.checkpoints():
            raise FileExistsError(f"{self.path} already holds a run")
        open(self.path / "history.json", "xb").close()

    def is_begun(self) -> bool:
        """Whether it holds a run. What was killed before it could write its first word holds none."""
        history = self.path / "history.json"
        return history.exists() and history.stat().st_size > 0

    def clear(self) -> None:
        """Make room for a run where one was killed before it had begun. Where it can't, create() says why."""
        with contextlib.suppress(OSError):
            (self.path / "history.json").unlink()

    def is_done(self) -> bool:
        return (self.path / "model.safetensors").exists()

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted(self.path.glob("checkpoint-*.npz"), reverse=True)

    def save_history(self, history: History) -> None:
        self._write_history(history.to_json())

    def _write_history(self, text: str) -> None:
        write_content(self.path / "history.json", text.encode())

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then history.json, then drop all checkpoints but the newest two."""
        arrays = checkpoint.weights + checkpoint.strategy_state
        meta = {"round": checkpoint.server_round, "weights": len(checkpoint.weights), "arrays": len(arrays)}
        texts = {"meta": json.dumps(meta), "history": checkpoint.history.to_json()}
        name = f"checkpoint-{checkpoint.server_round:06d}.npz"
        write_whole(self.path / name, lambda file: _savez(file, {**_as_bytes(texts), **_by_name(arrays)}))
        self._write_history(texts["history"])
        for old in self.checkpoints()[KEPT_CHECKPOINTS:]:
            old.unlink()

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are named. None where there is none."""
        for path in self.checkpoints():
            try:
                return _read_checkpoint(path)
            except Exception as error:  # on damaged bytes zipfile and numpy raise a dozen kinds between them
                say(f"{path} is damaged ({type(error).__name__}: {error}); using the one before it")
        return None

    def load_history(self) -> History:
        """All of history.json. Raises OSError or ValueError where there is no run."""
        return History.from_json((self.path / "history.json").read_text())

    def load_config(self) -> dict:
        """The configuration that the run began with. Raises FileNotFoundError or ValueError where there is no run."""
        return json.loads((self.path / "history.json").read_text())["config"]

    def save_model(self, arrays: dict[str, np.ndarray], about: dict) -> None:
        """model.safetensors: the arrays by PyTorch's names; about: see model_file.about."""
        model_file.write(self.path / "model.safetensors", arrays, about)

    def save_frozen(self, arrays: dict[str, np.ndarray]) -> None:
        """What no client sends again, for the final model: frozen.safetensors."""
        model_file.write(self.path / "frozen.safetensors", arrays, {})

    def save_initial(self, arrays: dict[str, np.ndarray]) -> None:
        """What --initial-weights gave, so that the run can be repeated: initial.safetensors."""
        model_file.write(self.path / INITIAL, arrays, {})

    def load_frozen(self) -> dict[str, np.ndarray]:
        """Raises OSError or ValueError where it is not there."""
        return model_file.read(self.path / "frozen.safetensors")[0]


@dataclass
class Run:
    """A run's folder, its history so far, and the checkpoint to go on after, if any."""

    folder: RunFolder
    history: History
    checkpoint: Checkpoint | None = None
    initial: dict[str, np.ndarray] = field(default_factory=dict)  # weights to begin with, by name, where given

    def __post_init__(self) -> None:
        self.history.config.setdefault("run_id", secrets.token_hex(8))

    @property
    def id(self) -> str:
        """Drawn once for a folder: 16 hex digits."""
        return self.history.config["run_id"]


def recorder(events: list[dict]) -> Callable[[str, int | None, str], None]:
    """A function that says who comes and goes, and writes it down."""

    def notify(event: str, partition: int | None, words: str) -> None:
        events.append({"time": round(time.time(), 3), "event": event, "partition": partition, "words": words})
        say(words, logging.INFO if event == "join" else logging.WARNING)

    return notify


def new_run_dir() -> Path:
    """A new folder named by the clock; of two that start in one second, each gets its own. Raises OSError."""
    name = time.strftime("runs/%Y-%m-%d-%H%M%S")
    for number in itertools.count(1):
        path = Path(name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def load_initial(path: str | None) -> dict[str, np.ndarray]:
    """The arrays of --initial-weights by name. Exits with 2 and one line where the file can't be used."""
    if path is None:
        return {}
    try:
        return model_file.read(Path(path))[0]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        fail(f"--initial-weights {path} can't be read ({why}); give a safetensors file", 2)


def open_run(args: argparse.Namespace) -> Run:
    """A new run in --run-dir, or the one of --resume. Exits with one line where the folder can't be used.

    args: run_dir, resume, initial_weights, and config, the settings of the run.
    """
    initial = load_initial(args.initial_weights)
    if args.resume:
        folder = RunFolder(Path(args.resume))
        checkpoint = folder.load_checkpoint()
        history = checkpoint.history if checkpoint else History(args.config)
        since = f"after {history.rounds[-1].unit} {checkpoint.server_round}" if checkpoint else None
        say(f"resuming {folder.path} {since or 'from the start: it holds no checkpoint'}")
        if "run_id" in args.config:  # history.json may have one that a checkpoint of an earlier version has not
            history.config["run_id"] = args.config["run_id"]
        run = Run(folder, history, checkpoint, initial)
        try:
            if "run_id" not in args.config:
                folder.save_history(history)
        except OSError as error:
            fail(f"--resume {folder.path} can't be written ({error.strerror}); free or change the disk")
        return run
    folder = RunFolder(Path(args.run_dir or "runs"))
    try:
        folder = RunFolder(Path(args.run_dir) if args.run_dir else new_run_dir())
        folder.create()
        run = Run(folder, History(args.config), initial=initial)
        folder.save_history(run.history)
        if initial:
            folder.save_initial(initial)
    except FileExistsError:
        remedy = f"name another, or go on with {command_line('--resume', folder.path)}"
        fail(f"--run-dir {folder.path} already holds a run, or is a file; {remedy}", 2)
    except OSError as error:
        fail(f"--run-dir {folder.path} can't be written ({error.strerror}); name another")
    return run


def _savez(file: BinaryIO, arrays: dict[str, np.ndarray]) -> None:
    np.savez(file, **arrays)  # type: ignore[arg-type]  # of which none is named allow_pickle


def _by_name(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"a{i:05d}": array for i, array in enumerate(arrays)}


def _as_bytes(texts: dict[str, str]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}


def _read_checkpoint(path: Path) -> Checkpoint:
    """Reads every array whole, so the zip's own checksums find damage in it; raises KeyError where one is missing."""
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        meta, history = json.loads(file["meta"].tobytes()), History.from_json(file["history"].tobytes())
        arrays = [file[f"a{i:05d}"] for i in range(meta["arrays"])]
    weights = arrays[: meta["weights"]]
    return Checkpoint(meta["round"], weights, arrays[meta["weights"] :], history)

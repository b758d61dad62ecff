"""The folder of a run: history.json, two checkpoints, the final model.npz; each written whole or not at all."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from federation.words import say

import numpy as np

KEPT_CHECKPOINTS = 2


@dataclass
class History:
    """What history.json holds; every value is plain JSON."""

    config: dict
    rounds: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)  # round, partition, reason
    events: list[dict] = field(default_factory=list)  # joins, leaves, refusals

    def to_json(self) -> str:
        return json.dumps(vars(self), indent=1)

    def scored(self) -> list[dict]:
        """Rows with a known accuracy; those of the asynchronous mode with the rounds' worth of updates as "round"."""
        rows, updates = [], 0
        for row in self.rounds:
            updates += len(row.get("updates", ()))
            if row["accuracy"] is not None:
                rows.append({**row, "round": updates / self.config["clients"]} if "updates" in row else row)
        return rows

    def by_round(self) -> list[dict]:
        """A row for each round, or for each round's worth of updates the newest version that had no more."""
        rows = self.scored()
        if not rows or "updates" not in rows[0]:
            return rows
        chosen, seconds = [], 0.0
        for number in range(int(rows[-1]["round"]) + 1):
            row = [row for row in rows if row["round"] <= number][-1]
            chosen.append({**row, "round": number, "seconds": row["time"] - seconds})
            seconds = row["time"]
        return chosen


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
        """Make the folder. Raises FileExistsError where it already holds a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "history.json").exists() or self.checkpoints():
            raise FileExistsError(f"{self.path} already holds a run")

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        return sorted(self.path.glob("checkpoint-*.npz"), reverse=True)

    def save_history(self, history: History) -> None:
        write_whole(self.path / "history.json", lambda file: file.write(history.to_json().encode()))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then history.json, then drop all checkpoints but the newest two."""
        arrays = checkpoint.weights + checkpoint.strategy_state
        meta = {"round": checkpoint.server_round, "weights": len(checkpoint.weights), "arrays": len(arrays)}
        texts = {"meta": json.dumps(meta), "history": checkpoint.history.to_json()}
        name = f"checkpoint-{checkpoint.server_round:06d}.npz"
        write_whole(self.path / name, lambda file: np.savez(file, **_as_bytes(texts), **_by_name(arrays)))
        self.save_history(checkpoint.history)
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
        try:
            return History(**json.loads((self.path / "history.json").read_text()))
        except TypeError:
            raise ValueError(f"{self.path / 'history.json'} is not a run's history") from None

    def load_config(self) -> dict:
        """The configuration that the run began with. Raises FileNotFoundError or ValueError where there is no run."""
        return json.loads((self.path / "history.json").read_text())["config"]

    def save_model(self, weights: list[np.ndarray], model: str, classes: list[str]) -> None:
        """model.npz: the arrays w00000, w00001, ... by position, the network's name, and the class names."""
        arrays = {f"w{i:05d}": array for i, array in enumerate(weights)}
        names = {"model": np.array(model), "classes": np.array(classes)}
        write_whole(self.path / "model.npz", lambda file: np.savez(file, **names, **arrays))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that after a crash at any moment there is the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself lasts only once the folder is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _by_name(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"a{i:05d}": array for i, array in enumerate(arrays)}


def _as_bytes(texts: dict[str, str]) -> dict[str, np.ndarray]:
    return {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}


def _read_checkpoint(path: Path) -> Checkpoint:
    """Reads every array whole, so the zip's own checksums find damage in it; raises KeyError where one is missing."""
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        meta, history = (json.loads(file[name].tobytes()) for name in ("meta", "history"))
        arrays = [file[f"a{i:05d}"] for i in range(meta["arrays"])]
    weights = arrays[: meta["weights"]]
    return Checkpoint(meta["round"], weights, arrays[meta["weights"] :], History(**history))

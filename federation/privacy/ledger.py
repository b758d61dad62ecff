"""What was spent on one client's training examples, over all runs, in a file that the client keeps.

A training is written down, and on disk, before its update leaves. The newest update is kept beside the ledger: asked
for the same once more, the client gives the same bits, which tells nothing new.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from federation.console import PublicError
from federation.pieces import hash_arrays
from federation.privacy.accounting import LEAST_NOISE, Steps
from federation.process import write_whole

import numpy as np
from filelock import FileLock, Timeout

FORMAT = 1
MOST_STEPS = 10**7  # of one training


class LedgerError(PublicError):
    """The ledger can't be used, in one line; public: without its path."""

    def __init__(self, path: Path, words: str):
        super().__init__(f"the ledger {path} {words}")
        self._words = words

    @property
    def public(self) -> str:
        return f"its ledger {self._words}"


@dataclass(frozen=True)
class Training:
    """One local training whose update may have left."""

    run: str
    round: int
    start: str  # pieces.hash_arrays of the model that it began from
    update: str  # and of its update
    rate: float
    noise: float
    steps: int
    clip: float
    seeded: bool  # by --dp-seed, so that its noise protects nothing
    utc: str

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, kind = getattr(self, each.name), each.type
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{each.name} of a training is {value!r}")
        good = 0 < self.rate <= 1 and LEAST_NOISE <= self.noise < math.inf and 0 < self.clip < math.inf
        if not (good and self.round >= 0 and 0 <= self.steps <= MOST_STEPS):
            raise ValueError("numbers of a training out of range")


@dataclass
class Ledger:
    """Open until close(), for one process at a time. Methods raise LedgerError."""

    path: Path
    sha256: str  # of the training examples
    examples: int
    runs: dict[str, int] = field(default_factory=dict)  # partition by run, of those that it was in from their start
    trainings: list[Training] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, sha256: str, examples: int) -> Self:
        """The ledger at this path, a new one where there is none."""
        path = Path(os.path.realpath(path))  # a new file in a link's place would leave the old one behind it
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise LedgerError(path, "is in use by another client; give each client its own with --ledger") from None
        except OSError as error:
            raise _unwritable(path, error) from None
        ledger = cls(path, sha256, examples)
        ledger._lock = lock
        try:
            ledger._read()
            ledger._write(ledger.runs, ledger.trainings)  # that it can be written shows before the first training
        except BaseException:
            lock.release()
            raise
        return ledger

    _lock: Any = field(default=None, init=False, repr=False, compare=False)

    def close(self) -> None:
        if self._lock:
            self._lock.release()

    def steps_of(self, is_meant: Callable[[str], bool] = lambda run: True) -> list[Steps]:
        """What was spent in the runs that are meant, all of them as it is."""
        return [Steps(each.rate, each.noise, each.steps) for each in self.trainings if is_meant(each.run)]

    @property
    def void(self) -> bool:
        """Whether an update left whose noise anybody can make again."""
        return any(each.seeded for each in self.trainings)

    def begin(self, run: str, partition: int) -> None:
        """Note that this client is in a run from its start, so that it knows all that it spends in it."""
        if run not in self.runs:
            runs = {**self.runs, run: partition}
            self._write(runs, self.trainings)
            self.runs = runs

    def kept(self, run: str, server_round: int, start: str) -> list[np.ndarray] | None:
        """The newest update, where it is of this round and from this model; None otherwise, or where it is lost."""
        newest = self.trainings[-1] if self.trainings else None
        if newest is None or (newest.run, newest.round, newest.start) != (run, server_round, start):
            return None
        try:
            with open(self._update_path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = [file[f"{i:05d}"] for i in range(len(file.files))]
        except Exception:  # of a damaged file many kinds
            return None
        return arrays if hash_arrays(arrays) == newest.update else None

    def charge(self, training: Training, arrays: list[np.ndarray]) -> None:
        """Write a training down; once this returns, its update may leave.

        The update goes to disk first. Where the machine stops between the two, nothing has left and nothing is
        counted; the one before is lost, and costs again if it is asked for again. Where it stops after them, the update
        is there to be sent.
        """
        named: dict[str, Any] = {f"{i:05d}": array for i, array in enumerate(arrays)}
        self._write_whole(self._update_path, lambda file: np.savez(file, **named))
        trainings = [*self.trainings, training]
        self._write(self.runs, trainings)
        self.trainings = trainings  # not before it is on disk: kept() gives away what stands here

    @property
    def _update_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.update.npz")

    def _write(self, runs: dict[str, int], trainings: list[Training]) -> None:
        data = {"sha256": self.sha256, "examples": self.examples}
        written = [dataclasses.asdict(each) for each in trainings]
        told = {"format": FORMAT, "data": data, "runs": runs, "trainings": written}
        self._write_whole(self.path, lambda file: file.write(json.dumps(told, indent=1).encode()))

    def _write_whole(self, path: Path, write: Callable[[BinaryIO], object]) -> None:
        def for_owner_alone(file: BinaryIO) -> None:
            os.chmod(file.name, 0o600)
            write(file)

        try:
            write_whole(path, for_owner_alone)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def _read(self) -> None:
        try:
            told = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return
        except OSError as error:
            words = f"can't be read ({error.strerror}); give this user the right to, or name a file with --ledger"
            raise LedgerError(self.path, words) from None
        except (ValueError, RecursionError):
            raise _damaged(self.path) from None
        try:
            sha256, examples, runs = told["data"]["sha256"], told["data"]["examples"], dict(told["runs"])
            trainings = [Training(**each) for each in told["trainings"]]
            numbers = [told["format"], examples, *runs.values()]
            if not isinstance(sha256, str) or any(type(each) is not int or each < 0 for each in numbers):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise _damaged(self.path) from None
        if told["format"] != FORMAT:
            raise LedgerError(self.path, "is of another version of this program; use that one")
        if examples != self.examples:
            which = f"{examples:,} training examples, and this client has {self.examples:,}"
            raise LedgerError(self.path, f"is of {which}; {OTHER}")
        if sha256 != self.sha256:
            raise LedgerError(self.path, f"is of other training examples than this client has; {OTHER}")
        self.runs, self.trainings = runs, trainings


OTHER = "for examples that are in no other ledger begin a new one with --ledger"


def _damaged(path: Path) -> LedgerError:
    words = "is damaged; without it nobody knows what was spent: bring it back from a backup of after its last training"
    return LedgerError(path, words)


def _unwritable(path: Path, error: OSError) -> LedgerError:
    why = error.strerror or os.strerror(error.errno or 0)
    return LedgerError(
        path, f"can't be written ({why}), so there must be no training; free the disk, or give this user the right to"
    )

"""What goes to participants and comes from them, written into the server's record of the run."""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from federation.compression import num_bytes, pack
from federation.participants.client_manager import Participant
from federation.pieces import InPieces, hash_arrays
from federation.security.audit import AuditLog, session_name

import numpy as np
from flwr.common import Parameters

Read = Callable[[Parameters], Sequence[Any] | None]  # the arrays of a message, None where it holds none


@dataclass
class Outgoing:
    """A global model as it is sent, and what the record says of it: worked out once for all who get it."""

    parameters: Parameters
    arrays: list[np.ndarray]  # as they travel
    sha256: str = ""

    @functools.cached_property
    def bytes(self) -> int:
        return num_bytes(self.arrays, "none")

    def is_like(self, arrays: Sequence[Any]) -> bool:
        """Whether an update of these arrays may be one of it: shapes and dtypes are its own."""
        return [(each.shape, each.dtype) for each in arrays] == [(each.shape, each.dtype) for each in self.arrays]


class Exchange:
    """The lines of audit.jsonl about participants. Methods raise audit.Unwritable."""

    def __init__(self, log: AuditLog, compress: str, read: Read) -> None:
        self.log = log
        self.compress = compress
        self.read = read
        self._lock = threading.Lock()
        self._hashed: tuple[Any, str] = (None, "")  # arrays, and their hash: a round's model goes out twice
        self._told: tuple[int, dict[str, str]] = (-1, {})  # of which round or version the head was told, and how

    def hash_of(self, weights: list[np.ndarray], packed: list[np.ndarray] | None = None) -> str:
        """hash_arrays of a global model as it travels; of the same list as the last time it is not worked out again."""
        if self._hashed[0] is not weights:
            self._hashed = (weights, hash_arrays(pack(weights, self.compress) if packed is None else packed))
        return self._hashed[1]

    def outgoing(self, parameters: Parameters, packed: list[np.ndarray], weights: list[np.ndarray]) -> Outgoing:
        """packed: the weights as they travel."""
        if not self.log.path:
            return Outgoing(parameters, packed)
        return Outgoing(parameters, packed, self.hash_of(weights, packed))

    def made(self, number: int, weights: list[np.ndarray]) -> str:
        """Write down the global model of this round or version; returns its hash."""
        sha256 = self.hash_of(weights)
        self.log.write("model", number, sha256=sha256, bytes=num_bytes(weights, self.compress))
        return sha256

    def sent(self, kind: str, one: Participant, number: int, model: Outgoing) -> None:
        self.log.write(
            kind, number, receiver=one.title, session=session_of(one), sha256=model.sha256, bytes=model.bytes
        )

    def came(self, kind: str, one: Participant, number: int | None, parameters: Parameters) -> None:
        """Arrays from a participant; sha256 is null where they can't be read."""
        if not self.log.path or (not parameters.tensors and not isinstance(parameters, InPieces)):  # it says why
            return
        if isinstance(parameters, InPieces) and parameters.sha256:
            sha256: str | None = parameters.sha256
            size = sum(array.size * array.dtype.itemsize for array in parameters.arrays)
        else:
            arrays = self.read(parameters)
            sha256 = None if arrays is None else hash_arrays(arrays)
            size = num_bytes(list(arrays), "none") if arrays is not None else sum(map(len, parameters.tensors))
        self.log.write(kind, number, sender=one.title, session=session_of(one), sha256=sha256, bytes=size)

    def message(self, kind: str, one: Participant, number: int | None, told: dict) -> None:
        """A message without arrays from a participant, with the head of its own record where it tells it."""
        self.log.write(kind, number, sender=one.title, session=session_of(one))
        self.log.take(told, number, one.title, session=session_of(one))

    def told(self, kind: str, one: Participant, number: int) -> None:
        """A message without arrays to a participant."""
        self.log.write(kind, number, receiver=one.title, session=session_of(one))

    def head(self, number: int) -> dict[str, str]:
        """Our head as it goes to all participants with the evaluation of this round or version."""
        with self._lock:
            if self._told[0] != number:
                self._told = (number, self.log.told(number))
            return self._told[1]


def session_of(one: Participant) -> str:
    return session_name(one.instance)

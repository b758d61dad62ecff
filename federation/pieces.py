"""Weights in pieces: a large model travels in messages of a few megabytes, and waits on disk until it is needed.

What travels are the bytes of all arrays in order, without headers: both sides know shapes and dtypes from joining.
Neither side then needs room for a message of the model's size, and no model is too large for gRPC.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from federation.compression import num_bytes

import numpy as np
from flwr.common import Parameters

LARGE = 32_000_000  # bytes of a model that travels in pieces
IN_MEMORY = 100_000_000  # bytes of all updates of a round that wait there for their turn; more wait on disk
PIECE = 2_000_000  # bytes of one
BLOCK = 1_000_000  # numbers of an array that are worked on at a time...
AT_A_TIME = 4_000_000  # ...and of all arrays together
Part = tuple[int, int, int]  # which of several arrays, and the places in it from and to


@dataclass
class InPieces(Parameters):
    """Flower's Parameters of a model that does not travel within the message that they are in."""

    tensors: list[bytes] = field(default_factory=list)
    tensor_type: str = "pieces"
    arrays: "Sequence[np.ndarray | StoredArray]" = ()
    folder: Path | None = None  # where an answer may wait, unseen, for its turn
    largest: float = math.inf  # bytes of a message
    sha256: str = ""  # hash_arrays of what came in, worked out on its way to the disk

    @property
    def piece(self) -> int:
        return int(min(PIECE, self.largest // 2))


class LazyArray:
    """An array whose numbers are read or worked out where they are needed: block by block, or, as NumPy's, all."""

    __slots__ = ()
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The numbers at these places of the flat array."""
        raise NotImplementedError

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self.read(0, self.size).reshape(self.shape).astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True, slots=True)  # there may be dozens for each of a thousand clients
class StoredArray(LazyArray):
    """An array within a file: as it came, in the dtype that it shall have."""

    file: IO[bytes]
    offset: int
    shape: tuple[int, ...]
    stored: np.dtype  # in the file
    dtype: np.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """The numbers at these places of the flat array."""
        self.file.seek(self.offset + start * self.stored.itemsize)
        count = max(0, min(stop, self.size) - start)
        return np.fromfile(self.file, self.stored, count).astype(self.dtype, copy=False)


def block(array: np.ndarray | LazyArray, start: int, stop: int) -> np.ndarray:
    """The numbers at these places of the flat array, wherever it is kept."""
    return array.read(start, stop) if isinstance(array, LazyArray) else array.reshape(-1)[start:stop]


def hash_arrays(arrays: Sequence[np.ndarray | LazyArray]) -> str:
    """SHA-256 of dtypes, shapes and values in order, as hex: of what travelled, whether at once or in pieces."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(_title(array.dtype, array.shape))
        for start, stop in blocks(array.size):
            digest.update(np.ascontiguousarray(block(array, start, stop)).view(np.uint8).data)
    return digest.hexdigest()


def _title(dtype: np.dtype, shape: Sequence[int]) -> bytes:
    return f"{dtype.str} {tuple(shape)}\n".encode()


def blocks(size: int, length: int = BLOCK, of: int = 1) -> Iterator[tuple[int, int]]:
    """The places of an array of so many numbers, a block at a time; of none, one empty block.

    of: arrays of which a block each is worked on at the same time, so that those of many are shorter.
    """
    length = _shared(length, of)
    return ((start, min(start + length, size)) for start in range(0, max(1, size), length))


def _shared(length: int, of: int) -> int:
    return max(1, min(length, AT_A_TIME // max(1, of)))


def parts(arrays: Sequence[np.ndarray | LazyArray], length: int, of: int = 1) -> Iterator[list[Part]]:
    """The numbers of all arrays in order, a block at a time; small arrays share one, where they are of one dtype.

    of: as for blocks().
    """
    together: list[Part] = []
    free = length = _shared(length, of)
    for k, array in enumerate(arrays):
        start = 0
        while True:
            if together and (free == 0 or arrays[together[0][0]].dtype != array.dtype):
                yield together
                together, free = [], length
            stop = min(array.size, start + free)
            together.append((k, start, stop))
            free -= stop - start
            if stop == array.size:
                break
            start = stop
    if together:
        yield together


def joined(arrays: Sequence[np.ndarray | LazyArray], block_parts: list[Part]) -> np.ndarray:
    """The numbers of these parts in a row."""
    found = [block(arrays[k], start, stop) for k, start, stop in block_parts]
    return np.concatenate(found) if len(found) > 1 else found[0]


def cut(arrays: Sequence[np.ndarray], start: int, stop: int) -> bytes:
    """The bytes at these places of all arrays in a row."""
    found, begin = [], 0
    for array in arrays:
        end = begin + array.nbytes
        if begin < stop and end > start and array.nbytes:
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            found.append(flat[max(0, start - begin) : stop - begin])
        begin = end
    return b"".join(each.tobytes() for each in found)


class Assembly:
    """Arrays of these shapes and dtypes, filled with what comes in, from the first byte to the last."""

    def __init__(self, like: Sequence[tuple[tuple[int, ...], np.dtype]]):
        self.arrays = [np.empty(shape, dtype) for shape, dtype in like]
        self.size = num_bytes(self.arrays, "none")
        self.filled = 0

    def add(self, start: int, content: bytes) -> None:
        """Raises ValueError where it is not what comes next; from 0, all begins anew."""
        if start == 0:
            self.filled = 0
        if start != self.filled or start + len(content) > self.size:
            raise ValueError(f"piece {start} + {len(content)} where {self.filled} of {self.size} bytes are there")
        begin = 0
        for array in self.arrays:
            flat = array.reshape(-1).view(np.uint8)
            first, last = max(start, begin), min(start + len(content), begin + array.nbytes)
            if first < last:
                flat[first - begin : last - begin] = np.frombuffer(content[first - start : last - start], np.uint8)
            begin += array.nbytes
        self.filled += len(content)


class StoreFull(OSError):
    """Our own disk does not take an update: nothing that its client could be blamed for."""


class Store:
    """A file without a name in a folder, gone with the program: arrays of these shapes and dtypes, as they come."""

    def __init__(self, folder: Path | None, like: Sequence[tuple[tuple[int, ...], np.dtype, np.dtype]]):
        """like: shape, dtype in the file, dtype in use. Raises StoreFull."""
        try:
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (open as long as its arrays are)
        except OSError as error:
            raise StoreFull(*error.args) from None
        self.arrays: list[StoredArray] = []
        self.size = 0
        self._digest = hashlib.sha256()
        self._titles: list[tuple[int, bytes]] = []  # where each array begins, and what its hash begins with
        self._added = 0
        for shape, stored, dtype in like:
            self.arrays.append(StoredArray(self.file, self.size, shape, stored, dtype))
            self._titles.append((self.size, _title(stored, shape)))
            self.size += math.prod(shape) * stored.itemsize

    def add(self, content: bytes) -> None:
        """The next bytes. Raises StoreFull."""
        self._hash(content)
        view = memoryview(content)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError as error:
            raise StoreFull(*error.args) from None

    def sha256(self) -> str:
        """hash_arrays of its arrays as they are in the file, without reading them again, once all bytes are there."""
        self._hash(b"")
        return self._digest.hexdigest()

    def _hash(self, content: bytes) -> None:
        view, end = memoryview(content), self._added + len(content)
        while self._titles and self._titles[0][0] <= end:
            begin, title = self._titles.pop(0)
            self._digest.update(view[: begin - self._added])
            view, self._added = view[begin - self._added :], begin
            self._digest.update(title)
        self._digest.update(view)
        self._added = end


def on_disk(arrays: Sequence[np.ndarray], folder: Path | None) -> InPieces:
    """Arrays that came in one message, to wait in a file in that folder for their turn. Raises StoreFull."""
    store = Store(folder, [(array.shape, array.dtype, array.dtype) for array in arrays])
    for array in arrays:
        store.add(array.tobytes())
    return InPieces(arrays=store.arrays, folder=folder, sha256=store.sha256())

"""A client's end of a large model's way: what came in so far, and what the server fetches. See federation/pieces.py."""

from collections.abc import Callable, Sequence

from federation.console import PublicError
from federation.pieces import Assembly, cut

import numpy as np

Like = Sequence[tuple[tuple[int, ...], np.dtype]]


class Transfer:
    """One model each way at a time."""

    def __init__(self) -> None:
        self._assembly: Assembly | None = None
        self._kept: dict[str, list[np.ndarray]] = {}

    def store(self, start: int, content: bytes, like: Callable[[], Like]) -> None:
        """A piece that came in; like: shapes and dtypes as they travel. Raises ValueError where it is not the next."""
        if start == 0:
            self._kept = {}
            self._assembly = Assembly(like())
        assert self._assembly
        self._assembly.add(start, content)

    def take(self) -> list[np.ndarray]:
        """The model that came in, once. Raises PublicError where it is not whole."""
        assembly, self._assembly = self._assembly, None
        if assembly is None or assembly.filled < assembly.size:
            raise PublicError("the model has not come whole")
        return assembly.arrays

    def keep(self, what: str, arrays: list[np.ndarray]) -> None:
        """Have these to be fetched by this name, and nothing else."""
        self._kept = {what: arrays}

    def fetch(self, what: str, start: int, stop: int, make: Callable[[], list[np.ndarray]]) -> bytes:
        """A piece to send; make: the arrays, where they are not kept yet."""
        if what not in self._kept:
            self.keep(what, make())
        return cut(self._kept[what], start, stop)

"""Limits how far one client's update moves the model."""

import math
from dataclasses import dataclass
from typing import Any

from federation.pieces import LazyArray, block, blocks

import numpy as np


def clip(update: list[Any], weights: list[np.ndarray], max_norm: float) -> list[Any]:
    """Shorten the step from weights to update to an L2 norm of max_norm at most; integer arrays stay as they are.

    In float64: a float32 step between huge but finite values would be infinite, and its clipped self NaN.
    """
    clipped = [old.dtype.kind == "f" and bool(np.isfinite(old).all()) for old in weights]
    pairs = list(zip(update, weights, strict=True))
    norm = math.sqrt(sum(squared_step(new, old) for (new, old), shorten in zip(pairs, clipped, strict=True) if shorten))
    if norm <= max_norm:
        return update
    factor = max_norm / norm
    return [
        Shortened(old.shape, old.dtype, new, old, factor) if shorten else new
        for (new, old), shorten in zip(pairs, clipped, strict=True)
    ]


@dataclass(frozen=True)
class Shortened(LazyArray):
    """An array of a clipped update, worked out where it is needed: old + factor (new - old)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    new: Any
    old: np.ndarray
    factor: float

    def read(self, start: int, stop: int) -> np.ndarray:
        """The numbers at these places of the flat array."""
        old = block(self.old, start, stop)
        step = np.subtract(block(self.new, start, stop), old, dtype=np.float64)
        return (old + step * self.factor).astype(self.dtype)


def squared_step(new: Any, old: np.ndarray) -> float:
    """The squared L2 norm of a step."""
    steps = (np.subtract(block(new, *place), block(old, *place), dtype=np.float64) for place in blocks(old.size))
    return float(sum(np.sum(np.square(step)) for step in steps))

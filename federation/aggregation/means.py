"""Means over clients, weighted by their examples."""

from collections.abc import Sequence
from typing import Any

from federation.aggregation.validation import Score, Update

import numpy as np


def weighted_mean(values: Sequence[tuple[np.ndarray | float, int]]) -> Any:
    """Mean of (value, examples) pairs, in float64, weighted by examples."""
    return sum(np.asarray(value, np.float64) * n for value, n in values) / sum(n for _, n in values)


def mean_array(pairs: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    """The weighted mean in the arrays' own dtype; integers are rounded, half to even, and exact whatever their size."""
    dtype = pairs[0][0].dtype
    if dtype.kind in "iu" and any(np.abs(array.astype(np.float64)).max(initial=0) >= 2**53 for array, _ in pairs):
        total = sum(array.astype(object) * n for array, n in pairs)
        count = sum(n for _, n in pairs)
        floor = total // count
        rest = 2 * (total - floor * count)
        return np.asarray(floor + (rest > count) + (rest == count) * (floor % 2)).astype(dtype)
    return as_dtype(weighted_mean(pairs), dtype)


def mean_metrics(answers: Sequence[Update | Score]) -> dict[str, float]:
    """Every metric's mean over those that have it, weighted by examples; exact where the metric is additive."""
    names = {name for answer in answers for name in answer.metrics}
    pairs = {name: [(a.metrics[name], a.examples) for a in answers if name in a.metrics] for name in sorted(names)}
    return {name: float(weighted_mean(values)) for name, values in pairs.items()}


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return (array if dtype.kind == "f" else np.rint(array)).astype(dtype, copy=False)

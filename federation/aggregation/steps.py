"""How far each update moves the model, and in which direction, next to the others of its round."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from federation.aggregation.validation import Update
from federation.pieces import BLOCK, joined, parts
from federation.security.clipping import squared_step

import numpy as np


@dataclass(frozen=True)
class Step:
    """The difference between an update and the weights that it started from."""

    size: float  # L2 norm over the arrays that are trained
    buffer_size: float  # the same over those that are measured (BatchNorm's)
    examples: int  # that it was trained on
    cosine: float | None = None  # between it and the mean of the others' steps; None for a lone or an empty step


def measure(
    updates: Sequence[Update], starts: Sequence[list[np.ndarray]], buffer_positions: Sequence[int]
) -> list[Step]:
    """The step of each update from its start; integer arrays and what isn't finite have none. Sums in float64."""
    first = starts[0] if starts else []
    moved = [i for i, old in enumerate(first) if old.dtype.kind == "f" and np.isfinite(old).all()]
    squares, with_sum, sum_square = _products(updates, starts, [i for i in moved if i not in buffer_positions])
    buffers = [i for i in moved if i in buffer_positions]
    buffer_squares = [
        sum(squared_step(update.weights[i], start[i]) for i in buffers)
        for update, start in zip(updates, starts, strict=True)
    ]
    examples, several = [update.examples for update in updates], len(updates) > 1
    cosines = [
        _cosine(square, n, product, sum_square) if several else None
        for square, n, product in zip(squares, examples, with_sum, strict=True)
    ]
    sizes, buffer_sizes = np.sqrt(squares).tolist(), np.sqrt(buffer_squares).tolist()
    return [Step(*values) for values in zip(sizes, buffer_sizes, examples, cosines, strict=True)]


def _products(
    updates: Sequence[Update], starts: Sequence[list[np.ndarray]], positions: list[int]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Of the steps in the arrays at these positions: the square of each, its product with their weighted sum, and that
    sum's square."""
    squares, with_sum, sum_square = np.zeros(len(updates)), np.zeros(len(updates)), 0.0
    pairs = [
        ([update.weights[i] for i in positions], [start[i] for i in positions])
        for update, start in zip(updates, starts, strict=True)
    ]
    for place in parts(pairs[0][1] if pairs else [], BLOCK):
        length = sum(stop - start for _, start, stop in place)
        step, weighted, total = np.empty(length), np.empty(length), np.zeros(length)
        for k, (new, old) in enumerate(pairs):
            np.subtract(joined(new, place), joined(old, place), out=step, dtype=np.float64)
            squares[k] += _product(step, step)
            total += np.multiply(step, updates[k].examples, out=weighted)
        for k, (new, old) in enumerate(pairs):
            # Worked out again, as those of a thousand clients would take a thousand times the room.
            np.subtract(joined(new, place), joined(old, place), out=step, dtype=np.float64)
            with_sum[k] += _product(step, total)
        sum_square += float(_product(total, total))
    return squares, with_sum, sum_square


def _product(one: np.ndarray, two: np.ndarray) -> np.float64:
    """Their inner product, with the same bits on any number of cores; NumPy's @ sums in parts, one for each core."""
    return np.einsum("i,i->", one, two)


def _cosine(square: float, n: float, with_sum: float, sum_square: float) -> float | None:
    """Of a step s and the others' weighted sum S - n s, from s.s, n, s.S and S.S."""
    others = sum_square - 2 * n * with_sum + n * n * square
    if square <= 0 or others <= 1e-24 * sum_square:
        return None
    return float(np.clip((with_sum - n * square) / math.sqrt(square * others), -1, 1))


def excess(step: Step, others: Sequence[Step]) -> float:
    """How many times the median of these steps it is, by its trained arrays or its buffers, whichever is more.

    Taken as it is, and by the example, of which the less counts: who has many more examples than the others takes
    more and longer steps.
    """
    ratios = [1.0]
    for name in ("size", "buffer_size"):
        size, sizes = getattr(step, name), [getattr(each, name) for each in others]
        median = statistics.median(sizes)
        by_example = statistics.median(own / each.examples for own, each in zip(sizes, others, strict=True))
        if median > 0 and by_example > 0:
            ratios.append(min(size / median, size / step.examples / by_example))
    return max(ratios)

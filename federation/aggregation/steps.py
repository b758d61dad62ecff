"""How far each update moves the model, and in which direction, next to the others of its round."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from federation.aggregation.validation import Update
from federation.pieces import block, blocks

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
    count = len(updates)
    squares, buffer_squares = np.zeros(count), np.zeros(count)
    with_sum, sum_square = np.zeros(count), 0.0  # products of each step with the weighted sum of all; its square
    examples = np.array([update.examples for update in updates], np.float64)
    for i, old in enumerate(starts[0] if starts else []):
        if old.dtype.kind != "f" or not np.isfinite(old).all():
            continue
        for place in blocks(old.size):
            own, total = np.zeros(count), np.zeros(place[1] - place[0])
            for k in range(count):
                step = _step(updates[k].weights[i], starts[k][i], place)
                own[k] = step @ step
                total += step * examples[k]
            if i in buffer_positions:
                buffer_squares += own
                continue
            squares += own
            # Worked out again, as those of a thousand clients would take a thousand times the room.
            with_sum += [_step(u.weights[i], start[i], place) @ total for u, start in zip(updates, starts, strict=True)]
            sum_square += float(total @ total)
    cosines = [_cosine(squares[k], examples[k], with_sum[k], sum_square) if count > 1 else None for k in range(count)]
    sizes, buffer_sizes = np.sqrt(squares).tolist(), np.sqrt(buffer_squares).tolist()
    numbers = [update.examples for update in updates]
    return [Step(*values) for values in zip(sizes, buffer_sizes, numbers, cosines, strict=True)]


def _step(new: Any, old: Any, place: tuple[int, int]) -> np.ndarray:
    return np.subtract(block(new, *place), block(old, *place), dtype=np.float64)


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

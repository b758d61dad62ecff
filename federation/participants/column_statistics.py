"""Mean and standard deviation of each column over all clients, from sums that say nothing of a single row.

In two passes, as the variance from a sum of squares loses its digits where a mean is large (Chan et al. 1983): first
count and sum of each column, then, around the mean of all, the sum of the squared differences.
"""

import json
from collections.abc import Callable, Sequence
from math import fsum, sqrt
from typing import Any

from federation.config import FEWEST_VALUES
from federation.console import clean
from federation.protocol import LARGEST

Sums = dict[str, tuple[int, float]]  # by column: how many values, and a sum over them


def agree(
    ask: Callable[[dict], list[tuple[Any, dict]]], drop: Callable[[Any, str], None], columns: Sequence[str]
) -> dict[str, list[float]] | None:
    """The statistics of these columns over all clients; None where nobody could tell of them.

    ask: a question to all participants, as in protocol.py; drop: what becomes of one whose answer makes no sense.
    """
    totals = _told(ask, drop, {"ask": "columns"}, columns)
    if not totals:
        return None
    found = means(totals)
    squares = _told(ask, drop, {"ask": "columns", "means": json.dumps(found)}, columns)
    return statistics(found, squares) if squares else None


def _told(ask: Callable, drop: Callable, question: dict, columns: Sequence[str]) -> list[Sums]:
    told = []
    for participant, answer in ask(question):
        try:
            told.append(read_sums(answer, columns, participant.train_examples, "means" in question))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            drop(participant, clean(answer.get("error", "what it tells of its columns makes no sense")))
    return told


def read_sums(answer: dict, columns: Sequence[str], examples: int, squares: bool = False) -> Sums:
    """A client's answer, which declared so many examples; squares: whether its sums are of squared differences.

    Raises ValueError, TypeError, KeyError, AttributeError or RecursionError where it makes no sense.
    """
    sums = {}
    for name, (count, total) in json.loads(answer["columns"]).items():
        if name not in columns or not isinstance(count, int) or not FEWEST_VALUES <= count <= examples:
            raise ValueError(f"the number of values in column {name!r}")
        if not (0 if squares else -LARGEST) <= total <= LARGEST:
            raise ValueError(f"the sum of column {name!r}")
        sums[name] = (count, float(total))
    return sums


def means(told: Sequence[Sums]) -> dict[str, float]:
    """Of the columns that anybody told of."""
    return {name: total / count for name, (count, total) in _added(told).items()}


def statistics(means: dict[str, float], told: Sequence[Sums]) -> dict[str, list[float]]:
    """By column: how many values, their mean, and their standard deviation; told: sums of squared differences.

    The deviation of a column that is constant but for rounding is 0.
    """
    added = _added(told)
    found = {}
    for name in means.keys() & added.keys():
        count, squares = added[name]
        deviation = sqrt(squares / count)
        found[name] = [count, means[name], 0.0 if deviation <= 1e-12 * abs(means[name]) else deviation]
    return dict(sorted(found.items()))


def _added(told: Sequence[Sums]) -> Sums:
    names = sorted({name for sums in told for name in sums})
    pairs = {name: [sums[name] for sums in told if name in sums] for name in names}
    return {name: (sum(count for count, _ in each), fsum(total for _, total in each)) for name, each in pairs.items()}

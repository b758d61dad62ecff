"""How much a client's updates tell of one example: epsilon of differential privacy, by dp-accounting.

Neighbouring data sets differ by one example, which counts in one of them and for nothing in the other: how many there
are is public. Each step draws every example by itself with probability `rate`, and adds noise of `noise` times the
clipping norm (Abadi et al. 2016, arXiv:1607.00133). Steps are composed by the distributions of their privacy loss,
which is close to exact, and never below it.
"""

import copy
import functools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from federation.console import PublicError

LEAST_NOISE, MOST_NOISE = 0.25, 500.0  # in clipping norms
LEAST_DELTA = 1e-12  # from about 1e-15 downwards dp-accounting finds no epsilon, as it cuts tails off
CLOSE = 0.99  # of an epsilon is used at least
AIM = 0.995  # of it: a little room for how steps are put together


@dataclass(frozen=True)
class Steps:
    """Some steps of DP-SGD alike."""

    rate: float  # of the draws
    noise: float  # in clipping norms
    number: int


class Spent(PublicError):
    """Nothing is left of an epsilon."""


class Accountant:
    """Adds up steps. Raises PublicError with the remedy where dp-accounting is missing."""

    def __init__(self, spent: Iterable[Steps] = ()):
        self._dp, pld = _dp_accounting()
        self._pld = pld()
        alike: Counter[tuple[float, float]] = Counter()
        for each in spent:
            alike[each.rate, each.noise] += each.number
        for (rate, noise), number in sorted(alike.items()):
            self._add(Steps(rate, noise, number))

    def with_steps(self, steps: Steps) -> "Accountant":
        """These as well, in a new one."""
        more = copy.copy(self)
        more._pld = copy.deepcopy(self._pld)
        more._add(steps)
        return more

    def epsilon(self, delta: float) -> float:
        """The least epsilon for this delta."""
        return float(self._pld.get_epsilon(delta))

    def noise_for(self, target: float, delta: float, rate: float, number: int) -> float:
        """The least noise, to a hundredth of epsilon, with which so many more steps keep it at target at most.

        LEAST_NOISE where less would do. Raises Spent where MOST_NOISE is not enough. An evaluation takes from a tenth
        of a second to some seconds, the longer the less noise: hence from 1, and in logarithms, in which epsilon is
        nearly a straight line and Brent's method needs two or three.
        """
        from scipy.optimize import brentq  # a dependency of dp-accounting

        @functools.cache
        def excess(log_noise: float) -> float:
            epsilon = self.with_steps(Steps(rate, math.exp(log_noise), number)).epsilon(delta)
            return math.log(max(epsilon, 1e-12) / (AIM * target))

        least, most = math.log(LEAST_NOISE), math.log(MOST_NOISE)
        low = high = 0.0
        while excess(high) > 0:
            if high == most:
                raise Spent(
                    f"{number:,} more steps would spend more than its epsilon of {target:g} even with noise of "
                    f"{MOST_NOISE:g} clipping norms; its owner may raise --dp-epsilon"
                )
            low, high = high, min(high + 2, most)
        while excess(low) <= 0:
            if low == least:
                return LEAST_NOISE
            low, high = max(low - 0.7, least), low
        return math.exp(brentq(excess, low, high, xtol=1e-3))

    def _add(self, steps: Steps) -> None:
        if steps.number and steps.rate:
            event = self._dp.PoissonSampledDpEvent(steps.rate, self._dp.GaussianDpEvent(steps.noise))
            self._pld.compose(self._dp.SelfComposedDpEvent(event, steps.number))


@functools.cache  # a calibration takes seconds
def noise_for(epsilon: float, delta: float, rate: float, number: int) -> float:
    """The least noise for so many steps where nothing is spent before; see Accountant."""
    return Accountant().noise_for(epsilon, delta, rate, number)


def _dp_accounting() -> tuple[Any, Any]:
    """The module, and its accountant; imported when used, as that takes a second."""
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise PublicError("private training needs: pip install dp-accounting") from None
    return dp_accounting, PLDAccountant

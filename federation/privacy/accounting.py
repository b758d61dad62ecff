"""How much a client's updates tell of one example: epsilon of differential privacy, by dp-accounting.

Neighbouring data sets differ by one example, added or removed; how many examples there are is public. Each step draws
every example by itself with probability `rate`, and adds noise of `noise` times the clipping norm (Abadi et al. 2016,
arXiv:1607.00133). Steps are composed by the distributions of their privacy loss, which is close to exact.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from federation.console import PublicError

LEAST_NOISE, MOST_NOISE = 0.25, 500.0  # in clipping norms; what needs more is told that its epsilon is spent
CLOSE = 0.99  # of an epsilon is used at least


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
            self._pld.compose(self._event(Steps(rate, noise, number)))

    def with_steps(self, steps: Steps) -> "Accountant":
        """These as well, in a new one."""
        more = copy.copy(self)
        more._pld = copy.deepcopy(self._pld)
        if steps.number and steps.rate:
            more._pld.compose(self._event(steps))
        return more

    def epsilon(self, delta: float) -> float:
        """The least epsilon for this delta."""
        return float(self._pld.get_epsilon(delta))

    def noise_for(self, target: float, delta: float, rate: float, number: int) -> float:
        """The least noise, to a hundredth of epsilon, with which so many more steps keep it at target at most.

        Raises Spent. By secants in logarithms, in which epsilon is nearly a straight line, within what is known to be
        too little and enough; an evaluation takes half a second.
        """
        aim, slope, noise = math.log(target) - 0.005, -1.5, 1.0
        too_little, enough = math.log(LEAST_NOISE), math.log(MOST_NOISE)
        before: tuple[float, float] | None = None
        while enough - too_little > 1e-4:
            epsilon = self.with_steps(Steps(rate, noise, number)).epsilon(delta)
            if CLOSE * target <= epsilon <= 0.999 * target:  # a little room for how steps are put together
                return noise
            now = math.log(noise), math.log(max(epsilon, 1e-12))
            too_little, enough = (now[0], enough) if epsilon > target else (too_little, now[0])
            if before and before[0] != now[0]:
                slope = min(-0.01, (now[1] - before[1]) / (now[0] - before[0]))
            before, guess = now, now[0] + (aim - now[1]) / slope
            inside = too_little < guess < enough
            noise = math.exp(guess if inside else (too_little + enough) / 2)
        if enough == math.log(MOST_NOISE):
            raise Spent(f"it has spent its epsilon of {target:g} on these examples, and trains no more")
        return math.exp(enough)

    def _event(self, steps: Steps) -> Any:
        gaussian = self._dp.GaussianDpEvent(steps.noise)
        return self._dp.SelfComposedDpEvent(self._dp.PoissonSampledDpEvent(steps.rate, gaussian), steps.number)


def _dp_accounting() -> tuple[Any, Any]:
    """The module, and its accountant; imported when used, as that takes a second."""
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise PublicError("private training needs: pip install dp-accounting") from None
    return dp_accounting, PLDAccountant

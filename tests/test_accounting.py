"""Epsilon, beside the closed form of the Gaussian mechanism; and how much noise keeps it."""

import math
import sys

from federation.console import PublicError
from federation.privacy.accounting import LEAST_NOISE, Accountant, Spent, Steps

import pytest

pytestmark = pytest.mark.slow  # an epsilon takes from a tenth of a second to some
DELTA = 1e-5


@pytest.fixture(scope="module")
def fresh():
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    return Accountant()


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Balle & Wang 2018, arXiv:1805.06530, theorem 8, for sensitivity 1, by bisection."""

    def cumulative(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        a, b = 1 / (2 * noise), middle * noise
        too_much = cumulative(a - b) - math.exp(middle) * cumulative(-a - b) > delta
        low, high = (middle, high) if too_much else (low, middle)
    return high


def test_one_step_with_all_examples_is_the_gaussian_mechanism(fresh):
    assert gaussian_epsilon(1, DELTA) == pytest.approx(4.37718, abs=1e-5)
    assert Accountant([Steps(1, 1, 1)]).epsilon(DELTA) == pytest.approx(gaussian_epsilon(1, DELTA), abs=1e-3)


def test_four_steps_with_all_examples_are_one_with_half_the_noise(fresh):
    four, one = Accountant([Steps(1, 1, 4)]).epsilon(DELTA), Accountant([Steps(1, 0.5, 1)]).epsilon(DELTA)
    assert four == pytest.approx(9.9973, abs=1e-3)
    assert one == pytest.approx(gaussian_epsilon(0.5, DELTA), abs=1e-3)
    assert four == pytest.approx(one, abs=1e-3)


@pytest.mark.parametrize("spent", [[], [Steps(0, 1, 10)], [Steps(0.5, 1, 0)]], ids=["nothing", "rate 0", "no steps"])
def test_nothing_drawn_spends_nothing(fresh, spent):
    assert Accountant(spent).epsilon(DELTA) == 0
    assert fresh.with_steps(Steps(0, 1, 10)).epsilon(DELTA) == 0


def test_the_steps_of_several_runs_add_up(fresh):
    runs = [Steps(1, 2, 1), Steps(0.1, 2, 20), Steps(1, 2, 3)]
    one_by_one = fresh
    for steps in runs:
        one_by_one = one_by_one.with_steps(steps)
    assert one_by_one.epsilon(DELTA) == pytest.approx(Accountant(runs).epsilon(DELTA), abs=1e-3)
    assert fresh.epsilon(DELTA) == 0  # the first stays as it was
    # With all examples: 1 / noise**2 adds up, and three steps of noise 2 and one of 1 are one with 1 / sqrt(7 / 4).
    together = Accountant([Steps(1, 2, 3), Steps(1, 1, 1)]).epsilon(DELTA)
    assert together == pytest.approx(gaussian_epsilon(math.sqrt(4 / 7), DELTA), abs=1e-3)


def test_more_steps_of_any_kind_never_lower_epsilon(fresh):
    now = fresh
    for steps in [Steps(0.03, 1, 30), Steps(1e-3, 20, 1), Steps(1, 400, 1), Steps(0.5, 5, 2), Steps(0.03, 1, 30)]:
        more = now.with_steps(steps)
        assert more.epsilon(DELTA) >= now.epsilon(DELTA)
        now = more


@pytest.mark.parametrize(
    ("epsilon", "examples", "batch"),
    [(8, 300, 100), (3, 5_000, 512), (1, 300, 32), (0.1, 300, 300), (0.01, 16_667, 512)],
)
def test_noise_is_the_least_with_which_epsilon_is_kept_to_a_hundredth(fresh, epsilon, examples, batch):
    rate, steps = batch / examples, 3 * round(examples / batch)
    noise = fresh.noise_for(epsilon, DELTA, rate, steps)
    assert 0.99 * epsilon <= fresh.with_steps(Steps(rate, noise, steps)).epsilon(DELTA) <= epsilon


def test_noise_takes_account_of_what_is_spent():
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    before = Accountant([Steps(1, 2, 1)])
    left = before.noise_for(3, DELTA, 1, 1)
    assert 2.97 <= before.with_steps(Steps(1, left, 1)).epsilon(DELTA) <= 3
    assert left > Accountant().noise_for(3, DELTA, 1, 1)


def test_a_huge_epsilon_still_gets_the_least_noise(fresh):
    assert fresh.noise_for(1e6, DELTA, 0.1, 1) == LEAST_NOISE


@pytest.mark.parametrize(
    ("spent", "epsilon"), [([], 1e-4), ([Steps(1, 1, 1)], 4.377), ([Steps(1, 1, 1)], 1)], ids=["tiny", "all", "over"]
)
def test_where_no_noise_is_enough_one_line_says_so(fresh, spent, epsilon):
    with pytest.raises(Spent, match=r"^30 more steps would spend more than its epsilon of \S+ even .* --dp-epsilon$"):
        Accountant(spent).noise_for(epsilon, DELTA, 1, 30)


def test_without_dp_accounting_one_line_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(PublicError, match=r"^private training needs: pip install dp-accounting$"):
        Accountant()

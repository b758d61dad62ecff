"""From updates to the next model, by Flower's strategies; small enough to be worked out by hand."""

import io

from federation.aggregation import strategy as strategies
from federation.aggregation.means import mean_array, mean_metrics, weighted_mean
from federation.aggregation.strategy import STRATEGIES, CheckedStrategy, _points, unsupported
from federation.security.clipping import clip
from federation.server.settings import ServerSettings

import numpy as np
import pytest
from flwr.server.strategy import FedAvg, FedProx
from helpers.updates import strategy, update
from test_validation import npy

# Sums


def test_weighted_mean_counts_examples_not_clients():
    assert weighted_mean([(0.0, 1), (1.0, 3)]) == 0.75


def test_weighted_mean_of_arrays_is_taken_in_float64():
    values = [(np.array([1, 2], np.float32), 1), (np.array([5, 4], np.float32), 3)]
    mean = weighted_mean(values)
    assert mean.dtype == np.float64
    assert mean.tolist() == [4.0, 3.5]


# Clipping


def test_a_step_is_shortened_to_the_norm_and_integers_stay():
    old = [np.array([1, 0], np.float32), np.array([0], np.float32), np.array(7)]
    new = [np.array([4, 0], np.float32), np.array([4], np.float32), np.array(9)]  # a step of (3, 0, 4): norm 5
    clipped = [np.asarray(array) for array in clip(new, old, 2.5)]
    assert [array.tolist() for array in clipped] == [[2.5, 0], [2], 9]
    assert [array.dtype for array in clipped] == [np.float32, np.float32, np.int64]


def test_a_step_within_the_norm_is_left_alone():
    new = [np.array([3, 4], np.float32)]
    assert clip(new, [np.zeros(2, np.float32)], 5.0) is new


def test_a_huge_step_is_clipped_to_numbers():
    most = np.finfo(np.float32).max
    (clipped,) = map(np.asarray, clip([np.array([most, 0], np.float32)], [np.array([-most, 1], np.float32)], 1.0))
    assert np.isfinite(clipped).all()
    assert clipped[1] == pytest.approx(1.0)


def test_max_update_norm_bounds_what_one_client_moves():
    rule = strategy("fedavg", [np.zeros(2, np.float32)], [], max_update_norm=5.0)
    far, near = [np.array([300, 400], np.float32)], [np.array([0, 1], np.float32)]
    (mean,) = rule.aggregate([np.zeros(2, np.float32)], [update(far), update(near)])
    assert mean.tolist() == [1.5, 2.5]  # of (3, 4) and (0, 1)


# Strategies: one weight, so that each answer can be worked out by hand


def aggregate(name: str, *clients: tuple[float, int], start: float = 0.0, rule: CheckedStrategy | None = None) -> float:
    """The next global weight from clients' (weight, examples)."""
    weights = [np.array([start], np.float32)]
    rule = rule or strategy(name, weights, [])
    (new,) = rule.aggregate(weights, [update([np.array([weight], np.float32)], n) for weight, n in clients])
    assert new.dtype == np.float32
    return float(new[0])


def test_fedavg_is_the_mean_by_examples():
    assert aggregate("fedavg", (0, 1), (4, 3)) == 3


def test_fedmedian_is_the_middle_one_whatever_the_others_say():
    assert aggregate("fedmedian", (1, 1), (2, 1), (1e6, 99)) == 2
    assert aggregate("fedmedian", (1, 1), (3, 1)) == 2


def test_fedtrimmedavg_leaves_out_the_least_and_the_greatest():
    assert aggregate("fedtrimmedavg", (-1e6, 9), (2, 1), (1e6, 9)) == 2
    assert aggregate("fedtrimmedavg", (-1e6, 9), (1, 1), (2, 1), (6, 1), (1e6, 9)) == 3
    assert aggregate("fedtrimmedavg", (1, 1), (3, 1)) == 2  # of two, nobody can be left out


def test_krum_takes_the_one_with_the_nearest_neighbours():
    assert aggregate("krum", (1e6, 9), (1.0, 1), (1.5, 1)) == 1
    # Of five, two neighbours count: 2 is 1 + 1 away from them, 1 and 3 are 1 + 4.
    assert aggregate("krum", (-1e6, 9), (1, 1), (2, 1), (3, 1), (1e6, 9)) == 2


def test_fedavgm_goes_on_with_half_its_last_step():
    rule = strategy("fedavgm", [np.zeros(1, np.float32)], [])
    first = aggregate("fedavgm", (0, 1), (2, 1), rule=rule)
    assert first == 1  # the mean: nothing came before
    assert aggregate("fedavgm", (3, 1), start=first, rule=rule) == 3.5  # 1 + (3 - 1) + 0.5 * 1


def test_fedadam_steps_by_its_moments():
    rule = strategy("fedadam", [np.zeros(1, np.float32)], [])
    # eta 0.01, beta 0.9 and 0.99, tau 0.001; Flower corrects the bias as of one step later than Adam does.
    m, v = 0.1 * 1, 0.01 * 1**2
    first = 0.01 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2) * m / (v**0.5 + 0.001)
    assert aggregate("fedadam", (0, 1), (2, 1), rule=rule) == pytest.approx(first, rel=1e-6)
    m, v = 0.9 * m + 0.1 * -2, 0.99 * v + 0.01 * (-2) ** 2
    second = first + 0.01 * (1 - 0.99**3) ** 0.5 / (1 - 0.9**3) * m / (v**0.5 + 0.001)
    assert aggregate("fedadam", (first - 2, 5), start=first, rule=rule) == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_counters_stay_whole_numbers_of_their_own_type(name):
    weights = [np.zeros(2, np.float32), np.array(5), np.array([1, 2], np.uint8), np.array([True])]
    one = [np.ones(2, np.float32), np.array(6), np.array([2, 4], np.uint8), np.array([True])]
    two = [np.ones(2, np.float32), np.array(9), np.array([2, 8], np.uint8), np.array([False])]
    new = strategy(name, weights, []).aggregate(weights, [update(one, 1), update(two, 3)])
    assert [(array.dtype, array.shape) for array in new] == [(array.dtype, array.shape) for array in weights]
    assert [array.tolist() for array in new[1:]] == [8, [2, 7], [False]]  # 8.25, (2, 7), 0.25


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_measured_statistics_are_averaged_and_not_optimised(name):
    weights = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    rule = strategy(name, weights, buffer_positions=[1])
    for variance in (3, 5):  # with a momentum, the second answer would overshoot
        new = [np.ones(1, np.float32), np.full(1, variance, np.float32)]
        weights = rule.aggregate(weights, [update(new, 2), update(new, 1)])
        assert weights[1].tolist() == [variance]
        assert weights[1].dtype == np.float32


@pytest.mark.parametrize("name", ["fedavg", "fedmedian", "fedtrimmedavg"])
def test_what_is_averaged_in_pieces_has_the_bits_of_the_whole(name, monkeypatch):
    rng = np.random.default_rng(0)
    shapes = [(5, 3, 2), (), (7,), (0, 4)]
    updates = [update([rng.normal(size=shape).astype(np.float32) for shape in shapes], n) for n in (1, 20, 3)]
    start = [np.zeros(shape, np.float32) for shape in shapes]
    whole = strategy(name, start, []).aggregate(start, updates)
    monkeypatch.setattr(strategies, "PIECE", 4)
    assert same_bits(strategy(name, start, []).aggregate(start, updates), whole)


# From round to round


def rounds(rule: CheckedStrategy, weights: list[np.ndarray], numbers: range) -> list[np.ndarray]:
    """Updates that are a function of the round and the weights, as clients' are."""
    for number in numbers:
        rng = np.random.default_rng(number)
        updates = [
            update(
                [(array + rng.normal(size=array.shape)).astype(array.dtype) for array in weights[:2]]
                + [weights[2] + 1],
                n,
            )
            for n in (10, 20, 30)
        ]
        weights = rule.aggregate(weights, updates)
    return weights


START = [np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), np.ones(3, np.float32), np.array(0)]


def same_bits(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    pairs = zip(one, two, strict=True)
    return all((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in pairs)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_restored_strategy_goes_on_with_the_same_bits(name, after):
    whole = rounds(strategy(name, START, [1]), START, range(4))
    first = strategy(name, START, [1])
    weights = rounds(first, START, range(after))
    state = [np.load(io.BytesIO(npy(array))) for array in first.state()]  # as a checkpoint keeps it
    second = strategy(name, weights, [1])
    second.restore(state, weights)
    assert same_bits(rounds(second, weights, range(after, 4)), whole)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("empty", [0, 1])
def test_a_round_without_updates_changes_nothing_then_or_later(name, empty):
    whole = rounds(strategy(name, START, [1]), START, range(3))
    rule = strategy(name, START, [1])
    weights = rounds(rule, START, range(empty))
    assert rule.aggregate(weights, []) is weights
    assert same_bits(rounds(rule, weights, range(empty, 3)), whole)


# A strategy's own numbers


def test_the_servers_learning_rate_is_the_step_of_fedadam_and_fedavgm():
    start = [np.zeros(1, np.float32)]
    assert aggregate("fedavgm", (2, 1), rule=strategy("fedavgm", start, [], server_learning_rate=0.25)) == 0.5
    steps = [
        aggregate("fedadam", (2, 1), rule=strategy("fedadam", start, [], server_learning_rate=rate))
        for rate in (0.01, 0.05)
    ]
    assert steps[1] == pytest.approx(5 * steps[0])


def test_the_servers_momentum_is_fedavgms():
    rule = strategy("fedavgm", [np.zeros(1, np.float32)], [], server_momentum=0.0)
    first = aggregate("fedavgm", (2, 1), rule=rule)
    assert aggregate("fedavgm", (5, 1), start=first, rule=rule) == 5


def test_krum_and_the_trimmed_mean_take_the_number_of_hostile_clients():
    start = [np.zeros(1, np.float32)]
    assert strategy("krum", start, [], malicious_clients=2, clients=9).flower.num_malicious_clients == 2
    clients = [(value, 1) for value in (0, 1, 2, 3, 94)]
    assert aggregate("fedtrimmedavg", *clients, rule=strategy("fedtrimmedavg", start, [], trimmed_fraction=0.2)) == 2
    assert aggregate("fedtrimmedavg", *clients, rule=strategy("fedtrimmedavg", start, [], trimmed_fraction=0.1)) == 20


class OwnRounds(FedAvg):
    def configure_evaluate(self, server_round, parameters, client_manager):
        return []


def test_a_strategy_that_configures_rounds_itself_is_refused_in_words(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "fedprox", lambda settings, initial: FedProx(proximal_mu=1.0))
    monkeypatch.setitem(STRATEGIES, "own", lambda settings, initial: OwnRounds())
    for name, words in (
        ("fedprox", "is Flower's FedProx, whose own configure_fit is not called here; FedProx is --proximal-mu here"),
        ("own", "is Flower's OwnRounds, whose own configure_evaluate is not called here; use another"),
    ):
        assert unsupported(STRATEGIES[name], ServerSettings()) == words
    assert [unsupported(STRATEGIES[name], ServerSettings(strategy=name)) for name in ("fedavg", "krum", "fedadam")] == [
        "",
        "",
        "",
    ]


# What can't be averaged as floats are


def test_an_array_of_infinities_that_all_have_stays_as_it_is():
    mask = np.array([0, -np.inf], np.float32)
    start = [np.zeros(1, np.float32), mask]
    rule = strategy("fedadam", start, [])
    new = rule.aggregate(start, [update([np.ones(1, np.float32), mask], n) for n in (1, 2)])
    assert new[1] is mask
    assert np.isfinite(new[0]).all()


@pytest.mark.parametrize(("values", "mean"), [((2**60 + 1, 2**60 + 1), 2**60 + 1), ((2**60, 2**60 + 6), 2**60 + 3)])
def test_large_integers_are_averaged_exactly(values, mean):
    assert mean_array([(np.array([value]), 1) for value in values]).tolist() == [mean]


def test_the_mean_of_large_integers_is_rounded_half_to_even_as_that_of_small_ones():
    big = 2**60
    assert mean_array([(np.array([big]), 1), (np.array([big + 1]), 1)]).tolist() == [big]
    assert mean_array([(np.array([big + 1]), 1), (np.array([big + 2]), 1)]).tolist() == [big + 2]
    assert mean_array([(np.array([0]), 1), (np.array([1]), 1)]).tolist() == [0]


def test_every_metric_is_averaged_over_those_that_have_it_by_examples():
    answers = [
        update([], 1, f1=0.0, train_loss=1.0),
        update([], 3, f1=1.0, train_loss=1.0),
        update([], 4, train_loss=3.0),
    ]
    assert mean_metrics(answers) == {"f1": 0.75, "train_loss": 2.0}


def test_krum_is_shown_points_as_far_from_each_other_as_the_updates_are():
    updates = [[np.array([0, 0], np.float32)], [np.array([3, 0], np.float32)], [np.array([0, 4], np.float32)]]
    here, there, above = _points(updates)
    apart = [np.linalg.norm(here - there), np.linalg.norm(here - above), np.linalg.norm(there - above)]
    assert np.round(apart, 9).tolist() == [3, 4, 5]

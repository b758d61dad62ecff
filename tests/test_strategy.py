"""What counts and what doesn't: every update is checked, then aggregated; small enough to be worked out by hand."""

import io
import struct
import tracemalloc
from pathlib import Path

from federation.strategy import (
    STRATEGIES,
    BadUpdate,
    CheckedStrategy,
    check_evaluate,
    check_fit,
    clip,
    read_weights,
    weighted_mean,
)

import numpy as np
import pytest
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status

OK = Status(Code.OK, "")
WEIGHTS = [np.zeros((2, 3), np.float32), np.array(5)]  # a kernel, and a counter as BatchNorm has


def npy(array: np.ndarray) -> bytes:
    """As Flower sends an array."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def forged(descr: str, shape: str, data: bytes = b"") -> bytes:
    """A .npy file whose header says what it likes."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def fit_res(arrays: list[np.ndarray | bytes], examples: int = 10, **metrics: object) -> FitRes:
    tensors = [array if isinstance(array, bytes) else npy(array) for array in arrays]
    return FitRes(OK, Parameters(tensors, "numpy.ndarray"), examples, metrics or {"train_loss": 0.5})


def checked(*arrays: np.ndarray | bytes, **options: object):
    return check_fit(fit_res(list(arrays), **options), WEIGHTS, declared=10)


# Sums


def test_weighted_mean_counts_examples_not_clients():
    assert weighted_mean([(0.0, 1), (1.0, 3)]) == 0.75


def test_weighted_mean_of_arrays_is_taken_in_float64():
    values = [(np.array([1, 2], np.float32), 1), (np.array([5, 4], np.float32), 3)]
    mean = weighted_mean(values)
    assert mean.dtype == np.float64
    assert mean.tolist() == [4.0, 3.5]


# What may count


def test_a_good_update_comes_back_as_it_was_sent_with_its_examples():
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    (got, counter), examples = checked(kernel, np.array(6), examples=7)
    assert np.array_equal(got, kernel)
    assert got.dtype == np.float32
    assert (counter, counter.dtype, counter.shape) == (6, np.int64, ())
    assert examples == 7


def test_columns_first_order_is_read_right():
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    sent = npy(np.asfortranarray(kernel))
    assert b"'fortran_order': True" in sent
    (got, _), _ = checked(sent, np.array(6))
    assert np.array_equal(got, kernel)


KERNEL, COUNTER = WEIGHTS
BAD_ARRAYS = {
    "too few arrays": ([KERNEL], "1 arrays instead of 2"),
    "too many arrays": ([KERNEL, COUNTER, COUNTER], "3 arrays instead of 2"),
    "no arrays": ([], "0 arrays instead of 2"),
    "another shape": ([KERNEL.T, COUNTER], r"array 0 has shape \(3, 2\) instead of \(2, 3\)"),
    "one dimension more": ([KERNEL, COUNTER[None]], r"array 1 has shape \(1,\) instead of \(\)"),
    "another float": ([KERNEL.astype(np.float64), COUNTER], "array 0 has dtype float64 instead of float32"),
    "another byte order": ([KERNEL.astype(">f4"), COUNTER], "array 0 has dtype >f4 instead of float32"),
    "float counter": ([KERNEL, COUNTER.astype(np.float64)], "array 1 has dtype float64 instead of int64"),
    "complex": ([KERNEL.astype(np.complex64), COUNTER], "array 0 claims dtype complex64"),
    "text": ([np.full((2, 3), "boo"), COUNTER], "array 0 claims dtype <U3"),
    "records": ([np.zeros((2, 3), [("a", "f4")]), COUNTER], "array 0 claims dtype"),
    "empty": ([b"", COUNTER], "array 0 is not a NumPy array"),
    "garbage": ([b"garbage" * 100, COUNTER], "array 0 is not a NumPy array"),
    "a header that is no header": ([b"\x93NUMPY\x01\x00\x04\x00[[[[", COUNTER], "array 0 is not a NumPy array"),
    "half a header": ([npy(KERNEL)[:40], COUNTER], "array 0 is not a NumPy array"),
    "a giant header": ([forged("<f4", "(" + "1, " * 9000 + ")"), COUNTER], "array 0 is not a NumPy array"),
    "a byte missing": ([npy(KERNEL)[:-1], COUNTER], "array 0 has 23 bytes, too many or too few for its shape"),
    "a byte too many": ([npy(KERNEL) + b"\0", COUNTER], "array 0 has 25 bytes, too many or too few for its shape"),
    "negative shape": ([forged("<f4", "(-2, -3)", bytes(24)), COUNTER], r"array 0 claims .* shape \(-2, -3\)"),
    "a shape of truth": ([forged("<f4", "(True, 6)", bytes(24)), COUNTER], r"array 0 claims the shape \(True, 6\)"),
    "no bytes in a giant shape": (
        [forged("<f4", f"(0, {2**70})"), COUNTER],
        r"array 0 claims the shape \(0, 11805916",
    ),
    "a hundred dimensions": (
        [forged("<f4", "(" + "1, " * 100 + ")", bytes(4)), COUNTER],
        r"array 0 claims the shape \(1, 1,",
    ),
}


@pytest.mark.parametrize(("arrays", "reason"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_dont_fit_are_turned_away_with_the_reason(arrays, reason):
    with pytest.raises(BadUpdate, match=reason):
        checked(*arrays)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_is_one_too_many(value):
    kernel = KERNEL.copy()
    kernel[1, 2] = value
    with pytest.raises(BadUpdate, match=r"^array 0 holds NaN or infinite values$"):
        checked(kernel, COUNTER)
    with pytest.raises(BadUpdate, match=r"^array 0 holds NaN or infinite values$"):
        read_weights(fit_res([kernel]).parameters)


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_objects_are_never_unpickled(tmp_path):
    fuse = tmp_path / "unpickled"
    array = np.empty((2, 3), object)
    array[:] = Bomb(fuse)
    np.load(io.BytesIO(npy(array)), allow_pickle=True)
    assert fuse.exists()  # the bomb works
    fuse.unlink()
    for payload in (npy(array), npy(array)[128:]):  # as an array of objects, and as a bare pickle
        with pytest.raises(BadUpdate, match="array 0"):
            checked(payload, COUNTER)
        with pytest.raises(BadUpdate, match="array 0"):
            read_weights(Parameters([payload], "numpy.ndarray"))
    assert not fuse.exists()


def test_a_giant_claim_of_few_bytes_sets_no_memory_aside():
    claim = forged("<f4", f"({10**12},)", bytes(4))
    tracemalloc.start()
    with pytest.raises(BadUpdate, match="array 0 has 4 bytes, too many or too few for its shape"):
        checked(claim, COUNTER)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("examples", [0, -1, 11, 2**60])
def test_examples_must_be_some_and_no_more_than_declared(examples):
    with pytest.raises(BadUpdate, match=rf"^it claims {examples} examples, having declared 10 when it joined$"):
        checked(*WEIGHTS, examples=examples)
    with pytest.raises(BadUpdate, match=rf"^it claims {examples} examples"):
        check_evaluate(EvaluateRes(OK, 1.0, examples, {"accuracy": 0.5}), declared=10)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), "0.5", b"0.5", None])
def test_a_training_loss_must_be_a_finite_number(loss):
    metrics = {"other": 1.0} if loss is None else {"train_loss": loss}
    with pytest.raises(BadUpdate, match=r"^its training loss is "):
        checked(*WEIGHTS, **metrics)


def test_a_clients_own_words_are_passed_on_in_one_clean_line():
    with pytest.raises(BadUpdate, match=r"^it says: the disk is full of \[31mcolour$"):
        checked(error="the disk\nis full of \x1b[31mcolour")


def test_a_good_evaluation_is_loss_accuracy_and_examples():
    assert check_evaluate(EvaluateRes(OK, 1.5, 4, {"accuracy": 1}), declared=4) == (1.5, 1.0, 4)


@pytest.mark.parametrize("accuracy", [-0.01, 1.01, float("nan"), "0.5", None])
def test_an_accuracy_is_a_number_within_0_and_1(accuracy):
    with pytest.raises(BadUpdate, match=r"^its accuracy is .*, not within 0 and 1$"):
        check_evaluate(EvaluateRes(OK, 1.0, 1, {"accuracy": accuracy}), declared=1)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_an_evaluation_loss_is_finite(loss):
    with pytest.raises(BadUpdate, match=r"^its loss is (nan|inf)$"):
        check_evaluate(EvaluateRes(OK, loss, 1, {"accuracy": 0.5}), declared=1)


def test_untrained_weights_are_read_by_position_and_none_are_too_few():
    kernel, counter = read_weights(fit_res(WEIGHTS).parameters)
    assert (kernel.dtype, kernel.shape, counter.dtype, int(counter)) == (np.float32, (2, 3), np.int64, 5)
    with pytest.raises(BadUpdate, match=r"^it holds no arrays$"):
        read_weights(Parameters([], "numpy.ndarray"))


# Clipping


def test_a_step_is_shortened_to_the_norm_and_integers_stay():
    old = [np.array([1, 0], np.float32), np.array([0], np.float32), np.array(7)]
    new = [np.array([4, 0], np.float32), np.array([4], np.float32), np.array(9)]  # a step of (3, 0, 4): norm 5
    clipped = clip(new, old, 2.5)
    assert [array.tolist() for array in clipped] == [[2.5, 0], [2], 9]
    assert [array.dtype for array in clipped] == [np.float32, np.float32, np.int64]


def test_a_step_within_the_norm_is_left_alone():
    new = [np.array([3, 4], np.float32)]
    assert clip(new, [np.zeros(2, np.float32)], 5.0) is new


def test_a_huge_step_is_clipped_to_numbers():
    most = np.finfo(np.float32).max
    (clipped,) = clip([np.array([most, 0], np.float32)], [np.array([-most, 1], np.float32)], 1.0)
    assert np.isfinite(clipped).all()
    assert clipped[1] == pytest.approx(1.0)


def test_max_update_norm_bounds_what_one_client_moves():
    rule = CheckedStrategy("fedavg", [np.zeros(2, np.float32)], [], max_update_norm=5.0)
    far, near = [np.array([300, 400], np.float32)], [np.array([0, 1], np.float32)]
    (mean,) = rule.aggregate([np.zeros(2, np.float32)], [(far, 1), (near, 1)])
    assert mean.tolist() == [1.5, 2.5]  # of (3, 4) and (0, 1)


# Strategies: one weight, so that each answer can be worked out by hand


def aggregate(name: str, *clients: tuple[float, int], start: float = 0.0, rule: CheckedStrategy | None = None) -> float:
    """The next global weight from clients' (weight, examples)."""
    weights = [np.array([start], np.float32)]
    rule = rule or CheckedStrategy(name, weights, [])
    (new,) = rule.aggregate(weights, [([np.array([weight], np.float32)], n) for weight, n in clients])
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
    rule = CheckedStrategy("fedavgm", [np.zeros(1, np.float32)], [])
    first = aggregate("fedavgm", (0, 1), (2, 1), rule=rule)
    assert first == 1  # the mean: nothing came before
    assert aggregate("fedavgm", (3, 1), start=first, rule=rule) == 3.5  # 1 + (3 - 1) + 0.5 * 1


def test_fedadam_steps_by_its_moments():
    rule = CheckedStrategy("fedadam", [np.zeros(1, np.float32)], [])
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
    new = CheckedStrategy(name, weights, []).aggregate(weights, [(one, 1), (two, 3)])
    assert [(array.dtype, array.shape) for array in new] == [(array.dtype, array.shape) for array in weights]
    assert [array.tolist() for array in new[1:]] == [8, [2, 7], [False]]  # 8.25, (2, 7), 0.25


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_measured_statistics_are_averaged_and_not_optimised(name):
    weights = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    rule = CheckedStrategy(name, weights, statistics=[1])
    for variance in (3, 5):  # with a momentum, the second answer would overshoot
        update = [np.ones(1, np.float32), np.full(1, variance, np.float32)]
        weights = rule.aggregate(weights, [(update, 2), (update, 1)])
        assert weights[1].tolist() == [variance]
        assert weights[1].dtype == np.float32


# From round to round


def rounds(rule: CheckedStrategy, weights: list[np.ndarray], numbers: range) -> list[np.ndarray]:
    """Updates that are a function of the round and the weights, as clients' are."""
    for number in numbers:
        rng = np.random.default_rng(number)
        updates = [
            (
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
    whole = rounds(CheckedStrategy(name, START, [1]), START, range(4))
    first = CheckedStrategy(name, START, [1])
    weights = rounds(first, START, range(after))
    state = [np.load(io.BytesIO(npy(array))) for array in first.state()]  # as a checkpoint keeps it
    second = CheckedStrategy(name, weights, [1])
    second.restore(state, weights)
    assert same_bits(rounds(second, weights, range(after, 4)), whole)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("empty", [0, 1])
def test_a_round_without_updates_changes_nothing_then_or_later(name, empty):
    whole = rounds(CheckedStrategy(name, START, [1]), START, range(3))
    rule = CheckedStrategy(name, START, [1])
    weights = rounds(rule, START, range(empty))
    assert rule.aggregate(weights, []) is weights
    assert same_bits(rounds(rule, weights, range(empty, 3)), whole)

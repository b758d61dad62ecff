"""What may count and what not: every answer is checked before it does."""

import io
import struct
import tracemalloc
from pathlib import Path

from federation.aggregation.validation import BadUpdate, read_weights, validate_evaluate, validate_fit
from federation.config import Metric

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
    update = validate_fit(fit_res(list(arrays), **options), 0, WEIGHTS, declared=10)
    return update.weights, update.examples


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


def test_a_number_that_would_overflow_the_sum_is_turned_away():
    with pytest.raises(BadUpdate, match=r"^array 0 holds 3e\+38, too large to be averaged$"):
        checked(np.full((2, 3), -3e38, np.float32), np.array(5))


@pytest.mark.parametrize("examples", [0, -1, 11, 2**60])
def test_examples_must_be_some_and_no_more_than_declared(examples):
    with pytest.raises(BadUpdate, match=rf"^it claims {examples} examples, having declared 10 when it joined$"):
        checked(*WEIGHTS, examples=examples)
    with pytest.raises(BadUpdate, match=rf"^it claims {examples} examples"):
        validate_evaluate(EvaluateRes(OK, 1.0, examples, {"accuracy": 0.5}), 0, declared=10)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), "0.5", b"0.5", None])
def test_a_training_loss_must_be_a_finite_number(loss):
    metrics = {"other": 1.0} if loss is None else {"train_loss": loss}
    with pytest.raises(BadUpdate, match=r"^its training loss is "):
        checked(*WEIGHTS, **metrics)


def test_a_clients_own_words_are_passed_on_in_one_clean_line():
    with pytest.raises(BadUpdate, match=r"^it says: the disk is full of \[31mcolour$"):
        checked(error="the disk\nis full of \x1b[31mcolour")


def test_a_good_evaluation_is_all_its_finite_numbers_and_its_examples():
    told = {"accuracy": 1, "f1": 7.5, "auc": float("nan"), "note": "well", "train_x": 1.0, "round": 3.0, "a b": 1.0}
    score = validate_evaluate(EvaluateRes(OK, 1.5, 4, told), 2, declared=4)
    assert (score.partition, score.examples) == (2, 4)
    assert score.metrics == {"accuracy": 1.0, "f1": 7.5, "loss": 1.5}  # the others are no metrics of a model


def test_metrics_of_a_training_are_named_as_such():
    update = validate_fit(fit_res(WEIGHTS, train_loss=0.5, f1=0.25), 1, WEIGHTS, declared=10)
    assert update.metrics == {"train_loss": 0.5, "train_f1": 0.25}


@pytest.mark.parametrize("accuracy", [float("nan"), float("-inf"), "0.5", None])
def test_the_main_metric_is_a_finite_number_of_any_range(accuracy):
    with pytest.raises(BadUpdate, match=r"^its accuracy is "):
        validate_evaluate(EvaluateRes(OK, 1.0, 1, {"accuracy": accuracy}), 0, declared=1)
    for any_range in (-3.0, 72):
        score = validate_evaluate(EvaluateRes(OK, 1.0, 1, {"accuracy": any_range}), 0, declared=1)
        assert score.metrics["accuracy"] == any_range


def test_the_main_metric_is_the_tasks_and_may_be_the_loss():
    score = validate_evaluate(EvaluateRes(OK, 1.5, 4, {"mae": 7}), 2, declared=4, main=Metric("mae"))
    assert score.metrics == {"mae": 7.0, "loss": 1.5}
    assert validate_evaluate(EvaluateRes(OK, 1.5, 4, {}), 2, declared=4, main=Metric("loss")).metrics == {"loss": 1.5}
    with pytest.raises(BadUpdate, match=r"^its mae is None$"):
        validate_evaluate(EvaluateRes(OK, 1.5, 4, {"accuracy": 0.5}), 2, declared=4, main=Metric("mae"))


def test_of_a_flood_of_metrics_some_are_left_out_but_never_those_that_are_needed():
    flood = {f"a{i}": 1.0 for i in range(100)}
    score = validate_evaluate(EvaluateRes(OK, 1.5, 4, {**flood, "mae": 7.0}), 2, declared=4, main=Metric("mae"))
    assert (score.metrics["mae"], score.metrics["loss"], len(score.metrics)) == (7.0, 1.5, 16)
    update = validate_fit(fit_res(WEIGHTS, train_loss=0.5, **flood), 1, WEIGHTS, declared=10)
    assert (update.metrics["train_loss"], len(update.metrics)) == (0.5, 16)


@pytest.mark.parametrize("name", ["seconds", "clients", "train_error"])
def test_a_main_metric_that_is_called_as_something_else_of_a_round_is_refused_in_words(name):
    with pytest.raises(BadUpdate, match=f"^its main metric is called {name}, a name that is taken; choose another$"):
        validate_evaluate(EvaluateRes(OK, 1.5, 4, {name: 7.0}), 2, declared=4, main=Metric(name))


def test_a_main_metric_that_is_no_mean_over_examples_may_be_undefined_at_one_client():
    auc = Metric("auc", additive=False)
    score = validate_evaluate(EvaluateRes(OK, 1.5, 4, {"auc": float("nan"), "accuracy": 1.0}), 2, declared=4, main=auc)
    assert score.metrics == {"accuracy": 1.0, "loss": 1.5}
    for told in ({"auc": float("inf")}, {"auc": "nan"}, {}):
        with pytest.raises(BadUpdate, match=r"^its auc is "):
            validate_evaluate(EvaluateRes(OK, 1.5, 4, told), 2, declared=4, main=auc)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_an_evaluation_loss_is_finite(loss):
    with pytest.raises(BadUpdate, match=r"^its loss is (nan|inf)$"):
        validate_evaluate(EvaluateRes(OK, loss, 1, {"accuracy": 0.5}), 0, declared=1)


def test_a_buffer_may_hold_infinities_that_all_clients_have_and_no_others():
    mask = np.array([0, -np.inf], np.float32)
    (_, read) = read_weights(fit_res([KERNEL, mask]).parameters, buffer_positions=[1])
    assert np.array_equal(read, mask)
    validate_fit(fit_res([KERNEL, mask]), 0, [KERNEL, mask], declared=10)
    for other in (np.array([-np.inf, 0], np.float32), np.array([0, np.nan], np.float32)):
        with pytest.raises(BadUpdate, match="array 1 holds NaN or infinite values"):
            validate_fit(fit_res([KERNEL, other]), 0, [KERNEL, mask], declared=10)


def test_a_value_is_too_large_by_the_models_own_type_and_not_by_the_one_it_travelled_in():
    update = [np.full((2, 3), 671, np.float16), np.array(5)]  # a BatchNorm's variance, above the root of 65504
    assert validate_fit(fit_res(update), 0, WEIGHTS, declared=10, compress="fp16").weights[0].max() == 671


def test_untrained_weights_are_read_by_position_and_none_are_too_few():
    kernel, counter = read_weights(fit_res(WEIGHTS).parameters)
    assert (kernel.dtype, kernel.shape, counter.dtype, int(counter)) == (np.float32, (2, 3), np.int64, 5)
    with pytest.raises(BadUpdate, match=r"^it holds no arrays$"):
        read_weights(Parameters([], "numpy.ndarray"))

"""What makes an answer fit to count: shapes, dtypes, finite values, and no more examples than were declared."""

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from federation.compression import travels_as, unpack
from federation.config import ACCURACY, METRIC_NAME, Metric
from federation.console import clean
from federation.pieces import InPieces, StoredArray, block, blocks
from federation.protocol import DP_DELTA, DP_EPSILON

import numpy as np
from flwr.common import EvaluateRes, FitRes, Parameters

TRAIN = "train_"  # begins the names of metrics of local training
TRAIN_LOSS = TRAIN + "loss"
MOST_METRICS = 16  # of one answer
# In history.json's rows, and columns of the tables
TAKEN = {"round", "taken_back", "made_from", "clients", "seconds", "bytes_received", "updates", "time", "evaluated"}
TAKEN |= {"received", "version", "staleness", "utc", "weights_sha256", "epsilon", "delta", DP_EPSILON, DP_DELTA}
NOTHING = np.zeros(0)
SUM = -1  # stands for a partition where many clients' updates came as one


class BadUpdate(Exception):
    """An answer that must not count; the text is the reason. client_failed: the client itself says that it failed."""

    def __init__(self, reason: str, client_failed: bool = False):
        super().__init__(reason)
        self.client_failed = client_failed


@dataclass(frozen=True, eq=False)
class Update:
    """A client's update that is fit to count."""

    partition: int
    weights: list[Any]  # arrays by position, in the dtypes of the global model; of a large one, pieces.StoredArrays
    examples: int
    metrics: dict[str, float]  # of its training; names begin with train_
    parts: dict[int, int] | None = None  # of a sum: examples by partition; its own partition is then SUM
    received: int = 0  # of a sum: bytes that came in for it

    @property
    def clients(self) -> dict[int, int]:
        """Examples by partition of all whose training is in it."""
        return {self.partition: self.examples} if self.parts is None else self.parts


@dataclass(frozen=True)
class Score:
    """The global model on a client's test examples."""

    partition: int
    examples: int
    metrics: dict[str, float]  # "loss" among them
    epsilon: float | None = None  # that it says to have spent, where it trains privately...
    delta: float | None = None  # ...and its delta


def read_weights(parameters: Parameters, buffer_positions: Sequence[int] = ()) -> list[np.ndarray]:
    """The untrained model as a client sends it; buffers may hold infinities. Raises BadUpdate; never unpickles."""
    if isinstance(parameters, InPieces):
        weights = [np.asarray(array) for array in parameters.arrays]
    else:
        weights = [_read_array(tensor, i) for i, tensor in enumerate(parameters.tensors)]
    if not weights:
        raise BadUpdate("it holds no arrays")
    _check_numbers([NOTHING if i in buffer_positions else array for i, array in enumerate(weights)])
    return weights


def travelled(parameters: Parameters) -> Sequence[Any] | None:
    """The arrays of a message as they came, whatever they are; None where they can't be read. Never unpickles."""
    try:
        whole = [_read_array(tensor, i) for i, tensor in enumerate(parameters.tensors)]
        return parameters.arrays if isinstance(parameters, InPieces) else whole or None
    except BadUpdate:
        return None


def validate_fit(
    res: FitRes,
    partition: int,
    weights: list[np.ndarray],
    declared: int,
    compress: str = "none",
    private: bool = False,
) -> Update:
    """A client's update, if it is fit to count next to `weights`. Raises BadUpdate with the reason.

    It must have come as `compress` has it, and is returned in the dtypes of `weights`. private: it comes without
    the loss of its training.
    """
    _check_told(res.metrics, res.num_examples, declared)
    update = _read_update(res.parameters, weights, compress)
    _check_numbers([NOTHING if _is_constant(new, old) else new for new, old in zip(update, weights, strict=True)])
    if not private and not _is_finite(res.metrics.get(TRAIN_LOSS)):
        raise BadUpdate(f"its training loss is {clean(res.metrics.get(TRAIN_LOSS), 40)}")
    read = {} if private else _read_metrics(res.metrics, (TRAIN_LOSS,))
    metrics = {TRAIN + name.removeprefix(TRAIN): value for name, value in read.items()}
    return Update(partition, update, res.num_examples, metrics)


def validate_statistics(
    res: FitRes, partition: int, statistics: list[np.ndarray], declared: int, compress: str = "none"
) -> Update:
    """What a client measured of BatchNorm, mean and variance by turns, next to these. Raises BadUpdate."""
    _check_told(res.metrics, res.num_examples, declared)
    measured = _read_update(res.parameters, statistics, compress)
    _check_numbers(measured)
    for i, variance in enumerate(measured[1::2]):
        if (variance < 0).any():
            raise BadUpdate(f"the variance of BatchNorm layer {i} is negative")
    return Update(partition, measured, res.num_examples, {})


def _read_update(parameters: Parameters, weights: list[np.ndarray], compress: str) -> list[Any]:
    """Its arrays, in the dtypes of the global model; those of a large one stay in their file. Raises BadUpdate."""
    if isinstance(parameters, InPieces):  # of the shapes and dtypes that were asked for
        return [
            replace(array, dtype=old.dtype) if isinstance(array, StoredArray) and array.dtype != old.dtype else array
            for array, old in zip(parameters.arrays, weights, strict=True)
        ]
    if len(parameters.tensors) != len(weights):
        raise BadUpdate(f"{len(parameters.tensors)} arrays instead of {len(weights)}")
    update = []
    for i, (tensor, old) in enumerate(zip(parameters.tensors, weights, strict=True)):
        array = _read_array(tensor, i)
        if array.shape != old.shape:
            raise BadUpdate(f"array {i} has shape {array.shape} instead of {old.shape}")
        dtype = travels_as(old.dtype, compress)
        if array.dtype != dtype:
            raise BadUpdate(f"array {i} has dtype {array.dtype} instead of {dtype}")
        update.append(array)
    return unpack(update, weights)


def validate_evaluate(res: EvaluateRes, partition: int, declared: int, main: Metric = ACCURACY) -> Score:
    """A client's scores, if the loss and the main metric are finite. Raises BadUpdate with the reason.

    A main metric that is no mean over examples may be undefined at one client, as an AUC with one class only.
    """
    _check_told(res.metrics, res.num_examples, declared)
    told = {"loss": res.loss, **res.metrics}
    for name in ("loss", main.name):
        undefined = name == main.name and not main.additive and math.isnan(_number(told.get(name)))
        if not _is_finite(told.get(name)) and not undefined:
            raise BadUpdate(f"its {name} is {clean(told.get(name), 40)}")
    read = _read_metrics(told, ("loss", main.name))
    metrics = {name: value for name, value in read.items() if not name.startswith(TRAIN)}
    if main.name not in metrics and _is_finite(told.get(main.name)):  # as a table's column is called so
        raise BadUpdate(f"its main metric is called {clean(main.name, 40)}, a name that is taken; choose another")
    epsilon, delta = (_spent(told.get(name)) for name in (DP_EPSILON, DP_DELTA))
    return Score(partition, res.num_examples, metrics, epsilon, delta)


def _spent(value: Any) -> float | None:
    return float(value) if _is_finite(value) and value >= 0 else None


def _read_metrics(told: dict, needed: Sequence[str]) -> dict[str, float]:
    """The finite numbers under usable names, of many those that are needed first.

    A metric that is no number, such as an undefined F1, is left out.
    """
    usable = [name for name, value in told.items() if METRIC_NAME.fullmatch(name) and _is_finite(value)]
    chosen = sorted(set(usable) - TAKEN, key=lambda name: (name not in needed, name))[:MOST_METRICS]
    return {name: float(told[name]) for name in sorted(chosen)}


def _check_told(metrics: dict, num_examples: int, declared: int) -> None:
    if "error" in metrics:
        raise BadUpdate(f"it says: {clean(metrics['error'])}", client_failed=True)
    if not 0 < num_examples <= declared:
        raise BadUpdate(f"it claims {num_examples} examples, having declared {declared} when it joined")


def _read_array(tensor: bytes, position: int) -> np.ndarray:
    """A NumPy array from .npy bytes. The header is read before memory is set aside: it may claim any shape."""
    start = 10 + int.from_bytes(tensor[8:10], "little")  # magic, version, length of the header, header
    try:
        shape, fortran, dtype = _read_header(tensor[:start])
    except Exception:  # numpy's header parser raises many kinds on hostile bytes
        raise BadUpdate(f"array {position} is not a NumPy array") from None
    if dtype.kind not in "fiub" or any(size < 0 for size in shape):
        raise BadUpdate(f"array {position} claims dtype {clean(dtype, 40)} and shape {clean(shape, 40)}")
    if math.prod(shape) * dtype.itemsize != len(tensor) - start:
        raise BadUpdate(f"array {position} has {len(tensor) - start} bytes, too many or too few for its shape")
    try:
        return np.frombuffer(tensor, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError):  # no bytes can claim (0, 2**99), four bytes a hundred dimensions, or (True,)
        raise BadUpdate(f"array {position} claims the shape {clean(shape, 40)}, which no array has") from None


@functools.lru_cache(maxsize=256)  # the same from all clients, and slow to read: numpy parses Python
def _read_header(header: bytes) -> tuple[tuple, bool, np.dtype]:
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError
    return np.lib.format.read_array_header_1_0(stream)


def _is_constant(new: Any, old: np.ndarray) -> bool:
    """Whether an array with infinities, such as a mask, is the one that all clients have."""
    return not _all_finite(old) and np.array_equal(np.asarray(new), old, equal_nan=True)


def _all_finite(array: Any) -> bool:
    return array.dtype.kind != "f" or all(np.isfinite(block(array, *place)).all() for place in blocks(array.size))


def _check_numbers(arrays: list[Any]) -> None:
    """Whether they can be multiplied by examples, summed, and squared by an optimiser, without becoming infinite."""
    for i, array in enumerate(arrays):
        if array.dtype.kind != "f":
            continue
        if not _all_finite(array):
            raise BadUpdate(f"array {i} holds NaN or infinite values")
        most = max(np.abs(block(array, *place)).max(initial=0) for place in blocks(array.size))
        if most > math.sqrt(np.finfo(array.dtype).max):
            raise BadUpdate(f"array {i} holds {most:g}, too large to be averaged")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.inf


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

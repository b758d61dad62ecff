"""What makes an answer fit to count: shapes, dtypes, finite values, and no more examples than were declared."""

import functools
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from federation.compression import travels_as, unpack
from federation.config import MAIN_METRIC
from federation.console import clean

import numpy as np
from flwr.common import EvaluateRes, FitRes, Parameters

TRAIN = "train_"  # begins the names of metrics of local training
TRAIN_LOSS = TRAIN + "loss"
MOST_METRICS = 16  # of one answer
METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
TAKEN = {"round", "clients", "seconds", "bytes_received", "updates", "time", "evaluated"}  # in history.json's rows
TAKEN |= {"received", "version", "staleness"}  # columns of the tables


class BadUpdate(Exception):
    """An answer that must not count; the text is the reason. client_failed: the client itself says that it failed."""

    def __init__(self, reason: str, client_failed: bool = False):
        super().__init__(reason)
        self.client_failed = client_failed


@dataclass(frozen=True, eq=False)
class Update:
    """A client's update that is fit to count."""

    partition: int
    weights: list[np.ndarray]  # by position, in the dtypes of the global model
    examples: int
    metrics: dict[str, float]  # of its training; names begin with train_


@dataclass(frozen=True)
class Score:
    """The global model on a client's test examples."""

    partition: int
    examples: int
    metrics: dict[str, float]  # "loss" among them


def read_weights(parameters: Parameters, buffer_positions: Sequence[int] = ()) -> list[np.ndarray]:
    """The untrained model as a client sends it; buffers may hold infinities. Raises BadUpdate; never unpickles."""
    weights = [_read_array(tensor, i) for i, tensor in enumerate(parameters.tensors)]
    if not weights:
        raise BadUpdate("it holds no arrays")
    _check_numbers([np.zeros(0) if i in buffer_positions else array for i, array in enumerate(weights)])
    return weights


def validate_fit(
    res: FitRes, partition: int, weights: list[np.ndarray], declared: int, compress: str = "none"
) -> Update:
    """A client's update, if it is fit to count next to `weights`. Raises BadUpdate with the reason.

    It must have come as `compress` has it, and is returned in the dtypes of `weights`.
    """
    _check_told(res.metrics, res.num_examples, declared)
    if len(res.parameters.tensors) != len(weights):
        raise BadUpdate(f"{len(res.parameters.tensors)} arrays instead of {len(weights)}")
    update = []
    for i, (tensor, old) in enumerate(zip(res.parameters.tensors, weights, strict=True)):
        array = _read_array(tensor, i)
        if array.shape != old.shape:
            raise BadUpdate(f"array {i} has shape {array.shape} instead of {old.shape}")
        dtype = travels_as(old.dtype, compress)
        if array.dtype != dtype:
            raise BadUpdate(f"array {i} has dtype {array.dtype} instead of {dtype}")
        update.append(array)
    update = unpack(update, weights)
    _check_numbers([np.zeros(0) if _is_constant(new, old) else new for new, old in zip(update, weights, strict=True)])
    if not _is_finite(res.metrics.get(TRAIN_LOSS)):
        raise BadUpdate(f"its training loss is {clean(res.metrics.get(TRAIN_LOSS), 40)}")
    metrics = {TRAIN + name.removeprefix(TRAIN): value for name, value in _read_metrics(res.metrics).items()}
    return Update(partition, update, res.num_examples, metrics)


def validate_evaluate(res: EvaluateRes, partition: int, declared: int) -> Score:
    """A client's scores, if the loss and the main metric are finite. Raises BadUpdate with the reason."""
    _check_told(res.metrics, res.num_examples, declared)
    told = {"loss": res.loss, **res.metrics}
    for name in ("loss", MAIN_METRIC):
        if not _is_finite(told.get(name)):
            raise BadUpdate(f"its {name} is {clean(told.get(name), 40)}")
    metrics = {name: value for name, value in _read_metrics(told).items() if not name.startswith(TRAIN)}
    return Score(partition, res.num_examples, metrics)


def _read_metrics(told: dict) -> dict[str, float]:
    """The finite numbers under usable names; a metric that isn't one, such as an undefined F1, is left out."""
    usable = [name for name, value in told.items() if METRIC_NAME.fullmatch(name) and _is_finite(value)]
    return {name: float(told[name]) for name in sorted(usable)[:MOST_METRICS] if name not in TAKEN}


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


def _is_constant(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether an array with infinities, such as a mask, is the one that all clients have."""
    return not np.isfinite(old).all() and np.array_equal(new, old, equal_nan=True)


def _check_numbers(arrays: list[np.ndarray]) -> None:
    """Whether they can be multiplied by examples, summed, and squared by an optimiser, without becoming infinite."""
    for i, array in enumerate(arrays):
        if array.dtype.kind != "f":
            continue
        if not np.isfinite(array).all():
            raise BadUpdate(f"array {i} holds NaN or infinite values")
        most = np.abs(array).max(initial=0)
        if most > math.sqrt(np.finfo(array.dtype).max):
            raise BadUpdate(f"array {i} holds {most:g}, too large to be averaged")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)

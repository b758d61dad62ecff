"""What makes an answer fit to count: shapes, dtypes, finite values, and no more examples than were declared."""

import functools
import io
import math

from federation.wire import travels_as, unpack
from federation.words import clean

import numpy as np
from flwr.common import EvaluateRes, FitRes, Parameters


class BadUpdate(Exception):
    """An answer that must not count; the text is the reason. client_failed: the client itself says that it failed."""

    def __init__(self, reason: str, client_failed: bool = False):
        super().__init__(reason)
        self.client_failed = client_failed


Update = tuple[list[np.ndarray], int]  # weights by position, number of examples


def read_weights(parameters: Parameters) -> list[np.ndarray]:
    """Arrays from the wire, with nothing to compare them to. Raises BadUpdate; never unpickles."""
    weights = [_read_array(tensor, i) for i, tensor in enumerate(parameters.tensors)]
    if not weights:
        raise BadUpdate("it holds no arrays")
    _check_finite(weights)
    _check_size(weights)
    return weights


def check_fit(res: FitRes, weights: list[np.ndarray], declared: int, compress: str = "none") -> Update:
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
    _check_finite(update)
    _check_size(update)
    if not _is_finite(res.metrics.get("train_loss")):
        raise BadUpdate(f"its training loss is {clean(res.metrics.get('train_loss'), 40)}")
    return unpack(update, weights), res.num_examples


def check_evaluate(res: EvaluateRes, declared: int) -> tuple[float, float, int]:
    """Loss, accuracy and number of examples, if they make sense. Raises BadUpdate with the reason."""
    _check_told(res.metrics, res.num_examples, declared)
    accuracy = res.metrics.get("accuracy")
    if not _is_finite(res.loss):
        raise BadUpdate(f"its loss is {res.loss}")
    if not (_is_finite(accuracy) and 0 <= accuracy <= 1):
        raise BadUpdate(f"its accuracy is {clean(accuracy, 40)}, not within 0 and 1")
    return float(res.loss), float(accuracy), res.num_examples


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


def _check_finite(arrays: list[np.ndarray]) -> None:
    for i, array in enumerate(arrays):
        if not np.isfinite(array).all():
            raise BadUpdate(f"array {i} holds NaN or infinite values")


def _check_size(arrays: list[np.ndarray]) -> None:
    """Whether they can be multiplied by examples, summed, and squared by an optimiser, without becoming infinite."""
    for i, array in enumerate(arrays):
        most = np.abs(array).max(initial=0) if array.dtype.kind == "f" else 0
        if most and most > math.sqrt(np.finfo(array.dtype).max):
            raise BadUpdate(f"array {i} holds {most:g}, too large to be averaged")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)

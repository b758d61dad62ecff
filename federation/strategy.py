"""Aggregation by Flower's own strategies, after every update has been checked."""

import io
import math
from collections.abc import Callable

from federation.wire import as_sent, travels_as, unpack
from federation.words import clean

import numpy as np
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, Krum

# Server-side step sizes as in Reddi et al. 2021 (arXiv:2003.00295), table 8 and section 4, and, for the
# momentum, Hsu et al. 2019 (arXiv:1909.06335).
STRATEGIES: dict[str, Callable[[Parameters], FedAvg]] = {
    "fedavg": lambda initial: FedAvg(inplace=False, fit_metrics_aggregation_fn=_no_metrics),
    "fedavgm": lambda initial: FedAvgM(
        server_momentum=0.5, initial_parameters=initial, fit_metrics_aggregation_fn=_no_metrics
    ),
    "fedadam": lambda initial: FedAdam(
        eta=0.01, tau=0.001, initial_parameters=initial, fit_metrics_aggregation_fn=_no_metrics
    ),
    "fedmedian": lambda initial: FedMedian(inplace=False, fit_metrics_aggregation_fn=_no_metrics),
    "fedtrimmedavg": lambda initial: FedTrimmedAvg(beta=0.34, fit_metrics_aggregation_fn=_no_metrics),
    "krum": lambda initial: Krum(num_malicious_clients=1, fit_metrics_aggregation_fn=_no_metrics),
}
# What the optimisers keep from round to round; a resumed run needs it for the same bits.
STATE = {"fedavgm": ("momentum_vector",), "fedadam": ("current_weights", "m_t", "v_t")}


class BadUpdate(Exception):
    """An answer that must not count; the text is the reason. client_failed: the client itself says that it failed."""

    def __init__(self, reason: str, client_failed: bool = False):
        super().__init__(reason)
        self.client_failed = client_failed


Update = tuple[list[np.ndarray], int]  # weights by position, number of examples


class CheckedStrategy:
    """One of Flower's strategies, fed with checked updates in the order of their partitions.

    Only floating-point arrays that are trained go through the strategy. Integer arrays (BatchNorm's
    counters) become the rounded weighted mean in their own dtype, and under a server optimiser
    (fedavgm, fedadam) the arrays at the positions in `statistics` (BatchNorm's running mean and
    variance) become the plain weighted mean: a step of Adam could make a variance negative.
    """

    def __init__(
        self,
        name: str,
        weights: list[np.ndarray],
        statistics: list[int],
        max_update_norm: float | None = None,
        compress: str = "none",
    ):
        self.name = name
        self.max_update_norm = max_update_norm
        self.compress = compress
        self.aggregations = 0
        averaged = set(statistics) if name in STATE else set()
        self.trained = [i for i, array in enumerate(weights) if array.dtype.kind == "f" and i not in averaged]
        self.flower = STRATEGIES[name](ndarrays_to_parameters([weights[i] for i in self.trained]))

    def aggregate(self, weights: list[np.ndarray], updates: list[Update]) -> list[np.ndarray]:
        """The next global weights, as they will be sent; without any update, the same. Updates must have been checked.

        Raises TooLarge where they can't be sent.
        """
        if not updates:
            return weights
        self.aggregations += 1
        if self.max_update_norm is not None:
            updates = [(clip(update, weights, self.max_update_norm), n) for update, n in updates]
        results = [(None, _fit_res([update[i] for i in self.trained], n)) for update, n in updates]
        # Flower's optimisers take round 1 for their first step: a round without updates must not count.
        parameters, _ = self.flower.aggregate_fit(self.aggregations, results, [])
        new = [weighted_mean([(update[i], n) for update, n in updates]) for i in range(len(weights))]
        for i, array in zip(self.trained, parameters_to_ndarrays(parameters), strict=True):
            new[i] = array
        new = as_sent([as_dtype(array, old.dtype) for array, old in zip(new, weights, strict=True)], self.compress)
        self._go_on_from(new)
        return new

    def state(self) -> list[np.ndarray]:
        """Arrays that restore() takes back."""
        kept = [getattr(self.flower, name) or [] for name in STATE.get(self.name, ())]
        return [np.array(self.aggregations), *(array for arrays in kept for array in arrays)]

    def restore(self, state: list[np.ndarray], weights: list[np.ndarray]) -> None:
        """Go on as the strategy that state() was called on, whose global weights were these."""
        self.aggregations, rest = int(state[0]), state[1:]
        for number, name in enumerate(STATE.get(self.name, ())):
            arrays = rest[number * len(self.trained) : (number + 1) * len(self.trained)]
            setattr(self.flower, name, list(arrays) or None)
        self._go_on_from(weights)

    def _go_on_from(self, weights: list[np.ndarray]) -> None:
        """Flower's momentum steps from the model that the clients get."""
        if self.name == "fedavgm":
            self.flower.initial_parameters = ndarrays_to_parameters([weights[i] for i in self.trained])


def read_weights(parameters: Parameters) -> list[np.ndarray]:
    """Arrays from the wire, with nothing to compare them to. Raises BadUpdate; never unpickles."""
    weights = [_read_array(tensor, i) for i, tensor in enumerate(parameters.tensors)]
    if not weights:
        raise BadUpdate("it holds no arrays")
    _check_finite(weights)
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


def clip(update: list[np.ndarray], weights: list[np.ndarray], max_norm: float) -> list[np.ndarray]:
    """Shorten the step from weights to update to an L2 norm of max_norm at most; integer arrays stay as they are.

    In float64: a float32 step between huge but finite values would be infinite, and its clipped self NaN.
    """
    pairs = list(zip(update, weights, strict=True))
    steps = [np.subtract(new, old, dtype=np.float64) if old.dtype.kind == "f" else None for new, old in pairs]
    norm = math.sqrt(sum(float(np.sum(np.square(step))) for step in steps if step is not None))
    if norm <= max_norm:
        return update
    shortened = zip(pairs, steps, strict=True)
    return [
        new if step is None else (old + step * (max_norm / norm)).astype(old.dtype) for (new, old), step in shortened
    ]


def weighted_mean(values: list[tuple[np.ndarray | float, int]]) -> np.ndarray:
    """Mean of (value, examples) pairs, in float64, weighted by examples."""
    return sum(np.asarray(value, np.float64) * n for value, n in values) / sum(n for _, n in values)


def _check_told(metrics: dict, num_examples: int, declared: int) -> None:
    if "error" in metrics:
        raise BadUpdate(f"it says: {clean(metrics['error'])}", client_failed=True)
    if not 0 < num_examples <= declared:
        raise BadUpdate(f"it claims {num_examples} examples, having declared {declared} when it joined")


def _read_array(tensor: bytes, position: int) -> np.ndarray:
    """A NumPy array from .npy bytes. The header is read before memory is set aside: it may claim any shape."""
    stream = io.BytesIO(tensor)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # numpy's header parser raises many kinds on hostile bytes
        raise BadUpdate(f"array {position} is not a NumPy array") from None
    if dtype.kind not in "fiub" or any(size < 0 for size in shape):
        raise BadUpdate(f"array {position} claims dtype {clean(dtype, 40)} and shape {clean(shape, 40)}")
    if math.prod(shape) * dtype.itemsize != len(tensor) - stream.tell():
        raise BadUpdate(f"array {position} has {len(tensor) - stream.tell()} bytes, too many or too few for its shape")
    try:
        return np.frombuffer(tensor, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError):  # no bytes can claim (0, 2**99), four bytes a hundred dimensions, or (True,)
        raise BadUpdate(f"array {position} claims the shape {clean(shape, 40)}, which no array has") from None


def _check_finite(arrays: list[np.ndarray]) -> None:
    for i, array in enumerate(arrays):
        if not np.isfinite(array).all():
            raise BadUpdate(f"array {i} holds NaN or infinite values")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def as_dtype(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return (array if dtype.kind == "f" else np.rint(array)).astype(dtype)


def _fit_res(arrays: list[np.ndarray], num_examples: int) -> FitRes:
    return FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), num_examples, {})


def _no_metrics(_: object) -> dict:
    """Given to Flower's strategies, which otherwise warn that they have no such function."""
    return {}

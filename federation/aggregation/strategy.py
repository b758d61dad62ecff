"""Aggregation by Flower's own strategies, after every update has been validated."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from federation.aggregation.batchnorm import pooled
from federation.aggregation.means import as_dtype, mean_array
from federation.aggregation.validation import Update
from federation.compression import as_sent
from federation.pieces import LazyArray, Part, block, blocks, joined, parts
from federation.security.clipping import clip

import numpy as np
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, Krum

# A Flower strategy, made of the run's settings and of the first global model. Only its aggregate_fit is called, so a
# strategy that configures rounds in its own way (configure_fit or configure_evaluate) is refused. Step sizes as in
# Reddi et al. 2021 (arXiv:2003.00295), table 8 and section 4; the momentum as in Hsu et al. 2019 (arXiv:1909.06335).
MakeStrategy = Callable[[Any, Parameters], FedAvg]
STRATEGIES: dict[str, MakeStrategy] = {
    "fedavg": lambda settings, initial: FedAvg(inplace=False, fit_metrics_aggregation_fn=_no_metrics),
    "fedavgm": lambda settings, initial: FedAvgM(
        server_learning_rate=settings.server_learning_rate,
        server_momentum=settings.server_momentum,
        initial_parameters=initial,
        fit_metrics_aggregation_fn=_no_metrics,
    ),
    "fedadam": lambda settings, initial: FedAdam(
        eta=settings.server_learning_rate,
        tau=0.001,
        initial_parameters=initial,
        fit_metrics_aggregation_fn=_no_metrics,
    ),
    "fedmedian": lambda settings, initial: FedMedian(inplace=False, fit_metrics_aggregation_fn=_no_metrics),
    "fedtrimmedavg": lambda settings, initial: FedTrimmedAvg(
        beta=settings.trimmed_fraction, fit_metrics_aggregation_fn=_no_metrics
    ),
    "krum": lambda settings, initial: Krum(
        num_malicious_clients=settings.malicious_clients, fit_metrics_aggregation_fn=_no_metrics
    ),
}
# What the optimisers keep from round to round; a resumed run needs it for the same bits.
STATE: dict[type[FedAvg], tuple[str, ...]] = {
    FedAvgM: ("momentum_vector",),
    FedAdam: ("current_weights", "m_t", "v_t"),
}
# These treat each number by itself, so they can be given a few at a time. Flower makes three copies of all that it
# is given, from every client: with a hundred clients, of three hundred models.
BY_NUMBER = (FedAvg, FedMedian, FedTrimmedAvg)
MEASURED = (*BY_NUMBER, *STATE)  # whose models take BatchNorm's statistics as they are measured on them
PIECE = 16_384  # numbers
Weighted = tuple[list[Any], int]  # arrays, number of examples
Step = Callable[[list[Part], list[Weighted]], list[np.ndarray]]


class CheckedStrategy:
    """One of Flower's strategies, given validated updates in the order of their partitions.

    Only floating-point arrays that are trained go through the strategy. Integer arrays (BatchNorm's
    counters) become the rounded weighted mean in their own dtype, and under a server optimiser
    (FedAvgM, FedAdam) the arrays at `buffer_positions` (BatchNorm's running mean and variance)
    become the plain weighted mean: a step of Adam could make a variance negative.
    """

    def __init__(
        self,
        make: MakeStrategy,
        settings: Any,
        weights: list[np.ndarray],
        buffer_positions: list[int],
        compress: str = "none",
    ):
        self.max_update_norm = settings.max_update_norm
        self.compress = compress
        self.aggregations = 0
        self.flower = make(settings, ndarrays_to_parameters([]))
        self.state_names = STATE.get(type(self.flower), ())
        averaged = set(buffer_positions) if self.state_names else set()
        self.constant = {i for i, array in enumerate(weights) if not np.isfinite(array).all()}  # a mask, say
        kept = averaged | self.constant
        self.trained = [i for i, array in enumerate(weights) if array.dtype.kind == "f" and i not in kept]
        self.flower = make(settings, ndarrays_to_parameters([weights[i] for i in self.trained]))
        self.flower.initial_parameters = None  # a copy of the model, which is in `start`, or FedAdam's own
        self._go_on_from(weights)

    def aggregate(self, weights: list[np.ndarray], updates: list[Update]) -> list[np.ndarray]:
        """The next global weights, as they will be sent; without any update, the same.

        Raises TooLarge where they can't be sent.
        """
        if not updates:
            return weights
        self.aggregations += 1
        pairs = [(update.weights, update.examples) for update in updates]
        if self.max_update_norm is not None:
            pairs = [(clip(arrays, weights, self.max_update_norm), n) for arrays, n in pairs]
        by_flower = dict(zip(self.trained, self._by_flower(pairs), strict=True))
        new = []
        for i, old in enumerate(weights):
            if i in self.constant:
                new.append(old)
            elif i in by_flower:
                new.append(as_dtype(by_flower[i], old.dtype))
            else:
                new.append(mean_array([(np.asarray(arrays[i]), n) for arrays, n in pairs]))
        new = as_sent(new, self.compress)
        self._go_on_from(new)
        return new

    def with_statistics(
        self, weights: list[np.ndarray], positions: list[int], measured: list[Update]
    ) -> list[np.ndarray]:
        """These weights with BatchNorm's statistics as the clients measured them on them; without any, the same.

        positions: of running mean and variance of each layer, by turns, as the arrays of each update. FedMedian and
        FedTrimmedAvg treat them like the numbers of an update; else they become those of all examples together.
        """
        if not measured:
            return weights
        pairs, old = [(update.weights, update.examples) for update in measured], [weights[i] for i in positions]
        if self.max_update_norm is not None:
            pairs = [(clip(arrays, old, self.max_update_norm), n) for arrays, n in pairs]
        by_number = isinstance(self.flower, FedMedian | FedTrimmedAvg)
        statistics = self._ask_flower(self.flower, pairs) if by_number else pooled(pairs)
        new = dict(zip(positions, as_sent(statistics, self.compress), strict=True))
        return [new.get(i, array) for i, array in enumerate(weights)]

    def state(self) -> list[np.ndarray]:
        """Arrays that restore() takes back."""
        kept = [getattr(self.flower, name) or [] for name in self.state_names]
        return [np.array(self.aggregations), *(array for arrays in kept for array in arrays)]

    def restore(self, state: list[np.ndarray], weights: list[np.ndarray]) -> None:
        """Go on as the strategy that state() was called on, whose global weights were these."""
        self.aggregations, rest = int(state[0]), state[1:]
        for number, name in enumerate(self.state_names):
            arrays = rest[number * len(self.trained) : (number + 1) * len(self.trained)]
            setattr(self.flower, name, list(arrays) or None)
        self._go_on_from(weights)

    def _by_flower(self, updates: list[Weighted]) -> list[np.ndarray]:
        """The next values of the arrays at the positions in `trained`."""
        if isinstance(self.flower, Krum):
            return self._by_krum(updates)
        if type(self.flower) in BY_NUMBER:
            (new,) = self._in_blocks(updates, lambda place, pairs: self._ask_flower(self.flower, pairs))
            return new
        return self._by_optimiser(updates)

    def _by_optimiser(self, updates: list[Weighted]) -> list[np.ndarray]:
        """The server's optimisers need the mean only, to the bit as they work it out, and their own state's numbers."""
        # Flower's FedAvgM multiplies by examples first, its FedAdam by each client's part of them.
        averaging = FedAvg(inplace=not isinstance(self.flower, FedAvgM), fit_metrics_aggregation_fn=_no_metrics)
        old = {name: getattr(self.flower, name) for name in self.state_names}

        def step(place: list[Part], pairs: list[Weighted]) -> list[np.ndarray]:
            for name, arrays in old.items():
                setattr(self.flower, name, [joined(arrays, place)] if arrays else None)
            if isinstance(self.flower, FedAvgM):
                self.flower.initial_parameters = ndarrays_to_parameters([joined(self.start, place)])
            new = self._ask_flower(self.flower, [(self._ask_flower(averaging, pairs), 1)])
            return new + [arrays[0] for name in old if (arrays := getattr(self.flower, name))]

        new, *state = self._in_blocks(updates, step)
        for name, arrays in zip(old, state, strict=False):  # without momentum FedAvgM has none
            setattr(self.flower, name, arrays)
        return new

    def _by_krum(self, updates: list[Weighted]) -> list[np.ndarray]:
        """Krum compares whole updates. Of stored ones it is shown points at the same distances from each other."""
        if not any(isinstance(update[i], LazyArray) for update, _ in updates for i in self.trained):
            return self._ask_flower(self.flower, [([update[i] for i in self.trained], n) for update, n in updates])
        points = _points([[update[i] for i in self.trained] for update, _ in updates])
        (chosen,) = self._ask_flower(self.flower, [([point], n) for point, (_, n) in zip(points, updates, strict=True)])
        best = next(k for k, point in enumerate(points) if np.array_equal(point, chosen))
        return [np.asarray(updates[best][0][i]) for i in self.trained]

    def _in_blocks(self, updates: list[Weighted], step: Step) -> list[list[np.ndarray]]:
        """What step(parts of the `trained` arrays, the updates' numbers there) gives, put together to whole arrays."""
        trained = [([update[i] for i in self.trained], n) for update, n in updates]
        like, made = trained[0][0], defaultdict(list)
        for place in parts(like, PIECE, of=len(updates)):
            for each, numbers in enumerate(step(place, [([Block(arrays, place)], n) for arrays, n in trained])):
                begin = 0
                for k, start, stop in place:
                    if start == 0:
                        made[each].append(np.empty(like[k].shape, numbers.dtype))
                    made[each][k].reshape(-1)[start:stop] = numbers[begin : begin + stop - start]
                    begin += stop - start
        return list(made.values()) or [[]]

    def _ask_flower(self, flower: FedAvg, updates: list[Weighted]) -> list[np.ndarray]:
        results: list[Any] = [(None, _fit_res(arrays, n)) for arrays, n in updates]  # no proxies: none is asked
        # Flower's optimisers take round 1 for their first step: a round without updates must not count.
        parameters, _ = flower.aggregate_fit(self.aggregations, results, [])
        assert parameters is not None
        return parameters_to_ndarrays(parameters)

    def _go_on_from(self, weights: list[np.ndarray]) -> None:
        """Flower's momentum steps from the model that the clients get."""
        self.start = [weights[i] for i in self.trained]


def measures(make: MakeStrategy, settings: Any) -> bool:
    """Whether BatchNorm's statistics are measured on what it makes: Krum's model is one client's, with its own."""
    return type(make(settings, ndarrays_to_parameters([]))) in MEASURED


def unsupported(make: MakeStrategy, settings: Any) -> str:
    """Why a strategy can't be used here, or "". FedProx, say, would run, and be FedAvg."""
    strategy = type(make(settings, ndarrays_to_parameters([])))
    for name in ("configure_fit", "configure_evaluate"):
        if getattr(strategy, name) is not getattr(FedAvg, name):
            remedy = "FedProx is --proximal-mu here" if strategy.__name__ == "FedProx" else "use another"
            return f"is Flower's {strategy.__name__}, whose own {name} is not called here; {remedy}"
    return ""


def _points(updates: list[list[Any]]) -> np.ndarray:
    """A point for each update, (n, n) float64, as far from each other as the updates are in their L2 norm.

    From the products of all pairs of differences to the first, summed block by block: G = P P^T.
    """
    gram = np.zeros((len(updates), len(updates)))
    for i, array in enumerate(updates[0]):
        for place in blocks(array.size, 4 * PIECE, of=len(updates)):
            rows = np.stack([block(update[i], *place) for update in updates]).astype(np.float64)
            rows -= rows[0]
            gram += rows @ rows.T
    values, vectors = np.linalg.eigh(gram)
    return vectors * np.sqrt(np.maximum(values, 0.0))


@dataclass(frozen=True, eq=False)
class Block:
    """Numbers of one client's arrays, read as they are needed."""

    arrays: list[Any]
    place: list[Part]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return joined(self.arrays, self.place)


class Unwritten(Parameters):
    """Flower's Parameters of arrays that become bytes only as they are read: of one client after the other."""

    def __init__(self, arrays: list[Any]) -> None:
        self.arrays, self.tensor_type = arrays, "numpy.ndarray"

    @property
    def tensors(self) -> list[bytes]:  # type: ignore[override]
        return ndarrays_to_parameters([np.asarray(array) for array in self.arrays]).tensors


def _fit_res(arrays: list[Any], num_examples: int) -> FitRes:
    return FitRes(Status(Code.OK, ""), Unwritten(arrays), num_examples, {})


def _no_metrics(_: object) -> dict:
    """Given to Flower's strategies, which otherwise warn that they have no such function."""
    return {}

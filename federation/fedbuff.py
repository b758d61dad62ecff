"""Asynchronous aggregation in a buffer (FedBuff): who trains what, and what becomes of it. No clock, no network."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from federation.checks import Update
from federation.recipe import Terms
from federation.strategy import CheckedStrategy, as_dtype, clip, weighted_mean
from federation.wire import as_sent

import numpy as np


@dataclass(frozen=True)
class Training:
    """One training that was handed out: all that its result depends on beside the client's own images."""

    partition: int
    number: int  # of this client's trainings, from 1; its randomness is drawn from it
    version: int  # of the model that it starts from
    begins: int  # updates that had come in when it was handed out...
    ends: int  # ...and that will have when it is done, if the client takes as long as last time


@dataclass(frozen=True)
class Change:
    """What one training made of its model, waiting in the buffer."""

    training: Training
    staleness: int  # versions made since the client got its model
    weights: list[np.ndarray]
    base: list[np.ndarray]  # the weights that it started from
    examples: int
    train_loss: float

    def to_json(self) -> dict:
        return {**asdict(self.training), "staleness": self.staleness}


class FedBuff:
    """The model of an asynchronous run, its buffer, and the count of updates that tells how far it is.

    `updates` of `total` have come in: that is how far the run is. Of the learning-rate schedule, which
    spans the run, a training gets the part in which it will last, as far as can be told: one update of
    each client, as in a round, or as many as came in during its last training, where a client is slow.
    """

    def __init__(
        self, weights: list[np.ndarray], statistics: list[int], terms: Terms, rounds: int, compress: str = "none"
    ):
        self.weights = weights
        self.terms = terms
        self.compress = compress
        self.total = rounds * terms.clients
        self.version = 0
        self.updates = 0
        self.buffer: list[Change] = []
        self._fedavg = CheckedStrategy("fedavg", weights, statistics, compress=compress)
        self._measured = {i for i, array in enumerate(weights) if i in statistics or array.dtype.kind != "f"}
        self._trainings: dict[int, int] = {}  # done, by partition
        self._returned: dict[int, Training] = {}  # the last one that came back since the client got its next
        self._spans: dict[int, int] = {}  # updates that came in during a client's last training, its own among them

    def restore(self, version: int, rows: list[dict]) -> None:
        """Go on after `rows`, the history of versions, the last of which is the one in `weights`."""
        self.version = version
        for change in (change for row in rows for change in row["updates"]):
            self.updates += 1
            self._trainings[change["partition"]] = change["number"]

    def hand_out(self, partition: int) -> Training:
        """The next training of a free client: on the newest model."""
        before = self._returned.pop(partition, None)
        if before:
            self._spans[partition] = max(self.terms.clients, self.updates - before.begins)
        ends = min(self.total, self.updates + self._spans.get(partition, self.terms.clients))
        number = self._trainings.get(partition, 0) + 1
        return Training(partition, number, self.version, self.updates, ends)

    def came_back(self, training: Training) -> None:
        """Its client is free again, whatever its update is worth: the next training draws anew."""
        self._trainings[training.partition] = training.number
        self._returned[training.partition] = training

    def receive(self, training: Training, base: list[np.ndarray], update: Update, train_loss: float) -> bool:
        """Put a checked update into the buffer; base: the weights it started from. False where it is too stale."""
        staleness = self.version - training.version
        if staleness > self.terms.max_staleness:
            return False
        weights, examples = update
        if self.terms.max_update_norm is not None:
            weights = clip(weights, base, self.terms.max_update_norm)
        self.buffer.append(Change(training, staleness, weights, base, examples, train_loss))
        self.updates += 1
        return True

    def is_due(self) -> bool:
        """Whether the buffer is full, or will not get any fuller. It may hold more: what came in the same moment."""
        return len(self.buffer) >= self.terms.buffer_size or (self.updates >= self.total and bool(self.buffer))

    def apply(self) -> list[Change]:
        """Make a new version of what is in the buffer, and empty it; returns what was in it, as it came.

        Summed by partition and number, so that the order within a buffer makes no difference. What is
        left at the end of the run in a buffer that is part full moves the model by that part.
        Raises TooLarge where the new version can't be sent.
        """
        changes, self.buffer = self.buffer, []
        in_order = sorted(changes, key=lambda change: (change.training.partition, change.training.number))
        part, rate = min(1.0, len(changes) / self.terms.buffer_size), self.terms.server_learning_rate
        if part == rate == 1.0 and not any(change.staleness for change in changes):
            # The formula is FedAvg's then. Computed as in rounds, it ends in the same bits too.
            self.weights = self._fedavg.aggregate(self.weights, [(c.weights, c.examples) for c in in_order])
        else:
            moved = [self._moved(i, in_order, part, rate) for i in range(len(self.weights))]
            self.weights = as_sent(moved, self.compress)
        self.version += 1
        return changes

    def _moved(self, i: int, changes: list[Change], part: float, rate: float) -> np.ndarray:
        """The array at position i, one step on; where it is measured, not trained, towards what was measured."""
        old, measured = self.weights[i], i in self._measured
        steps = [(c.weights[i] - (old if measured else c.base[i]), c.examples, c.staleness) for c in changes]
        return as_dtype(old + part * (1.0 if measured else rate) * mean_step(steps), old.dtype)


def mean_step(steps: list[tuple[np.ndarray, int, int]]) -> np.ndarray:
    """The step of one array from (difference Δ, examples n, staleness τ) triples, in float64.

    With Δᵢ what client i changed in the version that it started from, the next version is

        w ← w + η Σᵢ nᵢ sᵢ Δᵢ / Σᵢ nᵢ,   sᵢ = 1/√(1 + τᵢ),   η the server's learning rate:

    FedBuff, Nguyen et al. 2022, arXiv:2106.06639, algorithm 1 with its staleness scaling, and with
    examples as weights, as in FedAvg, which it is when nothing is stale and η is 1. Staleness shortens
    the step itself, so that it tells even in a buffer of one.
    """
    return weighted_mean([(np.asarray(step, np.float64) / math.sqrt(1 + staleness), n) for step, n, staleness in steps])


def replay(
    rows: list[dict],
    weights: list[np.ndarray],
    statistics: list[int],
    terms: Terms,
    rounds: int,
    train: Callable[[Training, list[np.ndarray]], Update],
    compress: str = "none",
) -> list[np.ndarray]:
    """The weights that a run ended with, from the order of arrival in its history and nothing else.

    rows: history.json's "rounds"; weights: the untrained model; train(training, weights) does a client's work again,
    with as_sent() at both ends where the run's weights travelled compressed.
    """
    run = FedBuff(weights, statistics, terms, rounds, compress)
    versions = [weights]
    for row in rows[1:]:
        for change in row["updates"]:
            training = Training(**{name: value for name, value in change.items() if name != "staleness"})
            base = versions[training.version]
            run.receive(training, base, train(training, base), train_loss=0.0)
        run.apply()
        versions.append(run.weights)
    return run.weights

"""Asynchronous aggregation in a buffer (FedBuff): who trains what, and what becomes of it. No clock, no network."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from federation.aggregation.means import as_dtype, mean_array, weighted_mean
from federation.aggregation.strategy import STRATEGIES, CheckedStrategy
from federation.aggregation.validation import Update
from federation.compression import as_sent
from federation.security.clipping import clip

import numpy as np


@dataclass(frozen=True)
class TrainingJob:
    """One training that was handed out: all that its result depends on beside the client's own images."""

    partition: int
    number: int  # of this client's trainings, from 1; its randomness is drawn from it
    version: int  # of the model that it starts from
    begins: int  # updates that had come in when it was handed out...
    ends: int  # ...and that will have when it is done, if the client takes as long as last time


@dataclass(frozen=True)
class BufferedUpdate:
    """What one training made of its model, waiting in the buffer."""

    job: TrainingJob
    staleness: int  # versions made since the client got its model
    base: list[np.ndarray]  # the weights that it started from
    update: Update

    def to_json(self) -> dict:
        return {**asdict(self.job), "staleness": self.staleness}


class FedBuff:
    """The model of an asynchronous run, its buffer, and the count of updates that tells how far it is.

    `updates` of `total` have come in: that is how far the run is. Of the learning-rate schedule, which
    spans the run, a training gets the part in which it will last, as far as can be told: one update of
    each client, as in a round, or as many as came in during its last training, where a client is slow.
    """

    def __init__(
        self,
        weights: list[np.ndarray],
        buffer_positions: list[int],
        settings: Any,
        rounds: int,
        compress: str = "none",
    ):
        """settings: those of the server, as in server/settings.py."""
        self.weights = weights
        self.settings = settings
        self.compress = compress
        self.total = rounds * settings.clients
        self.version = 0
        self.updates = 0
        self.taken_back: set[int] = set()  # versions that nothing builds on any more
        self.buffer: list[BufferedUpdate] = []
        unclipped = dataclasses.replace(settings, max_update_norm=None)  # receive() clips
        self._fedavg = CheckedStrategy(STRATEGIES["fedavg"], unclipped, weights, buffer_positions, compress)
        self._measured = {i for i, array in enumerate(weights) if i in buffer_positions or array.dtype.kind != "f"}
        self._trainings: dict[int, int] = {}  # done, by partition
        self._returned: dict[int, TrainingJob] = {}  # the last one that came back since the client got its next
        self._spans: dict[int, int] = {}  # updates that came in during a client's last training, its own among them

    def restore(self, version: int, updates: Iterable[dict], taken_back: Iterable[int] = ()) -> None:
        """Go on after these updates, as history.json has them, from which the version in `weights` came last.

        taken_back: versions whose updates are not among them.
        """
        self.version = version
        self.taken_back = set(taken_back)
        for update in updates:
            self.updates += 1
            self._trainings[update["partition"]] = update["number"]

    def hand_out(self, partition: int) -> TrainingJob:
        """The next training of a free client: on the newest model."""
        before = self._returned.pop(partition, None)
        if before:
            self._spans[partition] = max(self.settings.clients, self.updates - before.begins)
        ends = min(self.total, self.updates + self._spans.get(partition, self.settings.clients))
        number = self._trainings.get(partition, 0) + 1
        return TrainingJob(partition, number, self.version, self.updates, ends)

    def came_back(self, job: TrainingJob) -> None:
        """Its client is free again, whatever its update is worth: the next training draws anew."""
        self._trainings[job.partition] = job.number
        self._returned[job.partition] = job

    def staleness(self, job: TrainingJob, version: int | None = None) -> int:
        """Versions made since the one that it started from, up to this one, or the newest, and not taken back."""
        newest = self.version if version is None else version
        return sum(each not in self.taken_back for each in range(job.version + 1, newest + 1))

    def receive(self, job: TrainingJob, base: list[np.ndarray], update: Update, staleness: int | None = None) -> bool:
        """Put a validated update into the buffer; base: the weights it started from. False where it is too stale.

        staleness: where it is known already.
        """
        staleness = self.staleness(job) if staleness is None else staleness
        if staleness > self.settings.max_staleness:
            return False
        if self.settings.max_update_norm is not None:
            clipped = clip(update.weights, base, self.settings.max_update_norm)
            update = dataclasses.replace(update, weights=clipped)
        self.buffer.append(BufferedUpdate(job, staleness, base, update))
        self.updates += 1
        return True

    def is_due(self) -> bool:
        """Whether the buffer is full, or will not get any fuller. It may hold more: what came in the same moment."""
        return len(self.buffer) >= self.settings.buffer_size or (self.updates >= self.total and bool(self.buffer))

    def apply(self) -> list[BufferedUpdate]:
        """Make a new version of what is in the buffer, and empty it; returns what was in it, as it came.

        Summed by partition and number, so that the order within a buffer makes no difference. What is
        left at the end of the run in a buffer that is part full moves the model by that part.
        Raises TooLarge where the new version can't be sent.
        """
        buffered, self.buffer = self.buffer, []
        in_order = sorted(buffered, key=lambda each: (each.job.partition, each.job.number))
        part, rate = min(1.0, len(buffered) / self.settings.buffer_size), self.settings.server_learning_rate
        if not buffered or (part == rate == 1.0 and not any(each.staleness for each in buffered)):
            # The formula is FedAvg's then. Computed as in rounds, it ends in the same bits too.
            self.weights = self._fedavg.aggregate(self.weights, [each.update for each in in_order])
        else:
            moved = [self._moved(i, in_order, part, rate) for i in range(len(self.weights))]
            self.weights = as_sent(moved, self.compress)
        self.version += 1
        return buffered

    def go_back(
        self, version: int, weights: list[np.ndarray], came_in: int, updates: list[BufferedUpdate]
    ) -> list[BufferedUpdate]:
        """Take back all versions since this one, and make the next of its weights and these of their updates.

        came_in: the updates that this version holds. Returns the new version's updates, with their staleness now. What
        waits in the buffer and started from a version that is taken back, is thrown away.
        """
        self.taken_back.update(range(version + 1, self.version + 1))
        waiting = [each for each in self.buffer if each.job.version not in self.taken_back]
        self.weights = weights
        self.buffer = [dataclasses.replace(each, staleness=self.staleness(each.job, version)) for each in updates]
        made_of = self.apply()
        self.buffer = [dataclasses.replace(each, staleness=self.staleness(each.job)) for each in waiting]
        self.updates = came_in + len(made_of) + len(waiting)
        return made_of

    def _moved(self, i: int, buffered: list[BufferedUpdate], part: float, rate: float) -> np.ndarray:
        """The array at position i, one step on; where it is measured, not trained, towards what was measured."""
        old, measured = self.weights[i], i in self._measured
        if not np.isfinite(old).all():
            return old  # constant, such as a mask
        if old.dtype.kind in "iu" and part == 1.0 and not any(each.staleness for each in buffered):
            return mean_array([(np.asarray(each.update.weights[i]), each.update.examples) for each in buffered])
        steps = [
            (
                np.asarray(each.update.weights[i]) - (old if measured else each.base[i]),
                each.update.examples,
                each.staleness,
            )
            for each in buffered
        ]
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
    versions: Iterable[list[dict]],
    weights: list[np.ndarray],
    buffer_positions: list[int],
    settings: Any,
    rounds: int,
    train: Callable[[TrainingJob, list[np.ndarray]], Update],
    compress: str = "none",
    made_from: Mapping[int, int] | None = None,
) -> list[np.ndarray]:
    """The weights that a run ended with, from the order of arrival in its history and nothing else.

    versions: the updates of each version but the untrained one, as history.json has them; weights: the untrained
    model; train(job, weights) does a client's work again, with as_sent() at both ends where the run's weights
    travelled compressed; made_from: by number, the version that one was made from, where that is not the one before.
    """
    run = FedBuff(weights, buffer_positions, settings, rounds, compress)
    known = [weights]
    for number, updates in enumerate(versions, start=1):
        run.weights = known[(made_from or {}).get(number, number - 1)]
        for update in updates:
            job = TrainingJob(**{name: value for name, value in update.items() if name != "staleness"})
            run.receive(job, known[job.version], train(job, known[job.version]), update["staleness"])
        run.apply()
        known.append(run.weights)
    return run.weights

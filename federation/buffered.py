"""The asynchronous loop: every client trains on the newest model as soon as it is free, and nobody waits."""

import time
from dataclasses import dataclass

from federation.cohort import SLICE, Asked
from federation.fedbuff import FedBuff, Training
from federation.pace import Pace
from federation.places import Place
from federation.rounds import FederatedServer, RunFailed
from federation.run_folder import Checkpoint
from federation.strategy import weighted_mean
from federation.tables import VERSION_HEAD, table, table_row
from federation.wire import num_bytes
from federation.words import say

import numpy as np
from flwr.common import EvaluateRes, FitRes, Parameters


@dataclass(frozen=True)
class Job:
    """What a client is at work on: a training, or, without one, the evaluation of a version."""

    version: int
    weights: list[np.ndarray]  # of that version
    training: Training | None = None


class BufferedServer(FederatedServer):
    """The asynchronous mode; how a run starts, ends, fails and resumes is FederatedServer's.

    A checkpoint is written with every version, when the buffer is empty. A server that dies loses what
    its clients have in hand and the less than --buffer-size updates that came in since: all of that is
    trained again, as a run of rounds trains the round again that it died in.

    Who is free when depends on the clients' speed, so two runs differ. But history.json holds every
    training in its order of arrival, and the result is a function of that: fedbuff.replay().
    """

    unit = "version"

    def _begin(self, weights: list[np.ndarray]) -> None:
        self._adopt(weights)
        say(VERSION_HEAD)
        self._write_version([], seconds=0.0)

    def _go_on(self, checkpoint: Checkpoint) -> None:
        self._adopt(checkpoint.weights)
        rows = self.history.rounds
        self.run.restore(checkpoint.server_round, rows)
        self.said = checkpoint.server_round  # the newest version may not have been evaluated by all
        self.began -= rows[-1]["time"]
        say(table(rows[:-1]) if rows[:-1] else VERSION_HEAD)

    def _adopt(self, weights: list[np.ndarray]) -> None:
        self.weights = weights
        self.run = FedBuff(weights, self.admission.statistics, self.terms, self.recipe.rounds, self.recipe.compress)
        self.began = time.monotonic()
        self.said = 0  # versions whose row is on the screen
        self.reached = False  # the target accuracy
        self.busy: dict[Asked, Job] = {}
        self.evaluated: dict[str, int] = {}  # the newest version that each client was asked to evaluate
        self.scores: dict[int, dict[int, tuple[float, float, int]]] = {}  # by version and partition
        self.pace = Pace(self.terms.patience)
        self.sent: tuple[int, Parameters | None] = (-1, None)
        self.held_until: float | None = None  # an update came in, and more are expected in the same moment
        self.alone_since: float | None = None  # when too few clients were left

    def _work(self) -> None:
        while self.run.updates < self.run.total and not self.reached:
            if not self._more_is_coming():
                self._make_version_if_due()
                self._hand_out(training=self._enough_clients())
            self._collect()
        self._make_version_if_due()
        late = sorted(asked.place.partition for asked, job in self.busy.items() if job.training)
        if late:
            say(f"the last update is in; still training, then to evaluate the model: {', '.join(map(str, late))}")
        while self._hand_out(training=False) or self.busy:
            self._collect()
        if self.history.rounds[-1]["accuracy"] is None:
            raise RunFailed(f"no client could evaluate the final model, version {self.run.version}")
        self._say_rows(final=True)
        self.folder.save_checkpoint(self._checkpoint())

    # Handing out and taking in

    def _hand_out(self, training: bool) -> bool:
        """Give those who are free the newest version: to evaluate first, then to train. Whether any work was given."""
        at_work, before = {asked.place.instance for asked in self.busy}, len(self.busy)
        free = [place for place in self.admission.ready() if place.instance not in at_work]
        for place in sorted(free, key=lambda place: self.pace.usual(place.partition)):
            if self.evaluated.get(place.instance) != self.run.version:
                self.evaluated[place.instance] = self.run.version
                asked = self.cohort.start_evaluate(place, self.cohort.hosts(), self._parameters(), self.run.version)
                self.busy[asked] = Job(self.run.version, self.run.weights)
            elif training and self._comes_in_time(place):
                self._start_training(place)
        return len(self.busy) > before

    def _start_training(self, place: Place) -> None:
        training, total = self.run.hand_out(place.partition), self.run.total
        span = {"start": training.begins / total, "end": training.ends / total}
        words, hosts = {"version": training.version, **span}, self.cohort.hosts()
        asked = self.cohort.start_fit(place, hosts, self._parameters(), training.number, **words)
        self.busy[asked] = Job(training.version, self.run.weights, training)

    def _parameters(self) -> Parameters:
        """The newest version as it is sent, made once for all."""
        if self.sent[0] != self.run.version:
            self.sent = (self.run.version, self.cohort.parameters(self.run.weights))
        return self.sent[1]

    def _collect(self) -> None:
        """Take in what came, after a short wait where nothing did."""
        if not self.busy:
            self.cohort.stop.wait(0.1)
            self.cohort.raise_if_stopped()
        held = max(0.0, self.held_until - time.monotonic()) if self.held_until else SLICE
        for asked in self.cohort.wait(list(self.busy), min(SLICE, held)):
            job, place = self.busy.pop(asked), asked.place
            answer = self.cohort.answer(asked)
            if answer is None or self.admission.place_of(place.client) is not place:
                # It left, or lost its stream and is back already: what it was to do is done again.
                self.evaluated.pop(place.instance, None)
            elif job.training:
                self.pace.took(place.partition, time.monotonic() - asked.since)
                self._take_update(place, job, answer)
            else:
                self._take_score(place, job.version, answer)
        self._say_rows()

    def _take_update(self, place: Place, job: Job, answer: FitRes) -> None:
        self.run.came_back(job.training)
        if self.run.updates >= self.run.total or self.reached:
            return
        checked = self.cohort.checked_fit(self.run.version, place, answer, job.weights)
        if checked is None:
            return
        if not self.run.receive(job.training, job.weights, *checked):
            staleness = self.run.version - job.version
            words = f"its staleness {staleness} is above --max-staleness {self.terms.max_staleness}"
            self.cohort.leave_out(self.run.version, place, words)
        if self.held_until is None:
            self.held_until = time.monotonic() + self.pace.moment()

    def _take_score(self, place: Place, version: int, answer: EvaluateRes) -> None:
        score = self.cohort.checked_evaluate(version, place, answer)
        if score is None:
            return
        scores = self.scores.setdefault(version, {})
        scores[place.partition] = score
        self.history.rounds[version].update(
            accuracy=float(weighted_mean([(accuracy, n) for _, accuracy, n in scores.values()])),
            loss=float(weighted_mean([(loss, n) for loss, _, n in scores.values()])),
            accuracy_by_client={str(p): accuracy for p, (_, accuracy, _) in sorted(scores.items())},
            evaluated=round(self._seconds(), 3),
        )

    def _more_is_coming(self) -> bool:
        """Whether an update that came in waits a moment (--patience) for others that are about to come.

        Clients of equal speed then share a version and start together from it, without staleness, as in
        rounds; otherwise each would miss what came in just after it began.
        """
        if self.held_until is None:
            return False
        if time.monotonic() < self.held_until and self.pace.is_more_coming(self._working()):
            return True
        self.held_until = None
        return False

    def _comes_in_time(self, place: Place) -> bool:
        """Whether its update can be expected before the others have sent the last ones of the run.

        Otherwise a slow client would be busy with nothing when the run ends, and keep its evaluation waiting.
        """
        others = self.pace.arrivals_within(self.pace.usual(place.partition), self._working())
        return self.run.updates + others < self.run.total

    def _working(self) -> list[tuple[int, float]]:
        now = time.monotonic()
        return [(asked.place.partition, now - asked.since) for asked, job in self.busy.items() if job.training]

    # Writing down

    def _make_version_if_due(self) -> None:
        if self.run.is_due():
            changes = self.run.apply()
            self._write_version(changes, seconds=self._seconds() - self.history.rounds[-1]["time"])

    def _write_version(self, changes: list, seconds: float) -> None:
        """A row for the newest version, on disk before anybody trains on it; its accuracy comes later."""
        losses = [(change.train_loss, change.examples) for change in changes]
        row = {
            "round": self.run.version,
            "accuracy": None,
            "loss": None,
            "train_loss": float(weighted_mean(losses)) if losses else None,
            "clients": len({change.training.partition for change in changes}),
            "seconds": round(seconds, 3),
            "bytes_received": sum(num_bytes(change.weights, self.recipe.compress) for change in changes),
            "accuracy_by_client": {},
            "updates": [change.to_json() for change in changes],  # in their order of arrival
            "time": round(self._seconds(), 3),  # since the run began: made, and last evaluated
            "evaluated": None,
        }
        self.history.rounds.append(row)
        self.rounds_done = self.run.version
        self.weights = self.run.weights
        self.folder.save_checkpoint(self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.run.version, self.run.weights, [], self.history)

    def _say_rows(self, final: bool = False) -> None:
        """Say the row of each version that no client evaluates any more, as a newer one is there."""
        being_evaluated = {job.version for job in self.busy.values() if job.training is None}
        while self.said < self.run.version + final and self.said not in being_evaluated:
            row = self.history.rounds[self.said]
            say(table_row(row))
            self.on_round(row)
            self.said += 1
            target = self.terms.target_accuracy
            enough = len(row["accuracy_by_client"]) >= max(1, len(self.admission.ready()) / 2)
            if target is not None and self.said > 1 and not self.reached and enough and row["accuracy"] >= target:
                self.reached = True
                say(f"accuracy {target:g} reached with version {row['round']} (--target-accuracy)")

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _enough_clients(self) -> bool:
        """Whether --min-clients are there. Raises RunFailed once they were not for --rejoin-wait seconds."""
        there, least, now = len(self.admission.ready()), self.terms.min_clients, time.monotonic()
        if there >= least:
            self.alone_since = None
            return True
        if self.alone_since is None:
            self.alone_since = now
            say(f"{there} clients left, --min-clients is {least}; waiting up to {self.terms.rejoin_wait:g} s for more")
        if now >= self.alone_since + self.terms.rejoin_wait:
            raise self._too_few(there)
        return False

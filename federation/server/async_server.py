"""The asynchronous mode: every client trains on the newest model as soon as it is free, and nobody waits."""

import time
from dataclasses import dataclass

from federation.aggregation.fedbuff import BufferedUpdate, FedBuff, TrainingJob
from federation.aggregation.means import mean_metrics
from federation.aggregation.pace import Pace
from federation.aggregation.steps import measure
from federation.aggregation.validation import Score
from federation.aggregation.verdicts import Verdicts, Version
from federation.compression import num_bytes
from federation.console import say
from federation.participants.client_manager import Participant
from federation.participants.exchange import Outgoing
from federation.results.history import WEIGHT, VersionRecord
from federation.results.run_folder import Checkpoint
from federation.security.audit import utc_now
from federation.server.acceptance import FEWEST_TO_COMPARE
from federation.server.dispatch import SLICE, Request, RoundLost, RunFailed
from federation.server.records import by_partition, shares
from federation.server.rounds import MAX_ATTEMPTS, FederatedServer

import numpy as np
from flwr.common import EvaluateRes, FitRes


@dataclass(frozen=True)
class Work:
    """What a client is at work on: a training, or, without one, the evaluation of a version."""

    version: int
    weights: list[np.ndarray]  # of that version
    training: TrainingJob | None = None


class AsyncServer(FederatedServer):
    """The asynchronous mode; how a run starts, ends, fails and resumes is FederatedServer's.

    A checkpoint is written with every version, when the buffer is empty. A server that dies loses what
    its clients have in hand and the less than --buffer-size updates that came in since: all of that is
    trained again, as a run of rounds trains the round again that it died in. While the newest version is
    not known to be good, the checkpoint holds the newest good one beside it.

    Who is free when depends on the clients' speed, so two runs differ. But history.json holds every
    training in its order of arrival, and the result is a function of that: fedbuff.replay().
    """

    unit = "version"

    def _begin(self, weights: list[np.ndarray]) -> None:
        self._set_global_weights(weights)
        self._write_version([])

    def _continue_from(self, checkpoint: Checkpoint) -> None:
        self._set_global_weights(checkpoint.weights)
        counted = [record for record in self.versions if not record.taken_back]
        taken_back = [record.round for record in self.versions if record.taken_back]
        self.buffer.restore(checkpoint.server_round, (each for one in counted for each in one.updates), taken_back)
        self.verdicts = Verdicts(self._newest([]))
        if checkpoint.strategy_state:  # the newest version is not known to be good
            number, *weights = checkpoint.strategy_state
            came_in = sum(len(record.updates) for record in counted if record.round <= number)
            self.verdicts = Verdicts(Version(int(number), weights, came_in=came_in))
            self.verdicts.add(self._newest([]))
        self.said = checkpoint.server_round  # the newest version may not have been evaluated by all
        self.began -= self.versions[-1].time
        for record in self.versions[:-1]:
            self._say(record)

    def _set_global_weights(self, weights: list[np.ndarray]) -> None:
        self.weights = weights
        positions, compress = self.clients.buffer_positions, self.recipe.compress
        self.buffer = FedBuff(weights, positions, self.settings, self.recipe.rounds, compress)
        self.began = time.monotonic()
        self.said = 0  # versions whose row is on the screen
        self.reached = False  # the target
        self.busy: dict[Request, Work] = {}
        self.evaluated: dict[str, int] = {}  # the newest version that each client was asked to evaluate
        self.scores: dict[int, dict[int, Score]] = {}  # by version and partition
        self.verdicts = Verdicts(Version(0, weights))
        self.pace = Pace(self.settings.patience)
        self.sent: tuple[int, Outgoing] = (-1, self.dispatcher.parameters([]))
        self.held_until: float | None = None  # an update came in, and more are expected in the same moment
        self.alone_since: float | None = None  # when too few clients were left

    @property
    def versions(self) -> list[VersionRecord]:
        return self.history.rounds  # type: ignore[return-value]  # in this mode they are

    def _work(self) -> None:
        while True:
            while not self._all_in():
                if not self._more_is_coming():
                    self._make_version_if_due()
                    self._hand_out(training=self._enough_clients())
                self._collect()
            self.held_until = None  # nothing more is waited for
            self._make_version_if_due()
            late = sorted((each.participant.partition for each, work in self.busy.items() if work.training))
            if late:
                names = ", ".join(self.clients.names.get(place, str(place)) for place in late)
                say(f"the last update is in; still training, then to evaluate the model: {names}")
            self._with_retries(self._evaluate_last)
            if self._all_in() and not self.buffer.is_due():
                break  # else the last version was taken back, and its updates are trained again
        self._say_rows(final=True)
        self.folder.save_checkpoint(self._checkpoint())

    def _all_in(self) -> bool:
        return self.buffer.updates >= self.buffer.total or self.reached

    def _evaluate_last(self) -> None:
        """Have all clients evaluate the final model. Raises RoundLost where all were lost meanwhile."""
        while self._hand_out(training=False) or self.busy:
            self._collect()
        if self.versions[-1].main() is None or self.verdicts.trials:
            if not self.clients.ready():
                raise RoundLost
            raise RunFailed(f"no client could evaluate the final model, version {self.buffer.version}")

    # Handing out and taking in

    def _hand_out(self, training: bool) -> bool:
        """Give those who are free the newest version: to evaluate first, then to train. Whether any work was given.

        Nobody trains while it is not known who is to blame for a bad version.
        """
        self.clients.check_members()
        waiting = self.verdicts.waiting()
        at_work, before = {request.participant.instance for request in self.busy}, len(self.busy)
        free = [one for one in self.clients.ready() if one.instance not in at_work]
        for one in sorted(free, key=lambda one: self.pace.usual(one.partition)):
            if self.evaluated.get(one.instance) != self.buffer.version:
                self.evaluated[one.instance] = self.buffer.version
                hosts, version = self.dispatcher.hosts(), self.buffer.version
                request = self.dispatcher.start_evaluate(one, hosts, self._parameters(), version)
                self.busy[request] = Work(version, self.buffer.weights)
            elif training and not self.verdicts.trials and one.partition not in waiting and self._comes_in_time(one):
                self._start_training(one)
        return len(self.busy) > before

    def _start_training(self, participant: Participant) -> None:
        job, total = self.buffer.hand_out(participant.partition), self.buffer.total
        part = {"start": job.begins / total, "end": job.ends / total}
        hosts, parameters = self.dispatcher.hosts(), self._parameters()
        request = self.dispatcher.start_fit(participant, hosts, parameters, job.number, version=job.version, **part)
        self.busy[request] = Work(job.version, self.buffer.weights, job)

    def _parameters(self) -> Outgoing:
        """The newest version as it is sent, made once for all."""
        if self.sent[0] != self.buffer.version:
            self.sent = (self.buffer.version, self.dispatcher.parameters(self.buffer.weights))
        return self.sent[1]

    def _collect(self) -> None:
        """Take in what came, after a short wait where nothing did."""
        if not self.busy:
            self.dispatcher.stop.wait(0.1)
            self.dispatcher.raise_if_stopped()
        held = max(0.0, self.held_until - time.monotonic()) if self.held_until else SLICE
        for request in self.dispatcher.wait(list(self.busy), min(SLICE, held)):
            work, participant = self.busy.pop(request), request.participant
            answer = self.dispatcher.answer(request)
            if answer is None or self.clients.of_client(participant.client) is not participant:
                # It left, or lost its stream and is back already: what it was to do is done again.
                self.evaluated.pop(participant.instance, None)
            elif work.training:
                self.pace.took(participant.partition, time.monotonic() - request.since)
                self._take_update(participant, work, work.training, answer)
            else:
                self._take_score(participant, work.version, answer)
        self._say_rows()
        bad = self.acceptance.decide(self.verdicts)
        if bad is not None:
            self._take_back(bad)

    def _take_update(self, participant: Participant, work: Work, job: TrainingJob, answer: FitRes) -> None:
        self.buffer.came_back(job)
        if self._all_in():
            return
        version = self.buffer.version
        if job.version in self.buffer.taken_back:
            reason = f"it was trained from version {job.version}, which is taken back"
            self.acceptance.leave_out(version, participant.partition, reason)
            return
        update = self.acceptance.update(version, participant, answer, work.weights)
        if update is None or not self.acceptance.in_line(version, update, work.weights):
            return
        if not self.buffer.receive(job, work.weights, update):
            staleness = self.buffer.staleness(job)
            reason = f"its staleness {staleness} is above --max-staleness {self.settings.max_staleness}"
            self.acceptance.leave_out(version, participant.partition, reason)
        if self.held_until is None:
            self.held_until = time.monotonic() + self.pace.moment()

    def _take_score(self, participant: Participant, version: int, answer: EvaluateRes) -> None:
        if version in self.buffer.taken_back:
            return  # that a client can't evaluate it is the version's fault
        score = self.acceptance.score(version, participant, answer, self.verdicts.undecided.get(version))
        if score is None:
            return
        scores = self.scores.setdefault(version, {})
        scores[participant.partition] = score
        record = self.versions[version]
        record.metrics = mean_metrics(list(scores.values()))
        main = self.acceptance.main_metric
        record.by_client[main] = {
            str(p): each.metrics[main] for p, each in sorted(scores.items()) if main in each.metrics
        }
        record.evaluated = round(self._seconds(), 3)

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

    def _comes_in_time(self, participant: Participant) -> bool:
        """Whether its update can be expected before the others have sent the last ones of the run.

        Otherwise a slow client would be busy with nothing when the run ends, and keep its evaluation waiting.
        """
        others = self.pace.arrivals_within(self.pace.usual(participant.partition), self._working())
        return self.buffer.updates + others < self.buffer.total

    def _working(self) -> list[tuple[int, float]]:
        now = time.monotonic()
        return [
            (request.participant.partition, now - request.since) for request, work in self.busy.items() if work.training
        ]

    # Writing down

    def _make_version_if_due(self) -> None:
        if self.buffer.is_due() and not self.verdicts.trials:
            self._write_version(self.buffer.apply())

    def _take_back(self, bad: int) -> None:
        """Take back the versions since the newest good one, and make another from that. Raises RunFailed."""
        good, first = self.verdicts.good, not self.verdicts.trials
        compare = self.settings.clients >= FEWEST_TO_COMPARE
        trial = self.verdicts.next_trial(bad, self.clients.buffer_positions, compare)
        if trial is None:
            what = f"most clients can't evaluate version {bad}, which has the weights of version {good.number}"
            raise RunFailed(f"{what}; look at what they print")
        if first:
            what = "looking for the update that is to blame" if trial.updates else "it is taken back"
            say(f"version {bad}: most clients can't evaluate it; {what}")
        elif len(self.verdicts.trials) == 1:
            words = f"no single update is to blame; the model is version {good.number} again"
            say(f"version {self.verdicts.bad}: {words}")
        if self.verdicts.in_vain == MAX_ATTEMPTS:
            what = f"most clients could not evaluate a new version {MAX_ATTEMPTS} times in a row"
            remedy = "look at what the clients print, or begin a new run with a lower --learning-rate"
            raise RunFailed(f"{what}; {remedy}", resumable=False)
        for record in self.versions[good.number + 1 :]:
            record.take_back()
        updates = self.buffer.go_back(good.number, good.weights, good.came_in, trial.updates)
        self._write_version(updates, made_from=good.number)

    def _newest(self, buffered: list[BufferedUpdate]) -> Version:
        came_in = self.buffer.updates - len(self.buffer.buffer)
        return Version(self.buffer.version, self.buffer.weights, buffered, came_in)

    def _write_version(self, buffered: list[BufferedUpdate], made_from: int | None = None) -> None:
        """A record of the newest version, on disk before anybody trains on it; its metrics come later."""
        updates, starts = [each.update for each in buffered], [each.base for each in buffered]
        measured = measure(updates, starts, self.clients.buffer_positions)
        steps = {update.partition: step for update, step in zip(updates, measured, strict=True)}
        now, new = self._seconds(), updates if made_from is None else []  # the others came in before
        record = VersionRecord(
            self.buffer.version,
            metrics={},
            train_metrics=mean_metrics(updates),
            clients=len({update.partition for update in updates}),
            seconds=round(now - self.versions[-1].time, 3) if self.versions else 0.0,
            bytes_received=sum(num_bytes(update.weights, self.recipe.compress) for update in new),
            by_client={self.acceptance.main_metric: {}, **by_partition(steps), WEIGHT: shares(updates)},
            main_metric=self.acceptance.main_metric,
            updates=[each.to_json() for each in buffered],
            time=round(now, 3),
            made_from=made_from,
            rounds_worth=self._newest([]).came_in / self.settings.clients,
        )
        if self.versions:  # the untrained model counts as good
            self.verdicts.add(self._newest(buffered))
        self.versions.append(record)
        self.rounds_done = self.buffer.version
        self.weights = self.buffer.weights
        record.utc, record.weights_sha256 = utc_now(), self.dispatcher.exchange.made(record.round, self.weights)
        self.folder.save_checkpoint(self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        good = self.verdicts.good
        beside = [np.array(good.number), *good.weights] if self.verdicts.undecided else []
        return Checkpoint(self.buffer.version, self.buffer.weights, beside, self.history)

    def _say_rows(self, final: bool = False) -> None:
        """Say the row of each version that no client evaluates any more, as a newer one is there."""
        being_evaluated = {work.version for work in self.busy.values() if work.training is None}
        while self.said < self.buffer.version + final and self.said not in being_evaluated:
            record = self.versions[self.said]
            self._say(record)
            self.observers.round(record)
            self.said += 1
            scored_by = len(self.scores.get(record.round, {}))
            enough = scored_by >= max(1, len(self.clients.ready()) / 2)
            if self._at_target(record.main()) and enough and self.said > 1 and not self.reached:
                self.reached = True
                say(f"{self.target_words()} reached with version {record.round} (--target)")

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _enough_clients(self) -> bool:
        """Whether --min-clients are there. Raises RunFailed once they were not for --rejoin-wait seconds."""
        there, least, now = len(self.clients.ready()), self.settings.min_clients, time.monotonic()
        if there >= least:
            self.alone_since = None
            return True
        if self.alone_since is None:
            self.alone_since = now
            wait = self.settings.rejoin_wait
            say(f"{there} clients left, --min-clients is {least}; waiting up to {wait:g} s for more")
        if now >= self.alone_since + self.settings.rejoin_wait:
            raise self.dispatcher.too_few(there, self.rounds_done)
        return False


SERVERS: dict[str, type[FederatedServer]] = {"sync": FederatedServer, "async": AsyncServer}  # by --mode

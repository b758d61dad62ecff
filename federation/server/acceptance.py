"""Which answers count, and what becomes of a client whose answers do not."""

import collections
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from federation.aggregation.steps import Step, excess, measure
from federation.aggregation.strategy import CheckedStrategy
from federation.aggregation.validation import (
    BadUpdate,
    Score,
    Update,
    validate_evaluate,
    validate_fit,
    validate_statistics,
)
from federation.aggregation.verdicts import Verdicts, Version
from federation.console import say
from federation.participants.client_manager import ClientManager, Participant
from federation.results.history import History
from federation.server.dispatch import Dispatcher
from federation.server.settings import ServerSettings

import numpy as np
from flwr.common import EvaluateRes, FitRes

STRIKES = 3  # bad updates in a row that cost a client its place
FEWEST_TO_COMPARE = 3  # of two steps, nobody can say which is out of line
REMEMBERED = 10  # steps of the asynchronous mode to compare the next one with


@dataclass
class Evaluation:
    """A model on every client's test examples: what counts, and what does not."""

    scores: list[Score]
    failed: list[tuple[Participant, BadUpdate]]

    @property
    def model_is_bad(self) -> bool:
        """Whether most clients can't evaluate it; a client that itself failed says nothing of the model."""
        return len([bad for _, bad in self.failed if not bad.client_failed]) > len(self.scores)


class Acceptance:
    """Every answer that does not count is said, and written into the history."""

    def __init__(self, clients: ClientManager, settings: ServerSettings, history: History, unit: str = "round"):
        self.clients = clients
        self.settings = settings
        self.history = history
        self.unit = unit  # what the run's progress is counted in
        self._recent: collections.deque[Step] = collections.deque(maxlen=REMEMBERED)

    @property
    def main_metric(self) -> str:
        """Its name: without it a score does not count."""
        return self.clients.metrics[0].name

    # Rounds

    def updates(
        self, number: int, weights: list[np.ndarray], answers: Sequence[tuple[Participant, FitRes]]
    ) -> tuple[list[Update], dict[int, Step]]:
        """The updates that count, and the steps of all that could be read, by partition.

        First each is validated by itself, then compared with the others.
        """
        read = [self.update(number, one, res, weights) for one, res in answers]
        valid = [update for update in read if update is not None]
        steps = measure(valid, [weights] * len(valid), self.clients.buffer_positions)
        good = valid
        if len(valid) >= FEWEST_TO_COMPARE:
            good = [u for u, step in zip(valid, steps, strict=True) if not self._is_outlier(number, u, step, steps)]
        return good, {update.partition: step for update, step in zip(valid, steps, strict=True)}

    def steps(self, weights: list[np.ndarray], updates: list[Update]) -> dict[int, Step]:
        """The steps of updates that are compared with no others, by partition."""
        measured = measure(updates, [weights] * len(updates), self.clients.buffer_positions)
        return {update.partition: step for update, step in zip(updates, measured, strict=True)}

    def statistics(
        self, number: int, weights: list[np.ndarray], answers: Sequence[tuple[Participant, FitRes]]
    ) -> list[Update]:
        """BatchNorm's statistics on these weights, as updates of these arrays alone; validated as updates are.

        None, where most clients can't measure any: it may be the model's fault, and its evaluation will tell.
        """
        like, compress = [weights[i] for i in self.clients.batchnorm], self.clients.recipe.compress
        measured, failed = [], []
        for one, res in answers:
            try:
                measured.append(validate_statistics(res, one.partition, like, one.train_examples, compress))
            except BadUpdate as bad:
                failed.append((one, bad))
        if len([bad for _, bad in failed if not bad.client_failed]) > len(measured):
            return []
        for one, problem in failed:
            self.reject(number, one.partition, problem)
        steps = measure(measured, [like] * len(measured), range(len(like)))
        if len(measured) < FEWEST_TO_COMPARE:
            return measured
        return [u for u, step in zip(measured, steps, strict=True) if not self._is_outlier(number, u, step, steps)]

    def evaluation(self, answers: Sequence[tuple[Participant, EvaluateRes]]) -> Evaluation:
        """The answers, read; nobody is left out yet, as it may be the model's fault."""
        evaluation = Evaluation([], [])
        for one, res in answers:
            try:
                evaluation.scores.append(
                    validate_evaluate(res, one.partition, one.test_examples, self.clients.metrics[0])
                )
            except BadUpdate as bad:
                evaluation.failed.append((one, bad))
        return evaluation

    def leave_out_failed(self, number: int, evaluation: Evaluation) -> None:
        for participant, bad in evaluation.failed:
            self.reject(number, participant.partition, bad)

    def culprit(self, number: int, partition: int, times: float) -> None:
        """Leave out the update with which most clients can't evaluate the new model; times: its step's excess()."""
        reason = f"with its update most clients can't evaluate the model; its step is {times:.1f} times the median"
        self.reject(number, partition, BadUpdate(reason))

    def counted(self, updates: Sequence[Update]) -> None:
        """These updates are in the model now: their clients' strikes are forgotten."""
        partitions = {partition for update in updates for partition in update.clients}
        for participant in self.clients.ready():
            if participant.partition in partitions:
                participant.strikes = 0

    # One answer at a time

    def update(self, number: int, participant: Participant, res: FitRes, weights: list[np.ndarray]) -> Update | None:
        """A valid update; None, in public, where it must not count. weights: what it started from."""
        partition, recipe = participant.partition, self.clients.recipe
        try:
            declared, private = participant.train_examples, recipe.private_training
            return validate_fit(res, partition, weights, declared, recipe.compress, private)
        except BadUpdate as bad:
            self.reject(number, partition, bad)
            return None

    def in_line(self, number: int, update: Update, weights: list[np.ndarray]) -> bool:
        """Whether its step is in line with the last ones, as the asynchronous mode compares it; if not, in public."""
        (step,) = measure([update], [weights], self.clients.buffer_positions)
        enough = self.settings.clients >= FEWEST_TO_COMPARE and len(self._recent) >= FEWEST_TO_COMPARE - 1
        if enough and self._is_outlier(number, update, step, list(self._recent)):
            return False
        self._recent.append(step)
        return True

    def score(self, number: int, participant: Participant, res: EvaluateRes, undecided: Version | None) -> Score | None:
        """A valid score; None where it must not count.

        undecided: the version, where it is not known yet whether a client that can't evaluate it is to blame for that.
        """
        evaluation, partition = self.evaluation([(participant, res)]), participant.partition
        for _, bad in evaluation.failed:
            if undecided and not bad.client_failed:
                undecided.note(partition, bad)
            else:
                self.reject(number, partition, bad)
        for score in evaluation.scores:
            if undecided:
                undecided.note(partition, None)
            return score
        return None

    def decide(self, verdicts: Verdicts) -> int | None:
        """What the scores so far say of the versions since the newest good one; returns a bad one's number, if any.

        With a version that is good, its updates count, who could not evaluate it is left out, and where it was a trial,
        its suspect is the culprit.
        """
        clients, trial = {one.partition for one in self.clients.ready()}, next(iter(verdicts.trials), None)
        for version in verdicts.accept(clients):
            self.counted([each.update for each in version.updates])
            for partition, bad in version.failed.items():
                self.reject(version.number, partition, bad)
            if trial and trial.suspect is not None:
                self.culprit(verdicts.bad, trial.suspect, trial.excess)
            elif trial and trial.updates:
                say(f"version {verdicts.bad}: an update trained from a version that is taken back is to blame")
        return verdicts.find_bad(clients)

    def reject(self, number: int, partition: int, bad: BadUpdate) -> None:
        """Leave an answer out, in public; after three in a row, or a failure of its own, the client goes."""
        self.leave_out(number, partition, str(bad))
        for participant in self.clients.ready():
            if participant.partition != partition:
                continue
            participant.strikes += 1
            if participant.strikes >= STRIKES:
                self.clients.drop(participant, f"{STRIKES} bad updates in a row, the last: {bad}")
            elif bad.client_failed:
                self.clients.drop(participant, "it failed")

    def leave_out(self, number: int, partition: int, reason: str) -> None:
        """Say and write down that an answer does not count."""
        self.history.rejected.append({"round": number, "partition": partition, "reason": reason})
        say(f"{self.unit} {number}: {self.clients.title(partition)} left out: {reason}", logging.WARNING)

    def _is_outlier(self, number: int, update: Update, step: Step, others: Sequence[Step]) -> bool:
        factor, times = self.settings.outlier_factor, excess(step, others)
        if not factor or times <= factor:
            return False
        size = max(step.size, step.buffer_size)
        reason = f"its step (L2 norm {size:.3g}) is {times:.1f} times the median, above --outlier-factor {factor:g}"
        self.reject(number, update.partition, BadUpdate(reason))
        return True


def without_culprit(
    number: int,
    weights: list[np.ndarray],
    updates: list[Update],
    steps: dict[int, Step],
    dispatcher: Dispatcher,
    acceptance: Acceptance,
    strategy: CheckedStrategy,
) -> tuple[list[np.ndarray], list[Update], Evaluation]:
    """The round aggregated anew, without the one update with which most clients can't evaluate the model.

    The largest steps are left out first. Where no single update is to blame, none counts, and the model stays.
    """
    say(f"round {number}: most clients can't evaluate the new model; looking for the update that is to blame")
    state, all_steps = strategy.state(), list(steps.values())
    for suspect in sorted(updates, key=lambda update: -excess(steps[update.partition], all_steps)):
        others = [update for update in updates if update is not suspect]
        new_weights = strategy.aggregate(weights, others)
        evaluation = acceptance.evaluation(dispatcher.evaluate(number, new_weights))
        if not evaluation.model_is_bad:
            acceptance.culprit(number, suspect.partition, excess(steps[suspect.partition], all_steps))
            return new_weights, others, evaluation
        strategy.restore(state, weights)
    say(f"round {number}: no single update is to blame; none of the round counts")
    return weights, [], acceptance.evaluation(dispatcher.evaluate(number, weights))

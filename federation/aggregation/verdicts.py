"""Which versions of an asynchronous run most clients can evaluate, and what to make in place of one that they can't."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from federation.aggregation.fedbuff import BufferedUpdate
from federation.aggregation.steps import excess, measure
from federation.aggregation.validation import BadUpdate

import numpy as np


@dataclass
class Version:
    """A version of the model, and which clients (by partition) could evaluate it so far, and which could not."""

    number: int
    weights: list[np.ndarray]
    updates: list[BufferedUpdate] = field(default_factory=list)  # that made it; not known any more after --resume
    came_in: int = 0  # updates that it holds, all since the run began
    evaluated: set[int] = field(default_factory=set)
    failed: dict[int, BadUpdate] = field(default_factory=dict)

    def note(self, partition: int, bad: BadUpdate | None) -> None:
        """A client could evaluate it, or could not; who lost its connection is asked again."""
        self.evaluated.discard(partition)
        self.failed.pop(partition, None)
        if bad is None:
            self.evaluated.add(partition)
        else:
            self.failed[partition] = bad


@dataclass(frozen=True)
class Trial:
    """Updates to make a version of in place of a bad one, without those of one client, the suspect."""

    updates: list[BufferedUpdate]
    suspect: int | None = None  # its partition
    excess: float = 0.0  # of its largest step


class Verdicts:
    """The newest version that is known to be good, and those made since, whose scores still come in.

    A version is good once at least half of the clients could evaluate it, or one made after it, and bad once more
    than half could not evaluate it: when all have tried, it is one of the two. Until then the updates since the good
    one are kept. Once a version is bad, all since the good one are taken back, and one trial after the other is
    made of the good one's weights until most clients can evaluate it. The last trial is the good one itself.
    """

    def __init__(self, good: Version) -> None:
        self.good = good
        self.undecided: dict[int, Version] = {}  # by number, the newest last
        self.bad = 0  # the version that the trials are in place of
        self.trials: list[Trial] = []  # the first is being evaluated, the others are still to be made
        self.in_vain = 0  # times in a row that no trial but the last was good

    def add(self, version: Version) -> None:
        self.undecided[version.number] = version

    def waiting(self) -> set[int]:
        """Clients that could not evaluate the newest version: they don't train on it before it is decided."""
        return set(list(self.undecided.values())[-1].failed) if self.undecided else set()

    def accept(self, clients: set[int]) -> list[Version]:
        """The versions, oldest first, that are now known to be good by what these clients say; ends the trials."""
        could: set[int] = set()
        for number in sorted(self.undecided, reverse=True):
            could |= self.undecided[number].evaluated & clients
            if 0 < len(clients) <= 2 * len(could):
                accepted = [self.undecided.pop(each) for each in sorted(self.undecided) if each <= number]
                self.good = accepted[-1]
                self.trials = []
                if self.good.updates:
                    self.in_vain = 0
                return accepted
        return []

    def find_bad(self, clients: set[int]) -> int | None:
        """The oldest version that is bad by what these clients say; None where there is none."""
        return next(
            (n for n, each in self.undecided.items() if 2 * len(clients & each.failed.keys()) > len(clients)), None
        )

    def next_trial(self, bad: int, buffer_positions: Sequence[int], compare: bool) -> Trial | None:
        """What to make in place of the undecided versions, of which one is bad; None after the last trial.

        compare: whether there are clients enough to blame one of them.
        """
        if self.trials:
            self.trials = self.trials[1:]
        else:
            self.bad = bad
            self.trials = trials(list(self.undecided.values()), self.good.number, buffer_positions, compare)
        self.in_vain += len(self.trials) == 1
        self.undecided = {}
        return self.trials[0] if self.trials else None


def trials(versions: list[Version], good: int, buffer_positions: Sequence[int], compare: bool) -> list[Trial]:
    """In the order in which to try them, the largest step's client being the first suspect.

    Updates that started from a version that is taken back are in none. Where there are such, the first trial is
    without them alone, as one of them may be to blame.
    """
    updates = [each for version in versions for each in version.updates]
    kept = [each for each in updates if each.job.version <= good]
    made = [Trial(kept)] if 0 < len(kept) < len(updates) else []
    if compare:
        steps = measure([each.update for each in kept], [each.base for each in kept], buffer_positions)
        by_size = sorted(zip(kept, steps, strict=True), key=lambda pair: pair[1].size)
        largest = {each.job.partition: step for each, step in by_size}
        times = {partition: excess(step, list(largest.values())) for partition, step in largest.items()}
        for suspect in sorted(times, key=lambda partition: (-times[partition], partition)):
            others = [each for each in kept if each.job.partition != suspect]
            made.append(Trial(others, suspect, times[suspect]))
    return [*made, Trial([])]

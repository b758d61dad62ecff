"""Who takes part: which client holds which partition, and what it said of its data."""

import contextlib
import math
import secrets
import threading
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from federation.config import ACCURACY, Metric, Recipe
from federation.console import clean, say
from federation.participants.agreement import conflict, initial_conflict, remark
from federation.protocol import DataSummary, TaskSummary
from federation.security.audit import AuditLog, session_name
from federation.security.identity import Identity
from federation.security.members import Member

import numpy as np
from flwr.server import ClientManager as FlowerClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.criterion import Criterion


@dataclass
class Participant:
    """A client that has a partition; numbers of examples are what it declared when it joined."""

    partition: int
    client: ClientProxy
    instance: str
    host: str
    classes: list[str] = field(default_factory=list)  # by its own data
    told_classes: bool = False  # those of the federation, where they are others
    train_examples: int = 0
    test_examples: int = 0
    class_counts: list[int] = field(default_factory=list)
    summary: DataSummary | None = None
    ready: bool = False
    strikes: int = 0  # bad updates in a row
    member: Member | None = None  # whose key it proved to have
    signature: str = ""  # the server's, for a client that asked who it is

    @property
    def title(self) -> str:
        """What people read: the member's name, or the number."""
        return self.member.name if self.member else f"client {self.partition}"

    @property
    def knows_pieces(self) -> bool:
        """Clients of 1.0.0 don't."""
        return bool(self.summary and self.summary.task)

    @property
    def measures_batchnorm(self) -> bool:
        """Clients of 1.0.0 don't, nor those whose task leaves it."""
        return bool(self.summary and self.summary.batchnorm)


class Refused(Exception):
    """A client can't join, with the words and the exit code it is told.

    kind is what the server counts such refusals by: words may hold what anyone made up.
    """

    def __init__(self, kind: str, words: str, code: int = 1):
        super().__init__(words)
        self.kind = kind
        self.code = code


class ClientManager(FlowerClientManager):
    """Flower's client manager as the rounds need it; the two below it admit clients: Admission those that come
    over gRPC, NodeAdmission the nodes of Flower's engines.

    notify(event, partition, words) is called from other threads for joins, leaves and refusals.
    """

    def __init__(
        self,
        num_partitions: int,
        recipe: Recipe,
        notify: Callable[[str, int | None, str], None],
        classes: list[str] | None = None,  # where the server was told them
    ) -> None:
        self.num_partitions = num_partitions
        self.recipe = recipe
        self.notify = notify
        self.run_id = ""  # of history.json
        self.audit = AuditLog()
        self.farewell: dict[str, str] = {}  # what goes to all with the reason why the run is over
        self.salt = secrets.token_hex(16)  # of the names by which clients of one machine are known
        self.local = recipe.partitioner == "local"  # each client has data of its own
        self.classes: list[str] = classes or []  # the federation's
        self.fixed = bool(classes)
        self.agreed: DataSummary | None = None  # what all have alike, once it is fixed
        self.initial: dict[str, np.ndarray] = {}  # weights to begin with, by name, where the server was given them
        self.statistics: dict[str, list[float]] = {}  # of columns, over all clients: see participants/column_statistics
        self.max_message_bytes: float = math.inf
        self.participants: dict[int, Participant] = {}
        self.identity: Identity | None = None  # the server's own key
        self.places: dict[str, int] = {}  # of members by their keys, for as long as they are members
        self.names: dict[int, str] = {}  # of members by partition, of the newest that had it
        self.changed = threading.Condition()
        self.closed = False

    def begin(self, classes: list[str], agreed: DataSummary) -> None:
        """From the first round on, or in a resumed run, these don't change."""
        self.classes, self.agreed, self.fixed = classes, agreed, True

    @property
    def buffer_positions(self) -> list[int]:
        """Of the arrays that are measured, not trained (BatchNorm's)."""
        return self.agreed.buffer_positions if self.agreed else []

    @property
    def batchnorm(self) -> list[int]:
        """Positions of running mean and variance of each BatchNorm layer, by turns, where they are measured anew."""
        return self.agreed.batchnorm if self.agreed else []

    @property
    def task(self) -> TaskSummary | None:
        """What the clients say of their task; those of version 1.0.0 say nothing."""
        return self.agreed.task if self.agreed else None

    @property
    def metrics(self) -> list[Metric]:
        """Of the task; the first is the main one."""
        return self.task.metrics if self.task else [ACCURACY]

    def ready(self) -> list[Participant]:
        """Participants that can be asked to work, by partition."""
        with self.changed:
            return [self.participants[p] for p in sorted(self.participants) if self.participants[p].ready]

    def wait_ready(self, number: int, timeout: float, stop: threading.Event) -> bool:
        """Wait until that many are ready. False after timeout seconds, or soon after stop is set."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while len(self.ready()) < number:
                left = deadline - time.monotonic()
                if left <= 0 or stop.is_set():
                    return False
                self.changed.wait(min(left, 0.2))  # in slices, so that a signal is seen
        return True

    def unregister(self, client: ClientProxy) -> None:
        """Called by Flower when a client is gone, and by us when it has to go: its partition is free."""
        with self.changed:
            participant = self.of_client(client)
            if participant is None:
                return
            del self.participants[participant.partition]
            self.changed.notify_all()
        place = "kept for it" if participant.member else "free"
        if participant.ready and not self.closed:
            self.notify("leave", participant.partition, f"{participant.title} left; its place is {place}")

    def title(self, partition: int) -> str:
        """What people read of who has, or had, a partition."""
        return "the sum" if partition < 0 else self.names.get(partition, f"client {partition}")

    def known_members(self) -> dict[str, dict]:
        """As history.json keeps them, by partition."""
        return {
            str(place): {"name": self.names[place], "key": public}
            for public, place in self.places.items()
            if place in self.names
        }

    def know_members(self, stored: dict[str, dict]) -> None:
        """Inverse of known_members, in a resumed run."""
        self.places = {each["key"]: int(place) for place, each in stored.items()}
        self.names = {int(place): each["name"] for place, each in stored.items()}

    def of_client(self, client: ClientProxy) -> Participant | None:
        return next((each for each in self.participants.values() if each.client is client), None)

    # Whether a client keeps what it was sent: then large models can travel in pieces, and of a model that it has
    # measured BatchNorm's statistics on, only the new statistics. Nodes are made anew for every message.
    in_pieces = False

    def check_members(self) -> None:
        """Drop who is no member any more; where nobody has a key there is nothing to do."""

    @abstractmethod
    def reassign(self, participant: Participant) -> None:
        """Tell a client that lacks some of the federation's classes which they are; until it answers it isn't ready."""

    @abstractmethod
    def lose(self, client: ClientProxy) -> None:
        """Give up a client that does not answer; it may come back."""

    @abstractmethod
    def drop(self, participant: Participant, words: str) -> None:
        """End a client's part in the run for good, for this reason."""

    @abstractmethod
    def close(self, kind: str, words: str, seconds: float = 3.0) -> None:
        """Admit nobody any more, and tell all that the run is over; see protocol.CloseReason."""

    # For admission

    def check_classes(self, classes: list[str]) -> None:
        """Raises Refused where a client with these classes can't be one of the federation.

        Before the classes are fixed, only a list that more than half of all places share can shut another out, so
        that a wrong one that comes first does no harm. With data of its own a client may lack some classes.
        """
        if self.fixed:
            fits = set(classes) <= set(self.classes) if self.local else classes == self.classes
            ours = self.classes
        else:
            ours, count = self._commonest()
            fits = self.local or classes == ours or 2 * count <= self.num_partitions
        if not fits:
            raise Refused("classes", different_classes(classes, ours))

    def agree_on_classes(self) -> list[Participant]:
        """Fix the federation's classes once all are there; returns who has others.

        They are the ones given to the server; else, where each has data of its own, all that any of them has; else
        those of most.
        """
        if not self.fixed:
            names = {name for each in self.participants.values() for name in each.classes}
            same = len({tuple(each.classes) for each in self.participants.values()}) == 1
            self.classes = sorted(names) if self.local and not same else self._commonest()[0]
            self.fixed = True
        return [each for each in self.ready() if each.classes != self.classes and not each.told_classes]

    def agree(self) -> list[tuple[Participant, str]]:
        """Fix what all clients have alike, once all are there; returns who has it otherwise, and what.

        It is what most have, of several the lowest partition's.
        """
        if self.agreed is None:
            self.agreed = self._usual()[0]
        told = [(each, conflict(each.summary, self.agreed)) for each in self.ready() if each.summary and self.agreed]
        return [(each, words) for each, words in told if words]

    def _commonest(self) -> tuple[list[str], int]:
        """The list of classes that most participants have, of several the lowest partition's, and how many have it."""
        lists = Counter(tuple(self.participants[p].classes) for p in sorted(self.participants))
        (most, count), *_ = lists.most_common(1) or [((), 0)]  # of several the first
        return list(most), count

    def _usual(self) -> tuple[DataSummary | None, int]:
        """The same of what else all must have alike; clients of 1.0.0, which say less of it, can't be the measure."""
        alike: dict[str, list[DataSummary]] = {}  # of a thousand clients that are, one is compared
        for summary in (each.summary for each in self.ready() if each.summary):
            alike.setdefault(summary.common, []).append(summary)
        told = [same[0] for same in alike.values()]
        kinds: list[DataSummary] = []
        for one in [each for each in told if each.task] or told:
            if all(conflict(one, kind) for kind in kinds):
                kinds.append(one)
        counts = [sum(len(same) for same in alike.values() if conflict(same[0], kind) is None) for kind in kinds]
        return (kinds[counts.index(max(counts))], max(counts)) if kinds else (None, 0)

    def settle(self, participant: Participant, summary: DataSummary, name: str) -> int:
        """Make the participant ready; how many are there now, or 0 where it was lost meanwhile. Raises Refused."""
        train, test, counts = summary.train_examples, summary.test_examples, summary.class_counts
        if train < 1 or test < 1:
            raise Refused(
                f"examples {name}", f"{name} has {train:,} training and {test:,} test examples; it needs both"
            )
        with self.changed:
            if self.participants.get(participant.partition) is not participant:
                return 0
            if counts and len(counts) != len(self.classes if participant.told_classes else participant.classes):
                raise Refused(f"counts {name}", f"{name} counts its examples by other classes than it has")
            usual, number = (self.agreed, self.num_partitions) if self.agreed else self._usual()
            other = conflict(summary, usual) if usual else None
            # Before round 1 only what more than half of all places have can shut another out: see check_classes.
            # With data of its own a client may lack classes, and so a row of its last layer, until it is told all.
            if other and 2 * number > self.num_partitions and (self.fixed or not self.local):
                raise Refused(f"task {name}", f"{name} {other}")
            words = initial_conflict(summary.task, self.initial) if self.initial else None
            if words:
                raise Refused(f"initial weights {name}", f"{name} {words}")
            if summary.model_bytes > self.max_message_bytes and not (self.in_pieces and summary.task):
                size = (
                    f"{summary.model_bytes / 1e6:.1f} MB, more than --max-message-mb {self.max_message_bytes / 1e6:g}"
                )
                raise Refused("model size", f"{name}'s model takes {size}; raise it at the server")
            if usual and other is None:
                self._remark(participant, summary, usual, name)
            if usual and summary.common == usual.common:
                summary = replace(summary, task=usual.task)  # which is then there once, and not for each client
            participant.train_examples, participant.test_examples = train, test
            participant.class_counts, participant.summary, participant.ready = counts, summary, True
            self.changed.notify_all()
            there = len(self.ready())
        with contextlib.suppress(OSError):  # of a full disk the round's next line tells
            key: dict[str, Any] = {"key": participant.member.public} if participant.member else {}
            self.audit.write("data-summary", sender=name, session=session_name(participant.instance), **key)
        return there

    def _remark(self, participant: Participant, summary: DataSummary, usual: DataSummary, name: str) -> None:
        """What is odd, but no reason to refuse."""
        words = remark(summary.task, usual.task)
        if words:
            say(f"{name}: {words}")
        if not self.local and summary.data_sizes != usual.data_sizes and summary.data_sizes and usual.data_sizes:
            one, other = (" + ".join(f"{size:,}" for size in each.data_sizes) for each in (summary, usual))
            say(
                f"warning: {name} has a data set of {one} examples, the others one of {other}: the partitions can't "
                "come from one data set; for clients with data of their own start the server with --partitioner local"
            )

    # The rest of Flower's interface

    def num_available(self) -> int:
        return len(self.ready())

    def all(self) -> dict[str, ClientProxy]:
        return {each.client.cid: each.client for each in self.ready()}

    def wait_for(self, num_clients: int, timeout: int = 86400) -> bool:
        return self.wait_ready(num_clients, timeout, threading.Event())

    def sample(
        self, num_clients: int, min_num_clients: int | None = None, criterion: Criterion | None = None
    ) -> list[ClientProxy]:
        """The lowest partitions; the rounds do their own client selection."""
        return [each.client for each in self.ready()[:num_clients]]


def different_classes(theirs: list[str], ours: list[str]) -> str:
    """What to say of a client with these classes in a federation with those."""
    one, other = clean(", ".join(theirs), 100), clean(", ".join(ours), 100)
    words = f"its classes [{one}] are not the federation's [{other}]"
    if one.endswith("…") or other.endswith("…"):
        odd = sorted(set(theirs) ^ set(ours))
        words += f"; in one only: {clean(', '.join(odd), 40)}" if odd else "; they are in another order"
    return words

"""Who takes part: which client holds which partition, and what it said of its data."""

import math
import secrets
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from federation.config import Recipe
from federation.console import clean
from federation.protocol import DataSummary

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
    ready: bool = False
    strikes: int = 0  # bad updates in a row


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
        self.salt = secrets.token_hex(16)  # of the names by which clients of one machine are known
        self.local = recipe.partitioner == "local"  # each client has data of its own
        self.classes: list[str] = classes or []  # the federation's
        self.fixed = bool(classes)
        self.buffer_positions: list[int] = []  # of the arrays that are measured, not trained (BatchNorm's)
        self.started = False
        self.input_shape: list[int] = []
        self.max_message_bytes: float = math.inf
        self.participants: dict[int, Participant] = {}
        self.changed = threading.Condition()
        self.closed = False

    def begin(self, classes: list[str], buffer_positions: list[int]) -> None:
        """From the first round on, or in a resumed run, these don't change."""
        self.classes, self.buffer_positions, self.started = classes, buffer_positions, True
        self.fixed = True

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
        if participant.ready and not self.closed:
            self.notify("leave", participant.partition, f"client {participant.partition} left; its place is free")

    def of_client(self, client: ClientProxy) -> Participant | None:
        return next((each for each in self.participants.values() if each.client is client), None)

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

    def _commonest(self) -> tuple[list[str], int]:
        """The list of classes that most participants have, of several the lowest partition's, and how many have it."""
        lists = [tuple(self.participants[p].classes) for p in sorted(self.participants)]
        if not lists:
            return [], 0
        most = max(lists, key=lists.count)
        return list(most), lists.count(most)

    def settle(self, participant: Participant, summary: DataSummary, name: str) -> int:
        """Make the participant ready; how many are there now, or 0 where it was lost meanwhile. Raises Refused."""
        train, test, counts = summary.train_examples, summary.test_examples, summary.class_counts
        if train < 1 or test < 1:
            words = f"{name} has {train:,} training and {test:,} test images; it needs both"
            raise Refused(f"images {name}", words)
        with self.changed:
            if self.participants.get(participant.partition) is not participant:
                return 0
            if counts and len(counts) != len(self.classes if participant.told_classes else participant.classes):
                raise Refused(f"counts {name}", f"{name} counts its images by other classes than it has")
            if not self.started and not self.ready():
                self.buffer_positions = summary.buffer_positions
            if summary.buffer_positions != self.buffer_positions:
                words = f"{name} measures other arrays of the network (BatchNorm's) than the others; use one model.py"
                raise Refused(f"statistics {name}", words)
            if not (self.started and self.input_shape) and not self.ready():  # runs of before kept none
                self.input_shape = summary.input_shape
            if summary.input_shape != self.input_shape:
                words = (
                    f"{name} has inputs of shape {summary.input_shape}, the others {self.input_shape}; use one data.py"
                )
                raise Refused(f"inputs {name}", words)
            if summary.model_bytes > self.max_message_bytes:
                size = (
                    f"{summary.model_bytes / 1e6:.1f} MB, more than --max-message-mb {self.max_message_bytes / 1e6:g}"
                )
                raise Refused("model size", f"{name}'s model takes {size}; raise it at the server")
            participant.train_examples, participant.test_examples = train, test
            participant.class_counts, participant.ready = counts, True
            self.changed.notify_all()
            return len(self.ready())

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

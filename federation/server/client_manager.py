"""Who takes part: which client holds which partition, and what it said of its data."""

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

    def __init__(self, num_partitions: int, recipe: Recipe, notify: Callable[[str, int | None, str], None]) -> None:
        self.num_partitions = num_partitions
        self.recipe = recipe
        self.notify = notify
        self.classes: list[str] = []  # the federation's, from the first client or the resumed run
        self.buffer_positions: list[int] = []  # of the arrays that are measured, not trained (BatchNorm's)
        self.started = False  # from the first round on the classes don't change
        self.participants: dict[int, Participant] = {}
        self.changed = threading.Condition()
        self.closed = False

    def begin(self, classes: list[str], buffer_positions: list[int]) -> None:
        """From the first round on, or in a resumed run, these don't change."""
        self.classes, self.buffer_positions, self.started = classes, buffer_positions, True

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
    def lose(self, client: ClientProxy) -> None:
        """Give up a client that does not answer; it may come back."""

    @abstractmethod
    def drop(self, participant: Participant, words: str) -> None:
        """End a client's part in the run for good, for this reason."""

    @abstractmethod
    def close(self, kind: str, words: str, seconds: float = 3.0) -> None:
        """Admit nobody any more, and tell all that the run is over; see protocol.CloseReason."""

    # For admission

    def same_classes(self, classes: list[str]) -> None:
        """The first client's classes are the federation's. Raises Refused for others."""
        if not self.participants and not self.started:
            self.classes = classes
        if classes == self.classes:
            return
        theirs, ours = clean(", ".join(classes), 100), clean(", ".join(self.classes), 100)
        words = f"its classes [{theirs}] are not the federation's [{ours}]"
        if theirs.endswith("…") or ours.endswith("…"):
            odd = sorted(set(classes) ^ set(self.classes))
            words += f"; in one only: {clean(', '.join(odd), 40)}" if odd else "; they are in another order"
        raise Refused("classes", words)

    def settle(self, participant: Participant, summary: DataSummary, name: str) -> int:
        """Make the participant ready; how many are there now, or 0 where it was lost meanwhile. Raises Refused."""
        train, test, counts = summary.train_examples, summary.test_examples, summary.class_counts
        if train < 1 or test < 1:
            words = f"{name} has {train:,} training and {test:,} test images; it needs both"
            raise Refused(f"images {name}", words)
        with self.changed:
            if self.participants.get(participant.partition) is not participant:
                return 0
            if counts and len(counts) != len(self.classes):
                raise Refused(f"counts {name}", f"{name} counts its images by other classes than it has")
            if not self.started and not self.ready():
                self.buffer_positions = summary.buffer_positions
            if summary.buffer_positions != self.buffer_positions:
                words = f"{name} measures other arrays of the network (BatchNorm's) than the others; use one model.py"
                raise Refused(f"statistics {name}", words)
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

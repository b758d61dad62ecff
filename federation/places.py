"""Who holds which partition, and what each of them brought; how they came to it is the admission's matter."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from federation.claims import Holdings
from federation.recipe import Recipe
from federation.words import clean

from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy


@dataclass
class Place:
    """A client's seat in the federation; counts are what the client declared when it joined."""

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

    kind is what the server counts such refusals by: words may hold what a stranger made up.
    """

    def __init__(self, kind: str, words: str, code: int = 1):
        super().__init__(words)
        self.kind = kind
        self.code = code


class Places(ClientManager):
    """Flower's client manager as the loop of rounds needs it.

    notify(event, partition, words) is called from other threads for joins, leaves and refusals. Two kinds of
    door lead here: Admission's, for streams of clients, and NodeAdmission's, for nodes of Flower's engines.
    """

    def __init__(self, num_places: int, recipe: Recipe, notify: Callable[[str, int | None, str], None]) -> None:
        self.num_places = num_places
        self.recipe = recipe
        self.notify = notify
        self.classes: list[str] | None = None  # the federation's, from the first client or the resumed run
        self.statistics: list[int] = []  # positions of the arrays that are measured, not trained (BatchNorm's)
        self.started = False  # from the first round on the classes stand fast
        self.places: dict[int, Place] = {}
        self.changed = threading.Condition()
        self.closed = False

    def begin(self, classes: list[str], statistics: list[int]) -> None:
        """From the first round on, or in a resumed run, these stand fast."""
        self.classes, self.statistics, self.started = classes, statistics, True

    def ready(self) -> list[Place]:
        """Places whose clients can be asked to work, by partition."""
        with self.changed:
            return [self.places[p] for p in sorted(self.places) if self.places[p].ready]

    def wait_ready(self, number: int, timeout: float, stop: threading.Event) -> bool:
        """Wait until that many places are ready. False after timeout seconds, or soon after stop is set."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while len(self.ready()) < number:
                left = deadline - time.monotonic()
                if left <= 0 or stop.is_set():
                    return False
                self.changed.wait(min(left, 0.2))  # in slices, so that a signal is seen
        return True

    def unregister(self, client: ClientProxy) -> None:
        """Called by Flower when a client is gone, and by us when it has to go: its place is free."""
        with self.changed:
            place = self.place_of(client)
            if place is None:
                return
            del self.places[place.partition]
            self.changed.notify_all()
        if place.ready and not self.closed:
            self.notify("leave", place.partition, f"client {place.partition} left; its place is free")

    def place_of(self, client: ClientProxy) -> Place | None:
        return next((place for place in self.places.values() if place.client is client), None)

    # For the door

    def same_classes(self, classes: list[str]) -> None:
        """The first client's classes are the federation's. Raises Refused for others."""
        if not self.places and not self.started:
            self.classes = classes
        if classes == self.classes:
            return
        theirs, ours = clean(", ".join(classes), 100), clean(", ".join(self.classes), 100)
        words = f"its classes [{theirs}] are not the federation's [{ours}]"
        if theirs.endswith("…") or ours.endswith("…"):
            odd = sorted(set(classes) ^ set(self.classes))
            words += f"; in one only: {clean(', '.join(odd), 40)}" if odd else "; they are in another order"
        raise Refused("classes", words)

    def settle(self, place: Place, holdings: Holdings, name: str) -> int:
        """Make the place ready; how many are there now, or 0 where it was lost meanwhile. Raises Refused."""
        train, test, counts = holdings.train_examples, holdings.test_examples, holdings.class_counts
        if train < 1 or test < 1:
            words = f"{name} has {train:,} training and {test:,} test images; it needs both"
            raise Refused(f"images {name}", words)
        with self.changed:
            if self.places.get(place.partition) is not place:
                return 0
            if counts and len(counts) != len(self.classes):
                raise Refused(f"counts {name}", f"{name} counts its images by other classes than it has")
            if not self.started and not self.ready():
                self.statistics = holdings.statistics
            if holdings.statistics != self.statistics:
                words = f"{name} measures other arrays of the network (BatchNorm's) than the others; use one model.py"
                raise Refused(f"statistics {name}", words)
            place.train_examples, place.test_examples, place.class_counts, place.ready = train, test, counts, True
            self.changed.notify_all()
            return len(self.ready())

    # The rest of Flower's interface

    def num_available(self) -> int:
        return len(self.ready())

    def all(self) -> dict[str, ClientProxy]:
        return {place.client.cid: place.client for place in self.ready()}

    def wait_for(self, num_clients: int, timeout: int = 86400) -> bool:
        return self.wait_ready(num_clients, timeout, threading.Event())

    def sample(
        self, num_clients: int, min_num_clients: int | None = None, criterion: object = None
    ) -> list[ClientProxy]:
        """The lowest partitions; the loop of rounds does its own client selection."""
        return [place.client for place in self.ready()[:num_clients]]

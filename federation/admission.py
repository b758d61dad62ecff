"""Who may join: first come, first served for the places, after proof of the shared secret."""

import hmac
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from federation.handshake import PROTOCOL, RETRY_SECONDS, proof
from federation.recipe import Recipe
from federation.words import clean

from flwr.common import GetPropertiesIns, ReconnectIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

VET_SECONDS = 10  # a connection that says nothing for so long is dropped


@dataclass
class Place:
    """A client's seat in the federation; counts are what the client declared when it joined."""

    partition: int
    client: ClientProxy
    instance: str  # names the client's process, so that it can take over its own broken connection
    host: str  # clients that share a machine say the same
    train_examples: int = 0
    test_examples: int = 0
    ready: bool = False
    strikes: int = 0  # bad updates in a row


class Refused(Exception):
    """A client can't join, with the words and the exit code it is told."""

    def __init__(self, words: str, code: int = 1):
        super().__init__(words)
        self.code = code


class Waitlisted(Exception):
    """A client can't join yet, with the words it is told."""


class Admission(ClientManager):
    """Flower's client manager with a door: every connection is vetted before it counts.

    notify(event, partition, words) is called from the vetting threads for joins, leaves and refusals.
    """

    def __init__(
        self,
        num_places: int,
        recipe: Recipe,
        notify: Callable[[str, int | None, str], None],
        *,
        secret: bytes | None = None,
        waiting_list: bool = True,
        load_timeout: float = 600,
    ) -> None:
        self.num_places = num_places
        self.recipe = recipe
        self.notify = notify
        self.secret = secret
        self.waiting_list = waiting_list
        self.load_timeout = load_timeout
        self.classes: list[str] | None = None  # the federation's, from the first client or the resumed run
        self.statistics: list[int] = []  # positions of the arrays that are measured, not trained (BatchNorm's)
        self.started = False  # from the first round on the classes stand fast
        self.places: dict[int, Place] = {}
        self.changed = threading.Condition()
        self.closed = False
        self._turned_away: Counter[str] = Counter()

    # The door

    def register(self, client: ClientProxy) -> bool:
        """Called by Flower's servicer for every new stream; the answer comes later, from vetting."""
        if self.closed:
            return False
        threading.Thread(target=self._vet, args=(client,), daemon=True).start()
        return True

    def unregister(self, client: ClientProxy) -> None:
        """Called by Flower when a stream ends, and by us when we end it."""
        with self.changed:
            place = self.place_of(client)
            if place is None:
                return
            del self.places[place.partition]
            self.changed.notify_all()
        if place.ready and not self.closed:
            self.notify("leave", place.partition, f"client {place.partition} left; its place is free")

    def _vet(self, client: ClientProxy) -> None:
        """Seat one client, or tell it why not; runs in a thread of its own on the open stream."""
        try:
            place = self._seat(client, self._hello(client))
            self._hand_out(place)
        except Waitlisted as wait:
            self.tell(client, "wait", str(wait), reconnect_in=RETRY_SECONDS)
        except Refused as refusal:
            self._count_refusal(str(refusal))
            self.unregister(client)
            self.tell(client, "refused", str(refusal), code=refusal.code)
        except Exception as error:  # a broken stream or a senseless answer: from strangers, expect anything
            self.unregister(client)
            close(client)
            self._count_refusal(f"a connection that ended before it had joined ({type(error).__name__})")

    def _hello(self, client: ClientProxy) -> dict:
        """Challenge the client. Raises Refused where the answer won't do."""
        nonce = secrets.token_hex(32)
        hello = ask(client, {"ask": "hello", "nonce": nonce, "protocol": PROTOCOL}, VET_SECONDS)
        if self.secret is not None and not hmac.compare_digest(proof(self.secret, nonce), str(hello.get("proof", ""))):
            how = "wrong" if hello.get("proof") else "missing"
            raise Refused(f"{how} shared secret; start the client with the --secret-file that the server has")
        if hello.get("protocol") != PROTOCOL:
            theirs = clean(hello.get("protocol"), 20)
            raise Refused(f"the client's handshake is version {theirs}, the server's {PROTOCOL}; update the older one")
        return hello

    def _seat(self, client: ClientProxy, hello: dict) -> Place:
        """Give the client a place, not yet ready. Raises Refused or Waitlisted."""
        classes = [clean(name, 100) for name in json.loads(hello["classes"])][:10_000]
        instance, wanted, held = str(hello["instance"])[:64], int(hello["wanted"]), int(hello["held"])
        with self.changed:
            if self.closed:
                raise Refused("the run is over")
            if not self.places and not self.started:
                self.classes = classes
            if classes != self.classes:
                theirs, ours = ", ".join(classes), ", ".join(self.classes)
                raise Refused(f"its classes [{theirs}] are not the federation's [{ours}]")
            before = next((place for place in self.places.values() if place.instance == instance), None)
            if before is not None:
                close(before.client)
                partition = before.partition
            else:
                partition = self._choose(wanted, held)
            place = Place(partition, client, instance, str(hello["host"])[:64])
            self.places[partition] = place
            return place

    def _choose(self, wanted: int, held: int) -> int:
        """A free partition: the one wanted, or held before, or the lowest."""
        free = [partition for partition in range(self.num_places) if partition not in self.places]
        if wanted >= self.num_places:
            last = self.num_places - 1
            raise Refused(f"--partition-id {wanted} is not there: this run has partitions 0 to {last}", code=2)
        if wanted >= 0 and wanted not in free:
            raise Refused(f"--partition-id {wanted} is taken; choose another, or leave it out", code=2)
        if not free:
            words = f"all {self.num_places} places are taken"
            if self.waiting_list:
                raise Waitlisted(words)
            raise Refused(f"{words}, and this server keeps no waiting list")
        return next(partition for partition in (wanted, held, free[0]) if partition in free)

    def _hand_out(self, place: Place) -> None:
        """Send partition and recipe; the place is ready once the client says what it holds."""
        words = {"ask": "place", "partition": place.partition, "num_partitions": self.num_places}
        answer = ask(place.client, {**words, "recipe": self.recipe.to_json()}, self.load_timeout)
        if "error" in answer:
            raise Refused(f"client {place.partition} could not start: {clean(answer['error'])}")
        train, test = int(answer["train_examples"]), int(answer["test_examples"])
        statistics = [int(position) for position in json.loads(answer["statistics"])]
        if train < 1 or test < 1:
            raise Refused(f"client {place.partition} has {train} training and {test} test images; it needs both")
        with self.changed:
            if self.places.get(place.partition) is not place:
                return
            place.train_examples, place.test_examples, place.ready = train, test, True
            if not self.started:
                self.statistics = statistics
            there = len(self.ready())
            self.changed.notify_all()
        how_many = f"{there} of {self.num_places} there"
        self.notify("join", place.partition, f"client {place.partition} joined, {train:,} training images ({how_many})")

    def _count_refusal(self, words: str) -> None:
        """Say the 1st, 10th, 100th... time of each refusal: a flood of strangers must not flood the log."""
        with self.changed:
            if len(self._turned_away) > 1000:
                self._turned_away.clear()
            self._turned_away[words] += 1
            times = self._turned_away[words]
        if times in (1, 10, 100, 1000, 10_000) and not self.closed:
            self.notify("refuse", None, f"turned away: {words}" + (f" ({times} times)" if times > 1 else ""))

    # What the loop of rounds needs

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

    def drop(self, place: Place, words: str) -> None:
        """End a client's membership and tell it why, as far as it still listens."""
        self.unregister(place.client)
        threading.Thread(target=self.tell, args=(place.client, "dropped", words), daemon=True).start()

    def close(self, kind: str, words: str, seconds: float = 3.0) -> None:
        """Close the door and tell every client; those that are busy or dead lose the stream after so many seconds."""
        with self.changed:
            self.closed = True
            clients = [place.client for place in self.places.values()]
        threads = [threading.Thread(target=self.tell, args=(client, kind, words), daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def tell(self, client: ClientProxy, kind: str, words: str, code: int = 1, reconnect_in: int | None = None) -> None:
        """Say why the stream ends, then end it with Flower's own ReconnectIns."""
        try:
            ask(client, {"ask": "told", "kind": kind, "words": words, "code": code}, VET_SECONDS)
            client.reconnect(ReconnectIns(seconds=reconnect_in), timeout=VET_SECONDS, group_id=None)
        except Exception:  # a client that no longer listens can't be told
            close(client)

    def place_of(self, client: ClientProxy) -> Place | None:
        return next((place for place in self.places.values() if place.client is client), None)

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


def ask(client: ClientProxy, words: dict, timeout: float) -> dict:
    """One question in a get_properties message. Raises where the stream is broken or timeout seconds pass."""
    return client.get_properties(GetPropertiesIns(config=words), timeout=timeout, group_id=None).properties


def close(client: ClientProxy) -> None:
    """End a stream from our side; whoever waits for its answer gets an exception."""
    client.bridge.close()

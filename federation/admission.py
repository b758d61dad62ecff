"""Who may join: first come, first served for the places, after proof of the shared secret."""

import hmac
import json
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from federation.handshake import PROTOCOL, RETRY_SECONDS, proof
from federation.recipe import Recipe
from federation.words import clean

from flwr.common import GetPropertiesIns, ReconnectIns
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed

VET_SECONDS = 10  # a connection that says nothing for so long is dropped
STRANGERS = 64  # connections that are vetted at a time; of Flower's 1,000 streams the rest stays free for clients
WAITERS = 1000  # on the waiting list
MOST_CLASSES, LONGEST_NAME, LONGEST_LIST = 10_000, 100, 2_000_000  # the last in characters of JSON


@dataclass
class Place:
    """A client's seat in the federation; counts are what the client declared when it joined."""

    partition: int
    client: ClientProxy
    instance: str  # names the client's process, so that it can take over its own broken connection
    host: str  # clients that share a machine say the same
    train_examples: int = 0
    test_examples: int = 0
    class_counts: list[int] = field(default_factory=list)  # training examples by class, where the client says so
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
        self._strangers: list[ClientProxy] = []  # being vetted
        self._waiting: dict[str, float] = {}  # instances by arrival, and when each asked last
        self._turned_away: Counter[str] = Counter()

    # The door

    def register(self, client: ClientProxy) -> bool:
        """Called by Flower's servicer for every new stream; the answer comes later, from vetting."""
        pushed_out = None
        with self.changed:
            if self.closed:
                return False
            if len(self._strangers) >= STRANGERS:
                # Anyone, not the oldest: however fast a flood, some clients have the time that an answer takes.
                pushed_out = self._strangers.pop(random.randrange(STRANGERS))
            self._strangers.append(client)
        if pushed_out:
            close(pushed_out)
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
        began, place = time.monotonic(), None
        try:
            place = self._seat(client, self._hello(client))
            self._no_stranger(client)
            self._hand_out(place)
        except Waitlisted as wait:
            self.tell(client, "wait", str(wait), reconnect_in=RETRY_SECONDS)
        except Refused as refusal:
            self._count_refusal(refusal.kind, str(refusal))
            self.unregister(client)
            self.tell(client, "refused", str(refusal), code=refusal.code)
        except GrpcBridgeClosed:
            self.unregister(client)
            who = f"client {place.partition}" if place else "a connection"
            silent = place is None and time.monotonic() - began >= VET_SECONDS
            how = f"said nothing for {VET_SECONDS} s" if silent else "broke off before it had joined"
            self._count_refusal(f"{who} {how}", f"{who} that {how}")
        except Exception as error:  # a senseless answer: from strangers, expect anything
            self.unregister(client)
            close(client)
            kind = type(error).__name__
            self._count_refusal(kind, f"a connection whose answer made no sense ({kind})")
        finally:
            self._no_stranger(client)

    def _no_stranger(self, client: ClientProxy) -> None:
        with self.changed:
            if client in self._strangers:
                self._strangers.remove(client)

    def _hello(self, client: ClientProxy) -> dict:
        """Challenge the client. Raises Refused where the answer won't do."""
        nonce = secrets.token_hex(32)
        hello = ask(client, {"ask": "hello", "nonce": nonce, "protocol": PROTOCOL}, VET_SECONDS)
        if self.secret is not None:
            given = str(hello.get("proof", ""))
            if not hmac.compare_digest(proof(self.secret, nonce).encode(), given.encode()):
                how = "wrong" if given else "missing"
                words = f"{how} shared secret; start the client with the --secret-file that the server has"
                raise Refused(f"{how} secret", words)
        if hello.get("protocol") != PROTOCOL:
            theirs = clean(hello.get("protocol"), 20)
            words = f"the client's handshake is version {theirs}, the server's {PROTOCOL}; update the older one"
            raise Refused("protocol", words)
        return hello

    def _seat(self, client: ClientProxy, hello: dict) -> Place:
        """Give the client a place, not yet ready. Raises Refused or Waitlisted, or what senseless answers raise."""
        classes = [_text(name, 1, 10 * LONGEST_NAME) for name in _list(hello["classes"])]
        instance, host = _text(hello["instance"], 16, 64), _text(hello["host"], 0, 64)
        wanted, held = _integer(hello["wanted"]), _integer(hello["held"])
        if not 1 <= len(classes) <= MOST_CLASSES:
            raise Refused("classes", f"it has {len(classes)} classes; this server takes 1 to {MOST_CLASSES:,}")
        with self.changed:
            if self.closed:
                raise Refused("over", "the run is over")
            self._same_classes([clean(name, LONGEST_NAME) for name in classes])
            before = next((place for place in self.places.values() if place.instance == instance), None)
            if before is not None:
                close(before.client)
                partition = before.partition
            else:
                partition = self._choose(instance, wanted, held)
            place = Place(partition, client, instance, host)
            self.places[partition] = place
            return place

    def _same_classes(self, classes: list[str]) -> None:
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

    def _choose(self, instance: str, wanted: int, held: int) -> int:
        """A free partition: the one wanted, or held before, or the lowest. Raises Refused or Waitlisted."""
        free = [partition for partition in range(self.num_places) if partition not in self.places]
        if wanted >= self.num_places:
            words = f"--partition-id {wanted} is not there: this run has partitions 0 to {self.num_places - 1}"
            raise Refused("partition", words, code=2)
        if wanted >= 0 and wanted not in free:
            words = f"--partition-id {wanted} is taken; choose another, or leave it out"
            raise Refused("partition", words, code=2)
        ahead = self._ahead_of(instance)
        if len(free) <= ahead:
            words = f"all {self.num_places} places are taken"
            if not self.waiting_list:
                raise Refused("full", f"{words}, and this server keeps no waiting list")
            if instance not in self._waiting and len(self._waiting) >= WAITERS:
                raise Refused("full", f"{words}, and {WAITERS:,} clients wait already")
            self._waiting[instance] = time.monotonic()
            raise Waitlisted(f"{words}; you are number {ahead + 1} on the waiting list")
        self._waiting.pop(instance, None)
        return next(partition for partition in (wanted, held, free[0]) if partition in free)

    def _ahead_of(self, instance: str) -> int:
        """How many came before and are still waiting."""
        asked_lately = time.monotonic() - 3 * RETRY_SECONDS
        self._waiting = {who: last for who, last in self._waiting.items() if last > asked_lately}
        return list(self._waiting).index(instance) if instance in self._waiting else len(self._waiting)

    def _hand_out(self, place: Place) -> None:
        """Send partition and recipe; the place is ready once the client says what it holds."""
        words = {"ask": "place", "partition": place.partition, "num_partitions": self.num_places}
        answer = ask(place.client, {**words, "recipe": self.recipe.to_json()}, self.load_timeout)
        name = f"client {place.partition}"
        if "error" in answer:
            raise Refused(f"start {name}", f"{name} could not start: {clean(answer['error'])}")
        train, test = _integer(answer["train_examples"]), _integer(answer["test_examples"])
        statistics = [_integer(position) for position in _list(answer["statistics"])]
        if train < 1 or test < 1:
            words = f"{name} has {train:,} training and {test:,} test images; it needs both"
            raise Refused(f"images {name}", words)
        counts = [_integer(count) for count in _list(answer.get("class_counts", "[]"))]
        if counts and (len(counts) != len(self.classes) or min(counts) < 0 or sum(counts) != train):
            raise Refused(f"counts {name}", f"{name} counts its images by class otherwise than in all")
        with self.changed:
            if self.places.get(place.partition) is not place:
                return
            place.class_counts = counts
            if not self.started and not self.ready():
                self.statistics = statistics
            if statistics != self.statistics:
                words = f"{name} measures other arrays of the network (BatchNorm's) than the others; use one model.py"
                raise Refused(f"statistics {name}", words)
            place.train_examples, place.test_examples, place.ready = train, test, True
            there = len(self.ready())
            self.changed.notify_all()
        how_many = f"{there} of {self.num_places} there"
        self.notify("join", place.partition, f"client {place.partition} joined, {train:,} training images ({how_many})")

    def _count_refusal(self, kind: str, words: str) -> None:
        """Say the first few of each kind, then the 10th, 100th...: strangers must not flood the terminal."""
        with self.changed:
            self._turned_away[kind] += 1
            times = self._turned_away[kind]
        if (times <= 3 or times in (10, 100, 1000, 10_000, 100_000)) and not self.closed:
            self.notify("refuse", None, f"turned away: {words}" + (f" ({times:,} times)" if times > 3 else ""))

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
            pass
        close(client)  # it has left by itself, or it means to stay in our way

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


def _text(value: object, least: int, most: int) -> str:
    """The value, if it is a string of so many characters. Raises ValueError."""
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise ValueError(f"not a text of {least} to {most} characters")
    return value


def _list(value: object) -> list:
    """What the value says in JSON, if it is a list. Raises ValueError."""
    items = json.loads(_text(value, 2, LONGEST_LIST))
    if not isinstance(items, list):
        raise ValueError("not a list")
    return items


def _integer(value: object) -> int:
    """The value, if it is an integer. Raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("not an integer")
    return value


def close(client: ClientProxy) -> None:
    """End a stream from our side; whoever waits for its answer gets an exception."""
    client.bridge.close()

"""Who may join: first come, first served for the places, after proof of the shared secret."""

import hmac
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable

from federation.claims import Claim, read_claim, read_holdings
from federation.handshake import PROTOCOL, RETRY_SECONDS, proof
from federation.places import Place, Places, Refused
from federation.recipe import Recipe
from federation.words import clean

from flwr.common import GetPropertiesIns, ReconnectIns
from flwr.server.client_proxy import ClientProxy
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed

VET_SECONDS = 10  # a connection that says nothing for so long is dropped
STRANGERS = 64  # connections that are vetted at a time; of Flower's 1,000 streams the rest stays free for clients
WAITERS = 1000  # on the waiting list


class Waitlisted(Exception):
    """A client can't join yet, with the words it is told."""


class Admission(Places):
    """The door for clients that come over gRPC: every connection is vetted before it counts."""

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
        super().__init__(num_places, recipe, notify)
        self.secret = secret
        self.waiting_list = waiting_list
        self.load_timeout = load_timeout
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

    def _vet(self, client: ClientProxy) -> None:
        """Seat one client, or tell it why not; runs in a thread of its own on the open stream."""
        began, place = time.monotonic(), None
        try:
            place = self._seat(client, read_claim(self._hello(client)))
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

    def _seat(self, client: ClientProxy, claim: Claim) -> Place:
        """Give the client a place, not yet ready. Raises Refused or Waitlisted."""
        with self.changed:
            if self.closed:
                raise Refused("over", "the run is over")
            self.same_classes(claim.classes)
            before = next((place for place in self.places.values() if place.instance == claim.instance), None)
            if before is not None:
                close(before.client)
                partition = before.partition
            else:
                partition = self._choose(claim)
            place = Place(partition, client, claim.instance, claim.host)
            self.places[partition] = place
            return place

    def _choose(self, claim: Claim) -> int:
        """A free partition: the one wanted, or held before, or the lowest. Raises Refused or Waitlisted."""
        instance, wanted = claim.instance, claim.wanted
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
        return next(partition for partition in (wanted, claim.held, free[0]) if partition in free)

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
        there = self.settle(place, read_holdings(answer), name)
        if there:
            words = f"{name} joined, {place.train_examples:,} training images ({there} of {self.num_places} there)"
            self.notify("join", place.partition, words)

    def _count_refusal(self, kind: str, words: str) -> None:
        """Say the first few of each kind, then the 10th, 100th...: strangers must not flood the terminal."""
        with self.changed:
            self._turned_away[kind] += 1
            times = self._turned_away[kind]
        if (times <= 3 or times in (10, 100, 1000, 10_000, 100_000)) and not self.closed:
            self.notify("refuse", None, f"turned away: {words}" + (f" ({times:,} times)" if times > 3 else ""))

    # When it is over for a client

    def lose(self, client: ClientProxy) -> None:
        """Give up a client whose stream is broken or that takes too long; it may come back."""
        self.unregister(client)
        close(client)

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


def ask(client: ClientProxy, words: dict, timeout: float) -> dict:
    """One question in a get_properties message. Raises where the stream is broken or timeout seconds pass."""
    return client.get_properties(GetPropertiesIns(config=words), timeout=timeout, group_id=None).properties


def close(client: ClientProxy) -> None:
    """End a stream from our side; whoever waits for its answer gets an exception."""
    client.bridge.close()

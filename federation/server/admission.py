"""Who may join: first come, first served for the partitions, after proof of the shared secret."""

import contextlib
import hmac
import json
import math
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType

from federation.config import Recipe
from federation.console import clean
from federation.participants.client_manager import ClientManager, Participant, Refused
from federation.participants.exchange import session_of
from federation.protocol import PROTOCOL, RETRY_SECONDS, Hello, presence, read_hello, read_summary
from federation.security.credentials import NotAdmitted, ServerCredentials
from federation.security.members import Member
from federation.security.secret import proof
from federation.server.grpc_server import GrpcBridgeClosed

from flwr.common import GetPropertiesIns, ReconnectIns
from flwr.server.client_proxy import ClientProxy

VERIFY_SECONDS = 10  # a connection that says nothing for so long is dropped
MOST_UNVERIFIED = 64  # connections at a time, or as many as there are places: the rest of the streams is for clients
WAITERS = 1000  # on the waiting list
NOTHING: Mapping[str, str] = MappingProxyType({})


class Waitlisted(Exception):
    """A client can't join yet, with the words it is told."""


class Admission(ClientManager):
    """Admits clients that come over gRPC: every connection is verified before it counts."""

    in_pieces = True

    def __init__(
        self,
        num_partitions: int,
        recipe: Recipe,
        notify: Callable[[str, int | None, str], None],
        *,
        credentials: ServerCredentials | None = None,
        waiting_list: bool = True,
        load_timeout: float = 600,
        classes: list[str] | None = None,
        max_message_bytes: float = math.inf,
    ) -> None:
        super().__init__(num_partitions, recipe, notify, classes)
        self.max_message_bytes = max_message_bytes
        self.credentials = credentials or ServerCredentials()
        self.identity = self.credentials.identity
        self.waiting_list = waiting_list
        self.load_timeout = load_timeout
        self._unverified: list[ClientProxy] = []
        self._waiting: dict[str, float] = {}  # instances by arrival, and when each asked last
        self._turned_away: Counter[str] = Counter()

    def register(self, client: ClientProxy) -> bool:
        """Called by Flower's servicer for every new stream; the answer comes later, once it is verified."""
        pushed_out = None
        with self.changed:
            if self.closed:
                return False
            if len(self._unverified) >= max(MOST_UNVERIFIED, self.num_partitions):
                # Anyone, not the oldest: however fast a flood, some clients have the time that an answer takes.
                pushed_out = self._unverified.pop(random.randrange(len(self._unverified)))
            self._unverified.append(client)
        if pushed_out:
            close(pushed_out)
        threading.Thread(target=self._verify, args=(client,), daemon=True).start()
        return True

    def _verify(self, client: ClientProxy) -> None:
        """Admit one client, or tell it why not; runs in a thread of its own on the open stream."""
        began = time.monotonic()
        participant: Participant | None = None
        try:
            participant = self._admit(client, *self._hello(client))
            self._verified(client)
            self._assign(participant)
        except Waitlisted as wait:
            self.tell(client, "wait", str(wait), reconnect_in=RETRY_SECONDS)
        except Refused as refusal:
            self._count_refusal(refusal.kind, str(refusal))
            self.unregister(client)
            self.tell(client, "refused", str(refusal), code=refusal.code)
        except NotAdmitted as refusal:
            self._count_refusal(refusal.kind, f"a client: {refusal}")
            self.tell(client, "refused", str(refusal))
        except GrpcBridgeClosed:
            self.unregister(client)
            who = participant.title if participant else "a connection"
            silent = participant is None and time.monotonic() - began >= VERIFY_SECONDS
            how = f"said nothing for {VERIFY_SECONDS} s" if silent else "broke off before it had joined"
            self._count_refusal(f"{who} {how}", f"{who} that {how}")
        except Exception as error:  # a senseless answer: anyone can connect and say anything
            self.unregister(client)
            close(client)
            kind = type(error).__name__
            self._count_refusal(kind, f"a connection whose answer made no sense ({kind})")
        finally:
            self._verified(client)

    def _verified(self, client: ClientProxy) -> None:
        with self.changed:
            if client in self._unverified:
                self._unverified.remove(client)

    def _hello(self, client: ClientProxy) -> tuple[Hello, Member | None, str]:
        """Challenge the client; returns what it says, whose key it has, and our signature for it.

        Raises Refused or NotAdmitted where the answer won't do.
        """
        self.check_members()
        nonce = secrets.token_hex(32)
        question = {"ask": "hello", "nonce": nonce, "protocol": PROTOCOL, "salt": self.salt}
        if self.credentials.members or self.credentials.identity:  # it is signed; else it is told after the proof
            question["run"] = self.run_id
        hello = ask(client, question, VERIFY_SECONDS)
        secret = self.credentials.secret
        if secret is not None:
            given = str(hello.get("proof", ""))
            if not hmac.compare_digest(proof(secret, nonce).encode(), given.encode()):
                how = "wrong" if given else "missing"
                words = f"{how} shared secret; start the client with the --secret-file that the server has"
                raise Refused(f"{how} secret", words)
        if hello.get("protocol") != PROTOCOL:
            theirs = clean(hello.get("protocol"), 20)
            words = f"the client's handshake is version {theirs}, the server's {PROTOCOL}; update the older one"
            raise Refused("protocol", words)
        member = self.credentials.check(hello, self.run_id, nonce)
        return read_hello(hello), member, self.credentials.prove(hello, self.run_id, nonce)

    def _admit(self, client: ClientProxy, hello: Hello, member: Member | None, signature: str) -> Participant:
        """Make the client a participant, not yet ready. Raises Refused or Waitlisted."""
        with self.changed:
            if self.closed:
                raise Refused("over", "the run is over")
            self.check_classes(hello.classes)
            before = next((each for each in self.participants.values() if each.instance == hello.instance), None)
            if before is not None and public_of(before.member) == public_of(member):
                close(before.client)
                partition = before.partition
            else:
                partition = self._choose(hello, member)
            participant = Participant(partition, client, hello.instance, hello.host, hello.classes)
            participant.member, participant.signature = member, signature
            if member:
                self._place(member, partition)
            self.participants[partition] = participant
            return participant

    def _choose(self, hello: Hello, member: Member | None = None) -> int:
        """A free partition: the one wanted, or held before, or the lowest. Raises Refused or Waitlisted.

        A member's place stays its own for as long as it is one.
        """
        instance, wanted = hello.instance, hello.wanted
        own: int | None = None
        if member:
            if any(public_of(each.member) == member.public for each in self.participants.values()):
                raise Refused("twice", f"{member.name} takes part already; end its other client first")
            own = member.partition if member.partition is not None else self.places.get(member.public)
            if own is not None and wanted not in (-1, own):
                raise Refused("partition", f"--partition-id {wanted}: {member.name} has partition {own}", code=2)
            if own is not None and own < self.num_partitions and own not in self.participants:
                return own
            if member.partition is not None and member.partition >= self.num_partitions:
                words = f"{member.name} has partition {own}; this run has partitions 0 to {self.num_partitions - 1}"
                raise Refused("partition", words, code=2)
            if member.partition is not None:
                raise Waitlisted(f"partition {own}, the only one that {member.name} may have, is taken")
        taken = {*self.participants, *self._kept()}
        free = [partition for partition in range(self.num_partitions) if partition not in taken]
        if wanted >= self.num_partitions:
            words = f"--partition-id {wanted} is not there: this run has partitions 0 to {self.num_partitions - 1}"
            raise Refused("partition", words, code=2)
        if wanted >= 0 and wanted not in free:
            words = f"--partition-id {wanted} is taken; choose another, or leave it out"
            raise Refused("partition", words, code=2)
        ahead = self._ahead_of(instance)
        if len(free) <= ahead:
            words = f"all {self.num_partitions} places are taken"
            if not self.waiting_list:
                raise Refused("full", f"{words}, and this server keeps no waiting list")
            if instance not in self._waiting and len(self._waiting) >= WAITERS:
                raise Refused("full", f"{words}, and {WAITERS:,} clients wait already")
            self._waiting[instance] = time.monotonic()
            raise Waitlisted(f"{words}; you are number {ahead + 1} on the waiting list")
        self._waiting.pop(instance, None)
        return next(partition for partition in (wanted, hello.held, free[0]) if partition in free)

    def _place(self, member: Member, partition: int) -> None:
        """It is this member's now, and of nobody who had it before."""
        self.places = {public: place for public, place in self.places.items() if place != partition}
        self.places[member.public], self.names[partition] = partition, member.name

    def _kept(self) -> set[int]:
        """Partitions of members, also of those that are not here."""
        members = self.credentials.members
        fixed = {each.partition for each in members or () if each.partition is not None}
        return fixed | {place for public, place in self.places.items() if members and members.find(public)}

    def check_members(self) -> None:
        """Read the credentials' files again where they have changed, and drop who is no member any more."""
        with self.changed:
            self.credentials.refresh()
            members, there = self.credentials.members, list(self.participants.values())
        for each in there:
            if members is None or each.member is None:
                continue
            now = members.find(each.member.public)
            if now:  # as its line says today
                each.member = now
            else:
                each.ready = False  # so that nothing else is said of its leaving
                self.notify("expel", each.partition, f"{each.title} is no member any more; its place is free")
                self.drop(each, "it is no member of this federation any more")

    def _ahead_of(self, instance: str) -> int:
        """How many came before and are still waiting."""
        asked_lately = time.monotonic() - 3 * RETRY_SECONDS
        self._waiting = {who: last for who, last in self._waiting.items() if last > asked_lately}
        return list(self._waiting).index(instance) if instance in self._waiting else len(self._waiting)

    def _assign(self, participant: Participant) -> None:
        """Send the assignment; the participant is ready once it says how much data it has."""
        assignment = {"partition": participant.partition, "num_partitions": self.num_partitions}
        question = {"ask": "place", **assignment, "recipe": self.recipe.to_json(), "run": self.run_id}
        if participant.signature:
            question["signature"] = participant.signature
        if self.fixed and participant.classes != self.classes:
            question["classes"] = json.dumps(self.classes)
            participant.told_classes = True
        told = bool(self.statistics)
        if told:
            question["columns"] = json.dumps(self.statistics)
        answer = ask(participant.client, question, self.load_timeout)
        name = participant.title
        if "error" in answer:
            raise Refused(f"start {name}", f"{name} could not start: {clean(answer['error'])}")
        if self.statistics and not told:  # agreed on while it opened its data
            return self._assign(participant)
        there = self.settle(participant, read_summary(answer), name)
        if there:
            words = f"{name} joined, {participant.train_examples:,} training examples"
            words += " " + presence(there, self.num_partitions)
            self.notify("join", participant.partition, words)

    def _count_refusal(self, kind: str, words: str) -> None:
        """Say the first few of each kind, then the 10th, 100th...: nobody shall fill the operator's terminal."""
        with self.changed:
            self._turned_away[kind] += 1
            times = self._turned_away[kind]
        if (times <= 3 or times in (10, 100, 1000, 10_000, 100_000)) and not self.closed:
            self.notify("refuse", None, f"turned away: {words}" + (f" ({times:,} times)" if times > 3 else ""))

    def reassign(self, participant: Participant) -> None:
        participant.ready = False
        threading.Thread(target=self._reassign, args=(participant,), daemon=True).start()

    def _reassign(self, participant: Participant) -> None:
        try:
            self._assign(participant)
        except Exception as error:  # it refuses, is lost, or says what makes no sense
            self.unregister(participant.client)
            words = str(error) if isinstance(error, Refused) else f"{participant.title} broke off"
            self._count_refusal("classes", words)
            self.tell(participant.client, "refused", words)

    # When it is over for a client

    def lose(self, client: ClientProxy) -> None:
        """Give up a client whose stream is broken or that takes too long; it may come back."""
        self.unregister(client)
        close(client)

    def drop(self, participant: Participant, words: str) -> None:
        """End a client's part in the run and tell it why, as far as it still listens."""
        self.unregister(participant.client)
        threading.Thread(target=self.tell, args=(participant.client, "dropped", words), daemon=True).start()

    def close(self, kind: str, words: str, seconds: float = 3.0) -> None:
        """Admit nobody any more, and tell every client; who is busy or dead loses the stream after so many seconds."""
        with self.changed:
            self.closed = True
            there = list(self.participants.values())
        threads = [threading.Thread(target=self._dismiss, args=(each, kind, words), daemon=True) for each in there]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _dismiss(self, participant: Participant, kind: str, words: str) -> None:
        """Tell it that the run is over; its last words hold the head of its own record."""
        answer = self.tell(participant.client, kind, words, more=self.farewell)
        with contextlib.suppress(OSError):  # a full disk is said elsewhere
            self.audit.take(answer, None, participant.title, session=session_of(participant))

    def tell(
        self,
        client: ClientProxy,
        kind: str,
        words: str,
        code: int = 1,
        reconnect_in: int | None = None,
        more: Mapping[str, str] = NOTHING,
    ) -> dict:
        """Say why the stream ends, then end it with Flower's own ReconnectIns; returns what the client answers."""
        answer: dict = {}
        try:
            told = {"ask": "told", "kind": kind, "words": words, "code": code}
            answer = ask(client, {**told, **more}, VERIFY_SECONDS)
            client.reconnect(ReconnectIns(seconds=reconnect_in), timeout=VERIFY_SECONDS, group_id=None)
        except Exception:  # a client that no longer listens can't be told
            pass
        close(client)  # it has left by itself, or it means to stay in our way
        return answer


def ask(client: ClientProxy, words: dict, timeout: float) -> dict:
    """One message of protocol.py. Raises where the stream is broken or timeout seconds pass."""
    return client.get_properties(GetPropertiesIns(config=words), timeout=timeout, group_id=None).properties


def close(client: ClientProxy) -> None:
    """End a stream from our side; whoever waits for its answer gets an exception."""
    client.bridge.close()  # type: ignore[attr-defined]  # of grpc_server.Proxy


def public_of(member: Member | None) -> str | None:
    return member.public if member else None

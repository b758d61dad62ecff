"""A client's membership: it answers the server's vetting, then passes the rounds on to the user's NumPyClient."""

import hashlib
import json
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from federation.handshake import PROTOCOL, RETRY_SECONDS, proof
from federation.recipe import Recipe
from federation.wire import pack, unpack
from federation.words import clean, fail, say

from flwr.client import NumPyClient


@dataclass(frozen=True)
class Seat:
    """What the server gave this client."""

    partition: int
    num_partitions: int
    recipe: Recipe


@dataclass(frozen=True)
class Farewell:
    """Why the server ended the stream: finished, wait, refused, dropped, stopped or failed."""

    kind: str
    words: str
    code: int


class Member(NumPyClient):
    """Wraps the client that open_client(seat) makes once the server has given a place.

    That client is a NumPyClient with two integers, num_train and num_test, and a list, statistics: the
    positions of the arrays that are measured and not trained. It may have class_counts, its training
    examples by class: the server keeps them for the picture of who holds what. What it raises is told
    to the server in one line, and kept in `failure`. It need not know how weights travel: it is given
    them in the dtypes of its own get_parameters({}), and may return the same.
    """

    def __init__(
        self,
        open_client: Callable[[Seat], NumPyClient],
        classes: list[str],
        *,
        secret: bytes | None = None,
        wanted_partition: int = -1,
    ) -> None:
        self.open_client = open_client
        self.classes = classes
        self.secret = secret
        self.wanted_partition = wanted_partition
        self.instance = secrets.token_hex(16)
        self.seat: Seat | None = None
        self.client: NumPyClient | None = None
        self.farewell: Farewell | None = None
        self.failure: str | None = None
        self.waiting = ""  # the server's words on the waiting list, if we are on it
        self.heard = 0  # messages from the server so far: tells progress from mere connecting

    def get_properties(self, config: dict) -> dict:
        self.heard += 1
        answer = {"hello": self._hello, "place": self._take_place, "told": self._take_leave}[config["ask"]]
        return answer(config)

    def get_parameters(self, config: dict) -> list:
        return self._work(lambda: self.client.get_parameters(config), failed=[])

    def fit(self, parameters: list, config: dict) -> tuple:
        return self._work(lambda: self._fit(parameters, config), failed=([], 0, {}))

    def evaluate(self, parameters: list, config: dict) -> tuple:
        return self._work(lambda: self.client.evaluate(self._unpacked(parameters), config), failed=(0.0, 0, {}))

    def _fit(self, parameters: list, config: dict) -> tuple:
        weights, *rest = self.client.fit(self._unpacked(parameters), config)
        return pack(weights, self.seat.recipe.compress), *rest

    def _unpacked(self, parameters: list) -> list:
        if self.seat.recipe.compress == "none":
            return parameters
        return unpack(parameters, self.client.get_parameters({}))

    def _hello(self, config: dict) -> dict:
        self.farewell = None
        return {
            "protocol": PROTOCOL,
            "proof": proof(self.secret, config["nonce"]) if self.secret else "",
            "classes": json.dumps(self.classes),
            "instance": self.instance,
            "host": host_name(),
            "wanted": self.wanted_partition,
            "held": self.seat.partition if self.seat else -1,
        }

    def _take_place(self, config: dict) -> dict:
        try:
            seat = Seat(config["partition"], config["num_partitions"], Recipe.from_json(config["recipe"]))
            if seat != self.seat or self.client is None:
                self.client = None  # lets the old partition's images go before the new ones are read
                self.client = self.open_client(seat)
            else:
                say(f"back in place {seat.partition}")
            self.seat = seat
        except Exception as error:
            return self._fail(error)
        return tell_holdings(self.client)

    def _take_leave(self, config: dict) -> dict:
        self.farewell = Farewell(config["kind"], clean(config["words"]), config["code"])
        if self.farewell.kind == "wait" and self.farewell.words != self.waiting:
            self.waiting = self.farewell.words
            say(f"{self.waiting}; asking again every {RETRY_SECONDS} s")
        return {}

    def _work(self, task: Callable, failed: object) -> object:
        self.heard += 1
        try:
            return task()
        except Exception as error:
            report = self._fail(error)
            return (*failed[:-1], report) if isinstance(failed, tuple) else failed

    def _fail(self, error: Exception) -> dict:
        """The one line that goes to the server, and to this client's own end."""
        self.failure = f"{type(error).__name__}: {clean(error)}" if str(error) else type(error).__name__
        if type(error).__module__ != "builtins":  # our own errors say all in their words
            self.failure = clean(error) or type(error).__name__
        return {"error": self.failure}


def tell_holdings(client: NumPyClient) -> dict:
    """What the server gets to know of a client's data."""
    numbers = {"train_examples": client.num_train, "test_examples": client.num_test}
    counts = json.dumps(getattr(client, "class_counts", []))
    return {**numbers, "statistics": json.dumps(client.statistics), "class_counts": counts}


def host_name() -> str:
    """The same for all clients on a machine, and telling nothing of it."""
    return hashlib.sha256(uuid.getnode().to_bytes(8, "big")).hexdigest()[:16]


def leave(member: Member) -> None:
    """End the process as the membership ended: quietly when the run is done, else with one line and its code."""
    if member.failure:
        fail(member.failure)
    if member.farewell and member.farewell.kind != "finished":
        fail(f"{member.farewell.kind}: {member.farewell.words}", member.farewell.code)

"""Clients without a process or a network, for tests of admission alone."""

import threading
from types import SimpleNamespace

from federation.admission import Admission
from federation.recipe import Recipe


class MadeUp:
    """Flower's proxy of a client, without a client; answers as told, and keeps what it is told."""

    def __init__(self, *, place: dict | None = None, **hello: object):
        usual = {
            "protocol": 1,
            "proof": "",
            "classes": '["cat", "dog"]',
            "instance": f"{id(self):032d}",
            "host": "here",
        }
        self.hello = {**usual, "wanted": -1, "held": -1, **hello}
        self.place = {"train_examples": 100, "test_examples": 10, "statistics": "[2]", **(place or {})}
        self.partition: int | None = None
        self.told: dict = {}
        self.reconnect_in: int | None = None
        self.cid = self.hello["instance"]
        self.bridge = self  # it has one method that we use: close
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()

    def get_properties(self, ins, timeout, group_id):
        match ins.config["ask"]:
            case "hello":
                answer = self.hello
            case "place":
                self.partition, answer = ins.config["partition"], self.place
            case "told":
                self.told, answer = ins.config, {}
        return SimpleNamespace(properties=answer)

    def reconnect(self, ins, timeout, group_id):
        self.reconnect_in = ins.seconds


class Door:
    """An Admission whose vetting is waited for."""

    def __init__(self, num_places: int = 3, **options: object):
        self.said: list[str] = []
        self.admission = Admission(num_places, Recipe(), lambda *event: self.said.append(event[2]), **options)

    def joins(self, client: MadeUp | None = None, **answers: object) -> MadeUp:
        """A client that comes, once it is seated or turned away."""
        client = client or MadeUp(**answers)
        assert self.admission.register(client)
        while not (client.closed.wait(0.002) or self.seated(client)):
            pass
        return client

    def seated(self, client: MadeUp) -> bool:
        return any(place.client is client for place in self.admission.ready())

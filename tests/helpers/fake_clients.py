"""Clients without a process or a network, for tests of admission alone."""

import threading
from types import SimpleNamespace

from federation.config import Recipe
from federation.server.admission import Admission


class FakeClient:
    """Flower's proxy of a client, without a client; gives these answers, and keeps what it is told."""

    def __init__(self, *, summary: dict | None = None, **hello: object):
        usual = {
            "protocol": 1,
            "proof": "",
            "classes": '["cat", "dog"]',
            "instance": f"{id(self):032d}",
            "host": "here",
        }
        self.hello = {**usual, "wanted": -1, "held": -1, **hello}
        self.summary = {"train_examples": 100, "test_examples": 10, "statistics": "[2]", **(summary or {})}
        self.partition: int | None = None
        self.assigned: dict = {}
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
                self.partition, self.assigned, answer = ins.config["partition"], ins.config, self.summary
            case "told":
                self.told, answer = ins.config, {}
        return SimpleNamespace(properties=answer)

    def reconnect(self, ins, timeout, group_id):
        self.reconnect_in = ins.seconds


class FakeAdmission:
    """An Admission whose verification of a client is waited for."""

    def __init__(self, num_partitions: int = 3, recipe: Recipe | None = None, **options: object):
        self.said: list[str] = []
        self.admission = Admission(
            num_partitions, recipe or Recipe(), lambda *event: self.said.append(event[2]), **options
        )

    def joins(self, client: FakeClient | None = None, **answers: object) -> FakeClient:
        """A client that connects, once it is admitted or turned away."""
        client = client or FakeClient(**answers)
        assert self.admission.register(client)
        while not (client.closed.wait(0.002) or self.admitted(client)):
            pass
        return client

    def admitted(self, client: FakeClient) -> bool:
        return any(participant.client is client for participant in self.admission.ready())

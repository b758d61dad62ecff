"""A server without a network: streams by a script, on a clock of our own."""

import contextlib
import threading
from types import SimpleNamespace

from federation.client import connection, staying
from federation.client.proxy import PROXIES
from federation.config import Recipe

import grpc
import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.common import EvaluateIns, FitIns, GetPropertiesIns, ndarrays_to_parameters
from flwr.compat.client.grpc_client import connection as flowers

ADDRESS = "127.0.0.1:8080"
START = [np.zeros(2, np.float32), np.array(0)]


class Broken(grpc.RpcError, grpc.Call):
    """A stream that ends with this status."""

    def __init__(self, code: grpc.StatusCode, details: str | None = ""):
        self._code, self._details = code, details

    def code(self):
        return self._code

    def details(self):
        return self._details

    add_callback = cancel = initial_metadata = is_active = time_remaining = trailing_metadata = None


Broken.__abstractmethods__ = frozenset()
AWAY = Broken(grpc.StatusCode.UNAVAILABLE, "failed to connect")
CUT = Broken(grpc.StatusCode.CANCELLED)


# What a server says, as Flower's connection hands it over


def properties(**config: object):
    return "get_properties", flowers.compat.getpropertiesins_to_recorddict(GetPropertiesIns(config))


def hello():
    return properties(ask="hello", nonce="n")


def place():
    return properties(ask="place", partition=1, num_partitions=3, recipe=Recipe().to_json())


def told(kind: str, words: str, code: int = 1):
    return properties(ask="told", kind=kind, words=words, code=code)


def reconnect(seconds: int = 0):
    return "reconnect", RecordDict({"config": ConfigRecord({"seconds": seconds})})


def fit(number: int = 1):
    ins = FitIns(ndarrays_to_parameters(START), {"server_round": number, "clients_on_host": 1})
    return "train", flowers.compat.fitins_to_recorddict(ins, False)


def evaluate(number: int = 1):
    ins = EvaluateIns(ndarrays_to_parameters(START), {"server_round": number, "clients_on_host": 1})
    return "evaluate", flowers.compat.evaluateins_to_recorddict(ins, False)


FINISHED = [told("finished", "the run is done after 3 rounds", 0), reconnect()]


class Server:
    """Each stream is a list of what the server says; an exception breaks it. After the last list it is away."""

    def __init__(self, monkeypatch, *streams: list):
        self.streams = list(streams)
        self.opened: list[tuple] = []
        self.answers: list = []
        self.now = 0.0
        self.slept: list[float] = []
        monkeypatch.setattr(connection, "grpc_connection", self.connect)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(connection, "time", clock)
        monkeypatch.setattr(staying, "time", clock)
        monkeypatch.setattr(connection, "tls_mismatch", lambda *_: None)
        monkeypatch.setattr(connection, "keep_client_connection", lambda: None)
        monkeypatch.setattr(connection.socket, "create_connection", self.probe)
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        monkeypatch.setenv("no_grpc_proxy", "")
        for name in (*PROXIES, "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        self.probed: object = ConnectionRefusedError()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def probe(self, address, timeout):
        """A connection to see why nobody answers."""
        if isinstance(self.probed, Exception):
            raise self.probed
        return self.probed

    @contextlib.contextmanager
    def connect(self, address, insecure, *_, root_certificates):
        self.opened.append((address, insecure, root_certificates))
        stream = iter(self.streams.pop(0) if self.streams else [AWAY])

        def receive():
            said = next(stream)
            if isinstance(said, Exception):
                raise said
            if callable(said):
                return said()
            kind, content = said
            metadata = flowers.Metadata(0, "id", 0, 0, "", "", 0.0, 60.0, kind)
            return flowers.make_message(metadata=metadata, content=content)

        yield receive, lambda message: self.answers.append(message), None, None, None, None

    def properties(self, number: int) -> dict:
        """The client's answer to a get_properties message."""
        return flowers.compat.recorddict_to_getpropertiesres(self.answers[number].content).properties


class Client:
    num_train, num_test, buffer_positions = 100, 10, ()

    def __init__(self, assignment=None):
        pass

    def get_parameters(self, config):
        return START

    def fit(self, parameters, config):
        return [array + 1 for array in parameters], 100, {"train_loss": 1.0}

    def evaluate(self, parameters, config):
        return 1.0, 10, {"accuracy": 0.5}

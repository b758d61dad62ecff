"""A client's way to the server without a network: streams by a script, on a clock of our own."""

import contextlib
import socket
import threading
from types import SimpleNamespace

from federation.client import connection
from federation.client.connection import take_part
from federation.client.session import Session
from federation.config import Recipe

import grpc
import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common import (
    EvaluateIns,
    FitIns,
    GetParametersIns,
    GetPropertiesIns,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.compat.client.grpc_client import connection as flowers

ADDRESS = "127.0.0.1:8080"
START = [np.zeros(2, np.float32), np.array(0)]
STARTED = "; start `python server.py`, or name it with --server"


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
        monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(connection, "tls_mismatch", lambda *_: None)
        monkeypatch.setattr(connection, "keep_client_connection", lambda: None)
        monkeypatch.setattr(connection.socket, "create_connection", self.probe)
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        monkeypatch.setenv("no_grpc_proxy", "")
        for name in (*connection.PROXIES, "no_proxy"):
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


@pytest.fixture
def serve(monkeypatch):
    return lambda *streams: Server(monkeypatch, *streams)


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


def session(client: type = Client) -> Session:
    return Session(client, ["cat", "dog"])


def ends(capsys, *, wait: float = 60, code: int = 1, client: type = Client, **options: object) -> str:
    """Take part until it ends with this code; the one line that it ends with."""
    with pytest.raises(SystemExit) as end:
        take_part(session(client), ADDRESS, wait=wait, **options)
    assert end.value.code == code
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


# A run


def test_every_message_gets_its_answer_and_after_the_last_it_returns(serve, capsys):
    parameters = "get_parameters", flowers.compat.getparametersins_to_recorddict(GetParametersIns({}))
    server = serve([hello(), place(), parameters, evaluate(0), fit(1), evaluate(1), *FINISHED])
    one = session()
    take_part(one, ADDRESS, wait=60)
    assert one.metrics == {"loss": 1.0, "accuracy": 0.5}
    assert len(server.answers) == 8
    assert server.properties(0)["instance"] == one.instance
    assert server.properties(1)["train_examples"] == 100
    update = flowers.compat.recorddict_to_fitres(server.answers[4].content, False)
    assert parameters_to_ndarrays(update.parameters)[0].tolist() == [1, 1]
    assert server.opened == [(ADDRESS, True, None)]
    assert server.slept == [0]
    assert capsys.readouterr().err == ""


def test_with_an_authority_the_connection_is_tls(serve):
    server = serve(FINISHED)
    take_part(session(), ADDRESS, wait=60, root_certificates=b"pem")
    assert server.opened == [(ADDRESS, False, b"pem")]


def test_a_server_on_this_machine_is_never_asked_through_a_proxy(serve, monkeypatch):
    serve(FINISHED)
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert connection.proxy_for("127.0.0.1")
    take_part(session(), ADDRESS, wait=60)
    assert connection.proxy_for("127.0.0.1") is None


# Waiting


def test_it_waits_for_a_server_that_is_not_there_yet_and_says_so_once(serve, capsys):
    server = serve([AWAY], [AWAY], [AWAY], [hello(), *FINISHED])
    take_part(session(), ADDRESS, wait=60)
    assert server.slept == [1, 1, 1, 0]
    assert capsys.readouterr().out == "no server at 127.0.0.1:8080; asking again for 60 s\n"


@pytest.mark.parametrize(("wait", "pauses"), [(3, [0.3] * 10), (25, [1.0] * 25), (0, [])])
def test_it_gives_up_after_so_many_seconds_with_one_line(serve, capsys, wait, pauses):
    server = serve()
    assert ends(capsys, wait=wait) == f"no server at 127.0.0.1:8080 after {wait} s{STARTED}"
    assert server.slept[: len(pauses)] == pytest.approx(pauses)
    assert len(server.slept) - len(pauses) in (0, 1)  # ten times 0.3 is a little under 3


def test_what_it_heard_begins_the_waiting_anew_and_connecting_alone_does_not(serve, capsys):
    server = serve([hello(), CUT], *[[AWAY]] * 8, [hello(), CUT], *[[AWAY]] * 8, [CUT])
    assert ends(capsys, wait=10).startswith("no server at")
    assert server.now == pytest.approx(9 + 10)


def test_a_connection_that_breaks_is_said_each_time_that_it_had_begun(serve, capsys):
    serve([hello(), CUT], [hello(), StopIteration()], [AWAY], FINISHED)
    take_part(session(), ADDRESS, wait=60)
    line = "the server at 127.0.0.1:8080 ended the connection; asking again for 60 s\n"
    assert capsys.readouterr().out == 2 * line


def test_on_the_waiting_list_it_asks_again_after_the_servers_seconds(serve, capsys):
    waits = [hello(), told("wait", "all 3 places are taken; you are number 1 on the waiting list"), reconnect(3)]
    server = serve(waits, waits, [hello(), place(), *FINISHED])
    one = session()
    take_part(one, ADDRESS, wait=1)
    assert server.slept == [3, 3, 0]
    assert len(server.opened) == 3
    assert capsys.readouterr().out.count("asking again every 3 s") == 1


def test_a_server_that_was_stopped_is_waited_for_as_it_may_be_resumed(serve, capsys):
    stopped = [hello(), place(), told("stopped", "the server was stopped by SIGINT after round 2"), reconnect()]
    serve(stopped, [AWAY], [hello(), place(), *FINISHED])
    take_part(session(), ADDRESS, wait=60)
    said = capsys.readouterr().out
    assert said.count("asking again") == 1
    assert "the server was stopped by SIGINT after round 2; asking again for 60 s\n" in said
    assert said.endswith("back in place 1\n")


# Endings


@pytest.mark.parametrize(("kind", "code"), [("refused", 2), ("dropped", 1), ("failed", 1)])
def test_an_end_that_is_not_a_finished_run_is_one_line_with_its_code(serve, capsys, kind, code):
    serve([hello(), told(kind, "for this reason", code), reconnect()])
    assert ends(capsys, code=code) == f"{kind}: for this reason"


def test_a_failure_of_its_own_ends_it_whether_told_or_cut_off_or_stopped(serve, capsys):
    class Failing(Client):
        def fit(self, parameters, config):
            raise RuntimeError("out of memory")

    for end in ([told("dropped", "it failed"), reconnect()], [CUT], [told("stopped", "by SIGINT"), reconnect()]):
        server = serve([hello(), place(), fit(), *end])
        assert ends(capsys, client=Failing) == "RuntimeError: out of memory"
        assert len(server.opened) == 1, "it doesn't come back"


def test_a_message_larger_than_the_server_takes_is_named(serve, capsys):
    details = "CLIENT: Sent message larger than max (4000269 vs. 1048576)"
    serve([hello(), place(), Broken(grpc.StatusCode.RESOURCE_EXHAUSTED, details)])
    line = f"a message is larger than the server takes ({details}); raise the server's --max-message-mb"
    assert ends(capsys) == line


def test_a_server_with_too_many_connections_is_asked_again(serve, capsys):
    full = Broken(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
    serve([full], [full], FINISHED)
    take_part(session(), ADDRESS, wait=60)
    assert capsys.readouterr().out == "the server at 127.0.0.1:8080 has too many connections; asking again for 60 s\n"
    serve(*[[full]] * 12)
    assert ends(capsys, wait=10) == "the server at 127.0.0.1:8080 has too many connections; gave up after 10 s"


def test_tls_that_does_not_fit_is_named_and_not_waited_for(serve, monkeypatch, capsys):
    server = serve([AWAY])
    asked = []
    monkeypatch.setattr(connection, "tls_mismatch", lambda *given: asked.append(given) or "the server speaks TLS")
    assert ends(capsys, root_certificates=b"pem") == "the server speaks TLS"
    assert asked == [("127.0.0.1", 8080, b"pem")]
    assert server.slept == []


def test_what_is_no_fault_of_the_connection_is_shown_whole(serve):
    serve([ValueError("Unsupported instruction in ServerMessage")])
    with pytest.raises(ValueError, match="Unsupported instruction"):
        take_part(session(), ADDRESS, wait=60)


def test_of_what_threads_raise_only_a_closed_channel_is_passed_over(serve, monkeypatch):
    serve(FINISHED)
    take_part(session(), ADDRESS, wait=60)
    shown = []
    monkeypatch.setattr(threading, "__excepthook__", shown.append)
    for words in ("Channel closed!", "something else"):
        threading.excepthook(SimpleNamespace(exc_value=ValueError(words)))
    assert [str(each.exc_value) for each in shown] == ["something else"]


# Why nobody answers


@pytest.mark.parametrize(
    ("probed", "line"),
    [
        (socket.gaierror(-2, "Name or service not known"), "no host named hospital is known here; check --server"),
        (TimeoutError(), "no answer from hospital:8080; a firewall may be in the way"),
        (OSError(113, "No route to host"), "no way to hospital:8080 (No route to host)"),
        (ConnectionRefusedError(111, "Connection refused"), "no server at hospital:8080"),
        (SimpleNamespace(close=lambda: None), "no server at hospital:8080"),
    ],
)
def test_a_name_a_firewall_a_route_or_a_port_is_to_blame(serve, probed, line):
    serve().probed = probed
    assert connection.out_of_reach("hospital", 8080) == line


class Line:
    """A connection to a proxy that answers this."""

    def __init__(self, answer: bytes):
        self.answer, self.sent = answer, b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def sendall(self, content):
        self.sent += content

    def recv(self, number):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n", "wants a login; put it into the proxy's address: http://"),
        (b"HTTP/1.1 503 Service Unavailable\r\n", "finds no server at hospital:8080 (it answers 503); no_grpc_proxy="),
        (b"", "finds no server at hospital:8080; no_grpc_proxy=hospital goes without it"),
        (None, "can't be reached; no_grpc_proxy=hospital goes without it"),
    ],
)
def test_where_a_proxy_is_in_the_way_it_is_asked(serve, monkeypatch, answer, found):
    server = serve()
    server.probed = ConnectionRefusedError() if answer is None else Line(answer)
    monkeypatch.setenv("https_proxy", "http://us%65r:pass@proxy:3128")
    assert connection.out_of_reach("hospital", 8080).startswith(f"the proxy proxy:3128 {found}")
    if answer is not None:
        first, host, login, *_ = server.probed.sent.decode().split("\r\n")
        assert (first, host) == ("CONNECT hospital:8080 HTTP/1.1", "Host: hospital:8080")
        assert login == "Proxy-Authorization: Basic dXNlcjpwYXNz"  # user:pass


@pytest.mark.parametrize(
    ("proxy", "exempt", "taken"),
    [
        ("http://proxy:3128", "", True),
        ("proxy:3128", "", True),
        ("http://proxy:3128", "localhost, hospital", False),
        ("http://proxy:3128", ".hospital.org", True),
        ("http://proxy:3128", "pital", False),
        ("http://proxy:3128", "*", False),
        ("http://proxy", "", False),
        ("http://proxy:many", "", False),
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(serve, monkeypatch, proxy, exempt, taken):
    serve()
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", exempt)
    assert (connection.proxy_for("hospital") is not None) == taken

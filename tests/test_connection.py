"""A client's way to the server without a network: streams by a script, on a clock of our own."""

import contextlib
import os
import re
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from federation.client import connection
from federation.client.connection import connect
from federation.client.proxy import PROXIES, proxy_for
from federation.client.session import RunEnded, Session

import grpc
import pytest
from flwr.common import (
    GetParametersIns,
    parameters_to_ndarrays,
)
from flwr.compat.client.grpc_client import connection as flowers
from flwr.proto.transport_pb2 import ServerMessage
from helpers.processes import free_port, wait_for
from helpers.scripted_server import (
    ADDRESS,
    AWAY,
    CUT,
    FINISHED,
    Broken,
    Client,
    Server,
    evaluate,
    fit,
    hello,
    place,
    reconnect,
    told,
)

STARTED = "; start `python server.py`, or name it with --server"


@pytest.fixture
def serve(monkeypatch):
    return lambda *streams: Server(monkeypatch, *streams)


def session(client: type = Client) -> Session:
    return Session(client, ["cat", "dog"])


def ends(capsys, *, wait: float = 60, code: int = 1, client: type = Client, **options: object) -> str:
    """Take part until it ends with this code; the one line that it ends with."""
    with pytest.raises(RunEnded) as end:
        connect(session(client), ADDRESS, wait=wait, **options)
    assert end.value.code == code
    assert "\n" not in str(end.value)
    return str(end.value)


# A run


def test_every_message_gets_its_answer_and_after_the_last_it_returns(serve, capsys):
    parameters = "get_parameters", flowers.compat.getparametersins_to_recorddict(GetParametersIns({}))
    server = serve([hello(), place(), parameters, evaluate(0), fit(1), evaluate(1), *FINISHED])
    one = session()
    connect(one, ADDRESS, wait=60)
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
    connect(session(), ADDRESS, wait=60, root_certificates=b"pem")
    assert server.opened == [(ADDRESS, False, b"pem")]


def test_a_server_on_this_machine_is_never_asked_through_a_proxy(serve, monkeypatch):
    serve(FINISHED)
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert proxy_for("127.0.0.1")
    connect(session(), ADDRESS, wait=60)
    assert proxy_for("127.0.0.1") is None


# Waiting


def test_it_waits_for_a_server_that_is_not_there_yet_and_says_so_once(serve, capsys):
    server = serve([AWAY], [AWAY], [AWAY], [hello(), *FINISHED])
    connect(session(), ADDRESS, wait=60)
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
    connect(session(), ADDRESS, wait=60)
    line = "the server at 127.0.0.1:8080 ended the connection; asking again for 60 s\n"
    assert capsys.readouterr().out == 2 * line


def test_on_the_waiting_list_it_asks_again_after_the_servers_seconds(serve, capsys):
    waits = [hello(), told("wait", "all 3 places are taken; you are number 1 on the waiting list"), reconnect(3)]
    server = serve(waits, waits, [hello(), place(), *FINISHED])
    one = session()
    connect(one, ADDRESS, wait=1)
    assert server.slept == [3, 3, 0]
    assert len(server.opened) == 3
    assert capsys.readouterr().out.count("asking again every 3 s") == 1


def test_a_server_that_was_stopped_is_waited_for_as_it_may_be_resumed(serve, capsys):
    stopped = [hello(), place(), told("stopped", "the server was stopped by SIGINT after round 2"), reconnect()]
    serve(stopped, [AWAY], [hello(), place(), *FINISHED])
    connect(session(), ADDRESS, wait=60)
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
    connect(session(), ADDRESS, wait=60)
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
        connect(session(), ADDRESS, wait=60)


def test_of_what_threads_raise_only_a_closed_channel_is_passed_over(serve, monkeypatch):
    serve(FINISHED)
    connect(session(), ADDRESS, wait=60)
    shown = []
    monkeypatch.setattr(connection, "show_fault", shown.append)
    for words in ("Channel closed!", "something else"):
        threading.excepthook(SimpleNamespace(exc_value=ValueError(words)))
    assert [str(each) for each in shown] == ["something else"]


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


@pytest.fixture
def real(monkeypatch):
    """Real sockets, and no proxy from outside."""
    for name in (*PROXIES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with contextlib.ExitStack() as ends:
        yield lambda answer=b"", host="127.0.0.1", port=0: ends.enter_context(Listener(answer, host, port))


RESET = b"breaks off at once, as a firewall does"


class Listener:
    """Somebody on this machine who hears one request of each caller, answers with these bytes and hangs up.

    A list is said piece by piece; after None it stays silent.
    """

    def __init__(self, answer: bytes | list | None, host: str, port: int):
        self.pieces = answer if isinstance(answer, list) else [answer]
        self.heard: list[bytes] = []
        self.socket = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = self.socket.getsockname()[1]
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.serve)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        self.thread.join(60)
        self.socket.close()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self.socket.accept()[0] as caller, contextlib.suppress(ConnectionError):
                    caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    caller.settimeout(60)
                    self.heard.append(caller.recv(10_000))
                    for piece in self.pieces:
                        if piece is None:
                            self.over.wait(60)
                        elif piece == RESET:
                            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        else:
                            caller.sendall(piece)


LOGIN = "wants a login; put it into the proxy's address: http://USER:PASSWORD@HOST:PORT"
HTTP = "HTTP/1.1 {}\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("407 Proxy Authentication Required", LOGIN),
        ("403 Forbidden", "refuses connections to hospital:8080 (it answers 403)"),
        ("404 Not Found", "finds no server at hospital:8080 (it answers 404)"),
        ("503 Service Unavailable", "finds no server at hospital:8080 (it answers 503)"),
        (
            "200 Connection established",
            "reaches hospital:8080, where the connection breaks off; TLS must be on at both ends or at neither",
        ),
        ([b"HTTP/1.", b"0 4", b"07", b" \r\n\r\n"], LOGIN),
        (b"", "hangs up without an answer"),
        (RESET, "hangs up without an answer"),
        (None, "gives no answer"),
        ([b"HTTP/1.1 4", None], "gives no answer"),
        (b"\x15\x03\x03\0\x02\x02\x46", "is no HTTP proxy by its answer"),
        (b"SSH-2.0-OpenSSH_9 407\r\n", "is no HTTP proxy by its answer"),
        (b"HTTP/1.1 \x1b[2J\xff\r\n", "is no HTTP proxy by its answer"),
        (b"x" * 100_000, "is no HTTP proxy by its answer"),
    ],
)
@pytest.mark.slow
def test_where_a_proxy_is_in_the_way_it_is_asked(real, monkeypatch, answer, found):
    proxy = real(HTTP.format(answer).encode() if isinstance(answer, str) else answer)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
    if None in proxy.pieces:
        monkeypatch.setattr("federation.client.proxy.PROBE_SECONDS", 0.3)
    line = f"the proxy 127.0.0.1:{proxy.port} {found}; no_grpc_proxy=hospital goes without it"
    assert connection.out_of_reach("hospital", 8080) == line
    assert proxy.heard == [b"CONNECT hospital:8080 HTTP/1.1\r\nHost: hospital:8080\r\n\r\n"]


@pytest.mark.parametrize("host", ["127.0.0.1", "a..b"])
def test_a_proxy_that_is_dead_or_has_no_possible_name_is_out_of_reach(real, monkeypatch, host):
    port = free_port()
    monkeypatch.setenv("http_proxy", f"http://{host}:{port}")
    line = f"the proxy {host}:{port} can't be reached; no_grpc_proxy=hospital goes without it"
    assert connection.out_of_reach("hospital", 8080) == line


def test_a_proxy_without_a_port_is_sought_at_grpcs_own(serve, monkeypatch):
    serve()
    monkeypatch.setenv("http_proxy", "http://proxy/")
    assert connection.out_of_reach("hospital", 8080).startswith("the proxy proxy:443 can't be reached")


LOGINS = ["user:pass", "us%65r:pa%20ss", "user", "user:", "user:p@ss", "us\u00e9r:pass", "user:p\udcffss", "user:100%"]


@pytest.mark.parametrize("login", LOGINS)
def test_a_login_in_the_proxys_address_is_given_as_grpc_gives_it_and_a_wrong_one_is_named(real, monkeypatch, login):
    proxy = real(HTTP.format("407 Proxy Authentication Required").encode())
    monkeypatch.setenv("http_proxy", f"http://{login}@127.0.0.1:{proxy.port}")
    line = f"the proxy 127.0.0.1:{proxy.port} does not take the login in its address; no_grpc_proxy="
    assert connection.out_of_reach("127.0.0.1", 8080).startswith(line)
    knock("127.0.0.1", 8080)
    ours, grpcs = ([line for line in heard.split(b"\r\n") if b"Authorization" in line] for heard in proxy.heard[:2])
    assert ours == grpcs
    assert len(ours) == 1


WRONG = [
    "http://{login}@127.0.0.1:many",
    "http://{login}@127.0.0.1:99999",
    "http://{login}@[::1",
    "http://{login}:3128",
    "http://user:12#{login}@127.0.0.1:3128",
    "http://user:12/{login}@127.0.0.1:3128",
    "http://user:12?{login}@127.0.0.1:3128",
    "http://{login}@",
]


@pytest.mark.parametrize("address", ["http://{login}@127.0.0.1:{port}", "{login}@127.0.0.1:{port}", *WRONG])
@pytest.mark.parametrize("answer", ["407 Who are you", "503 No", "200 OK", b"garbage", b""])
def test_a_login_in_a_proxys_address_is_never_shown(real, monkeypatch, capfd, address, answer):
    proxy, port = real(HTTP.format(answer).encode() if isinstance(answer, str) else answer), free_port()
    monkeypatch.setenv("http_proxy", address.format(login="jane:s3cret", port=proxy.port))
    line = connection.out_of_reach("127.0.0.1", port)
    assert ("http_proxy is no http://HOST:PORT" in line) == (address in WRONG)
    shown = line + "".join(capfd.readouterr())
    for name in (f":{proxy.port}", f":{port}", "127.0.0.1"):
        shown = shown.replace(name, "")
    assert not re.search("jane|s3cret|user|12|amFuZT", shown)


def test_ipv6_addresses_stand_in_brackets(real, monkeypatch):
    try:
        proxy = real(HTTP.format("503 No").encode(), "::1")
    except OSError:
        pytest.skip("no IPv6 here")
    port = free_port()
    assert connection.out_of_reach("::1", port) == f"no server at [::1]:{port}"
    monkeypatch.setenv("http_proxy", f"http://[::1]:{proxy.port}")
    found = f"the proxy [::1]:{proxy.port} finds no server at [fd00::1]:8080 (it answers 503); no_grpc_proxy=fd00::1"
    assert connection.out_of_reach("fd00::1", 8080).startswith(found)
    assert proxy.heard == [b"CONNECT [fd00::1]:8080 HTTP/1.1\r\nHost: [fd00::1]:8080\r\n\r\n"]


def knock(host: str, port: int) -> None:
    """Have gRPC itself call somebody who won't understand it, over a connection of its own."""
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with (
        grpc.insecure_channel(place, options=[("grpc.use_local_subchannel_pool", 1)]) as channel,
        contextlib.suppress(grpc.RpcError),
    ):
        channel.unary_unary("/any/thing")(b"", timeout=60)


IT = "http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("host", "variables", "taken"),
    [
        *[("127.0.0.1", {name: IT}, True) for name in PROXIES],
        *[("127.0.0.1", {name.upper(): IT}, os.name == "nt") for name in PROXIES],
        ("127.0.0.1", {"grpc_proxy": IT, "https_proxy": "", "http_proxy": "nonsense"}, True),
        ("127.0.0.1", {"https_proxy": IT, "http_proxy": ""}, True),
        ("127.0.0.1", {"grpc_proxy": "", "http_proxy": IT}, False),
        ("127.0.0.1", {"https_proxy": "nonsense", "http_proxy": IT}, False),
        ("127.0.0.1", {"http_proxy": "127.0.0.1:{port}"}, False),
        ("127.0.0.1", {"http_proxy": "https://127.0.0.1:{port}"}, False),
        ("127.0.0.1", {"http_proxy": "socks5://127.0.0.1:{port}"}, False),
        ("127.0.0.1", {"http_proxy": "HTTP://127.0.0.1:{port}/x"}, True),
        ("127.0.0.1", {"http_proxy": IT + " "}, True),
        ("127.0.0.1", {"http_proxy": " " + IT}, False),
        ("127.0.0.1", {"http_proxy": "http:///x"}, False),
        ("127.0.0.1", {"http_proxy": IT, "no_proxy": "other, 127.0.0.1"}, False),
        ("127.0.0.1", {"http_proxy": IT, "no_proxy": ", ,"}, True),
        ("127.0.0.1", {"http_proxy": IT, "no_proxy": "*"}, True),
        ("127.0.0.1", {"http_proxy": IT, "no_proxy": "127.0.0.0/8"}, False),
        ("127.0.0.1", {"http_proxy": IT, "no_proxy": "127.9.9.9/8"}, False),
        ("127.0.0.1", {"http_proxy": IT, "no_proxy": "10.0.0.0/8, ::/0"}, True),
        ("127.0.0.1", {"http_proxy": IT, "no_proxy": "127.0.0.10,27.0.0.1"}, True),
        ("127.0.0.1", {"http_proxy": IT, "no_grpc_proxy": "", "no_proxy": "127.0.0.1"}, True),
        ("127.0.0.1", {"http_proxy": IT, "no_grpc_proxy": "127.0.0.1", "no_proxy": "other"}, False),
        ("localhost", {"http_proxy": IT, "no_proxy": "LOCALHOST"}, False),
        ("LOCALHOST", {"http_proxy": IT, "no_proxy": "localhost"}, False),
        ("localhost", {"http_proxy": IT, "no_proxy": ".localhost"}, False),
        ("localhost", {"http_proxy": IT, "no_proxy": "host,local,127.0.0.1,localhost."}, True),
        ("localhost", {"http_proxy": IT, "no_proxy": "127.0.0.0/8"}, True),
        ("::1", {"http_proxy": IT}, True),
        ("::1", {"http_proxy": IT, "no_proxy": "::1"}, False),
        ("::1", {"http_proxy": IT, "no_proxy": "::/64"}, False),
        ("::1", {"http_proxy": IT, "no_proxy": "[::1],:1,0:0:0:0:0:0:0:1"}, True),
        ("localhost.", {"http_proxy": IT}, True),
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(real, monkeypatch, host, variables, taken):
    proxy, port = real(), free_port()
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(port=proxy.port))
    knock(host, port)
    assert bool(proxy.heard) == taken
    found = proxy_for(host)
    assert (found and (found.host, found.port)) == (("127.0.0.1", proxy.port) if taken else None)


@pytest.mark.parametrize(
    ("variables", "hint"),
    [
        ({}, ""),
        ({"https_proxy": "proxy:3128"}, "; https_proxy is passed over, for it does not begin with http://"),
        ({"http_proxy": "https://proxy:3128"}, "; http_proxy is passed over, for it does not begin with http://"),
        ({"http_proxy": "", "HTTPS_PROXY": "http://proxy:3128"}, ""),
        ({"http_proxy": "proxy:3128", "no_proxy": "hospital"}, ""),
        pytest.param(
            {"HTTPS_PROXY": "http://proxy:3128"},
            "; gRPC reads https_proxy, not HTTPS_PROXY",
            marks=pytest.mark.skipif(os.name == "nt", reason="variables have no case there"),
        ),
    ],
)
def test_a_proxy_that_grpc_passes_over_is_named_where_the_direct_way_fails(real, monkeypatch, variables, hint):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for error, line in [
        (socket.gaierror(-2, "Name or service not known"), "no host named hospital is known here; check --server"),
        (TimeoutError(), "no answer from hospital:8080; a firewall may be in the way"),
        (OSError(113, "No route to host"), "no way to hospital:8080 (No route to host)"),
    ]:

        def probe(*_, error=error, **__):
            raise error

        monkeypatch.setattr(connection.socket, "create_connection", probe)
        assert connection.out_of_reach("hospital", 8080) == line + hint


@pytest.mark.parametrize("host", ["a..b", "x" * 70, ".local"])
@pytest.mark.parametrize("authority", [None, b""])
def test_what_can_be_no_name_at_all_is_an_unknown_host(real, capsys, host, authority):
    found = connection._explain(AWAY, host, 8080, authority)
    assert found == f"no host named {host} is known here; check --server"


def test_a_port_that_nobody_listens_at_is_said_by_a_real_connection(real, monkeypatch, capsys):
    port = free_port()
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(connection, "keep_client_connection", lambda: None)
    monkeypatch.setenv("no_grpc_proxy", "")
    with pytest.raises(RunEnded) as end:
        connect(session(), f"127.0.0.1:{port}", wait=0)
    assert str(end.value) == f"no server at 127.0.0.1:{port} after 0 s{STARTED}"


@pytest.mark.slow
def test_an_attempt_leaves_no_thread_behind_however_many_there_are(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(connection, "keep_client_connection", lambda: None)
    monkeypatch.setenv("no_grpc_proxy", "")
    address, before = f"127.0.0.1:{free_port()}", set(threading.enumerate())
    connection.prepare(address)
    for _ in range(5):
        assert connection.attempt(session(), address) == f"no server at {address}"
    wait_for(lambda: set(threading.enumerate()) <= before, "end of the threads", 60)


@pytest.mark.slow
def test_a_message_over_the_limit_of_a_real_server_is_named_to_each_that_sends_one(real, monkeypatch, capsys):
    question = ServerMessage()
    question.get_properties_ins.config["ask"].string = "hello"
    question.get_properties_ins.config["nonce"].string = "n"

    def join(answers, context):
        yield question.SerializeToString()
        yield from answers

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(connection, "keep_client_connection", lambda: None)
    monkeypatch.setenv("no_grpc_proxy", "")
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 50)])
    handlers = {"Join": grpc.stream_stream_rpc_method_handler(join)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("flwr.proto.FlowerService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        for _ in range(2):
            with pytest.raises(RunEnded) as end:
                connect(session(), f"127.0.0.1:{port}", wait=60)
            assert end.value.code == 1
            assert str(end.value).startswith("a message is larger than the server takes (")
            assert str(end.value).endswith(" vs. 50)); raise the server's --max-message-mb")
    finally:
        server.stop(None).wait()

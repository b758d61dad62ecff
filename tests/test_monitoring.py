"""Looking at a run from outside: log file, page, Prometheus, gRPC's health service, and the line that clients enter."""

import json
import re
import urllib.error
import urllib.request
from types import SimpleNamespace

from federation import console
from federation.console import leave_log, say, show_fault, start_log
from federation.operations import monitoring
from federation.operations.monitoring import LivePage, Metrics, check_ports, serve_page
from federation.results.run_folder import Run, RunFolder, recorder
from federation.server import options
from federation.server.grpc_server import SERVICE, Health

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.example_runs import make_history
from helpers.in_process import Learner, federation
from helpers.processes import free_port


@pytest.fixture
def log():
    """Leaves no handler behind."""
    console._runs_for_long = False
    yield
    console._runs_for_long = False
    for handler in list(console.LOG.handlers):
        console.LOG.removeHandler(handler)
        handler.close()


# The log


def test_the_log_file_has_date_and_level_and_the_terminal_stays_as_it_is(tmp_path, capsys, log):
    start_log(str(tmp_path / "log"))
    say("client 0 joined")
    say("warning: --certificate ends soon")
    with pytest.raises(SystemExit):
        console.fail("no more")
    lines = (tmp_path / "log").read_text().splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    expected = ["INFO client 0 joined", "WARNING warning: --certificate ends soon", "ERROR error: no more"]
    assert [re.sub(f"^{time} ", "", line) for line in lines] == expected
    assert capsys.readouterr().out == "client 0 joined\nwarning: --certificate ends soon\n"


def test_in_json_every_line_is_an_object(tmp_path, capsys, log):
    start_log(str(tmp_path / "log"), "json")
    say('one "line"\nand another')
    (line,) = (tmp_path / "log").read_text().splitlines()
    told = json.loads(line)
    assert (told["level"], told["text"]) == ("INFO", 'one "line"\nand another')


def test_in_text_every_line_begins_with_time_and_level(tmp_path, capsys, log):
    start_log(str(tmp_path / "log"))
    say("round  clients\n    0        3")
    words = [line.split(" ", 2)[1:] for line in (tmp_path / "log").read_text().splitlines()]
    assert words == [["INFO", "round  clients"], ["INFO", "    0        3"]]


def test_the_log_file_has_a_faults_whole_traceback(tmp_path, capsys, log):
    start_log(str(tmp_path / "log"))
    try:
        raise ZeroDivisionError("of ours")
    except ZeroDivisionError as error:
        show_fault(error)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split(" ", 2)[1] for line in lines] == ["ERROR"] * len(lines)
    assert lines[0].endswith("Traceback (most recent call last):")
    assert lines[-1].endswith("ZeroDivisionError: of ours")
    assert capsys.readouterr().err.endswith("ZeroDivisionError: of ours\n")


def test_who_leaves_or_is_turned_away_is_a_warning_in_the_log(tmp_path, capsys, log):
    start_log(str(tmp_path / "log"), "json")
    notify = recorder([])
    for event in ("join", "leave", "refuse", "expel"):
        notify(event, 0, event)
    told = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {each["text"]: each["level"] for each in told} == {
        "join": "INFO",
        "leave": "WARNING",
        "refuse": "WARNING",
        "expel": "WARNING",
    }


def test_a_log_left_to_another_process_is_gone_on_with_wherever_it_then_is(tmp_path, capsys, log):
    """A sweep's servers write into its file, and rename it when it is full."""
    start_log(str(tmp_path / "log"))
    say("one")
    leave_log()
    (tmp_path / "log").rename(tmp_path / "log.1")
    say("two")
    assert [(tmp_path / name).read_text()[-4:] for name in ("log.1", "log")] == ["one\n", "two\n"]


def test_a_format_without_a_file_is_wrong_use(capsys):
    with pytest.raises(SystemExit) as end:
        options.parse_args(None, ["--log-format", "json"])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("--log-format json is of --log-file; give both or none\n")


def test_a_full_log_file_becomes_the_one_before_it(tmp_path, capsys, log, monkeypatch):
    monkeypatch.setattr(console, "LOG_BYTES", 100)
    start_log(str(tmp_path / "log"))
    for number in range(3):
        say(f"{number}" * 60)
    assert [(tmp_path / name).exists() for name in ("log", "log.1", "log.2", "log.3")] == [True, True, True, False]


def test_a_log_file_that_cannot_be_written_is_one_line_and_one_that_fails_later_ends_nothing(tmp_path, capsys, log):
    with pytest.raises(SystemExit) as end:
        start_log(str(tmp_path / "none/log"))
    assert end.value.code == 2
    words = f"--log-file {tmp_path}/none/log can't be written (No such file or directory); name another\n"
    assert capsys.readouterr().err.endswith(words)
    start_log(str(tmp_path / "log"))
    (handler,) = console._log_files()
    handler.stream.close()
    handler.stream = SimpleNamespace(write=full, flush=lambda: None, close=lambda: None, tell=lambda: 0, seek=full)
    say("still here")
    assert capsys.readouterr() == ("still here\n", "")
    handler.stream = None


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_into_a_file_or_a_pipe_each_line_of_server_and_client_has_the_time_of_day(capsys, monkeypatch, log):
    monkeypatch.setenv("FEDERATION_TIMES", "")
    say("a line of evaluate.py, which another program reads")
    assert capsys.readouterr().out == "a line of evaluate.py, which another program reads\n"
    start_log(None)
    say("a\nb")
    assert re.fullmatch(r"(\d\d:\d\d:\d\d) a\n\1 b\n", capsys.readouterr().out)


# The page


@pytest.fixture
def run(tmp_path) -> Run:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return Run(folder, make_history())


def test_the_page_is_there_from_round_0_and_reloads_itself_until_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda number: None)
    server = federation(tmp_path, [Learner(), Learner()], rounds=2)
    path = tmp_path / "run/report.html"
    page = LivePage(SimpleNamespace(folder=server.folder, history=server.history))
    seen: list[str] = []
    server.observers.add(page)
    server.observers.add(SimpleNamespace(begin=lambda h: None, round=lambda r: seen.append(path.read_text()), end=id))
    server.federate()
    assert [text.count('http-equiv="refresh"') for text in seen] == [1, 1, 1]
    assert ["after round 1 of 2" in text for text in seen] == [False, True, False]
    page.end(1)
    assert 'http-equiv="refresh"' not in path.read_text()


def get(port: int, path: str = "/", host: str = "") -> tuple[int, str, dict]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host} if host else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, "", {}


def test_the_page_is_served_to_this_machine_alone_and_nothing_else_is(run):
    port = free_port()
    page = LivePage(run)
    serve_page(page, port)
    assert get(port)[:2] == (200, monitoring.WAITING.decode())
    page.round(run.history.rounds[-1])
    status, text, headers = get(port)
    assert (status, "Federated run run" in text) == (200, True)
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
    assert get(port, host=f"localhost:{port}")[0] == 200
    for path in ("/history.json", "/../history.json", "/%2e%2e/x"):
        assert get(port, path)[0] == 404
    for host in (f"evil.org:{port}", "evil.org", f"127.0.0.1.evil.org:{port}"):
        assert get(port, host=host)[0] == 403


# Prometheus


def test_prometheus_finds_the_newest_round_and_how_the_run_ended(run):
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    port = free_port()
    metrics = Metrics(port)
    metrics.begin(run.history)
    last = run.history.rounds[-1]
    told = get(port, "/metrics")[1]
    assert f"federation_round {float(last.round)}\n" in told
    assert f'federation_metric{{name="accuracy"}} {last.metrics["accuracy"]}\n' in told
    assert f"federation_received_bytes {float(sum(each.bytes_received for each in run.history.rounds))}" in told
    assert f"federation_rejected {float(len(run.history.rejected))}\n" in told
    assert "federation_exit_code -1.0\n" in told
    metrics.end(0)
    assert "federation_exit_code 0.0\n" in get(port, "/metrics")[1]


def test_without_its_package_or_with_a_taken_port_one_line_says_so(monkeypatch, capsys):
    args = SimpleNamespace(address=f"127.0.0.1:{free_port()}", metrics=free_port(), page=None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        check_ports(args)
    assert capsys.readouterr().err.endswith("install it: pip install prometheus-client\n")


@pytest.mark.parametrize("flag", ["page", "metrics"])
def test_a_port_that_is_none_is_one_line(flag, capsys):
    with pytest.raises(SystemExit) as end:
        options.parse_args(None, [f"--{flag}", "70000"])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"--{flag} needs a port from 1 to 65535, got 70000\n")


# Health


@pytest.mark.slow
def test_the_standard_health_service_says_whether_clients_are_admitted():
    from concurrent.futures import ThreadPoolExecutor

    clients = SimpleNamespace(closed=False)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(Health(clients), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            stub, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest
            serving = health_pb2.HealthCheckResponse.SERVING
            assert [stub.Check(request(service=name)).status for name in ("", SERVICE)] == [serving, serving]
            clients.closed = True
            assert stub.Check(request()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as error:
                stub.Check(request(service="another"))
            assert error.value.code() == grpc.StatusCode.NOT_FOUND
    finally:
        server.stop(None).wait()


# What clients enter

TLS = ["--certificate", "c", "--private-key", "k", "--ca-certificate", "certificates/ca.pem"]


@pytest.mark.parametrize(
    ("flags", "hosts", "line"),
    [
        ([], [], "python client.py --server 127.0.0.1:8080"),
        (["--address", "[::1]:9000"], [], "python client.py --server '[::1]:9000'"),
        (
            ["--address", "0.0.0.0:8080", "--secret-file", "a/secret.txt", *TLS],
            ["fl.example.org", "192.0.2.7"],
            "python client.py --server fl.example.org:8080 --ca-certificate ca.pem --secret-file secret.txt",
        ),
        (
            ["--address", "0.0.0.0:8080", "--insecure", "--members", "m"],
            [],
            "python client.py --server 198.51.100.7:8080 --identity FILE",
        ),
    ],
)
def test_at_start_the_server_says_what_a_client_enters(flags, hosts, line, monkeypatch):
    monkeypatch.setattr(options, "own_address", lambda: "198.51.100.7")
    assert options.entered(options.parse_args(None, flags), hosts) == line

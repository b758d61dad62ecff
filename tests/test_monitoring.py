"""Looking at a run from outside: log file, page, Prometheus, gRPC's health service, and the line that clients enter."""

import base64
import http.client
import json
import re
import shlex
import socket
import sys
import time
from types import SimpleNamespace

from federation import console
from federation.client import options as client_options
from federation.console import leave_log, say, show_fault, start_log
from federation.net import own_address
from federation.operations import health, introduction
from federation.operations.live_page import FIRST_PAUSE, LivePage
from federation.operations.local_web import serve
from federation.operations.metrics import Metrics
from federation.operations.monitoring import Monitoring
from federation.results import report
from federation.results.report import finish
from federation.results.run_folder import Run, RunFolder, open_run, recorder
from federation.server import options
from federation.server.grpc_server import SERVICE, Health

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.example_runs import call, make_history
from helpers.in_process import Learner
from helpers.in_process import federation as in_process
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
    server = in_process(tmp_path, [Learner(), Learner()], rounds=2)
    path, seen = tmp_path / "run/report.html", []
    page = LivePage(SimpleNamespace(folder=server.folder, history=server.history))
    server.observers.add(page)
    server.observers.add(
        SimpleNamespace(begin=lambda h: None, round=lambda r: seen.append(path.read_text()), end=lambda code: None)
    )
    server.federate()
    assert [text.count('http-equiv="refresh"') for text in seen] == [1, 1, 1]
    assert ["after round 1 of 2" in text for text in seen] == [False, True, False]
    finish(server.folder)
    assert 'http-equiv="refresh"' not in path.read_text()


def test_the_page_of_a_run_that_failed_stands_still(run):
    page = LivePage(run)
    page.begin(run.history)
    page.round(run.history.rounds[-1])
    page.end(1)
    assert 'http-equiv="refresh"' not in (run.folder.path / "report.html").read_text()


def test_a_run_that_fails_before_its_first_round_has_no_page(run):
    run.history.rounds.clear()
    page = LivePage(run)
    page.end(1)
    assert not (run.folder.path / "report.html").exists()


def test_a_page_that_cannot_be_drawn_at_the_end_stands_still(run, monkeypatch, capsys):
    run.folder.save_history(run.history)
    page = LivePage(run)
    page.round(run.history.rounds[-1])
    monkeypatch.setattr(report, "pictures", no_matplotlib)
    finish(run.folder)
    assert 'http-equiv="refresh"' not in (run.folder.path / "report.html").read_text()
    assert "no pictures (ImportError: no matplotlib)" in capsys.readouterr().out


def no_matplotlib(*_: object) -> None:
    raise ImportError("no matplotlib")


def test_pictures_are_drawn_beside_the_run_and_seldom_enough_to_cost_a_tenth_of_a_processor(run, monkeypatch):
    """Each drawing takes a second of the thread's time here, so that ten pass before the next."""
    run.folder.save_history(run.history)
    seconds, pauses, drawn = iter(range(100)), [], []
    page = LivePage(run)
    monkeypatch.setattr("federation.operations.live_page.time", SimpleNamespace(thread_time=lambda: next(seconds)))
    monkeypatch.setattr(report, "pictures", lambda *_: drawn.append(len(drawn)) or {"accuracy": (b"light", b"dark")})
    page._over.wait = lambda pause: pauses.append(pause) or page._due.set() or len(pauses) > 2
    page.begin(run.history)
    page._drawer.join(10)
    assert pauses == [FIRST_PAUSE, 10, 10]
    assert drawn == [0, 1]
    picture = "data:image/png;base64," + base64.b64encode(b"light").decode()
    assert picture in (run.folder.path / "report.html").read_text()
    page.round(run.history.rounds[-1])
    assert picture in (run.folder.path / "report.html").read_text()


def test_without_matplotlib_the_page_goes_on_without_pictures_and_one_line_says_so(run, monkeypatch, capsys):
    run.folder.save_history(run.history)
    page = LivePage(run)
    monkeypatch.setattr(report, "pictures", no_matplotlib)
    monkeypatch.setattr("federation.operations.live_page.FIRST_PAUSE", 0.0)
    page.begin(run.history)
    page.round(run.history.rounds[-1])
    page._drawer.join(10)
    assert capsys.readouterr().out == "the page goes on without new pictures (ImportError: no matplotlib)\n"
    assert (run.folder.path / "report.html").exists()


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.headers)


def arguments(**values: object) -> SimpleNamespace:
    return SimpleNamespace(**{"tensorboard": None, "page": None, "metrics": None, **values})


def test_the_page_is_served_to_this_machine_alone_and_nothing_else_is(run, capsys):
    port = free_port()
    monitoring = Monitoring(arguments(page=port))
    assert capsys.readouterr().out == f"the run's page: http://127.0.0.1:{port}/\n"
    assert "No round is done yet" in ask(port)[1]
    observers = monitoring.observe(run)
    assert "No round is done yet" in ask(port)[1]
    observers.round(run.history.rounds[-1])
    status, text, headers = ask(port)
    assert (status, "Federated run run" in text) == (200, True)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "Python" not in headers["Server"]
    assert ask(port, method="HEAD")[:2] == (200, "")
    assert ask(port, method="HEAD")[2]["Content-Length"] == str(len(text.encode()))
    assert ask(port, Host=f"localhost:{port}")[0] == 200
    for path in ("/history.json", "/../history.json", "/%2e%2e/x", "/?", "/report.html/"):
        assert ask(port, path)[0] == 404
    for host in (f"evil.org:{port}", "evil.org", f"127.0.0.1.evil.org:{port}", "", f"127.0.0.1@evil.org:{port}"):
        assert ask(port, Host=host)[0] == 403
    assert [ask(port, method=method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [501] * 4


def test_only_this_machine_is_listened_to(run):
    server = serve({}, free_port(), "--page")
    assert server.server_address[0] == "127.0.0.1"
    server.shutdown()
    server.server_close()


# Prometheus


def values(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("federation_")]
    return {name: float(value) for name, _, value in lines}


@pytest.fixture
def prometheus():
    return pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")


def test_prometheus_finds_the_newest_round_and_how_the_run_ended(run, prometheus):
    port = free_port()
    observers = Monitoring(arguments(metrics=port)).observe(run)
    history, records = run.history, list(run.history.rounds)
    history.config["run_id"] = "5b1f0c7e9a3d2468"
    history.rounds.clear()
    told = values(ask(port, "/metrics")[1])
    assert told["federation_exit_code"] == -1
    assert told['federation_events_total{event="join"}'] == 1  # before the first round
    assert "federation_round" not in told
    observers.begin(history)
    for record in records:
        history.rounds.append(record)
        observers.round(record)
    history.rejected.append({"round": 2, "partition": 1, "reason": "NaN"})
    status, text, headers = ask(port, "/metrics")
    told = values(text)
    assert (status, headers["Content-Type"].partition(";")[0]) == (200, "text/plain")
    assert (told["federation_round"], told["federation_planned_rounds"]) == (2, 2)
    assert (told["federation_clients"], told["federation_planned_clients"]) == (2, 2)
    assert told['federation_metric{name="accuracy"}'] == 1.0
    assert told['federation_metric{name="loss"}'] == pytest.approx(1 / 3)
    assert told["federation_round_seconds"] == 2
    assert told["federation_received_bytes_total"] == 0 + 1000 + 2000
    assert told["federation_rejected_updates_total"] == 1
    assert abs(told["federation_round_timestamp_seconds"] - time.time()) < 60
    assert 'run_id="5b1f0c7e9a3d2468"' in text
    assert ask(port, "/")[0] == 404
    assert ask(port, "/metrics", Host="evil.org")[0] == 403
    observers.end(0)
    assert values(ask(port, "/metrics")[1])["federation_exit_code"] == 0


def test_prometheus_own_parser_reads_all_of_it(run, prometheus):
    from prometheus_client.parser import text_string_to_metric_families

    metrics = Metrics()
    metrics.observe(run)
    families = {each.name: each.type for each in text_string_to_metric_families(metrics.content()[1].decode())}
    assert {name: families[name] for name in ("federation_round", "federation_received_bytes")} == {
        "federation_round": "gauge",
        "federation_received_bytes": "counter",
    }


def test_without_its_package_one_line_says_so_before_there_is_a_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SystemExit) as end:
        Monitoring(arguments(metrics=free_port()))
    assert end.value.code == 1
    assert capsys.readouterr().err.endswith("install it: pip install prometheus-client\n")


def test_a_port_that_another_program_has_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        Monitoring(arguments(page=taken.getsockname()[1]))
    assert end.value.code == 1
    assert "can't be had (Address already in use); give another port\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--page", "70000"], "--page needs a port from 1 to 65535, got 70000"),
        (["--metrics", "0"], "--metrics needs a port from 1 to 65535, got 0"),
        (["--metrics", "8080"], "--metrics 8080 is the port of --address; give each its own"),
        (["--page", "9000", "--metrics", "9000"], "--metrics 9000 is the port of --page; give each its own"),
    ],
)
def test_a_port_that_cannot_be_is_wrong_use(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        options.parse_args(None, flags)
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"{words}\n")


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


def test_the_command_says_serving_not_serving_or_who_does_not_answer(monkeypatch, capsys):
    said = iter(["SERVING", "NOT_SERVING"])
    monkeypatch.setattr(health, "ask", lambda *_: next(said))
    assert [call(health.main), call(health.main)] == [0, 1]
    assert capsys.readouterr().out == "SERVING\nNOT_SERVING\n"


@pytest.mark.slow
def test_the_command_asks_a_server_that_is_not_there_and_wrong_use_is_one_line(capsys):
    address = f"127.0.0.1:{free_port()}"
    assert call(health.main, "--server", address) == 1
    assert capsys.readouterr().err.endswith(f"error: no answer from {address} (UNAVAILABLE)\n")
    assert call(health.main, "--server", "8080") == 2
    assert "--server '8080' is not HOST:PORT" in capsys.readouterr().err


def test_a_real_server_serves_while_it_waits_for_its_clients(federation):
    server = federation.server("--clients", "1", "--rounds", "1")
    server.says("waiting for 1 clients")
    asked = federation.start("health", "-m", "federation.health", "--server", federation.address)
    assert asked.ends(0) == "SERVING\n"


# A service is started again by the same command


def test_auto_resume_begins_a_run_goes_on_with_it_and_knows_when_it_is_done(tmp_path, capsys):
    words = ["--run-dir", str(tmp_path / "run"), "--auto-resume", "--rounds", "7"]
    args = options.parse_args(None, words)
    assert (args.resume, args.run_dir) == (None, str(tmp_path / "run"))
    folder = open_run(args).folder
    args = options.parse_args(None, words)
    assert (args.resume, args.run_dir, args.recipe.rounds) == (str(tmp_path / "run"), None, 7)
    folder.save_model({}, {})
    with pytest.raises(SystemExit) as end:
        options.parse_args(None, words)
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"the run in {tmp_path / 'run'} is done already")


def test_auto_resume_begins_where_a_run_was_killed_before_its_first_word(tmp_path):
    RunFolder(tmp_path / "run").create()
    args = options.parse_args(None, ["--run-dir", str(tmp_path / "run"), "--auto-resume"])
    assert (args.resume, args.run_dir) == (None, str(tmp_path / "run"))
    assert open_run(args).folder.is_begun()


@pytest.mark.parametrize("flags", [[], ["--resume", "run"], ["--sweep", "sweep.toml", "--run-dir", "runs"]])
def test_auto_resume_needs_a_run_dir_and_no_other_way_to_go_on(flags, capsys):
    with pytest.raises(SystemExit) as end:
        options.parse_args(None, ["--auto-resume", *flags])
    assert end.value.code == 2
    assert "--auto-resume goes with --run-dir" in capsys.readouterr().err


# What clients enter

TLS = ["--certificate", "c", "--private-key", "k", "--ca-certificate", "certificates/ca.pem"]


@pytest.mark.parametrize(
    ("flags", "hosts", "line"),
    [
        ([], [], "--server 127.0.0.1:8080"),
        (["--address", "[::1]:9000"], [], "--server '[::1]:9000'"),
        (
            ["--address", "0.0.0.0:8080", "--secret-file", "a/secret.txt", *TLS],
            ["fl.example.org", "192.0.2.7"],
            "--server fl.example.org:8080 --ca-certificate ca.pem --secret-file secret.txt",
        ),
        (
            ["--address", "0.0.0.0:8080", "--members", "m", "--partitioner", "local", *TLS],
            ["localhost", "192.0.2.7"],
            "--server 192.0.2.7:8080 --dataset FOLDER --ca-certificate ca.pem --identity FILE",
        ),
        (  # clients would find that the certificate is for another address
            ["--address", "10.0.0.5:8080", "--secret-file", "secret.txt", *TLS],
            ["fl.example.org"],
            "--server fl.example.org:8080 --ca-certificate ca.pem --secret-file secret.txt",
        ),
        (
            ["--members", "members", "--secure-aggregation"],
            [],
            "--server 127.0.0.1:8080 --identity FILE --peers FILE",
        ),
        (["--address", "0.0.0.0:8080", "--insecure"], [], "--server 198.51.100.7:8080"),
        (["--address", "[::]:8080", "--insecure"], [], "--server 198.51.100.7:8080"),
    ],
)
def test_at_start_the_server_says_what_a_client_enters(flags, hosts, line, monkeypatch, tmp_path):
    monkeypatch.delenv("FEDERATION_SECRET", raising=False)
    monkeypatch.setattr(introduction, "own_address", lambda: "198.51.100.7")
    said = introduction.introduce(options.parse_args(None, flags), tmp_path, hosts).splitlines()
    assert said[1] == f"clients enter: python client.py {line}"
    words = shlex.split(said[1])[4:]
    assert client_options.parse_args(None, words).server == words[1]  # the client takes it


def test_a_secret_of_the_environment_is_not_said_but_that_there_is_one_is(monkeypatch):
    monkeypatch.setenv("FEDERATION_SECRET", "horse")
    said = introduction.entered(options.parse_args(None, []), [])
    assert said == "python client.py --server 127.0.0.1:8080, with the server's FEDERATION_SECRET"


def test_the_own_address_is_one_of_this_machine_and_nothing_is_sent_to_find_it(monkeypatch):
    sent = []
    monkeypatch.setattr("socket.socket.send", lambda *_: sent.append(1))
    with socket.socket() as one:
        one.bind((own_address(), 0))  # another machine's would be refused
    assert not sent

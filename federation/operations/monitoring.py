"""Looking at a run while it goes on: a page that reloads itself, numbers for Prometheus; both on this machine only."""

import argparse
import http.server
import importlib.util
import threading
from typing import Any

from federation.config import LOSS
from federation.console import fail
from federation.net import check_port
from federation.results import report
from federation.results.history import History, RoundRecord
from federation.results.observers import Observers, open_observers
from federation.results.run_folder import Run

HERE = "127.0.0.1"


def check_ports(args: argparse.Namespace) -> None:
    """Before a run folder is made: exits with one line where a port is taken, or a package is not there."""
    check_port(args.address)
    for port in (args.metrics, args.page):
        if port:
            check_port(f"{HERE}:{port}")
    if args.metrics and importlib.util.find_spec("prometheus_client") is None:
        fail("--metrics needs the package prometheus-client; install it: pip install prometheus-client")


def open_monitoring(args: argparse.Namespace, run: Run) -> Observers:
    """The page, and the observers that the flags ask for. Exits with 1 and one line where one can't be had."""
    page, observers = LivePage(run), open_observers(args.tensorboard)
    observers.add(page)
    if args.page:
        serve_page(page, args.page)
    if args.metrics:
        observers.add(Metrics(args.metrics))
    return observers


class LivePage:
    """report.html in the run's folder, written anew after each round; its pictures come when the run is done."""

    def __init__(self, run: Run) -> None:
        self.path = run.folder.path / "report.html"
        self._folder = run.folder
        self._history = run.history

    def begin(self, history: History) -> None:
        self._history = history

    def round(self, record: RoundRecord) -> None:
        report.write_live(self._folder, self._history)

    def end(self, exit_code: int) -> None:
        if exit_code and self._history.rounds:
            report.write_live(self._folder, self._history, reload=False)


class Metrics:
    """Prometheus' text format at http://127.0.0.1:PORT/metrics."""

    def __init__(self, port: int) -> None:
        import prometheus_client as prometheus  # optional, and only here

        registry = prometheus.CollectorRegistry()

        def gauge(name: str, words: str, *labels: str) -> Any:
            return prometheus.Gauge(f"federation_{name}", words, labels, registry=registry)

        self._round = gauge("round", "The newest whole round, or version")
        self._clients = gauge("clients", "Clients whose updates counted in it")
        self._metric = gauge("metric", "Metrics of its model on all test examples", "name")
        self._seconds = gauge("round_seconds", "Seconds that it took")
        self._received = gauge("received_bytes", "Bytes of updates since the run began")
        self._rejected = gauge("rejected", "Answers that did not count since the run began")
        self._ended = gauge("exit_code", "How the run ended; -1 while it goes on")
        self._info = prometheus.Info("federation_run", "The run", registry=registry)
        self._ended.set(-1)
        self._history: History | None = None
        prometheus.start_http_server(port, HERE, registry)

    def begin(self, history: History) -> None:
        self._history = history
        self._info.info({name: str(history.config.get(name) or "") for name in ("run_id", "model", "strategy", "mode")})
        for record in history.rounds:
            self.round(record)

    def round(self, record: RoundRecord) -> None:
        history = self._history
        assert history
        self._round.set(record.round)
        self._clients.set(record.clients)
        self._seconds.set(record.seconds)
        self._received.set(sum(each.bytes_received for each in history.rounds))
        self._rejected.set(len(history.rejected))
        for name in {*record.metrics, LOSS.name, history.main.name}:
            self._metric.labels(name).set(record.metrics.get(name, float("nan")))

    def end(self, exit_code: int) -> None:
        self._ended.set(exit_code)


def serve_page(page: LivePage, port: int) -> None:
    """At http://127.0.0.1:PORT/, for browsers on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # By another name for this machine a page from elsewhere could read ours (DNS rebinding).
            if self.headers.get("Host", "").rpartition(":")[0] not in (HERE, "localhost"):
                return self.send_error(403, "Ask for 127.0.0.1 or localhost")
            if self.path != "/":
                return self.send_error(404)
            try:
                content = page.path.read_bytes()
            except OSError:
                content = WAITING
            self.send_response(200)
            for name, value in {**HEADERS, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing: a page that reloads itself would fill the terminal."""

    server = http.server.ThreadingHTTPServer((HERE, port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
}
WAITING = b'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="3"><p>No round is done yet.'

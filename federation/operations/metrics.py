"""A run in numbers for Prometheus (prometheus.io), in its text format."""

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from federation.console import fail
from federation.results.history import History, RoundRecord
from federation.results.run_folder import Run

RUNNING = -1  # in place of an exit code


class Metrics:
    """An observer, and a collector of prometheus_client: it reads the history whenever Prometheus asks.

    Exits with 1 and one line where the package is not there.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client.core  # optional, and only here
        except ImportError:
            fail("--metrics needs the package prometheus-client; install it: pip install prometheus-client")
        self._library: Any = prometheus_client
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)
        prometheus_client.ProcessCollector(registry=self._registry)  # memory, processor time, open files; on Linux
        self._history = History({})
        self._exit_code = RUNNING
        self._newest_round_at: float | None = None

    def observe(self, run: Run) -> None:
        """From now on, so that joins and refusals before the first round count too."""
        self._history = run.history

    def begin(self, history: History) -> None:
        self._history = history

    def round(self, record: RoundRecord) -> None:
        self._newest_round_at = time.time()

    def end(self, exit_code: int) -> None:
        self._exit_code = exit_code

    def content(self) -> tuple[str, bytes]:
        """For a web server."""
        return self._library.CONTENT_TYPE_LATEST, self._library.generate_latest(self._registry)

    def collect(self) -> Iterable[Any]:
        """Called by prometheus_client."""
        core, history = self._library.core, self._history

        def gauge(name: str, words: str, value: float) -> Any:
            return core.GaugeMetricFamily(f"federation_{name}", words, value)

        def counter(name: str, words: str, label: str, values: dict[str, float]) -> Any:
            family = core.CounterMetricFamily(f"federation_{name}", words, labels=[label] if label else [])
            for key, value in values.items():
                family.add_metric([key] if label else [], value)
            return family

        about = {name: str(history.config.get(name) or "") for name in ("run_id", "model", "strategy", "mode")}
        yield core.InfoMetricFamily("federation_run", "The run.", about)
        yield gauge("exit_code", f"How the run ended, {RUNNING} while it goes on.", self._exit_code)
        yield gauge("planned_rounds", "How many rounds it shall have.", history.config.get("rounds", 0))
        yield gauge("planned_clients", "How many clients it shall have.", history.config.get("clients", 0))
        events = Counter(event["event"] for event in list(history.events))
        yield counter("events", "Clients that joined, left or were turned away.", "event", dict(events))
        rounds, rejected = list(history.rounds), len(history.rejected)
        yield counter("rejected_updates", "Answers that did not count.", "", {"": rejected})
        received = sum(record.bytes_received for record in rounds)
        yield counter("received_bytes", "Bytes of the updates that counted.", "", {"": received})
        if not rounds:
            return
        last = rounds[-1]
        yield gauge("round", "The newest whole round, or version.", last.round)
        yield gauge("clients", "Clients that counted in it.", last.clients)
        yield gauge("round_seconds", "How long it took.", last.seconds)
        if self._newest_round_at:
            yield gauge("round_timestamp_seconds", "When it ended (Unix time).", self._newest_round_at)
        scores = core.GaugeMetricFamily("federation_metric", "Of its model on all test examples.", labels=["name"])
        for name, value in last.metrics.items():
            scores.add_metric([name], value)
        yield scores

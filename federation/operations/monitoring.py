"""How to look at a run while it goes on: its page, numbers for Prometheus, TensorBoard."""

import argparse

from federation.console import say
from federation.operations.live_page import NOTHING_YET, LivePage
from federation.operations.local_web import serve, url
from federation.operations.metrics import Metrics
from federation.results.observers import Observers, open_observers
from federation.results.run_folder import Run


class Monitoring:
    """What the flags ask for. Exits with 1 and one line where it can't be had, before there is a run folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._observers = open_observers(args.tensorboard)
        self._page: LivePage | None = None
        self._metrics: Metrics | None = None
        if args.metrics:
            self._metrics = Metrics()
            serve({"/metrics": self._metrics.content}, args.metrics, "--metrics")
            say(f"metrics for Prometheus: {url(args.metrics, '/metrics')}")
        if args.page:
            serve({"/": lambda: self._page.content() if self._page else NOTHING_YET}, args.page, "--page")
            say(f"the run's page: {url(args.page)}")

    def observe(self, run: Run) -> Observers:
        """Everybody who is told how this run goes on."""
        self._page = LivePage(run)
        self._observers.add(self._page)
        if self._metrics:
            self._metrics.observe(run)
            self._observers.add(self._metrics)
        return self._observers

"""The rounds of federated averaging: first one round, then all that a long run needs around it."""

import signal
import time
import traceback

from federation.aggregation.strategy import CheckedStrategy, MakeStrategy, mean_metrics
from federation.compression import TooLarge, num_bytes
from federation.config import MAIN_METRIC
from federation.console import say
from federation.results.history import RoundRecord
from federation.results.observers import Observers
from federation.results.run_folder import Checkpoint, Run
from federation.results.tables import Table
from federation.server.client_manager import ClientManager
from federation.server.dispatch import Dispatcher, RunFailed, Stopped
from federation.server.settings import ServerSettings

import numpy as np
from flwr.server import History as FlowerHistory
from flwr.server import Server


def federated_round(
    number: int, weights: list[np.ndarray], dispatcher: Dispatcher, strategy: CheckedStrategy
) -> tuple[list[np.ndarray], RoundRecord]:
    """One server round: returns the next global weights, and what is known of them.

    Algorithm 1 of McMahan et al. 2017 (arXiv:1602.05629), with any of Flower's strategies for the mean.
    """
    selected = dispatcher.select(number)
    began = time.monotonic()
    answers = dispatcher.fit(number, weights, selected)
    updates = dispatcher.validate(number, weights, answers)
    weights = strategy.aggregate(weights, updates)
    trained, received = mean_metrics(updates), sum(num_bytes(u.weights, strategy.compress) for u in updates)
    clients = len(updates)
    del answers, updates  # many clients' updates are many models; the evaluation needs room of its own
    record = evaluated(number, weights, dispatcher)
    record.train_metrics, record.clients, record.bytes_received = trained, clients, received
    record.seconds = round(time.monotonic() - began, 3)
    return weights, record


def evaluated(number: int, weights: list[np.ndarray], dispatcher: Dispatcher) -> RoundRecord:
    """The record of a model that was evaluated by all clients, as of round 0: without any training."""
    began = time.monotonic()
    scores = dispatcher.evaluate(number, weights)
    if not scores:
        raise RunFailed(f"no client could evaluate the model of round {number}")
    record = RoundRecord(number, mean_metrics(scores), clients=len(scores))
    record.by_client = {MAIN_METRIC: {str(score.partition): score.metrics[MAIN_METRIC] for score in scores}}
    record.seconds = round(time.monotonic() - began, 3)
    return record


class FederatedServer(Server):
    """Flower's server with these rounds. After federate(), exit_code tells how the run ended.

    Every result is a function of the recipe and of which clients took part, never of who answered
    first: updates are summed by partition, and clients draw their randomness from the round.
    """

    unit = "round"

    def __init__(
        self,
        clients: ClientManager,
        strategy: MakeStrategy,
        settings: ServerSettings,
        run: Run,
        observers: Observers | None = None,
    ) -> None:
        super().__init__(client_manager=clients)
        self.clients = clients
        self.recipe = clients.recipe
        self.make_strategy = strategy
        self.settings = settings
        self.folder, self.history, self.checkpoint = run.folder, run.history, run.checkpoint
        self.observers = observers or Observers([])
        self.dispatcher = Dispatcher(clients, settings, self.history, self.unit)
        self.table = Table()
        self.signal_number = 0
        self.exit_code = 1
        self.weights: list[np.ndarray] = []
        self.rounds_done = -1  # 0 once the untrained model is evaluated
        if self.checkpoint:
            clients.begin(self.history.config["classes"], self.history.config["statistics"])

    # Called by flwr.server.start_server

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[FlowerHistory, float]:
        """Run the whole federation in this process, which Ctrl-C and SIGTERM then end in order."""
        start = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):  # here, as start_server sets handlers of its own before
            signal.signal(number, self._on_signal)
        self.federate()
        return FlowerHistory(), time.monotonic() - start

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Nothing left to do: federate() has told everybody."""

    # The run

    def federate(self) -> None:
        """Run the whole federation; always returns, having told the clients how it ended."""
        try:
            self._run()
            self.exit_code = 0
            self.clients.close("finished", f"the run is done after {self.rounds_done} {self.unit}s")
        except Stopped:
            self.exit_code = 128 + self.signal_number
            name = signal.Signals(self.signal_number).name
            words = f"stopped by {name} after {self.unit} {max(0, self.rounds_done)}"
            say(f"{words}; go on with: python server.py --resume {self.folder.path}")
            self.clients.close("stopped", f"the server was {words}", seconds=2)
        except (RunFailed, OSError) as error:
            words = str(error)
            if isinstance(error, OSError):
                words = (
                    f"the run folder {self.folder.path} can't be written ({error.strerror}); free or change the disk"
                )
            say(f"error: {words}; then go on with: python server.py --resume {self.folder.path}")
            self.clients.close("failed", words)
        except TooLarge as error:
            words = f"the new model can't be sent: {error}; begin a new run without it"
            say(f"error: {words}")
            self.clients.close("failed", words)
        except Exception as error:  # a fault of ours: show all of it, but let nobody wait for us
            traceback.print_exc()
            self.clients.close("failed", f"the server failed ({type(error).__name__})")
        self.observers.end(self.exit_code)

    def _run(self) -> None:
        self._gather_first()
        self.clients.begin(self.clients.classes, self.clients.buffer_positions)
        counts = {str(one.partition): one.class_counts for one in self.clients.ready() if one.class_counts}
        self.history.config.update(
            classes=self.clients.classes, statistics=self.clients.buffer_positions, class_counts=counts
        )
        self.observers.begin(self.history)
        if self.checkpoint is None:
            self._begin(self.dispatcher.initial_weights())
        else:
            self.rounds_done = self.checkpoint.server_round
            self._go_on(self.checkpoint)
        self._work()
        self.folder.save_model(self.weights, self.recipe.model, self.clients.classes)

    def _gather_first(self) -> None:
        wanted, timeout = self.settings.clients, self.settings.join_timeout
        say(f"waiting for {wanted} clients ({len(self.clients.ready())} of {wanted} there)")
        if not self.dispatcher.wait_ready(wanted, timeout):
            there = len(self.clients.ready())
            raise RunFailed(
                f"{there} of {wanted} clients came within {timeout:g} s; start more, or raise --join-timeout"
            )

    def _begin(self, weights: list[np.ndarray]) -> None:
        self._adopt(weights)
        self._finish_round(evaluated(0, weights, self.dispatcher))

    def _go_on(self, checkpoint: Checkpoint) -> None:
        self._adopt(checkpoint.weights)
        self.aggregator.restore(checkpoint.strategy_state, self.weights)
        for record in self.history.rounds:
            self._say(record)

    def _adopt(self, weights: list[np.ndarray]) -> None:
        self.weights = weights
        positions, compress = self.clients.buffer_positions, self.recipe.compress
        self.aggregator = CheckedStrategy(self.make_strategy, self.settings, weights, positions, compress)

    def _work(self) -> None:
        while self.rounds_done < self.recipe.rounds and not self._target_reached():
            self.weights, record = federated_round(self.rounds_done + 1, self.weights, self.dispatcher, self.aggregator)
            self._finish_round(record)

    def _finish_round(self, record: RoundRecord) -> None:
        """Write the round down, then say it: what the table shows is safe on disk."""
        self.rounds_done = record.round
        self.history.rounds.append(record)
        self.folder.save_checkpoint(Checkpoint(record.round, self.weights, self.aggregator.state(), self.history))
        self._say(record)
        self.observers.round(record)

    def _say(self, record: RoundRecord) -> None:
        say("\n".join(self.table.lines(record)))

    # When to end

    def _target_reached(self) -> bool:
        target = self.settings.target_accuracy
        if target is None or self.rounds_done < 1 or (self.history.rounds[-1].main() or 0) < target:
            return False
        say(f"{MAIN_METRIC} {target:g} reached after round {self.rounds_done} (--target-accuracy)")
        return True

    def _on_signal(self, number: int, frame: object) -> None:
        """Only sets a flag, which every wait looks at five times a second: a checkpoint is never cut short."""
        self.signal_number = number
        self.dispatcher.stop.set()

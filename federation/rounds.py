"""The loop of server rounds: train everywhere, check, aggregate, evaluate everywhere, write down."""

import signal
import time
import traceback
from collections.abc import Callable

from federation.cohort import Cohort, Stopped
from federation.places import Place, Places
from federation.recipe import Terms
from federation.run_folder import Checkpoint, History, RunFolder
from federation.strategy import CheckedStrategy, weighted_mean
from federation.tables import TABLE_HEAD, table, table_row
from federation.wire import TooLarge, num_bytes
from federation.words import say

import numpy as np
from flwr.server.history import History as FlowerHistory
from flwr.server.server import Server


class RunFailed(Exception):
    """The run can't go on; the text says why and what to do."""


class FederatedServer(Server):
    """Flower's server with this project's loop. After federate(), exit_code tells how the run ended.

    Every result is a function of the recipe and of which clients took part, never of who answered
    first: updates are summed by partition, and clients draw their randomness from the round.
    """

    unit = "round"

    def __init__(
        self,
        admission: Places,
        terms: Terms,
        folder: RunFolder,
        history: History,
        checkpoint: Checkpoint | None = None,  # to go on after
    ) -> None:
        super().__init__(client_manager=admission)
        self.admission = admission
        self.recipe = admission.recipe
        self.terms = terms
        self.folder = folder
        self.history = history
        self.checkpoint = checkpoint
        self.cohort = Cohort(admission, terms, history, self.unit)
        self.signal_number = 0
        self.exit_code = 1
        self.weights: list[np.ndarray] = []
        self.rule: CheckedStrategy | None = None
        self.rounds_done = -1  # 0 once the untrained model is evaluated
        self.on_round: Callable[[dict], None] = lambda row: None  # gets each row of the table once it is on disk

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
            self.admission.close("finished", f"the run is done after {self.rounds_done} {self.unit}s")
        except Stopped:
            self.exit_code = 128 + self.signal_number
            name = signal.Signals(self.signal_number).name
            words = f"stopped by {name} after {self.unit} {max(0, self.rounds_done)}"
            say(f"{words}; go on with: python server.py --resume {self.folder.path}")
            self.admission.close("stopped", f"the server was {words}", seconds=2)
        except (RunFailed, OSError) as error:
            words = str(error)
            if isinstance(error, OSError):
                words = (
                    f"the run folder {self.folder.path} can't be written ({error.strerror}); free or change the disk"
                )
            say(f"error: {words}; then go on with: python server.py --resume {self.folder.path}")
            self.admission.close("failed", words)
        except TooLarge as error:
            words = f"the new model can't be sent: {error}; begin a new run without it"
            say(f"error: {words}")
            self.admission.close("failed", words)
        except Exception as error:  # a fault of ours: show all of it, but let nobody wait for us
            traceback.print_exc()
            self.admission.close("failed", f"the server failed ({type(error).__name__})")

    def _run(self) -> None:
        self._gather_first()
        self.admission.begin(self.admission.classes, self.admission.statistics)
        counts = {str(place.partition): place.class_counts for place in self.admission.ready() if place.class_counts}
        self.history.config.update(
            classes=self.admission.classes, statistics=self.admission.statistics, class_counts=counts
        )
        if self.checkpoint is None:
            self._begin(self._initial_weights())
        else:
            self.rounds_done = self.checkpoint.server_round
            self._go_on(self.checkpoint)
        self._work()
        self.folder.save_model(self.weights, self.recipe.model, self.admission.classes)

    def _begin(self, weights: list[np.ndarray]) -> None:
        self._adopt(weights)
        say(TABLE_HEAD)
        start = time.monotonic()
        self._finish_round(0, self.cohort.evaluate(0, self.weights), losses=[], received=0, start=start)

    def _go_on(self, checkpoint: Checkpoint) -> None:
        self._adopt(checkpoint.weights)
        self.rule.restore(checkpoint.strategy_state, self.weights)
        say(table(self.history.rounds))

    def _work(self) -> None:
        while self.rounds_done < self.recipe.rounds and not self._target_reached():
            self._round(self.rounds_done + 1)

    def _round(self, server_round: int) -> None:
        places = self._gather()
        start = time.monotonic()
        train = self.cohort.fit(server_round, self.weights, self._select(server_round, places))
        self.weights = self.rule.aggregate(self.weights, [update for update, _ in train.values()])
        losses = [(loss, examples) for (_, examples), loss in train.values()]
        received = sum(num_bytes(arrays, self.recipe.compress) for (arrays, _), _ in train.values())
        del train  # many clients' updates are many models; the evaluation needs room of its own
        self._finish_round(server_round, self.cohort.evaluate(server_round, self.weights), losses, received, start)

    def _finish_round(self, server_round: int, scores: dict, losses: list, received: int, start: float) -> None:
        """Write the round down, then say it: what the table shows is safe on disk."""
        if not scores:
            raise RunFailed(f"no client could evaluate the model of round {server_round}")
        self.rounds_done = server_round
        row = {
            "round": server_round,
            "accuracy": float(weighted_mean([(accuracy, n) for _, accuracy, n in scores.values()])),
            "loss": float(weighted_mean([(loss, n) for loss, _, n in scores.values()])),
            "train_loss": float(weighted_mean(losses)) if losses else None,
            "clients": len(losses) if server_round else len(scores),
            "seconds": round(time.monotonic() - start, 3),
            "bytes_received": received,
            "accuracy_by_client": {str(p): accuracy for p, (_, accuracy, _) in scores.items()},
        }
        self.history.rounds.append(row)
        self.folder.save_checkpoint(Checkpoint(server_round, self.weights, self.rule.state(), self.history))
        say(table_row(row))
        self.on_round(row)

    # Who takes part

    def _gather_first(self) -> None:
        wanted = self.terms.clients
        say(f"waiting for {wanted} clients ({len(self.admission.ready())} of {wanted} there)")
        if not self.cohort.wait_ready(wanted, self.terms.join_timeout):
            there = len(self.admission.ready())
            raise RunFailed(
                f"{there} of {wanted} clients came within {self.terms.join_timeout:g} s; "
                "start more, or raise --join-timeout"
            )

    def _gather(self) -> list[Place]:
        """Everybody, after a while for lost clients to come back. Raises RunFailed where too few are left."""
        missing = self.terms.clients - len(self.admission.ready())
        if missing:
            say(
                f"{missing} of {self.terms.clients} clients missing; "
                f"waiting up to {self.terms.rejoin_wait:g} s for the free places"
            )
            self.cohort.wait_ready(self.terms.clients, self.terms.rejoin_wait)
        places = self.admission.ready()
        if len(places) < self.terms.min_clients:
            raise self._too_few(len(places))
        return places

    def _too_few(self, there: int) -> RunFailed:
        return RunFailed(
            f"{there} of {self.terms.clients} clients left after {self.unit} {self.rounds_done}, "
            f"and --min-clients is {self.terms.min_clients}; the checkpoint is kept; start more clients"
        )

    def _select(self, server_round: int, places: list[Place]) -> list[Place]:
        """Client selection: that fraction of the places, drawn from the seed and the round."""
        number = max(1, round(self.terms.fraction_fit * len(places)))
        rng = np.random.default_rng([self.recipe.seed, server_round])
        return [places[i] for i in sorted(rng.choice(len(places), number, replace=False))]

    def _initial_weights(self) -> list[np.ndarray]:
        weights = self.cohort.initial_weights()
        if weights is None:
            raise RunFailed("no client could send the untrained model; look at what the clients print")
        return weights

    def _adopt(self, weights: list[np.ndarray]) -> None:
        self.weights = weights
        terms, statistics = self.terms, self.admission.statistics
        self.rule = CheckedStrategy(terms.strategy, weights, statistics, terms.max_update_norm, self.recipe.compress)

    # When to end

    def _target_reached(self) -> bool:
        target = self.terms.target_accuracy
        if target is None or self.rounds_done < 1 or self.history.rounds[-1]["accuracy"] < target:
            return False
        say(f"accuracy {target:g} reached after round {self.rounds_done} (--target-accuracy)")
        return True

    def _on_signal(self, number: int, frame: object) -> None:
        """Only sets a flag, which every wait looks at five times a second: a checkpoint is never cut short."""
        self.signal_number = number
        self.cohort.stop.set()

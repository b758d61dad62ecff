"""The loop of server rounds: train everywhere, check, aggregate, evaluate everywhere, write down."""

import concurrent.futures
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from federation import report
from federation.admission import Admission, Place, close
from federation.run_folder import Checkpoint, History, RunFolder
from federation.strategy import BadUpdate, CheckedStrategy, check_evaluate, check_fit, read_weights, weighted_mean
from federation.words import say

import numpy as np
from flwr.common import EvaluateIns, FitIns, GetParametersIns, ndarrays_to_parameters
from flwr.server.client_proxy import ClientProxy
from flwr.server.history import History as FlowerHistory
from flwr.server.server import Server

GRACE = 5.0  # seconds after which Flower cuts a stream that we gave up
STRIKES = 3  # bad updates in a row that cost a client its place


@dataclass(frozen=True)
class Terms:
    """What a run of rounds needs beside the recipe; times in seconds."""

    clients: int = 3
    min_clients: int = 2
    fraction_fit: float = 1.0
    strategy: str = "fedavg"
    max_update_norm: float | None = None
    target_accuracy: float | None = None
    join_timeout: float = 3600.0  # for the first clients to come
    rejoin_wait: float = 30.0  # for a lost client's place to be taken again
    round_timeout: float = 600.0  # for a client to answer


class RunFailed(Exception):
    """The run can't go on; the text says why and what to do."""


class Stopped(Exception):
    """A signal asked the server to stop."""


class FederatedServer(Server):
    """Flower's server with this project's loop. After fit(), exit_code tells how the run ended.

    Every result is a function of the recipe and of which clients took part, never of who answered
    first: updates are summed by partition, and clients draw their randomness from the round.
    """

    def __init__(
        self,
        admission: Admission,
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
        self.stop = threading.Event()
        self.signal_number = 0
        self.exit_code = 1
        self.weights: list[np.ndarray] = []
        self.rule: CheckedStrategy | None = None
        self.rounds_done = -1  # 0 once the untrained model is evaluated

    # Called by flwr.server.start_server

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[FlowerHistory, float]:
        """Run the whole federation; always returns, having told the clients how it ended."""
        start = time.monotonic()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self._run()
            self.exit_code = 0
            self.admission.close("finished", f"the run is done after {self.rounds_done} rounds")
        except Stopped:
            self.exit_code = 128 + self.signal_number
            name = signal.Signals(self.signal_number).name
            words = f"stopped by {name} after round {max(0, self.rounds_done)}"
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
        return FlowerHistory(), time.monotonic() - start

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Nothing left to do: fit() has told everybody."""

    # The run

    def _run(self) -> None:
        self._gather_first()
        self.admission.begin(self.admission.classes, self.admission.statistics)
        self.history.config.update(classes=self.admission.classes, statistics=self.admission.statistics)
        if self.checkpoint is None:
            self._adopt(self._initial_weights())
            say(report.TABLE_HEAD)
            self._finish_round(0, self._evaluate(0), train={}, start=time.monotonic())
        else:
            self._adopt(self.checkpoint.weights)
            self.rule.restore(self.checkpoint.strategy_state, self.weights)
            self.rounds_done = self.checkpoint.server_round
            say(report.table(self.history.rounds))
        while self.rounds_done < self.recipe.rounds and not self._target_reached():
            self._round(self.rounds_done + 1)
        self.folder.save_model(self.weights, self.recipe.model, self.admission.classes)
        report.plot(self.history, self.folder.path / "accuracy.png")

    def _round(self, server_round: int) -> None:
        places = self._gather()
        start = time.monotonic()
        train = self._fit(server_round, self._select(server_round, places))
        self.weights = self.rule.aggregate(self.weights, [update for update, _ in train.values()])
        self._finish_round(server_round, self._evaluate(server_round), train, start)

    def _finish_round(self, server_round: int, scores: dict, train: dict, start: float) -> None:
        """Write the round down, then say it: what the table shows is safe on disk."""
        if not scores:
            raise RunFailed(f"no client could evaluate the model of round {server_round}")
        self.rounds_done = server_round
        losses = [(loss, update[1]) for update, loss in train.values()]
        row = {
            "round": server_round,
            "accuracy": float(weighted_mean([(accuracy, n) for _, accuracy, n in scores.values()])),
            "loss": float(weighted_mean([(loss, n) for loss, _, n in scores.values()])),
            "train_loss": float(weighted_mean(losses)) if losses else None,
            "clients": len(train) if server_round else len(scores),
            "seconds": round(time.monotonic() - start, 3),
            "bytes_received": sum(array.nbytes for update, _ in train.values() for array in update[0]),
            "accuracy_by_client": {str(p): accuracy for p, (_, accuracy, _) in scores.items()},
        }
        self.history.rounds.append(row)
        self.folder.save_checkpoint(Checkpoint(server_round, self.weights, self.rule.state(), self.history))
        say(report.table_row(row))

    # Who takes part

    def _gather_first(self) -> None:
        wanted = self.terms.clients
        say(f"waiting for {wanted} clients ({len(self.admission.ready())} of {wanted} there)")
        if not self._wait_ready(wanted, self.terms.join_timeout):
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
            self._wait_ready(self.terms.clients, self.terms.rejoin_wait)
        places = self.admission.ready()
        if len(places) < self.terms.min_clients:
            raise RunFailed(
                f"{len(places)} of {self.terms.clients} clients left after round {self.rounds_done}, "
                f"and --min-clients is {self.terms.min_clients}; the checkpoint is kept; start more clients"
            )
        return places

    def _wait_ready(self, number: int, timeout: float) -> bool:
        ready = self.admission.wait_ready(number, timeout, self.stop)
        self._raise_if_stopped()
        return ready

    def _select(self, server_round: int, places: list[Place]) -> list[Place]:
        """Client selection: that fraction of the places, drawn from the seed and the round."""
        number = max(1, round(self.terms.fraction_fit * len(places)))
        rng = np.random.default_rng([self.recipe.seed, server_round])
        return [places[i] for i in sorted(rng.choice(len(places), number, replace=False))]

    # What they are asked

    def _initial_weights(self) -> list[np.ndarray]:
        """The untrained model, from the first client whose answer can be read; all build it from the seed."""
        for place in self.admission.ready():
            for _, answer in self._ask([place], lambda client, t: client.get_parameters(GetParametersIns({}), t, 0)):
                try:
                    return read_weights(answer.parameters)
                except BadUpdate as bad:
                    self._reject(0, place, bad)
        raise RunFailed("no client could send the untrained model; look at what the clients print")

    def _adopt(self, weights: list[np.ndarray]) -> None:
        self.weights = weights
        self.rule = CheckedStrategy(self.terms.strategy, weights, self.admission.statistics, self.terms.max_update_norm)

    def _fit(self, server_round: int, places: list[Place]) -> dict[int, tuple]:
        """Local training everywhere: {partition: (update, training loss)} of the good updates, by partition."""
        parameters = ndarrays_to_parameters(self.weights)
        answers = self._ask(
            places,
            lambda client, t: client.fit(FitIns(parameters, self._words(server_round, client)), t, server_round),
        )
        good = {}
        for place, res in answers:
            try:
                good[place.partition] = check_fit(res, self.weights, place.train_examples), res.metrics["train_loss"]
                place.strikes = 0
            except BadUpdate as bad:
                self._reject(server_round, place, bad)
        return good

    def _evaluate(self, server_round: int) -> dict[int, tuple[float, float, int]]:
        """The global model on everybody's test share: {partition: (loss, accuracy, examples)}."""
        parameters = ndarrays_to_parameters(self.weights)
        answers = self._ask(
            self.admission.ready(),
            lambda client, t: client.evaluate(
                EvaluateIns(parameters, self._words(server_round, client)), t, server_round
            ),
        )
        good = {}
        for place, res in answers:
            try:
                good[place.partition] = check_evaluate(res, place.test_examples)
            except BadUpdate as bad:
                self._reject(server_round, place, bad)
        return good

    def _words(self, server_round: int, client: ClientProxy) -> dict:
        """What goes with the weights: the round, and how many clients share the machine's cores."""
        place = self.admission.place_of(client)
        sharing = sum(other.host == place.host for other in self.admission.ready()) if place else 1
        return {"server_round": server_round, "clients_on_host": max(1, sharing)}

    def _ask(self, places: list[Place], call: Callable[[ClientProxy, float], object]) -> list[tuple[Place, object]]:
        """Ask all at once; answers by partition. Who breaks off or takes too long is dropped, and left out."""
        timeout = self.terms.round_timeout
        deadline = time.monotonic() + timeout
        executor = concurrent.futures.ThreadPoolExecutor(max_workers=max(1, len(places)))
        futures = {executor.submit(call, place.client, timeout + GRACE): place for place in places}
        waiting = set(futures)
        while waiting and time.monotonic() < deadline and not self.stop.is_set():
            _, waiting = concurrent.futures.wait(waiting, timeout=min(0.2, max(0.0, deadline - time.monotonic())))
        executor.shutdown(wait=False, cancel_futures=True)
        self._raise_if_stopped()
        answers = []
        for future, place in futures.items():
            if future in waiting:
                say(f"client {place.partition} did not answer within {timeout:g} s (--round-timeout)")
                self.admission.unregister(place.client)
                close(place.client)
            elif future.exception() is None:
                answers.append((place, future.result()))
            else:
                self.admission.unregister(place.client)
        return answers

    def _reject(self, server_round: int, place: Place, bad: BadUpdate) -> None:
        """Leave an answer out, in public; after three in a row, or a failure of its own, the client goes."""
        place.strikes += 1
        self.history.rejected.append({"round": server_round, "partition": place.partition, "reason": str(bad)})
        say(f"round {server_round}: client {place.partition} left out: {bad}")
        if place.strikes >= STRIKES:
            self.admission.drop(place, f"{STRIKES} bad updates in a row, the last: {bad}")
        elif str(bad).startswith("it says: "):
            self.admission.drop(place, "it failed")

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
        self.stop.set()

    def _raise_if_stopped(self) -> None:
        if self.stop.is_set():
            raise Stopped

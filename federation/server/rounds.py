"""The rounds of federated averaging: first one round, then all that a long run needs around it."""

import contextlib
import json
import signal
import time
from collections.abc import Callable
from typing import TypeVar

from federation import model_file
from federation.aggregation.means import mean_metrics
from federation.aggregation.steps import Step
from federation.aggregation.strategy import CheckedStrategy, MakeStrategy
from federation.aggregation.validation import Update
from federation.compression import TooLarge, as_sent
from federation.console import clean, command_line, say, show_fault
from federation.participants import column_statistics
from federation.participants.client_manager import ClientManager, Participant, different_classes
from federation.participants.provenance import provenance, software
from federation.protocol import BEGINS, as_stored, from_stored, presence
from federation.results.history import MEMBERS, WEIGHT, RoundRecord
from federation.results.observers import Observers
from federation.results.privacy import spent_in_words
from federation.results.run_folder import Checkpoint, Run
from federation.results.tables import Table
from federation.security.audit import FILE, AuditLog, privacy_of, utc_now
from federation.server.acceptance import Acceptance, Evaluation, without_culprit
from federation.server.dispatch import Dispatcher, RoundLost, RunFailed, Stopped
from federation.server.records import by_partition, received, shares, spent
from federation.server.secure_rounds import secure_statistics, secure_updates
from federation.server.settings import ServerSettings

import numpy as np
from flwr.server import History as FlowerHistory
from flwr.server import Server

MAX_ATTEMPTS = 5  # at one round, where all clients are lost in it
Result = TypeVar("Result")


def federated_round(
    number: int, weights: list[np.ndarray], dispatcher: Dispatcher, acceptance: Acceptance, strategy: CheckedStrategy
) -> tuple[list[np.ndarray], RoundRecord]:
    """One server round: returns the next global weights, and what is known of them.

    Algorithm 1 of McMahan et al. 2017 (arXiv:1602.05629), with any of Flower's strategies for the mean.
    Raises RoundLost, and the round can be done again, where all clients are lost in the same moment.
    """
    selected = dispatcher.select(number)
    began, state = time.monotonic(), strategy.state()
    updates, steps = trained(number, weights, selected, dispatcher, acceptance)
    averaged = strategy.aggregate(weights, updates)
    statistics = measured(number, averaged, dispatcher, acceptance) if updates else []
    new_weights = strategy.with_statistics(averaged, acceptance.clients.batchnorm, statistics)
    evaluation = acceptance.evaluation(dispatcher.evaluate(number, new_weights))
    if evaluation.model_is_bad and statistics:
        say(f"round {number}: most clients can't evaluate the model with the BatchNorm statistics that they measured")
        new_weights, evaluation = averaged, acceptance.evaluation(dispatcher.evaluate(number, averaged))
    if evaluation.model_is_bad and updates:
        strategy.restore(state, weights)
        new_weights, updates, evaluation = without_culprit(
            number, weights, updates, steps, dispatcher, acceptance, strategy
        )
    acceptance.counted(updates)
    record = record_of(number, evaluation, acceptance)
    record.train_metrics, record.clients = mean_metrics(updates), sum(len(update.clients) for update in updates)
    record.bytes_received = sum(received(update, strategy.compress) for update in [*updates, *statistics])
    record.by_client |= {**by_partition(steps), WEIGHT: shares(updates)}
    record.seconds = round(time.monotonic() - began, 3)
    return new_weights, record


def trained(
    number: int, weights: list[np.ndarray], selected: list[Participant], dispatcher: Dispatcher, acceptance: Acceptance
) -> tuple[list[Update], dict[int, Step]]:
    """The updates that count, and steps by partition; with secure aggregation the sum of all stands for one."""
    if dispatcher.recipe.secure_aggregation:
        updates = secure_updates(number, weights, selected, dispatcher, acceptance)
        return updates, acceptance.steps(weights, updates)
    return acceptance.updates(number, weights, dispatcher.fit(number, weights, selected))


def measured(number: int, averaged: list[np.ndarray], dispatcher: Dispatcher, acceptance: Acceptance) -> list[Update]:
    """BatchNorm's statistics on the averaged model; none where it has none."""
    if dispatcher.recipe.secure_aggregation:
        return secure_statistics(number, averaged, dispatcher, acceptance)
    return acceptance.statistics(number, averaged, dispatcher.measure(number, averaged))


def record_of(number: int, evaluation: Evaluation, acceptance: Acceptance) -> RoundRecord:
    """The record of a model that all clients evaluated. Round 0 is only evaluated: its record has nothing more."""
    acceptance.leave_out_failed(number, evaluation)
    if not evaluation.scores:
        raise RunFailed(f"no client could evaluate the model of round {number}; look at what the clients print")
    main, metrics = acceptance.main_metric, mean_metrics(evaluation.scores)
    record = RoundRecord(number, metrics, clients=len(evaluation.scores), main_metric=main)
    record.by_client = {
        main: {str(score.partition): score.metrics[main] for score in evaluation.scores if main in score.metrics}
    }
    if acceptance.clients.recipe.private_training:
        record.by_client |= spent(evaluation.scores)
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
        self.run, self.folder, self.history = run, run.folder, run.history
        clients.initial, clients.run_id = run.initial, run.id
        clients.audit = self.audit = AuditLog(
            run.folder.path / FILE, run.id, privacy=privacy_of(self.recipe), identity=clients.identity
        )
        earlier = [each for each in self.history.config.get("software", []) if each != software()]
        self.history.config["software"] = [*earlier, software()]  # a resumed run may have had another version
        self.observers = observers or Observers([])
        self.dispatcher = Dispatcher(clients, settings, self.unit)
        self.dispatcher.folder = self.folder.path
        self.acceptance = Acceptance(clients, settings, self.history, self.unit)
        self.table = Table(self.history)
        self.signal_number = 0
        self.exit_code = 1
        self.weights: list[np.ndarray] = []
        self.rounds_done = -1  # 0 once the untrained model is evaluated
        if run.checkpoint:
            clients.begin(self.history.config["classes"], from_stored(self.history.config))
            clients.statistics = self.history.config.get("columns", {})
            clients.know_members(self.history.config.get(MEMBERS, {}))

    # Called by flwr.server.start_server

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[FlowerHistory, float]:
        """Run the whole federation in this process, which Ctrl-C and SIGTERM then stop cleanly."""
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
            self._close("finished", f"the run is done after {self.rounds_done} {self.unit}s")
        except Stopped:
            self.exit_code = 128 + self.signal_number
            name = signal.Signals(self.signal_number).name
            words = f"stopped by {name} after {self.unit} {max(0, self.rounds_done)}"
            say(f"{words}; go on with: {self._resume()}" if self.history.rounds else words)
            self._close("stopped", f"the server was {words}", seconds=2)
        except (RunFailed, OSError) as error:
            words = str(error)
            if isinstance(error, OSError):
                words = (
                    f"the run folder {self.folder.path} can't be written ({error.strerror}); free or change the disk"
                )
            resumable = self.history.rounds and (not isinstance(error, RunFailed) or error.resumable)
            say(f"error: {words}" + (f"; then go on with: {self._resume()}" if resumable else ""))
            self._close("failed", words)
        except TooLarge as error:
            words = f"the new model can't be sent: {error}; begin a new run without it"
            say(f"error: {words}")
            self._close("failed", words)
        except Exception as error:  # a fault of ours: show all of it, but let nobody wait for us
            show_fault(error)
            self._close("failed", f"the server failed ({type(error).__name__})")
        self.dispatcher.close()
        self.observers.end(self.exit_code)

    def _close(self, kind: str, words: str, seconds: float = 3.0) -> None:
        """Tell the clients, and close the record, as far as the disk takes it: why the run ends was said before."""
        with contextlib.suppress(OSError):
            self.clients.farewell |= self.audit.told()
        self.clients.close(kind, words, seconds)
        with contextlib.suppress(OSError):
            self.audit.write("end", outcome=kind)
            self.audit.sync()
        self.audit.close()

    def _resume(self) -> str:
        return command_line("python", "server.py", "--resume", self.folder.path)

    def _run(self) -> None:
        self.audit.sync()
        self._gather_first()
        counts = {str(one.partition): one.class_counts for one in self.clients.ready() if one.class_counts}
        assert self.clients.agreed  # by all who are there
        self.history.config.update(classes=self.clients.classes, class_counts=counts, **as_stored(self.clients.agreed))
        say(f"{BEGINS}: {self.clients.task.describe()}" if self.clients.task else BEGINS)
        if self.clients.task and self.clients.task.columns and not self.clients.statistics:
            self._agree_on_columns(self.clients.task.columns)
        self.observers.begin(self.history)
        self._set_out()
        self._work()
        if not any(record.clients for record in self.history.rounds[1:]):
            what = "no update of any client counted, so the model is the untrained one; the lines above say why"
            raise RunFailed(f"{what}; begin a new run", resumable=False)
        if self.recipe.secure_aggregation:
            summed = [record.clients for record in self.history.rounds[1:] if record.clients]
            number = f"{min(summed)} to {max(summed)}" if min(summed) < max(summed) else f"{max(summed)}"
            say(f"secure aggregation: in {len(summed)} rounds the sum of {number} updates; no single one")
        if self.recipe.private_training:
            say(spent_in_words(self.history))
        self._save_model()

    def _set_out(self) -> None:
        """With the untrained model, or where the checkpoint left off; nothing may keep that model to the end."""
        checkpoint, self.run.checkpoint = self.run.checkpoint, None
        if checkpoint is None:
            weights = self._initial_weights()
            self.history.config["initial_weights"] = self.dispatcher.exchange.hash_of(weights)
            self._begin(weights)
        else:
            self.rounds_done = checkpoint.server_round
            self._continue_from(checkpoint)

    def _agree_on_columns(self, columns: list[str]) -> None:
        """Mean and spread of each column over all clients, for a task that scales its data by them."""
        statistics = column_statistics.agree(self.dispatcher.ask, self.clients.drop, columns)
        if statistics is None:
            raise RunFailed("no client could tell of its columns; look at what the clients print")
        self.clients.statistics = self.history.config["columns"] = statistics
        for participant, answer in self.dispatcher.ask({"ask": "columns", "statistics": json.dumps(statistics)}):
            if "error" in answer:  # it would train on numbers of another scale than the others'
                self.clients.drop(participant, clean(answer["error"]))
        say(f"the clients scale {len(statistics)} of {len(columns)} columns alike")

    def _initial_weights(self) -> list[np.ndarray]:
        """Of --initial-weights, or of the first client; frozen arrays are kept for the final model."""
        task, given = self.clients.task, self.clients.initial
        if task and task.frozen:
            own = {name: given[name] for name, *_ in task.frozen_arrays} if given else {}
            self.folder.save_frozen(own or self.dispatcher.frozen_weights(task))
        if given and task:
            return as_sent([given[name] for name, *_ in task.arrays], self.recipe.compress)
        return self.dispatcher.initial_weights()

    def _save_model(self) -> None:
        task, schema = self.clients.task, {"classes": self.clients.classes}
        names = [name for name, *_ in task.arrays] if task else [f"w{i:05d}" for i in range(len(self.weights))]
        frozen = self.folder.load_frozen() if task and task.frozen else {}
        schema |= task.schema if task else {}
        about = model_file.about(task.name, task.recipe, schema, self.clients.statistics) if task else {}
        arrays = {**frozen, **dict(zip(names, self.weights, strict=True))}
        took_part = [(record.round, record.by_client.get(WEIGHT, {})) for record in self.history.rounds[1:]]
        origin = provenance(self.clients, self.history.config, took_part, arrays, self.audit)
        self.history.config["provenance"] = origin
        self.folder.save_model(arrays, {**about, "provenance": origin})
        self.folder.save_history(self.history)
        self.clients.farewell["provenance"] = json.dumps(origin)

    def _gather_first(self) -> None:
        """Wait until all clients are there, with classes that fit together."""
        wanted, timeout = self.settings.clients, self.settings.join_timeout
        deadline = time.monotonic() + timeout
        say(f"waiting for {wanted} clients {presence(len(self.clients.ready()), wanted)}")
        while True:
            if not self.dispatcher.wait_ready(wanted, max(0.0, deadline - time.monotonic())):
                there = len(self.clients.ready())
                raise RunFailed(
                    f"{there} of {wanted} clients came within {timeout:g} s; start more, or raise --join-timeout"
                )
            others = self.clients.agree_on_classes()
            different = [] if others else self.clients.agree()  # what depends on the classes waits for them
            for one, words in different:
                say(f"{one.title} left out: it {words}")
                self.clients.drop(one, f"it {words}")
            for one in others:
                if self.clients.local:
                    lacking = clean(", ".join(sorted(set(self.clients.classes) - set(one.classes))))
                    say(f"{one.title} has no {lacking}, which others have; it is told all classes")
                    self.clients.reassign(one)
                else:
                    self.clients.drop(one, different_classes(one.classes, self.clients.classes))
            if not others and not different:
                break
        if len(self.clients.classes) == 1:
            raise RunFailed("the clients have 1 class; a classifier needs two at least")

    def _begin(self, weights: list[np.ndarray]) -> None:
        self._set_global_weights(weights)
        began = time.monotonic()
        evaluation = self.acceptance.evaluation(self._with_retries(lambda: self.dispatcher.evaluate(0, weights)))
        record = record_of(0, evaluation, self.acceptance)
        record.seconds = round(time.monotonic() - began, 3)
        self._finish_round(record)

    def _with_retries(self, work: Callable[[], Result]) -> Result:
        """Run work(). If all clients are lost during it, wait for them and try again."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return work()
            except RoundLost:
                if attempt == MAX_ATTEMPTS:
                    break
                wait = self.settings.rejoin_wait
                what = f"{self.unit} {self.rounds_done + 1}: all its clients were lost; it is done again"
                say(f"{what} once they are back (--rejoin-wait {wait:g} s)")
                self.dispatcher.wait_ready(self.settings.clients, wait)
                if not self.clients.ready():
                    raise self.dispatcher.too_few(0, self.rounds_done) from None
        raise RunFailed(f"{self.unit} {self.rounds_done + 1} lost all its clients {MAX_ATTEMPTS} times")

    def _continue_from(self, checkpoint: Checkpoint) -> None:
        self._set_global_weights(checkpoint.weights)
        self.aggregator.restore(checkpoint.strategy_state, self.weights)
        for record in self.history.rounds:
            self._say(record)

    def _set_global_weights(self, weights: list[np.ndarray]) -> None:
        self.weights = weights
        positions, compress = self.clients.buffer_positions, self.recipe.compress
        self.aggregator = CheckedStrategy(self.make_strategy, self.settings, weights, positions, compress)

    def _work(self) -> None:
        while self.rounds_done < self.recipe.rounds and not self._target_reached():
            self.weights, record = self._with_retries(self._round)
            self._finish_round(record)

    def _round(self) -> tuple[list[np.ndarray], RoundRecord]:
        number, state = self.rounds_done + 1, self.aggregator.state()
        try:
            return federated_round(number, self.weights, self.dispatcher, self.acceptance, self.aggregator)
        except RoundLost:
            self.aggregator.restore(state, self.weights)
            raise

    def _finish_round(self, record: RoundRecord) -> None:
        """Write the round down, then say it: what the table shows is safe on disk."""
        self.rounds_done = record.round
        record.utc, record.weights_sha256 = utc_now(), self.dispatcher.exchange.made(record.round, self.weights)
        self.history.rounds.append(record)
        if self.clients.places:
            self.history.config[MEMBERS] = self.clients.known_members()
        self.folder.save_checkpoint(Checkpoint(record.round, self.weights, self.aggregator.state(), self.history))
        self._say(record)
        self.observers.round(record)

    def _say(self, record: RoundRecord) -> None:
        say("\n".join(self.table.lines(record)))

    # When to end

    def _target_reached(self) -> bool:
        if self.rounds_done < 1 or not self._at_target(self.history.rounds[-1].main()):
            return False
        say(f"{self.target_words()} reached after round {self.rounds_done} (--target)")
        return True

    def _at_target(self, value: float | None) -> bool:
        target = self.settings.target
        if target is None or value is None:
            return False
        return value >= target if self.history.main.higher_is_better else value <= target

    def target_words(self) -> str:
        return f"{self.history.main.name} {self.settings.target:g}"

    def _on_signal(self, number: int, frame: object) -> None:
        """Only sets a flag, which every wait looks at five times a second: a checkpoint is never cut short."""
        self.signal_number = number
        self.dispatcher.stop.set()

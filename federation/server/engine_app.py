"""The server's side on Flower's engines: nodes in the place of streams, around the same rounds."""

import argparse
import contextlib
import io
import threading
import time
from collections.abc import Callable
from typing import Protocol

from federation.aggregation.strategy import STRATEGIES
from federation.config import Recipe
from federation.console import clean, say
from federation.participants.client_manager import ClientManager, Participant, Refused, different_classes
from federation.protocol import presence, read_hello, read_summary
from federation.results.observers import Observers
from federation.results.report import finish
from federation.results.run_folder import Run, open_run, recorder
from federation.server.async_server import SERVERS
from federation.server.dispatch import RunFailed
from federation.server.options import describe, parse_args

from flwr.app import Context
from flwr.common import GetPropertiesIns
from flwr.server import History as FlowerHistory
from flwr.server import Server, ServerApp, ServerAppComponents, ServerConfig
from flwr.server.client_proxy import ClientProxy

FOR_NODES = ("dataset", "data-dir", "device", "threads")  # keys of the run config that are no flags of server.py
RETRY_SECONDS = 10.0  # until a node that could not answer is asked again
MANY = 1_000_000


class Monitoring(Protocol):
    """Who looks at a run: see federation/operations/monitoring.py, which this side may not import."""

    def observe(self, run: Run) -> Observers: ...


OpenMonitoring = Callable[[argparse.Namespace], Monitoring]


class NodeAdmission(ClientManager):
    """Admits nodes of Flower's engines: the engine decides who joins, node config names the partition."""

    def __init__(self, recipe: Recipe, events: list[dict], load_timeout: float) -> None:
        super().__init__(0, recipe, recorder(events))  # the first node knows how many there are
        self.load_timeout = load_timeout
        self._gone: set[str] = set()  # nodes that Flower has taken off its list
        self._end = threading.Event()

    def register(self, client: ClientProxy) -> bool:
        """Called by Flower for every node."""
        self._gone.discard(client.cid)
        self._invite(client)
        return True

    def unregister(self, client: ClientProxy) -> None:
        self._gone.add(client.cid)
        super().unregister(client)

    def lose(self, client: ClientProxy) -> None:
        """Give up a node that does not answer, until it does again."""
        super().unregister(client)
        self._invite(client)

    def reassign(self, participant: Participant) -> None:
        self.drop(participant, different_classes(participant.classes, self.classes))

    def drop(self, participant: Participant, words: str) -> None:
        """Leave a node out for good. It lives on, and is only never asked again."""
        super().unregister(participant.client)
        number = participant.partition
        self.notify("refuse", number, f"client {number} is no longer asked: {words}")

    def close(self, kind: str, words: str, seconds: float = 3.0) -> None:
        """Nobody has to be told: the engine ends the run for its nodes."""
        self.closed = True
        self._end.set()

    def _invite(self, client: ClientProxy) -> None:
        threading.Thread(target=self._admit, args=(client,), daemon=True).start()

    def _admit(self, client: ClientProxy) -> None:
        """Ask a node what it holds, again and again while it does not answer."""
        said = ""
        while not self._end.is_set() and client.cid not in self._gone:
            try:
                answer = client.get_properties(
                    GetPropertiesIns({"salt": self.salt}), self.load_timeout, None
                ).properties
                self._take_in(client, answer)
                return
            except Refused as refusal:
                super().unregister(client)
                self.notify("refuse", None, f"turned away: {refusal}")
                return
            except Exception as error:  # what broke on the node's side, or its time is over: Flower's ValueError
                words = f"a node can't answer yet ({clean(error)}); asking again every {RETRY_SECONDS:g} s"
                if words != said and not self._end.is_set():
                    said = words
                    say(words)
            self._end.wait(RETRY_SECONDS)

    def _take_in(self, client: ClientProxy, answer: dict) -> None:
        """Make the node a participant. Raises Refused."""
        if "error" in answer:
            raise Refused("error", f"a node could not start: {clean(answer['error'])}")
        hello, number = read_hello(answer), answer["num_partitions"]
        with self.changed:
            self.num_partitions = self.num_partitions or number
            if number != self.num_partitions:
                words = f"a node's num-partitions is {number}, the others' {self.num_partitions}; give all the same"
                raise Refused("partitions", words)
            if not 0 <= hello.wanted < number:
                raise Refused("partition", f"a node's partition-id {hello.wanted} is not within 0 and {number - 1}")
            if hello.wanted in self.participants:
                raise Refused("partition", f"two nodes have partition-id {hello.wanted}; give each its own")
            self.check_classes(hello.classes)
            participant = Participant(hello.wanted, client, hello.instance, hello.host, hello.classes)
            self.participants[hello.wanted] = participant
        there = self.settle(participant, read_summary(answer), f"client {participant.partition}")
        words = f"client {participant.partition} joined, {participant.train_examples:,} training examples"
        self.notify("join", participant.partition, f"{words} {presence(there, self.num_partitions)}")


class EngineServer(Server):
    """What a ServerApp runs: the rounds of the scripts, once the first node has told how many there are."""

    def __init__(self, run_config: dict, open_monitoring: OpenMonitoring) -> None:
        self.run_config, self.open_monitoring = run_config, open_monitoring
        # Read twice: wrong use must show at once, and how many clients there are is not known yet.
        args = read_run_config(run_config, clients=MANY)
        self.events: list[dict] = []
        self.join_timeout = args.settings.join_timeout
        self.clients = NodeAdmission(args.recipe, self.events, args.settings.round_timeout)
        super().__init__(client_manager=self.clients)

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[FlowerHistory, float]:
        """Run the federation. Raises RunFailed where it fails, so that the engine knows."""
        if not self.clients.wait_ready(1, self.join_timeout, threading.Event()):
            raise RunFailed(f"no node came within {self.join_timeout:g} s")
        args = read_run_config(self.run_config, clients=self.clients.num_partitions)
        try:
            monitoring = self.open_monitoring(args)
            run = open_run(args)
        except SystemExit:  # which would end the engine's process before it has told anybody
            raise RunFailed("the run can't begin; the line above says why") from None
        run.history.events = self.events
        say(f"server on a Flower engine: {describe(args)}; results in {run.folder.path.absolute()}")
        strategy = STRATEGIES[args.settings.strategy]
        server = SERVERS[args.settings.mode](self.clients, strategy, args.settings, run, monitoring.observe(run))
        began = time.monotonic()
        server.federate()
        if server.exit_code:
            raise RunFailed(f"the run ended with exit code {server.exit_code}; its last lines say why")
        finish(run.folder)
        return FlowerHistory(), time.monotonic() - began

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Nothing to do: the engine ends the run for its nodes."""


def read_run_config(run_config: dict, clients: int) -> argparse.Namespace:
    """The run config as server.py's own flags, with all of their checks; "" leaves one at its default.

    Returns what options.parse_args does. Raises ValueError with its one line on wrong use.
    """
    flags = {key: value for key, value in run_config.items() if key not in FOR_NODES and value != ""}
    own = str(flags.pop("set", "")).split()  # of several, as a run config has no lists
    argv = [f"--{key}={value}" for key, value in flags.items()] + [f"--set={pair}" for pair in own]
    argv.append(f"--clients={clients}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse_args("run config", argv)
    except SystemExit:
        words = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ValueError(f"run config: {words}") from None
    if args.recipe.secure_aggregation:
        why = "Flower's engines make a client anew for each message, and it would forget what it masked"
        raise ValueError(f"run config: secure-aggregation can't be had here: {why}; use server.py and client.py")
    if args.recipe.private_training:
        why = "nodes have no flags for an epsilon and a ledger of their own"
        raise ValueError(f"run config: private-training can't be had here: {why}; use server.py and client.py")
    return args


def make_app(open_monitoring: OpenMonitoring) -> ServerApp:
    """The server for `flwr run`. Where the run config can't be used, the app raises ValueError."""

    def components(context: Context) -> ServerAppComponents:
        server = EngineServer(context.run_config, open_monitoring)
        return ServerAppComponents(server=server, config=ServerConfig(num_rounds=server.clients.recipe.rounds))

    return ServerApp(server_fn=components)

"""The server's side on Flower's engines: nodes in the place of streams, around the same places and the same loop."""

import argparse
import contextlib
import io
import threading
import time

from federation.claims import read_claim, read_holdings
from federation.options import parse_args
from federation.places import Place, Places, Refused
from federation.recipe import Recipe
from federation.rounds import RunFailed
from federation.run import finish, loop_of, open_run, recorder, task_of
from federation.words import clean, say

from flwr.app import Context
from flwr.common import GetPropertiesIns
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.client_proxy import ClientProxy
from flwr.server.history import History as FlowerHistory
from flwr.server.server import Server

FOR_NODES = ("dataset", "data-dir")  # keys of the run config that are no flags of server.py
RETRY_SECONDS = 10.0  # until a node that could not answer is asked again
MANY = 1_000_000


class NodeAdmission(Places):
    """The door for nodes of Flower's engines: the engine decides who joins, node config names the partition."""

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

    def drop(self, place: Place, words: str) -> None:
        """Leave a node out for good. It lives on, and is only never asked again."""
        super().unregister(place.client)
        self.notify("refuse", place.partition, f"client {place.partition} is no longer asked: {words}")

    def close(self, kind: str, words: str, seconds: float = 3.0) -> None:
        """Nobody has to be told: the engine ends the run for its nodes."""
        self.closed = True
        self._end.set()

    def _invite(self, client: ClientProxy) -> None:
        threading.Thread(target=self._seat, args=(client,), daemon=True).start()

    def _seat(self, client: ClientProxy) -> None:
        """Ask a node what it holds, again and again while it does not answer."""
        said = ""
        while not self._end.is_set() and client.cid not in self._gone:
            try:
                answer = client.get_properties(GetPropertiesIns({}), self.load_timeout, None).properties
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
        """Give the node its place. Raises Refused."""
        if "error" in answer:
            raise Refused("error", f"a node could not start: {clean(answer['error'])}")
        claim, number = read_claim(answer), answer["num_partitions"]
        with self.changed:
            self.num_places = self.num_places or number
            if number != self.num_places:
                words = f"a node's num-partitions is {number}, the others' {self.num_places}; give all the same"
                raise Refused("partitions", words)
            if not 0 <= claim.wanted < number:
                raise Refused("partition", f"a node's partition-id {claim.wanted} is not within 0 and {number - 1}")
            if claim.wanted in self.places:
                raise Refused("partition", f"two nodes have partition-id {claim.wanted}; give each its own")
            self.same_classes(claim.classes)
            place = Place(claim.wanted, client, claim.instance, claim.host)
            self.places[claim.wanted] = place
        there = self.settle(place, read_holdings(answer), f"client {place.partition}")
        words = f"client {place.partition} joined, {place.train_examples:,} training images"
        self.notify("join", place.partition, f"{words} ({there} of {self.num_places} there)")


class EngineServer(Server):
    """What a ServerApp runs: the loop of the scripts, once the first node has told how many there are."""

    def __init__(self, run_config: dict) -> None:
        self.run_config = run_config
        # Read twice: wrong use must show at once, and how many clients there are is not known yet.
        args = read_run_config(run_config, clients=MANY)
        self.events: list[dict] = []
        self.join_timeout = args.terms.join_timeout
        self.places = NodeAdmission(args.recipe, self.events, args.terms.round_timeout)
        super().__init__(client_manager=self.places)

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[FlowerHistory, float]:
        """Run the federation. Raises RunFailed where it fails, so that the engine knows."""
        if not self.places.wait_ready(1, self.join_timeout, threading.Event()):
            raise RunFailed(f"no node came within {self.join_timeout:g} s")
        args = read_run_config(self.run_config, clients=self.places.num_places)
        try:
            folder, history, checkpoint = open_run(args)
        except SystemExit:  # which would end the engine's process before it has told anybody
            raise RunFailed("the run folder can't be used; the line above says why") from None
        history.events = self.events
        say(f"server on a Flower engine: {task_of(args)}; results in {folder.path.absolute()}")
        loop = loop_of(args)(self.places, args.terms, folder, history, checkpoint)
        began = time.monotonic()
        loop.federate()
        if loop.exit_code:
            raise RunFailed(f"the run ended with exit code {loop.exit_code}; its last lines say why")
        finish(folder)
        return FlowerHistory(), time.monotonic() - began

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Nothing to do: the engine ends the run for its nodes."""


def read_run_config(run_config: dict, clients: int) -> argparse.Namespace:
    """The run config as server.py's own flags, with all of their checks; "" leaves one at its default.

    Returns what options.parse_args does. Raises ValueError with its one line on wrong use.
    """
    flags = {key: value for key, value in run_config.items() if key not in FOR_NODES and value != ""}
    argv = [f"--{key}={value}" for key, value in flags.items()] + [f"--clients={clients}"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_args("run config", argv)
    except SystemExit:
        words = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ValueError(f"run config: {words}") from None


def components(context: Context) -> ServerAppComponents:
    """What a ServerApp's server_fn returns. Raises ValueError on wrong use."""
    server = EngineServer(context.run_config)
    return ServerAppComponents(server=server, config=ServerConfig(num_rounds=server.places.recipe.rounds))

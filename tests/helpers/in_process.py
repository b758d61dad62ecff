"""A whole federation in this process: no sockets, no other processes; clients are objects that answer at once, or
after as many seconds as they say of a clock that only we turn."""

import concurrent.futures
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from federation.aggregation.strategy import STRATEGIES
from federation.config import Recipe
from federation.participants.client_manager import ClientManager, Participant
from federation.protocol import DataSummary
from federation.results.history import History
from federation.results.run_folder import Run, RunFolder, recorder
from federation.server.async_server import SERVERS
from federation.server.dispatch import Request
from federation.server.rounds import FederatedServer
from federation.server.settings import ServerSettings

import numpy as np
import pytest
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    GetParametersRes,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_proxy import ClientProxy

OK = Status(Code.OK, "")
START = [np.zeros(2, np.float32), np.ones(1, np.float32), np.array(0)]  # weights, a variance, a counter
BUFFERS = [1, 2]
SUMMARY = DataSummary(1000, 1000, BUFFERS, [], [], 0)  # of each client's data


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """Files are written, but nobody waits for the disk; for the test files that import this."""
    monkeypatch.setattr("os.fsync", lambda number: None)


class Learner:
    """Adds `step` to the weights in each training; `bad` says by round what its update, or its scores, become.

    seconds: that a training takes, where the clock is ours.
    """

    def __init__(self, step: float = 1.0, examples: int = 10, *, seconds: float = 1.0, **bad: Callable):
        self.step, self.examples, self.seconds = step, examples, seconds
        self.bad_fit, self.bad_evaluate = bad.get("fit"), bad.get("evaluate")
        self.fitted: list[int] = []
        self.evaluated: list[int] = []
        self.asked: list[dict] = []  # what came with each training

    def fit(self, weights: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        number = config["server_round"]
        self.fitted.append(number)
        self.asked.append(config)
        new = [weights[0] + np.float32(self.step), weights[1] * np.float32(0.5), weights[2] + 1]
        answer = new, self.examples, {"train_loss": 1.0 / number}
        return self.bad_fit(number, *answer) if self.bad_fit else answer

    def evaluate(self, weights: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        number = config["server_round"]
        self.evaluated.append(number)
        loss = float("nan") if (weights[1] < 0).any() or abs(weights[0]).max() > 1e4 else 1.0
        answer = loss, self.examples, {"accuracy": float(weights[0][0]), "f1": float(self.examples)}
        return self.bad_evaluate(number, *answer) if self.bad_evaluate else answer


class Proxy(ClientProxy):
    def __init__(self, learner: Learner):
        super().__init__(f"{id(learner)}")
        self.learner = learner

    def get_properties(self, ins, timeout, group_id):
        raise NotImplementedError

    def get_parameters(self, ins, timeout, group_id):
        return GetParametersRes(OK, ndarrays_to_parameters(START))

    def fit(self, ins, timeout, group_id):
        weights, examples, metrics = self.learner.fit(parameters_to_ndarrays(ins.parameters), ins.config)
        return FitRes(OK, ndarrays_to_parameters(weights), examples, metrics)

    def evaluate(self, ins, timeout, group_id):
        loss, examples, metrics = self.learner.evaluate(parameters_to_ndarrays(ins.parameters), ins.config)
        return EvaluateRes(OK, loss, examples, metrics)

    def reconnect(self, ins, timeout, group_id):
        raise NotImplementedError


class Clients(ClientManager):
    """All are there from the start; who is lost comes back at once, or never."""

    def __init__(self, learners: list[Learner], recipe: Recipe, events: list[dict], back: bool = False):
        super().__init__(len(learners), recipe, recorder(events))
        self.back = back
        self.dropped: dict[int, str] = {}
        self.told: tuple[str, str] = ("", "")
        for partition, learner in enumerate(learners):
            self.join(partition, learner)

    def join(self, partition: int, learner: Learner) -> None:
        one = Participant(partition, Proxy(learner), f"{partition}", "here", ["cat", "dog"], False, 1000, 1000, [])
        one.summary, one.ready = SUMMARY, True
        with self.changed:
            self.participants[partition] = one
            self.agreed = self.agreed or SUMMARY
            self.changed.notify_all()

    def register(self, client):
        raise NotImplementedError

    def lose(self, client):
        one = self.of_client(client)
        self.unregister(client)
        if one and self.back:
            self.join(one.partition, client.learner)

    def drop(self, participant, words):
        self.dropped[participant.partition] = words
        self.unregister(participant.client)

    def reassign(self, participant):
        self.drop(participant, "other classes")

    def close(self, kind, words, seconds=3.0):
        self.closed, self.told = True, (kind, words)


def federation(
    folder: Path, learners: list[Learner], *, back: bool = False, resume: bool = False, **values: object
) -> FederatedServer:
    """A server that is ready to federate(); values are those of the recipe or of the server's settings."""
    usual = {"rounds": 3, "clients": len(learners), "rejoin_wait": 0.0, "join_timeout": 0.2, "round_timeout": 5.0}
    values = {**usual, **values}
    recipe = Recipe(**{name: value for name, value in values.items() if name in Recipe.names()})
    settings = ServerSettings(**{name: value for name, value in values.items() if name in ServerSettings.names()})
    run_folder = RunFolder(folder / "run")
    if resume:
        checkpoint = run_folder.load_checkpoint()
        run = Run(run_folder, checkpoint.history, checkpoint)
    else:
        run_folder.create()
        run = Run(run_folder, History({**vars(recipe), **vars(settings)}))
    clients = Clients(learners, recipe, run.history.events, back)
    return SERVERS[settings.mode](clients, STRATEGIES[settings.strategy], settings, run, values.get("observers"))


def lost(*_: object) -> None:
    """As `bad`: the connection breaks."""
    raise ConnectionError


class Clock:
    """Turns only when a server waits, and then to what comes next. A client is asked at once, and its answer comes
    when its seconds are over; an evaluation takes none."""

    def __init__(self, server: FederatedServer, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        self.plan: list[tuple[float, int, Callable[[], object]]] = []  # when, in which order, what
        self.count = 0
        for module in ("async_server", "dispatch"):
            monkeypatch.setattr(f"federation.server.{module}.time", SimpleNamespace(monotonic=lambda: self.now))
        self.dispatcher = server.dispatcher
        self.is_over = self.dispatcher.wait
        monkeypatch.setattr(self.dispatcher, "_start", self.start)
        monkeypatch.setattr(self.dispatcher, "wait", self.wait)
        monkeypatch.setattr(self.dispatcher.stop, "wait", self.turn)

    def at(self, when: float, do: Callable[[], object]) -> None:
        self.count += 1
        self.plan.append((when, self.count, do))

    def turn(self, seconds: float) -> None:
        """To the next thing that happens, but not further than this; as every clock, a little even for no wait."""
        self.now = min([self.now + max(seconds, 0.001), *(when for when, _, _ in self.plan)])
        due, self.plan = [each for each in self.plan if each[0] <= self.now], [e for e in self.plan if e[0] > self.now]
        for _, _, do in sorted(due):
            do()

    def start(self, participant: Participant, call: Callable) -> Request:
        future, learner = concurrent.futures.Future(), participant.client.learner
        trained = len(learner.fitted)
        try:
            answer = call(participant.client, 0.0)
            end = lambda: future.set_result(answer)  # noqa: E731
        except ConnectionError as error:
            broken = error
            end = lambda: future.set_exception(broken)  # noqa: E731
        seconds = learner.seconds if len(learner.fitted) > trained else 0.0
        self.at(self.now + seconds, end)
        return Request(participant, future, self.now)

    def wait(self, requests: list[Request], timeout: float = 0.2, until: str = "") -> list[Request]:
        self.turn(timeout)
        return self.is_over(requests, 0)

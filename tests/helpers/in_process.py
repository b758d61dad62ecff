"""A whole federation in this process: no sockets, no other processes; clients are objects that answer at once."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from federation.aggregation.strategy import STRATEGIES
from federation.config import Recipe
from federation.results.history import History
from federation.results.run_folder import Run, RunFolder, recorder
from federation.server.async_server import SERVERS
from federation.server.client_manager import ClientManager, Participant
from federation.server.rounds import FederatedServer
from federation.server.settings import ServerSettings

import numpy as np
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


class Learner:
    """Adds `step` to the weights in each training; `bad` says by round what its update, or its scores, become."""

    def __init__(self, step: float = 1.0, examples: int = 10, **bad: Callable):
        self.step, self.examples = step, examples
        self.bad_fit, self.bad_evaluate = bad.get("fit"), bad.get("evaluate")
        self.fitted: list[int] = []
        self.evaluated: list[int] = []

    def fit(self, weights: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        number = config["server_round"]
        self.fitted.append(number)
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
    """All are there from the start; who is lost comes back after `back` seconds, or never."""

    def __init__(self, learners: list[Learner], recipe: Recipe, events: list[dict], back: float | None = None):
        super().__init__(len(learners), recipe, recorder(events))
        self.back = back
        self.dropped: dict[int, str] = {}
        self.told: tuple[str, str] = ("", "")
        for partition, learner in enumerate(learners):
            self._join(partition, learner)

    def _join(self, partition: int, learner: Learner) -> None:
        one = Participant(partition, Proxy(learner), f"{partition}", "here", ["cat", "dog"], False, 1000, 1000, [])
        one.ready = True
        with self.changed:
            self.participants[partition] = one
            self.buffer_positions = BUFFERS
            self.changed.notify_all()

    def register(self, client):
        raise NotImplementedError

    def lose(self, client):
        one = self.of_client(client)
        self.unregister(client)
        if one and self.back is not None:
            threading.Timer(self.back, self._join, (one.partition, client.learner)).start()

    def drop(self, participant, words):
        self.dropped[participant.partition] = words
        self.unregister(participant.client)

    def reassign(self, participant):
        self.drop(participant, "other classes")

    def close(self, kind, words, seconds=3.0):
        self.closed, self.told = True, (kind, words)


def federation(
    folder: Path, learners: list[Learner], *, back: float | None = None, resume: bool = False, **values: object
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


def slow(seconds: float) -> Callable:
    """As `bad`: the answer takes so long."""

    def answer(number: int, *usual: object) -> tuple:
        time.sleep(seconds)
        return usual

    return answer

"""Asks the participants, one by one or all at once, and waits for their answers, but not without end."""

import concurrent.futures
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from federation.aggregation.validation import BadUpdate, read_weights
from federation.compression import TooLarge, as_sent, pack
from federation.console import say
from federation.server.client_manager import ClientManager, Participant
from federation.server.settings import ServerSettings

import numpy as np
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
)
from flwr.server.client_proxy import ClientProxy

GRACE = 5.0  # seconds after which Flower ends a stream that we gave up
SLICE = 0.2  # seconds of waiting between two looks at the stop flag and the deadlines


class Stopped(Exception):
    """A signal asked the server to stop."""


class RunFailed(Exception):
    """The run can't go on; the text says why and what to do. resumable: whether --resume can help."""

    def __init__(self, words: str, resumable: bool = True):
        super().__init__(words)
        self.resumable = resumable


class RoundLost(Exception):
    """All clients were lost in the same moment: the round has to be done again."""


@dataclass(eq=False)
class Request:
    """A participant at work on what it was asked for."""

    participant: Participant
    future: concurrent.futures.Future
    since: float = field(default_factory=time.monotonic)


class Dispatcher:
    """Asks the clients that have a place. Every wait raises Stopped soon after `stop` is set."""

    def __init__(self, clients: ClientManager, settings: ServerSettings, unit: str = "round"):
        self.clients = clients
        self.settings = settings
        self.recipe = clients.recipe
        self.unit = unit  # what the run's progress is counted in
        self.stop = threading.Event()

    def wait_ready(self, number: int, timeout: float) -> bool:
        """Whether so many clients are there, within timeout seconds."""
        there = self.clients.wait_ready(number, timeout, self.stop)
        self.raise_if_stopped()
        return there

    def initial_weights(self) -> list[np.ndarray]:
        """The untrained model, from the first client whose answer can be read; all build it from the seed.

        It comes uncompressed, as the one message that says which dtypes the model has.
        """
        positions = self.clients.buffer_positions
        for participant in self.clients.ready():
            request = self._start(participant, lambda client, t: client.get_parameters(GetParametersIns({}), t, 0))
            for _, answer in self._wait_for_all([request]):
                try:
                    return as_sent(read_weights(answer.parameters, positions), self.recipe.compress)
                except (BadUpdate, TooLarge) as error:
                    say(f"client {participant.partition} can't send the untrained model: {error}")
                    self.clients.drop(participant, f"it can't send the untrained model: {error}")
        raise RunFailed("no client could send the untrained model; look at what the clients print")

    # A round

    def select(self, server_round: int) -> list[Participant]:
        """Client selection: --fraction-fit of those that are there, drawn from the seed and the round.

        Waits a while for lost clients to come back. Raises RunFailed where too few are left.
        """
        wanted, wait = self.settings.clients, self.settings.rejoin_wait
        missing = wanted - len(self.clients.ready())
        if missing:
            say(f"{missing} of {wanted} clients missing; waiting up to {wait:g} s for the free places")
            self.wait_ready(wanted, wait)
        there = self.clients.ready()
        if len(there) < self.settings.min_clients:
            raise self.too_few(len(there), server_round - 1)
        number = max(1, round(self.settings.fraction_fit * len(there)))
        rng = np.random.default_rng([self.recipe.seed, server_round])
        return [there[i] for i in sorted(rng.choice(len(there), number, replace=False))]

    def fit(
        self, server_round: int, weights: list[np.ndarray], selected: list[Participant]
    ) -> list[tuple[Participant, FitRes]]:
        """Local training on these weights, side by side; the answers by partition. Raises RoundLost without any."""
        parameters, hosts = self.parameters(weights), self.hosts()
        answers = self._wait_for_all([self.start_fit(one, hosts, parameters, server_round) for one in selected])
        if not answers:
            raise RoundLost
        return answers

    def evaluate(self, server_round: int, weights: list[np.ndarray]) -> list[tuple[Participant, EvaluateRes]]:
        """These weights on every client's test examples; the answers by partition. Raises RoundLost without any."""
        parameters, hosts, there = self.parameters(weights), self.hosts(), self.clients.ready()
        answers = self._wait_for_all([self.start_evaluate(one, hosts, parameters, server_round) for one in there])
        if not answers:
            raise RoundLost
        return answers

    # One client at a time

    def parameters(self, weights: list[np.ndarray]) -> Parameters:
        """A global model as it is sent."""
        return ndarrays_to_parameters(pack(weights, self.recipe.compress))

    def hosts(self) -> Counter[str]:
        """How many clients share each machine's cores."""
        return Counter(one.host for one in self.clients.ready())

    def start_fit(
        self, participant: Participant, hosts: Counter[str], parameters: Parameters, number: int, **more: Scalar
    ) -> Request:
        """Ask for a training; number is the round's or the training's, from which its randomness is drawn."""
        ins = FitIns(parameters, {**_config(number, participant, hosts), **more})
        return self._start(participant, lambda client, timeout: client.fit(ins, timeout, number))

    def start_evaluate(
        self, participant: Participant, hosts: Counter[str], parameters: Parameters, number: int
    ) -> Request:
        ins = EvaluateIns(parameters, _config(number, participant, hosts))
        return self._start(participant, lambda client, timeout: client.evaluate(ins, timeout, number))

    def wait(self, requests: list[Request], timeout: float = SLICE) -> list[Request]:
        """Those that are over: answered, broken off or overdue. Waits for the first, but not for long."""
        concurrent.futures.wait([one.future for one in requests], timeout, concurrent.futures.FIRST_COMPLETED)
        self.raise_if_stopped()
        overdue = time.monotonic() - self.settings.round_timeout
        return [one for one in requests if one.future.done() or one.since < overdue]

    def answer(self, request: Request) -> Any | None:
        """What a client said that is over; None, and it is given up, where it broke off or takes too long."""
        participant = request.participant
        if not request.future.done():
            limit = f"{self.settings.round_timeout:g} s (--round-timeout)"
            say(f"client {participant.partition} did not answer within {limit}")
        elif request.future.exception() is None:
            return request.future.result()
        # else the stream broke, or carried something that is no answer
        self.clients.lose(participant.client)
        return None

    def too_few(self, there: int, done: int) -> RunFailed:
        return RunFailed(
            f"{there} of {self.settings.clients} clients left after {self.unit} {done}, "
            f"and --min-clients is {self.settings.min_clients}; the checkpoint is kept; start more clients"
        )

    def raise_if_stopped(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def _start(self, participant: Participant, call: Callable[[ClientProxy, float], object]) -> Request:
        """Ask in a thread of its own: one that hangs must not keep the others."""
        executor = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        future = executor.submit(call, participant.client, self.settings.round_timeout + GRACE)
        executor.shutdown(wait=False)
        return Request(participant, future)

    def _wait_for_all(self, requests: list[Request]) -> list[tuple[Participant, Any]]:
        """Answers in the order of requests. Who breaks off or takes too long is given up, and left out."""
        waiting = requests
        while waiting:
            over = self.wait(waiting)
            waiting = [one for one in waiting if one not in over]
        answers = [(one.participant, self.answer(one)) for one in requests]
        return [(participant, answer) for participant, answer in answers if answer is not None]


def _config(number: int, participant: Participant, hosts: Counter[str]) -> dict[str, Scalar]:
    """What travels with the weights: the round, and how many clients share the machine's cores."""
    return {"server_round": number, "clients_on_host": max(1, hosts[participant.host])}

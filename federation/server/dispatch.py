"""Asks the participants, one by one or all at once, and waits for their answers, but not without end."""

import concurrent.futures
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from federation import model_file
from federation.aggregation.validation import BadUpdate, read_weights, travelled
from federation.compression import TooLarge, as_sent, num_bytes, pack, travels_as
from federation.console import say
from federation.participants.client_manager import ClientManager, Participant
from federation.participants.exchange import Exchange, Outgoing
from federation.pieces import IN_MEMORY, LARGE, InPieces, StoreFull, on_disk
from federation.protocol import TaskSummary
from federation.security.audit import Unwritable
from federation.security.masks import LEAST
from federation.server.settings import ServerSettings

import numpy as np
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    Scalar,
    Status,
    ndarrays_to_parameters,
)
from flwr.server.client_proxy import ClientProxy

GRACE = 5.0  # seconds after which the stream of a client that we gave up ends
Result = TypeVar("Result")
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
        self.folder: Path | None = None  # where large updates wait
        self.exchange = Exchange(clients.audit, self.recipe.compress, travelled)
        self.stop = threading.Event()
        # It starts a thread where none is free: one that hangs must not keep the others.
        self._threads = concurrent.futures.ThreadPoolExecutor(max_workers=sys.maxsize)
        self.held: dict[int, tuple[Participant, list[np.ndarray]]] = {}  # who has measured which model, by partition

    def wait_ready(self, number: int, timeout: float) -> bool:
        """Whether so many clients are there, within timeout seconds."""
        there = self.clients.wait_ready(number, timeout, self.stop)
        self.raise_if_stopped()
        return there

    def initial_weights(self) -> list[np.ndarray]:
        """The untrained model, from the first client whose answer can be read; all build it from the seed.

        It comes as all models travel, where the clients have told its dtypes; those of 1.0.0 send it uncompressed.
        """
        task, positions, compress = self.clients.task, self.clients.buffer_positions, self.recipe.compress
        if task is None:
            return self._first({}, lambda answer: as_sent(read_weights(answer.parameters, positions), compress))
        return self._first(
            {"packed": True}, lambda answer: as_told(read_weights(answer.parameters, positions), task.arrays)
        )

    def frozen_weights(self, task: TaskSummary) -> dict[str, np.ndarray]:
        """What no training changes, and so travels only once, from the first client that sends it as all have it."""

        def read(answer: GetParametersRes) -> dict[str, np.ndarray]:
            arrays = as_told(read_weights(answer.parameters, range(len(task.frozen_arrays))), task.frozen_arrays)
            named = dict(zip((name for name, *_ in task.frozen_arrays), arrays, strict=True))
            if model_file.hash_of(named) != task.frozen:
                raise BadUpdate("its frozen weights are not those that it told of")
            return named

        return self._first({"frozen": True}, read)

    def _first(self, config: dict[str, Scalar], read: Callable[[GetParametersRes], Result]) -> Result:
        for participant in self.clients.ready():
            request = self._start(participant, self._fetcher(participant, config))
            for _, answer in self._wait_for_all([request]):
                kind = "frozen-weights" if "frozen" in config else "untrained-model"
                self.exchange.came(kind, participant, None, answer.parameters)
                try:
                    return read(answer)
                except (BadUpdate, TooLarge) as error:
                    say(f"{participant.title} can't send the untrained model: {error}")
                    self.clients.drop(participant, f"it can't send the untrained model: {error}")
        raise RunFailed("no client could send the untrained model; look at what the clients print")

    def _fetcher(self, participant: Participant, config: dict[str, Scalar]) -> Callable[[ClientProxy, float], Any]:
        """Asks for the untrained model, or its frozen arrays: in one message, or, where they are large, in pieces."""
        task = participant.summary.task if participant.summary else None
        told = (task.frozen_arrays if "frozen" in config else task.arrays) if task else []
        compress = self.recipe.compress if "packed" in config else "none"
        like = [(tuple(shape), travels_as(np.dtype(dtype), compress)) for _, shape, dtype in told]
        if not self._in_pieces(sum(math.prod(shape) * dtype.itemsize for shape, dtype in like)):
            return lambda client, timeout: client.get_parameters(GetParametersIns(config), timeout, 0)
        what, none = "frozen" if "frozen" in config else "untrained", self.pieces([])

        def fetch(client: Any, timeout: float) -> GetParametersRes:
            stored = client.fetch(what, like, none, time.monotonic() + timeout)
            return GetParametersRes(Status(Code.OK, ""), stored)

        return fetch

    def ask(self, question: dict[str, Scalar]) -> list[tuple[Participant, dict]]:
        """One of protocol.py's questions to all clients; the answers by partition. Who fails is left out."""
        ins, there = GetPropertiesIns(question), self.clients.ready()
        asked = [self._start(one, lambda client, timeout: client.get_properties(ins, timeout, 0)) for one in there]
        answers = self._wait_for_all(asked)
        for one, _ in answers:
            self.exchange.message("column-sums", one, None, {})
        return [(one, answer.properties) for one, answer in answers]

    # A round

    def select(self, server_round: int) -> list[Participant]:
        """Client selection: --fraction-fit of those that are there, drawn from the seed and the round.

        Waits a while for lost clients to come back. Raises RunFailed where too few are left.
        """
        self.clients.check_members()
        wanted, wait = self.settings.clients, self.settings.rejoin_wait
        missing = wanted - len(self.clients.ready())
        if missing:
            say(f"{missing} of {wanted} clients missing; waiting up to {wait:g} s for the free places")
            self.wait_ready(wanted, wait)
        there = self.clients.ready()
        if len(there) < self.settings.min_clients:
            raise self.too_few(len(there), server_round - 1)
        least = LEAST if self.recipe.secure_aggregation else 1
        number = min(len(there), max(least, round(self.settings.fraction_fit * len(there))))
        rng = np.random.default_rng([self.recipe.seed, server_round])
        return [there[i] for i in sorted(rng.choice(len(there), number, replace=False))]

    def fit(
        self, server_round: int, weights: list[np.ndarray], selected: list[Participant]
    ) -> list[tuple[Participant, FitRes]]:
        """Local training on these weights, side by side; the answers by partition. Raises RoundLost without any."""
        model, hosts, self.held = self.parameters(weights), self.hosts(), {}
        to_disk = len(selected) * model.bytes > IN_MEMORY
        told: dict[str, Scalar] = {"participants": len(selected)}
        if self.recipe.secure_aggregation and self.settings.max_update_norm is not None:
            told["max_update_norm"] = self.settings.max_update_norm
        answers = self._wait_for_all(
            [self.start_fit(one, hosts, model, server_round, to_disk, **told) for one in selected]
        )
        if not answers:
            raise RoundLost
        return answers

    def measure(self, server_round: int, weights: list[np.ndarray]) -> list[tuple[Participant, FitRes]]:
        """BatchNorm's statistics of these weights at every client; none where there are none, or not all measure them.

        Raises RoundLost where none answers.
        """
        there = self.clients.ready()
        wanted = self.settings.batchnorm == "measured" and self.clients.batchnorm
        if not wanted or not all(one.measures_batchnorm for one in there):
            return []
        parameters, hosts = self.parameters(weights), self.hosts()
        asked = [self.start_fit(one, hosts, parameters, server_round, measure=True) for one in there]
        answers = self._wait_for_all(asked)
        if not answers:
            raise RoundLost
        if self.clients.in_pieces:
            self.held = {one.partition: (one, weights) for one, _ in answers}
        return answers

    def ask_each(
        self, participants: Sequence[Participant], ask: Callable[[Participant, Any, float], Any]
    ) -> list[tuple[Participant, Any]]:
        """ask(participant, client, timeout) of each, side by side; who breaks off is given up, and left out."""
        return self._wait_for_all(
            [
                self._start(one, lambda client, timeout, one=one: ask(one, client, timeout))  # type: ignore[misc]
                for one in participants
            ]
        )

    def evaluate(self, server_round: int, weights: list[np.ndarray]) -> list[tuple[Participant, EvaluateRes]]:
        """These weights on every client's test examples; the answers by partition. Raises RoundLost without any.

        Who has them but for BatchNorm's statistics, having just measured those, is sent the statistics alone.
        """
        hosts, there = self.hosts(), self.clients.ready()
        holders = [one for one in there if self._holds(one, weights)]
        positions, self.held = self.clients.batchnorm, {}
        asked = []
        if holders:
            statistics = self.parameters([weights[i] for i in positions])
            asked = [self.start_evaluate(one, hosts, statistics, server_round, measured=True) for one in holders]
        if len(holders) < len(there):
            parameters, others = self.parameters(weights), [one for one in there if one not in holders]
            asked += [self.start_evaluate(one, hosts, parameters, server_round) for one in others]
        answers = self._wait_for_all(sorted(asked, key=lambda request: request.participant.partition))
        if not answers:
            raise RoundLost
        return answers

    def _holds(self, participant: Participant, weights: list[np.ndarray]) -> bool:
        one, sent = self.held.get(participant.partition, (None, []))
        positions = self.clients.batchnorm
        same = (new is old for i, (new, old) in enumerate(zip(weights, sent, strict=True)) if i not in positions)
        return one is participant and all(same)

    # One client at a time

    def parameters(self, weights: list[np.ndarray]) -> Outgoing:
        """A global model as it is sent."""
        packed = pack(weights, self.recipe.compress)
        in_pieces = self._in_pieces(num_bytes(packed, "none"))
        parameters = self.pieces(packed) if in_pieces else ndarrays_to_parameters(packed)
        return self.exchange.outgoing(parameters, packed, weights)

    def _in_pieces(self, size: int) -> bool:
        """Whether a model of so many bytes travels in pieces: a large one does, where all clients know how."""
        most = min(LARGE, self.clients.max_message_bytes // 2)
        return self.clients.in_pieces and size > most and all(one.knows_pieces for one in self.clients.ready())

    def pieces(self, arrays: Sequence[np.ndarray]) -> InPieces:
        return InPieces(arrays=arrays, folder=self.folder, largest=self.clients.max_message_bytes)

    def hosts(self) -> Counter[str]:
        """How many clients share each machine's cores."""
        return Counter(one.host for one in self.clients.ready())

    def start_fit(
        self,
        participant: Participant,
        hosts: Counter[str],
        model: Outgoing,
        number: int,
        to_disk: bool = False,
        **more: Scalar,
    ) -> Request:
        """Ask for a training; number is the round's or the training's, from which its randomness is drawn.

        to_disk: the update waits for its turn in a file, unless it is none that could count.
        """
        ins = FitIns(model.parameters, {**_config(number, participant, hosts), **more})
        out, back = ("model-to-measure", "statistics") if "measure" in more else ("model-to-train", "update")

        def fit(client: ClientProxy, timeout: float) -> FitRes:
            self.exchange.sent(out, participant, number, model)
            answer = client.fit(ins, timeout, number)
            if to_disk and not isinstance(answer.parameters, InPieces):
                arrays = travelled(answer.parameters)
                if arrays is not None and model.is_like(arrays):
                    answer.parameters = on_disk(arrays, self.folder)
            self.exchange.came(back, participant, number, answer.parameters)
            return answer

        return self._start(participant, fit)

    def start_evaluate(
        self, participant: Participant, hosts: Counter[str], model: Outgoing, number: int, **more: Scalar
    ) -> Request:
        config = {**_config(number, participant, hosts), **more, **self.exchange.head(number)}
        ins = EvaluateIns(model.parameters, config)
        out = "statistics-to-evaluate" if "measured" in more else "model-to-evaluate"

        def evaluate(client: ClientProxy, timeout: float) -> EvaluateRes:
            self.exchange.sent(out, participant, number, model)
            answer = client.evaluate(ins, timeout, number)
            self.exchange.message("scores", participant, number, answer.metrics)
            return answer

        return self._start(participant, evaluate)

    def wait(
        self, requests: list[Request], timeout: float = SLICE, until: str = concurrent.futures.FIRST_COMPLETED
    ) -> list[Request]:
        """Those that are over: answered, broken off or overdue. Waits for the first, or all, but not for long."""
        concurrent.futures.wait([one.future for one in requests], timeout, until)
        self.raise_if_stopped()
        overdue = time.monotonic() - self.settings.round_timeout
        return [one for one in requests if one.future.done() or one.since < overdue]

    def answer(self, request: Request) -> Any | None:
        """What a client said that is over; None, and it is given up, where it broke off or takes too long.

        Raises StoreFull or audit.Unwritable where our disk could not take what it sent.
        """
        participant = request.participant
        if not request.future.done():
            limit = f"{self.settings.round_timeout:g} s (--round-timeout)"
            say(f"{participant.title} did not answer within {limit}")
        elif isinstance(request.future.exception(), StoreFull | Unwritable | None):
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
        future = self._threads.submit(call, participant.client, self.settings.round_timeout + GRACE)
        return Request(participant, future)

    def close(self) -> None:
        """Nobody is asked any more; does not wait for those who still are."""
        self._threads.shutdown(wait=False)

    def _wait_for_all(self, requests: list[Request]) -> list[tuple[Participant, Any]]:
        """Answers in the order of requests. Who breaks off or takes too long is given up, and left out."""
        waiting = requests
        while waiting:  # for all, as to be woken by each of a thousand takes a thousand looks at a thousand
            over = set(self.wait(waiting, until=concurrent.futures.ALL_COMPLETED))
            waiting = [one for one in waiting if one not in over]
        answers = [(one.participant, self.answer(one)) for one in requests]
        return [(participant, answer) for participant, answer in answers if answer is not None]


def as_told(arrays: list[np.ndarray], told: list[list]) -> list[np.ndarray]:
    """In the dtypes that the client told of. Raises BadUpdate where number or shapes are others."""
    shapes = [list(array.shape) for array in arrays]
    if shapes != [shape for _, shape, _ in told]:
        raise BadUpdate("its arrays are not of the shapes that it told of")
    return [array.astype(dtype, copy=False) for array, (*_, dtype) in zip(arrays, told, strict=True)]


def _config(number: int, participant: Participant, hosts: Counter[str]) -> dict[str, Scalar]:
    """What travels with the weights: the round, and how many clients share the machine's cores."""
    return {"server_round": number, "clients_on_host": max(1, hosts[participant.host])}

"""The clients of a run, asked one by one or all at once; only answers that pass the checks come through."""

import concurrent.futures
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from federation.checks import BadUpdate, Update, check_evaluate, check_fit, read_weights
from federation.places import Place, Places
from federation.recipe import Terms
from federation.run_folder import History
from federation.wire import TooLarge, as_sent, pack
from federation.words import say

import numpy as np
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    Parameters,
    ndarrays_to_parameters,
)
from flwr.server.client_proxy import ClientProxy

GRACE = 5.0  # seconds after which Flower cuts a stream that we gave up
SLICE = 0.2  # seconds of waiting between two looks at the stop flag and the deadlines
STRIKES = 3  # bad updates in a row that cost a client its place


class Stopped(Exception):
    """A signal asked the server to stop."""


@dataclass(eq=False)
class Asked:
    """A client at work on what it was asked for."""

    place: Place
    future: concurrent.futures.Future
    since: float = field(default_factory=time.monotonic)


class Cohort:
    """Asks the clients that hold a place. Every wait raises Stopped soon after `stop` is set."""

    def __init__(self, admission: Places, terms: Terms, history: History, unit: str = "round"):
        self.admission = admission
        self.terms = terms
        self.history = history
        self.compress = admission.recipe.compress
        self.unit = unit  # what the run's progress is counted in
        self.stop = threading.Event()

    def wait_ready(self, number: int, timeout: float) -> bool:
        """Whether so many clients are there, within timeout seconds."""
        there = self.admission.wait_ready(number, timeout, self.stop)
        self.raise_if_stopped()
        return there

    def initial_weights(self) -> list[np.ndarray] | None:
        """The untrained model, from the first client whose answer can be read; all build it from the seed.

        It comes uncompressed, as the one message that says which dtypes the model has.
        """
        for place in self.admission.ready():
            asked = self._start(place, lambda client, t: client.get_parameters(GetParametersIns({}), t, 0))
            for _, answer in self._wait_for_all([asked]):
                try:
                    return as_sent(read_weights(answer.parameters), self.compress)
                except (BadUpdate, TooLarge) as error:
                    self._reject(0, place, BadUpdate(str(error)))
        return None

    def fit(self, server_round: int, weights: list[np.ndarray], places: list[Place]) -> dict[int, tuple[Update, float]]:
        """Local training: {partition: (update, training loss)} of the good updates, by partition."""
        parameters, hosts = self.parameters(weights), self.hosts()
        answers = self._wait_for_all([self.start_fit(place, hosts, parameters, server_round) for place in places])
        good = {place.partition: self.checked_fit(server_round, place, res, weights) for place, res in answers}
        return {partition: answer for partition, answer in good.items() if answer is not None}

    def evaluate(self, server_round: int, weights: list[np.ndarray]) -> dict[int, tuple[float, float, int]]:
        """The model on everybody's test share: {partition: (loss, accuracy, examples)} of the good answers."""
        parameters, hosts, places = self.parameters(weights), self.hosts(), self.admission.ready()
        answers = self._wait_for_all([self.start_evaluate(place, hosts, parameters, server_round) for place in places])
        good = {place.partition: self.checked_evaluate(server_round, place, res) for place, res in answers}
        return {partition: answer for partition, answer in good.items() if answer is not None}

    def parameters(self, weights: list[np.ndarray]) -> Parameters:
        """A global model as it is sent."""
        return ndarrays_to_parameters(pack(weights, self.compress))

    def hosts(self) -> Counter[str]:
        """How many clients share each machine's cores."""
        return Counter(place.host for place in self.admission.ready())

    # One client at a time

    def start_fit(
        self, place: Place, hosts: Counter[str], parameters: Parameters, number: int, **words: float
    ) -> Asked:
        """Ask for a training; number is the round's or the training's, from which its randomness is drawn."""
        ins = FitIns(parameters, {**_words(number, place, hosts), **words})
        return self._start(place, lambda client, timeout: client.fit(ins, timeout, number))

    def start_evaluate(self, place: Place, hosts: Counter[str], parameters: Parameters, number: int) -> Asked:
        ins = EvaluateIns(parameters, _words(number, place, hosts))
        return self._start(place, lambda client, timeout: client.evaluate(ins, timeout, number))

    def wait(self, asked: list[Asked], timeout: float = SLICE) -> list[Asked]:
        """Those that are over: answered, broken off or overdue. Waits for the first, but not for long."""
        concurrent.futures.wait([one.future for one in asked], timeout, concurrent.futures.FIRST_COMPLETED)
        self.raise_if_stopped()
        return [one for one in asked if one.future.done() or time.monotonic() > one.since + self.terms.round_timeout]

    def answer(self, asked: Asked) -> object | None:
        """What a client said that is over; None, and it is dropped, where it broke off or takes too long."""
        place = asked.place
        if not asked.future.done():
            say(f"client {place.partition} did not answer within {self.terms.round_timeout:g} s (--round-timeout)")
        elif asked.future.exception() is None:
            return asked.future.result()
        # else the stream broke, or carried something that is no answer
        self.admission.lose(place.client)
        return None

    def checked_fit(
        self, number: int, place: Place, res: FitRes, weights: list[np.ndarray]
    ) -> tuple[Update, float] | None:
        """Update and training loss; None, in public, where they must not count. weights: what it started from."""
        try:
            update = check_fit(res, weights, place.train_examples, self.compress), float(res.metrics["train_loss"])
        except BadUpdate as bad:
            self._reject(number, place, bad)
            return None
        place.strikes = 0
        return update

    def checked_evaluate(self, number: int, place: Place, res: EvaluateRes) -> tuple[float, float, int] | None:
        """Loss, accuracy and examples; None, in public, where they must not count."""
        try:
            return check_evaluate(res, place.test_examples)
        except BadUpdate as bad:
            self._reject(number, place, bad)
            return None

    def leave_out(self, number: int, place: Place, reason: str) -> None:
        """Say and write down that an answer does not count."""
        self.history.rejected.append({"round": number, "partition": place.partition, "reason": reason})
        say(f"{self.unit} {number}: client {place.partition} left out: {reason}")

    def raise_if_stopped(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def _start(self, place: Place, call: Callable[[ClientProxy, float], object]) -> Asked:
        """Ask in a thread of its own: one that hangs must not keep the others."""
        executor = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        future = executor.submit(call, place.client, self.terms.round_timeout + GRACE)
        executor.shutdown(wait=False)
        return Asked(place, future)

    def _wait_for_all(self, asked: list[Asked]) -> list[tuple[Place, object]]:
        """Answers in the order of asked. Who breaks off or takes too long is dropped, and left out."""
        waiting = asked
        while waiting:
            over = self.wait(waiting)
            waiting = [one for one in waiting if one not in over]
        answers = [(one.place, self.answer(one)) for one in asked]
        return [(place, answer) for place, answer in answers if answer is not None]

    def _reject(self, number: int, place: Place, bad: BadUpdate) -> None:
        """Leave an answer out, in public; after three in a row, or a failure of its own, the client goes."""
        place.strikes += 1
        self.leave_out(number, place, str(bad))
        if place.strikes >= STRIKES:
            self.admission.drop(place, f"{STRIKES} bad updates in a row, the last: {bad}")
        elif bad.client_failed:
            self.admission.drop(place, "it failed")


def _words(number: int, place: Place, hosts: Counter[str]) -> dict:
    """What goes with the weights: the round, and how many clients share the machine's cores."""
    return {"server_round": number, "clients_on_host": max(1, hosts[place.host])}

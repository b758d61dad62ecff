"""The clients of a run, asked all at once; only answers that pass the checks come through."""

import concurrent.futures
import threading
import time
from collections.abc import Callable

from federation.admission import Admission, Place, close
from federation.recipe import Terms
from federation.run_folder import History
from federation.strategy import BadUpdate, Update, check_evaluate, check_fit, read_weights
from federation.words import say

import numpy as np
from flwr.common import EvaluateIns, FitIns, GetParametersIns, ndarrays_to_parameters
from flwr.server.client_proxy import ClientProxy

GRACE = 5.0  # seconds after which Flower cuts a stream that we gave up
STRIKES = 3  # bad updates in a row that cost a client its place


class Stopped(Exception):
    """A signal asked the server to stop."""


class Cohort:
    """Asks the clients that hold a place. Every method raises Stopped soon after `stop` is set."""

    def __init__(self, admission: Admission, terms: Terms, history: History):
        self.admission = admission
        self.terms = terms
        self.history = history
        self.stop = threading.Event()

    def wait_ready(self, number: int, timeout: float) -> bool:
        """Whether so many clients are there, within timeout seconds."""
        there = self.admission.wait_ready(number, timeout, self.stop)
        self._raise_if_stopped()
        return there

    def initial_weights(self) -> list[np.ndarray] | None:
        """The untrained model, from the first client whose answer can be read; all build it from the seed."""
        for place in self.admission.ready():
            for _, answer in self._ask([place], lambda client, t: client.get_parameters(GetParametersIns({}), t, 0)):
                try:
                    return read_weights(answer.parameters)
                except BadUpdate as bad:
                    self._reject(0, place, bad)
        return None

    def fit(self, server_round: int, weights: list[np.ndarray], places: list[Place]) -> dict[int, tuple[Update, float]]:
        """Local training: {partition: (update, training loss)} of the good updates, by partition."""
        parameters = ndarrays_to_parameters(weights)

        def call(client: ClientProxy, timeout: float):
            return client.fit(FitIns(parameters, self._words(server_round, client)), timeout, server_round)

        good = {}
        for place, res in self._ask(places, call):
            try:
                good[place.partition] = check_fit(res, weights, place.train_examples), float(res.metrics["train_loss"])
                place.strikes = 0
            except BadUpdate as bad:
                self._reject(server_round, place, bad)
        return good

    def evaluate(self, server_round: int, weights: list[np.ndarray]) -> dict[int, tuple[float, float, int]]:
        """The model on everybody's test share: {partition: (loss, accuracy, examples)} of the good answers."""
        parameters = ndarrays_to_parameters(weights)

        def call(client: ClientProxy, timeout: float):
            return client.evaluate(EvaluateIns(parameters, self._words(server_round, client)), timeout, server_round)

        good = {}
        for place, res in self._ask(self.admission.ready(), call):
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
            else:  # the stream broke, or carried something that is no answer
                self.admission.unregister(place.client)
                close(place.client)
        return answers

    def _reject(self, server_round: int, place: Place, bad: BadUpdate) -> None:
        """Leave an answer out, in public; after three in a row, or a failure of its own, the client goes."""
        place.strikes += 1
        self.history.rejected.append({"round": server_round, "partition": place.partition, "reason": str(bad)})
        say(f"round {server_round}: client {place.partition} left out: {bad}")
        if place.strikes >= STRIKES:
            self.admission.drop(place, f"{STRIKES} bad updates in a row, the last: {bad}")
        elif bad.client_failed:
            self.admission.drop(place, "it failed")

    def _raise_if_stopped(self) -> None:
        if self.stop.is_set():
            raise Stopped

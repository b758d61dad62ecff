"""The client's part in private training: what leaves it is what its budget allows and its ledger holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from federation.console import PublicError, say
from federation.pieces import hash_arrays
from federation.privacy.accounting import CLOSE, Accountant, Spent, Steps
from federation.privacy.budget import Budget, check_budget
from federation.privacy.dp_sgd import Plan, draws, train
from federation.privacy.ledger import Ledger, LedgerError, Training
from federation.privacy.noise import Source
from federation.privacy.private_task import check_delta, check_network, hash_examples, parts_to_train
from federation.protocol import DP_DELTA, DP_EPSILON, Assignment
from federation.security.audit import utc_now

import numpy as np
import torch

FOLDER = Path("privacy")
OpenClient = Callable[[Assignment], Any]


class PrivateClients:
    """Opens the client of an assignment, one at a time; where the run trains privately, so does the client."""

    def __init__(self, open_client: OpenClient, budget: Budget | None):
        self._open_client, self._budget = open_client, budget
        self._ledger: Ledger | None = None

    def __call__(self, assignment: Assignment) -> Any:
        """Raises PublicError, one line, where the budget, the task or the ledger does not allow it."""
        check_budget(self._budget, assignment.recipe)
        if self._ledger:  # of the last assignment, whose examples may be the same
            self._ledger.close()
            self._ledger = None
        client = self._open_client(assignment)
        if self._budget is None:
            return client
        private = PrivateClient(client, self._budget, assignment)
        self._ledger = private.ledger
        return private


class PrivateClient:
    """The client that it wraps, in one run; see session.Learner. Whatever it lacks is that client's own.

    What depends on training examples and is not covered by epsilon does not leave it: training losses, examples by
    class, sums over columns, BatchNorm's statistics. Methods raise PublicError, one line, where they can't.
    """

    class_counts: list[int] = []  # noqa: RUF012
    batchnorm_positions: list[int] = []  # noqa: RUF012

    def __init__(self, client: Any, budget: Budget, assignment: Assignment):
        self._client, self.budget, self.recipe = client, budget, client.recipe
        self._run, self._partition = assignment.run_id, assignment.partition
        check_network(client)
        sha256, self._size = hash_examples(client.train_set), len(client.train_set[0])
        check_delta(budget, self._size)
        self._rate, self._steps = draws(self.recipe, self._size)
        path = Path(budget.ledger) if budget.ledger else FOLDER / f"{sha256[:16]}.json"
        self.ledger = Ledger.open(path, sha256, self._size)
        try:
            self._begin(path)
            self._module, self._examples, self._loss = parts_to_train(client)  # last, as features take a while
        except BaseException:
            self.ledger.close()
            raise

    def _begin(self, path: Path) -> None:
        budget, trainings = self.budget, self.ledger.trainings
        if self.ledger.void and budget.seed is None:
            words = "holds trainings with --dp-seed, so that epsilon is void for these examples"
            raise LedgerError(path, f"{words}; where they are no secret, begin a new one with --ledger")
        self._accountant = Accountant(self.ledger.steps_of())
        self._spent = self._accountant.epsilon(budget.delta)
        self._limit = budget.epsilon
        if budget.epsilon_per_run is not None:
            before = Accountant(self.ledger.steps_of(lambda run: run != self._run)).epsilon(budget.delta)
            self._limit = min(budget.epsilon, before + budget.epsilon_per_run)
        self._noise = self._choose_noise()
        about = f"noise {self._noise:.3g} x clip {budget.clip:g}, {self._steps} steps a round; ledger {path}"
        if budget.seed is not None:
            say(f"private training with --dp-seed {budget.seed}, noise that anybody can make again: EPSILON IS VOID")
            return
        earlier = f", {self._spent:.2f} of it spent before" if self._spent else ""
        limit = f"epsilon {self._limit:.4g} at delta {budget.delta:g}"
        say(f"private training of {self._size:,} examples: {limit}{earlier}; {about}")
        others = [each for each in path.parent.glob("*.json") if each != path] if not trainings else []
        if others and not budget.ledger:
            say(
                f"that ledger is new, and {path.parent} holds {len(others)} of other examples; where they have "
                "examples in common, their epsilons add up: give one --ledger to data that grow or change"
            )

    def _choose_noise(self) -> float:
        """Of a run that goes on, what it was; otherwise the least with which the whole run keeps within the limit."""
        for training in reversed(self.ledger.trainings):
            if training.run == self._run and (training.rate, training.clip) == (self._rate, self.budget.clip):
                return training.noise
        number, delta = self._steps * self.recipe.rounds, self.budget.delta
        if self._spent > CLOSE * self._limit:
            raise Spent(self._spent_words())
        return self._accountant.noise_for(self._limit, delta, self._rate, number)

    def _spent_words(self) -> str:
        budget = self.budget
        return (
            f"it has spent {self._spent:.2f} of its epsilon of {budget.epsilon:g} on these examples, and trains no "
            "more; its owner may raise --dp-epsilon"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    @property
    def spent(self) -> dict[str, float | None]:
        """What is told of it: epsilon spent on these examples so far, in all runs; None where a seed made it void."""
        void = self.ledger.void or self.budget.seed is not None
        return {DP_EPSILON: None if void else self._spent, DP_DELTA: self.budget.delta}

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """Train on the model as often as the recipe says; the same update again for the same round and model.

        The metrics are empty.
        """
        number = config["server_round"]
        self._note(number)
        if self._run not in self.ledger.runs:
            words = f"knows nothing of this run, which is in round {number}"
            remedy = "bring the one back that this client had (--ledger), or wait for a new run"
            raise LedgerError(self.ledger.path, f"{words}; {remedy}")
        start = hash_arrays(parameters)
        update = self.ledger.kept(self._run, number, start)
        if update is not None:
            say(f"round {number}: the same update as before, which costs nothing")
            self._client.set_parameters(update)
            return update, self._size, {}
        after = self._accountant.with_steps(Steps(self._rate, self._noise, self._steps))
        spent = after.epsilon(self.budget.delta)
        if spent > self._limit:
            raise Spent(self._spent_words())
        self._client.set_parameters(parameters)
        update = self._train(number, start, config)
        self._accountant, self._spent = after, spent
        if self.budget.seed is None:
            say(f"round {number}: epsilon {spent:.2f} of {self.budget.epsilon:g} is spent")
        return update, self._size, {}

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        """As the client's own; beside the scores, what it has spent so far."""
        self._note(config["server_round"])
        loss, examples, metrics = self._client.evaluate(parameters, config)
        return loss, examples, {**metrics, **self.spent}

    def measure(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        raise PublicError("BatchNorm's statistics are of its training examples, and no epsilon covers them")

    def scale(self, statistics: dict[str, list[float]]) -> None:
        raise PublicError("the scaling of its columns would change the examples that its ledger is of")

    def _note(self, server_round: int) -> None:
        """That this client is in the run from its start, so that its ledger has all that it spends in it."""
        if server_round <= 1:
            self.ledger.begin(self._run, self._partition)

    def _train(self, number: int, start: str, config: dict) -> list[np.ndarray]:
        """Train, and write it down; where that fails the network is as it was, so that nothing can leave."""
        span = (config["start"], config["end"]) if "start" in config else None
        part = self.recipe.part(self._partition, number, f"round {number}", span)
        plan = Plan.of(self.recipe, part, self._size, self._noise, self.budget.clip)
        if self.budget.seed is not None:
            torch.manual_seed(part.seed)  # of dropout, which is no secret
        random_bytes = Source(self.budget.seed).bytes_of(self._partition, number)
        trained = train(self._module, self._examples, self._loss, plan, random_bytes, part.title)
        before = {name: self._module.state_dict()[name].clone() for name in trained}
        self._module.load_state_dict(trained, strict=False)
        try:
            update = self._client.get_parameters(config)
            training = Training(
                run=self._run,
                round=number,
                start=start,
                update=hash_arrays(update),
                rate=self._rate,
                noise=self._noise,
                steps=self._steps,
                clip=self.budget.clip,
                seeded=self.budget.seed is not None,
                utc=utc_now(),
            )
            self.ledger.charge(training, update)
        except BaseException:
            self._module.load_state_dict(before, strict=False)
            raise
        return update

"""The client's part in private training: what leaves it is what its budget allows and its ledger holds."""

import hashlib
from pathlib import Path
from typing import Any

from federation.config import PRIVATE, Recipe
from federation.console import PublicError, say
from federation.pieces import hash_arrays
from federation.privacy.accounting import CLOSE, Accountant, Spent, Steps
from federation.privacy.budget import Budget
from federation.privacy.dp_sgd import Plan, train
from federation.privacy.ledger import Ledger, LedgerError, Training
from federation.privacy.noise import Source
from federation.protocol import DP_DELTA, DP_EPSILON, Assignment
from federation.security.audit import utc_now
from federation.task.contract import PAGE
from federation.task.training import check

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

FOLDER = Path("privacy")


class PrivateTraining:
    """Of one client in one run. Raises PublicError, one line, where it can't be had."""

    def __init__(self, budget: Budget, client: Any, assignment: Assignment):
        self.budget, self.client, self.recipe = budget, client, client.recipe
        self.run, self.partition = assignment.run_id, assignment.partition
        self.module, self.examples, self.loss = private_parts(client)
        size = len(self.examples[0])
        check_numbers(budget, self.recipe, size)
        self.rate = self.recipe.batch_size / size
        self.steps = self.recipe.local_epochs * round(1 / self.rate)  # of one round
        sha256 = hash_examples(client.train_set)
        path = Path(budget.ledger) if budget.ledger else FOLDER / f"{sha256[:16]}.json"
        self.ledger = Ledger.open(path, sha256, size)
        if self.ledger.void and budget.seed is None:
            words = "holds trainings with --dp-seed, so that epsilon is void for these examples"
            raise LedgerError(path, f"{words}; where they are no secret, begin a new one with --ledger")
        self.accountant = Accountant(self.ledger.steps)
        self.epsilon = self.accountant.epsilon(budget.delta)  # spent so far
        self.noise = self._noise()
        say(self.describe(path))

    def _noise(self) -> float:
        """Of a run that goes on, what it was; otherwise the least with which the whole run keeps within the budget."""
        for training in reversed(self.ledger.trainings):
            if training.run == self.run and (training.rate, training.clip) == (self.rate, self.budget.clip):
                return training.noise
        if self.epsilon > CLOSE * self.budget.epsilon:
            raise Spent(spent(self.budget, self.epsilon))
        return self.accountant.noise_for(
            self.budget.epsilon, self.budget.delta, self.rate, self.steps * self.recipe.rounds
        )

    def describe(self, path: Path) -> str:
        budget, before = self.budget, f", of which {self.epsilon:.2f} is spent" if self.epsilon else ""
        if budget.seed is not None:
            return f"private training with --dp-seed {budget.seed}: noise that anybody can make again, EPSILON IS VOID"
        about = f"noise {self.noise:.3g}, {self.steps} steps a round"
        size = len(self.examples[0])
        return (
            f"private training: epsilon {budget.epsilon:g}{before}, at delta {budget.delta:g} for {size:,} examples: "
            f"{about}; ledger {path}"
        )

    def told(self) -> dict[str, float]:
        """What the server gets to know of it, with each score."""
        if self.ledger.void or self.budget.seed is not None:
            return {}
        return {DP_EPSILON: self.epsilon, DP_DELTA: self.budget.delta}

    def see(self, server_round: int) -> None:
        """A message of this round has come. Raises LedgerError."""
        if server_round <= 1:
            self.ledger.begin(self.run, self.partition)

    def fit(self, model: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """As the client's own, with nothing but the update; the same again for the same round and model."""
        number = config["server_round"]
        self.see(number)
        if self.run not in self.ledger.runs:
            path, words = self.ledger.path, f"knows nothing of this run, which is in round {number}"
            raise LedgerError(
                path, f"{words}; bring the one back that this client had (--ledger), or wait for a new run"
            )
        start = hash_arrays(model)
        kept = self.ledger.kept(self.run, number, start)
        if kept is not None:
            say(f"round {number}: the same update again, at no cost")
            self.client.set_parameters(kept)
            return kept, len(self.examples[0]), {}
        after = self.accountant.with_steps(Steps(self.rate, self.noise, self.steps))
        epsilon = after.epsilon(self.budget.delta)
        if epsilon > self.budget.epsilon:
            raise Spent(spent(self.budget, self.epsilon))
        self.client.set_parameters(model)
        update = self._train(number, start, config)
        self.accountant, self.epsilon = after, epsilon
        return update, len(self.examples[0]), {}

    def _train(self, number: int, start: str, config: dict) -> list[np.ndarray]:
        """Train, and write it down; where that fails the network is as it was, so that nothing can leave."""
        span = (config["start"], config["end"]) if "start" in config else None
        part = self.recipe.part(self.partition, number, f"round {number}", span)

        def learning_rate(t: float) -> float:
            return self.recipe.learning_rate * (1 - part.start - (part.end - part.start) * t)

        plan = Plan(self.steps, self.rate, self.noise, self.budget.clip, learning_rate, self.recipe.proximal_mu)
        random_bytes = Source(self.budget.seed).bytes_of(self.partition, number)
        trained = train(self.module, self.examples, self.loss, plan, random_bytes, part.title)
        before = {name: self.module.state_dict()[name].clone() for name in trained}
        self.module.load_state_dict(trained, strict=False)
        try:
            update = self.client.get_parameters(config)
            seeded = self.budget.seed is not None
            self.ledger.charge(
                Training(
                    self.run, number, start, hash_arrays(update), self.rate, self.noise, self.steps, self.budget.clip,
                    seeded, utc_now(),
                ),
                update,
            )  # fmt: skip
        except BaseException:
            self.module.load_state_dict(before, strict=False)
            raise
        return update


def spent(budget: Budget, epsilon: float) -> str:
    return (
        f"it has spent {epsilon:.2f} of its epsilon of {budget.epsilon:g} on these examples, and trains no more; "
        "its owner may raise --dp-epsilon"
    )


def check_numbers(budget: Budget, recipe: Recipe, size: int) -> None:
    """Raises PublicError where the budget or the recipe can't be used with so many examples."""
    if budget.delta * size >= 1:
        raise PublicError(f"--dp-delta {budget.delta:g} must be below 1 in its {size:,} examples, {1 / size:.2g}")
    if recipe.batch_size > size:
        raise PublicError(f"--batch-size {recipe.batch_size} is more than its {size:,} examples; set a smaller one")


def private_parts(client: Any) -> tuple[torch.nn.Module, tuple, Any]:
    """What trains, on what, by which loss, as the task says it. Raises PublicError with the remedy."""
    task, network, name = client.task, client.network, client.recipe.model
    if not task.has("private_training"):
        raise PublicError(f"its task's model.py has no private_training(network, examples); {PAGE} says more")
    if task.has("columns"):
        raise PublicError(
            "its task scales columns by sums over its examples, which no epsilon covers; use another task"
        )
    network.train()  # which frozen layers don't obey
    if any(isinstance(layer, _BatchNorm) and layer.training for layer in network.modules()):
        fit = [other for other, defaults in task.models.items() if PRIVATE in defaults and other != name]
        remedy = f"use --model {' or '.join(fit)}" if fit else "use a network with GroupNorm, or without"
        raise PublicError(f"{name} has BatchNorm, which mixes examples, so there is no private training; {remedy}")
    module, examples, loss = task.private_training(network, client.train_set)
    check(examples)
    if not any(each.requires_grad for each in module.parameters()):
        raise PublicError(f"all layers of {name} are frozen: there is nothing to train")
    return module, examples, loss


def hash_examples(examples: Any) -> str:
    """SHA-256 of a tuple of tensors; stays with the client, and names its ledger."""
    check(examples)
    digest = hashlib.sha256()
    for each in examples:
        array = np.ascontiguousarray(each.cpu().numpy())
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()

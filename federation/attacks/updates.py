"""What clients send after their training: as it is, their mean, and with differential privacy."""

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from federation.config import Recipe
from federation.console import PublicError
from federation.privacy.dp_sgd import Plan, train
from federation.task.task import Task
from federation.task.training import Examples

import numpy as np
import torch
from torch import nn

CLIP = 1.0  # L2 norm of one example's gradient under differential privacy


class Clients:
    """Clients that all begin with the same untrained network, of a data set of images."""

    def __init__(self, task: Task, dataset: Any, model: str, seed: int):
        self.task, self.dataset, self.seed = task, dataset, seed
        self.recipe = task.complete(Recipe(model=model, rounds=1, seed=seed))
        self.schema = task.schema(dataset)
        self.classes: list[str] = self.schema["classes"]
        labels = task.labels(dataset, "train", seed)
        assert labels is not None  # the project's own task has some
        self.labels = labels
        self.rng = np.random.default_rng(seed)
        self.start: nn.Module = task.build(self.schema, self.recipe)

    def draw(self, number: int) -> np.ndarray:
        """Rows of so many training images, in random order. Raises PublicError where there are not so many."""
        if len(self.labels) < number:
            raise PublicError(f"this takes {number:,} training images, the data set has {len(self.labels):,}")
        return self.rng.permutation(len(self.labels))[:number]

    def load(self, rows: np.ndarray, split: str = "train") -> Examples:
        return self.task.load(self.dataset, split, np.sort(rows), self.seed)

    def as_inputs(self, examples: Examples) -> Examples:
        """With floats, as the network takes them, for images."""
        return self.task.model.to_input(examples[0], torch.device("cpu")), examples[1]

    def update(self, examples: Examples, passes: int = 1, client: int = 0) -> nn.Module:
        """The network that a client of this number sends, by the recipe but for the passes over its examples."""
        network, recipe = copy.deepcopy(self.start), dataclasses.replace(self.recipe, local_epochs=passes)
        self.task.train_round(network, examples, recipe, recipe.part(client, 1, f"client {client}"))
        return network

    def private_update(self, examples: Examples, rate: float, steps: int, noise: float, peak: float) -> nn.Module:
        """The same by private training, its noise from the system, at a learning rate that falls from peak to 0.

        rate, noise: as in dp_sgd.Plan.
        """
        plan = Plan(steps, rate, noise, CLIP, lambda t: peak * (1 - t))
        module, inputs, loss = self.task.private_training(self.start, examples)
        trained = train(module, inputs, loss, plan, os.urandom, "a client with differential privacy")
        network = copy.deepcopy(self.start)
        network.load_state_dict(trained, strict=False)
        return network

    def private_gradient(self, examples: Examples, noise: float) -> list[torch.Tensor]:
        """What one step of DP-SGD on all of these tells: their mean gradient, each clipped, and noise."""
        after = self.private_update(examples, 1, 1, noise, 2.0)  # halfway through its only step the rate is 1
        pairs = zip(self.start.parameters(), after.parameters(), strict=True)
        return [(old - new).detach() for old, new in pairs]


def mean(networks: Sequence[nn.Module]) -> nn.Module:
    """All that a server has with secure aggregation, where all clients have as many examples."""
    network, states = copy.deepcopy(networks[0]), [each.state_dict() for each in networks]
    network.load_state_dict({name: sum(each[name] for each in states) / len(states) for name in states[0]})
    return network

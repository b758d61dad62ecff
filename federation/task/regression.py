"""A model.py's functions for numbers: `from federation.task.regression import METRICS, evaluate, show, train_round`.

Examples are a tuple of tensors: the inputs, and last the targets, (n,) or (n, k) float. The network gives the same.
"""

from federation.config import Metric, Part, Recipe
from federation.task import training
from federation.task.training import Examples, PrivateParts

import torch
from torch import nn
from torch.nn import functional as F

METRICS = [Metric("mae", higher_is_better=False, lowest=0, digits=3), Metric("r2", highest=1, chance=0, additive=False)]


def train_round(network: nn.Module, examples: Examples, recipe: Recipe, part: Part) -> dict[str, float]:
    """As training.train_round, with the mean squared error for the loss."""
    return training.train_round(network, examples, recipe, part, loss)


def private_training(network: nn.Module, examples: Examples) -> PrivateParts:
    """What private training needs, where all of the network trains."""
    return network, examples, loss


def evaluate(network: nn.Module, examples: Examples, recipe: Recipe) -> dict[str, float]:
    """Mean squared error, mean absolute error, and R², which is below 0 where the mean would be the better guess."""
    targets = examples[-1]
    guesses = predict(network, examples)
    squared = F.mse_loss(guesses, targets).item()
    spread = targets.var(correction=0).item()
    metrics = {"loss": squared, "mae": (guesses - targets).abs().mean().item()}
    return {**metrics, "r2": 1 - squared / spread} if spread else metrics


def predict(network: nn.Module, examples: Examples) -> torch.Tensor:
    """In the shape of the targets, on the CPU; the targets' values are not looked at."""
    return training.outputs(network, examples).reshape(examples[-1].shape)


def show(schema: dict, examples: Examples, predictions: torch.Tensor) -> list[str]:
    """A line an example: what it is, and what the network says."""
    return [f"{_row(truth)} → {_row(guess)}" for truth, guess in zip(examples[-1], predictions, strict=True)]


def _row(values: torch.Tensor) -> str:
    return ", ".join(f"{value:.4g}" for value in values.flatten().tolist())


def loss(network: nn.Module, batch: Examples) -> torch.Tensor:
    """Mean squared error."""
    return F.mse_loss(network(*batch[:-1]).reshape(batch[-1].shape), batch[-1])

"""For a model.py of classes: `from federation.task.classification import evaluate, predict, show, train_round`.

Examples are a tuple of tensors: the inputs, and last the classes, (n,) int64. The network gives logits (n, classes).
"""

from federation.config import Part, Recipe
from federation.task import training
from federation.task.training import Examples, PrivateParts

import torch
from torch import nn
from torch.nn import functional as F


def train_round(network: nn.Module, examples: Examples, recipe: Recipe, part: Part) -> dict[str, float]:
    """As training.train_round, with cross-entropy for the loss."""
    return training.train_round(network, examples, recipe, part, loss)


def private_training(network: nn.Module, examples: Examples) -> PrivateParts:
    """What private training needs, where all of the network trains."""
    return network, examples, loss


def evaluate(network: nn.Module, examples: Examples, recipe: Recipe) -> dict[str, float]:
    """Mean cross-entropy and accuracy."""
    logits, classes = training.outputs(network, examples), examples[-1]
    right = (logits.argmax(1) == classes).float().mean().item()
    return {"loss": F.cross_entropy(logits, classes).item(), "accuracy": right}


def predict(network: nn.Module, examples: Examples) -> torch.Tensor:
    """Probabilities (n, classes) on the CPU; the classes in examples are not looked at."""
    return training.outputs(network, examples).softmax(1)


def show(schema: dict, examples: Examples, predictions: torch.Tensor) -> list[str]:
    """A line an example: what it is, and what the network takes it for."""
    classes, pairs = schema["classes"], zip(examples[-1].tolist(), predictions.argmax(1).tolist(), strict=True)
    return [f"{'✓' if truth == guess else '✗'} {classes[truth]} → {classes[guess]}" for truth, guess in pairs]


def auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the ROC curve: how often a positive example scores above a negative one; ties count half.

    scores: (n,) floats; positive: (n,) bool. NaN where all are of one kind. By ranks, Mann and Whitney 1947.
    """
    scores, positive = scores.double(), positive.bool()
    number, others = int(positive.sum()), int((~positive).sum())
    if not number or not others:
        return float("nan")
    _, place, count = scores.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[place]  # from 1; the mean where scores are equal
    return float((rank[positive].sum() - number * (number + 1) / 2) / (number * others))


def loss(network: nn.Module, batch: Examples) -> torch.Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(network(*batch[:-1]), batch[-1])

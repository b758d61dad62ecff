"""Local training and evaluation as most PyTorch models need them, for a task that has no loop of its own.

Examples are a tuple of tensors with as many rows each: the inputs, and last the targets.
"""

from collections.abc import Callable, Iterator
from typing import Any

from federation.config import Part, Recipe
from federation.console import say
from federation.task.contract import TaskError

import torch
from torch import nn
from torch.optim.sgd import sgd
from tqdm import tqdm

Examples = tuple[torch.Tensor, ...]
Loss = Callable[[nn.Module, Examples], torch.Tensor]  # the mean over a batch
PrivateParts = tuple[nn.Module, Examples, Loss]  # what trains, on what, by which loss
EVALUATED = 500  # examples at a time
SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}


def train_round(network: nn.Module, examples: Examples, recipe: Recipe, part: Part, loss: Loss) -> dict[str, float]:
    """Plain FedAvg's local training: SGD with momentum 0.9 at the recipe's learning rate, batches in random order.

    With proximal_mu, FedProx's term as well (Li et al. 2020, arXiv:1812.06127). A last batch of one is left out, as
    BatchNorm can't learn from one example. Returns {"train_loss": the mean over all steps}.
    """
    check(examples)
    network.train()
    parameters: list[torch.Tensor] = [each for each in network.parameters() if each.requires_grad]
    start = [each.detach().clone() for each in parameters] if recipe.proximal_mu else []
    if not parameters:
        say("all layers of the network are frozen: there is nothing to train")
        with torch.inference_mode():
            return {"train_loss": loss(network.eval(), on_device(network, examples)).item()}
    momenta: list[torch.Tensor | None] = [None] * len(parameters)
    total, seen = 0.0, 0
    for batch in tqdm(list(_batches(examples, recipe)), part.title, unit=" batches", leave=False, disable=None):
        mean = loss(network, on_device(network, batch))
        gradients = torch.autograd.grad(mean, parameters, materialize_grads=True)
        with torch.no_grad():
            if recipe.proximal_mu:
                pairs = zip(gradients, parameters, start, strict=True)
                gradients = tuple(g + recipe.proximal_mu * (now - then) for g, now, then in pairs)
            # torch.optim.SGD as a function: the class imports torch's compiler, seconds for each client.
            sgd(parameters, list(gradients), momenta, lr=recipe.learning_rate, **SGD)
        total, seen = total + mean.item() * len(batch[0]), seen + len(batch[0])
    return {"train_loss": total / max(seen, 1)}


@torch.inference_mode()
def outputs(network: nn.Module, examples: Examples, size: int = EVALUATED) -> torch.Tensor:
    """What the network makes of these examples' inputs, so many at a time, on the CPU."""
    check(examples)
    network.eval()
    parts = zip(*(each.split(size) for each in examples), strict=True)
    return torch.cat([network(*on_device(network, batch)[:-1]).cpu() for batch in parts])


def check(examples: Any) -> None:
    """Raises TaskError, one line, where these are no examples that this loop can take."""
    ours = isinstance(examples, tuple) and len(examples) > 1
    kinds = (
        ", ".join(type(each).__name__ for each in examples) if isinstance(examples, tuple) else type(examples).__name__
    )
    if not ours or not all(isinstance(each, torch.Tensor) for each in examples):
        must = "load of data.py must give a tuple of tensors, inputs and last targets, for this training"
        raise TaskError(f"{must}; gave {kinds}", must)


def on_device(network: nn.Module, batch: Examples) -> Examples:
    """Where the network is."""
    device = next(network.parameters()).device
    return tuple(each.to(device) for each in batch)


def _batches(examples: Examples, recipe: Recipe) -> Iterator[Examples]:
    """Of all local epochs; the random state is that of the training's seed."""
    size = len(examples[0])
    for _ in range(recipe.local_epochs):
        for rows in torch.randperm(size).split(recipe.batch_size):
            if len(rows) > 1 or size == 1:
                yield tuple(each[rows] for each in examples)

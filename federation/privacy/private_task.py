"""What of a client's task can be trained privately, and what stands in the way."""

import hashlib
from typing import Any

from federation.config import PRIVATE
from federation.console import PublicError
from federation.pieces import hash_arrays
from federation.privacy.budget import Budget
from federation.task.contract import PAGE
from federation.task.training import check

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm


def check_delta(budget: Budget, size: int) -> None:
    """Raises PublicError where delta says nothing about so many examples: one of them could be given away whole."""
    if budget.delta * size >= 1:
        raise PublicError(f"--dp-delta {budget.delta:g} must be below 1 in its {size:,} examples, {1 / size:.2g}")


def check_network(client: Any) -> None:
    """Whether its task and network can be trained privately at all. Raises PublicError with the remedy."""
    task, network, name = client.task, client.network, client.recipe.model
    if not task.has("private_training"):
        raise PublicError(f"its task's model.py has no private_training(network, examples); {PAGE} says more")
    if task.has("columns"):
        raise PublicError("its task scales columns by sums over its examples, which no epsilon covers; use another")
    network.train()  # which frozen layers don't obey
    if any(isinstance(layer, _BatchNorm) and layer.training for layer in network.modules()):
        fit = [other for other, defaults in task.models.items() if PRIVATE in defaults and other != name]
        remedy = f"use --model {' or '.join(fit)}" if fit else "use a network with GroupNorm, or without"
        raise PublicError(f"{name} has BatchNorm, which mixes examples, so there is no private training; {remedy}")


def parts_to_train(client: Any) -> tuple[torch.nn.Module, tuple, Any]:
    """What trains, on what, by which loss, as the task says it. Raises PublicError with the remedy."""
    before = hash_arrays(client.get_parameters({}))
    module, examples, loss = client.task.private_training(client.network, client.train_set)
    check(examples)
    if hash_arrays(client.get_parameters({})) != before:  # by running means, say, which no epsilon would cover
        raise PublicError("its task's private_training changes the network; let it work in eval mode")
    if not any(each.requires_grad for each in module.parameters()):
        raise PublicError(f"all layers of {client.recipe.model} are frozen: there is nothing to train")
    return module, examples, loss


def hash_examples(examples: Any) -> str:
    """SHA-256 of a tuple of tensors; stays with the client, and names its ledger."""
    check(examples)
    digest = hashlib.sha256()
    for each in examples:
        array = np.ascontiguousarray(each.cpu().numpy())
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()

"""Who was in a training set: by the loss of each example, Yeom et al. 2018, arXiv:1709.01604."""

from collections.abc import Sequence

from federation.task import training
from federation.task.classification import auc
from federation.task.training import Examples

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def losses(network: nn.Module, examples: Examples) -> torch.Tensor:
    """The cross-entropy of each example, (n,); the first of the tuple is what the network takes, floats."""
    return F.cross_entropy(training.outputs(network, examples), examples[-1], reduction="none")


def members_found(inside: torch.Tensor, outside: torch.Tensor) -> float:
    """How often a member's loss is below a stranger's, ties counting half: 0.5 is guessing, 1 is certainty."""
    return auc(-torch.cat([inside, outside]), torch.arange(len(inside) + len(outside)) < len(inside))


def curve(inside: torch.Tensor, outside: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """At each limit of the loss: the share of strangers below it, taken for members, and of members, found."""
    limits = torch.cat([inside, outside]).sort().values
    shares: Sequence[np.ndarray] = [
        torch.searchsorted(each.sort().values, limits, right=True).numpy() / len(each) for each in (outside, inside)
    ]
    return shares[0], shares[1]

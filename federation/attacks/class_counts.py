"""How many examples of each class a client has: by how each class's part of the last layer moved in its training."""

import numpy as np
import torch
from torch import nn


def row_lengths(before: nn.Module, after: nn.Module) -> np.ndarray:
    """How far each class's weights in the last layer moved, (classes,): Euclidean."""
    return _step(before, after, "weight").norm(dim=1).numpy()


def bias_steps(before: nn.Module, after: nn.Module) -> np.ndarray:
    """By how much each class's bias in the last layer grew, (classes,)."""
    return _step(before, after, "bias").numpy()


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, from -1 to 1: Pearson's of the ranks, of which equal values share the mean. NaN of a constant."""
    ranks = [
        [(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values] for values in (one, other)
    ]
    if any(len(set(each)) == 1 for each in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _step(before: nn.Module, after: nn.Module, name: str) -> torch.Tensor:
    one, other = (
        [each for each in network.modules() if isinstance(each, nn.Linear)][-1] for network in (before, after)
    )
    return (getattr(other, name) - getattr(one, name)).detach()

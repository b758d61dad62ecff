"""How many examples of each class a client has: by how far each class's row of the last layer has moved."""

import numpy as np
import torch
from torch import nn


def movement(before: nn.Module, after: nn.Module) -> np.ndarray:
    """How far each class's weights in the last layer moved in a training, (classes,): Euclidean."""
    one, other = (_last_layer(each).detach() for each in (before, after))
    return (other - one).norm(dim=1).numpy()


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, from -1 to 1: Pearson's of the ranks, of which equal values share the mean. NaN of a constant."""
    ranks = [
        [(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values] for values in (one, other)
    ]
    if any(len(set(each)) == 1 for each in ranks):
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def _last_layer(network: nn.Module) -> torch.Tensor:
    *_, last = (each for each in network.modules() if isinstance(each, nn.Linear))
    return last.weight

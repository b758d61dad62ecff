"""Filters to begin with, where noise would have to be trained away first."""

import math

import torch
from torch.nn import functional as F


def cosine_filters(count: int, size: int) -> torch.Tensor:
    """The count / 2 smoothest waves of the 2-d cosine transform, each with its negative: (count, 3, size, size).

    In brightness and two colour contrasts; close to what a first layer learns, and to whitening once normalised.
    """
    at = (torch.arange(size) + 0.5) * math.pi / size
    wave = F.normalize(torch.cos(at * torch.arange(size)[:, None]), dim=1)  # (frequency, position)
    colour = F.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]), dim=1)
    every = [(c, fy, fx) for c in range(3) for fy in range(size) for fx in range(size)]
    smoothest = sorted(every, key=lambda f: (f[1] + f[2] + 1.5 * (f[0] > 0) + 0.1 * f[0], f))[: count // 2]
    filters = [torch.einsum("c,y,x->cyx", colour[c], wave[fy], wave[fx]) for c, fy, fx in smoothest]
    return torch.stack([sign * f for f in filters for sign in (1, -1)])

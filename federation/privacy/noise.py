"""Random numbers that nobody can know or repeat: noise and draws, from the operating system's generator."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

RandomBytes = Callable[[int], bytes]
PER_BLOCK = 1 << 20  # normal numbers made at a time, so that memory stays small


@dataclass(frozen=True)
class Source:
    """Where random bytes come from. A seed makes them repeatable, and with that worthless for privacy."""

    seed: int | None = None

    def bytes_of(self, partition: int, server_round: int) -> RandomBytes:
        """Random bytes for one training."""
        if self.seed is None:
            return os.urandom
        return np.random.default_rng([self.seed, partition, server_round]).bytes


def secret_normal(size: int, random_bytes: RandomBytes = os.urandom) -> torch.Tensor:
    """Independent standard normal numbers, (size,) float32.

    Box-Muller in float64, and each the sum of four, halved, so that the grid of floating-point numbers does not show
    what was drawn (Holohan and Braghin 2021, arXiv:2107.10138). That makes the attack of Mironov 2012
    (doi:10.1145/2382196.2382264) far harder, and does not exclude it.
    """
    parts = [_normal_block(min(PER_BLOCK, size - start), random_bytes) for start in range(0, size, PER_BLOCK)]
    return torch.cat(parts) if parts else torch.zeros(0)


def poisson_draw(number: int, rate: float, random_bytes: RandomBytes = os.urandom) -> torch.Tensor:
    """Positions of the examples drawn, each of `number` by itself with probability `rate`; sorted, int64."""
    if rate >= 1:
        return torch.arange(number)
    drawn = np.frombuffer(random_bytes(8 * number), np.uint64) < np.uint64(rate * 2.0**64)
    return torch.from_numpy(np.flatnonzero(drawn))


def _normal_block(size: int, random_bytes: RandomBytes) -> torch.Tensor:
    pairs = 2 * size  # two numbers come of each pair, and four make one
    words = np.frombuffer(random_bytes(16 * pairs), np.uint64).reshape(2, pairs) >> np.uint64(11)
    uniform = torch.from_numpy(words.astype(np.float64)).add_(0.5).mul_(2.0**-53)  # above 0, up to 1
    radius, angle = uniform[0].log_().mul_(-2).sqrt_(), uniform[1].mul_(2 * torch.pi)
    four = torch.stack([angle.cos(), angle.sin()]).mul_(radius).view(4, size)
    return four.sum(0).div_(2).float()

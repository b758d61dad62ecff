"""A fixed front end with one linear layer: little to train, which suits private training.

Scattering: Bruna and Mallat 2013 (arXiv:1203.1513), by formulas alone. For private training with a linear layer, and
normalised image by image: Tramèr and Boneh 2021 (arXiv:2011.11660).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

SIDE, CELLS = 32, 8  # pixels of an image's side, and cells in it: a feature is a mean over about 4x4 pixels
ANGLES = 8
SIZES, STRIDES = (7, 10), (1, 2)  # of the fine and the coarse wavelets; even with stride 2, which keeps the symmetry
CHANNELS = 3 * (1 + ANGLES + ANGLES + ANGLES * ANGLES)
FEATURES = CHANNELS * CELLS * CELLS // 2
LONGEST = 4.0  # with which a gradient is about as long as the clipping norm of 1, to which the noise is made
AT_A_TIME = 50  # images: their waves take 20 MB
COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))  # brightness and two contrasts


class Scattering(nn.Module):
    """77,760 weights for 10 classes: the linear layer's. The filters don't train, don't travel and aren't saved.

    An image (3, 32, 32) and its mirror image have the same features.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.register_buffer("colours", F.normalize(torch.tensor(COLOURS), dim=1), persistent=False)
        for scale, (size, stride) in enumerate(zip(SIZES, STRIDES, strict=True)):
            self.register_buffer(f"wavelets{scale}", wavelets(scale, size), persistent=False)
            self.register_buffer(f"means{scale}", cell_means(SIDE // stride), persistent=False)
        self.head = nn.Linear(FEATURES, num_classes, bias=False)  # a bias would not stay stable at its rate
        nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))

    @torch.no_grad()
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(n, FEATURES) of an L2 norm of about 2, LONGEST at most; an image's do not depend on the others."""
        return torch.cat([self._of_few(few) for few in x.split(AT_A_TIME)])

    def _of_few(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("oc,ncyx->noyx", self.colours, x)
        fine, coarse = self.moduli(x, 0), self.moduli(x, 1)  # (n, 3, 8, 32, 32), (n, 3, 8, 16, 16)
        both = self.moduli(fine.flatten(1, 2), 1).unflatten(1, (3, ANGLES))  # (n, 3, 8, 8, 16, 16)
        orders = [self.cells(x, 0), self.cells(fine, 0), self.cells(coarse, 1), self.cells(both, 1)]
        return torch.cat([both_views(normalised(each)).flatten(1) for each in orders], 1) * (
            LONGEST / math.sqrt(FEATURES)
        )

    def moduli(self, x: torch.Tensor, scale: int) -> torch.Tensor:
        """How strong each channel's waves of this scale are, by angle: (n, c, y, x) to (n, c, 8, y / s, x / s)."""
        filters, stride = getattr(self, f"wavelets{scale}"), STRIDES[scale]
        padded = F.pad(x.flatten(0, 1)[:, None], [(filters.shape[-1] - stride) // 2] * 4, mode="reflect")
        waves = F.conv2d(padded, filters, stride=stride).unflatten(1, (2, ANGLES))
        return waves.square().sum(1).sqrt().unflatten(0, x.shape[:2])

    def cells(self, x: torch.Tensor, scale: int) -> torch.Tensor:
        """Local means: (..., y, x) to (..., 8, 8)."""
        means = getattr(self, f"means{scale}")
        return means @ x @ means.T


def wavelets(scale: int, size: int) -> torch.Tensor:
    """Morlet wavelets at angles of 0 to 7/8 pi: (16, 1, size, size), the real parts first. Sums are 0."""
    width, frequency, slant = 0.8 * 2**scale, 0.75 * math.pi / 2**scale, 0.5  # those of Bruna and Mallat's programs
    at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = at[:, None], at[None]
    parts = []
    for angle in (math.pi * i / ANGLES for i in range(ANGLES)):
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        window = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * width**2)) * slant / (2 * math.pi * width**2)
        wave = torch.exp(1j * frequency * along)
        wave = window * (wave - (window * wave).sum() / window.sum())
        parts.append(torch.stack([wave.real, wave.imag]))
    return torch.stack(parts, 1).flatten(0, 1)[:, None].float()


def cell_means(side: int) -> torch.Tensor:
    """(8, side): weights of a row's pixels in each cell's mean, by a Gaussian of 1.6 pixels of the image."""
    pixel = SIDE / side
    at, centre = (torch.arange(side) + 0.5) * pixel, (torch.arange(CELLS) + 0.5) * SIDE / CELLS
    weights = torch.exp(-((at - centre[:, None]) ** 2) / (2 * 1.6**2))
    return weights / weights.sum(1, keepdim=True)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Each image's and colour's values with mean 0 and variance 1; of an even image, 0. x: (n, 3, ...)."""
    flat = x.flatten(2)
    variance, mean = torch.var_mean(flat, 2, correction=0, keepdim=True)
    return ((flat - mean) / (variance + 1e-5).sqrt()).view_as(x)


def both_views(x: torch.Tensor) -> torch.Tensor:
    """The mean with the mirror image's: (n, 3, angles..., 8, 8) to (n, 3, angles..., 8, 4), as half of it is enough."""
    mirrored = x.flip(-1)
    for axis in range(2, x.dim() - 2):
        mirrored = mirrored.flip(axis).roll(1, axis)  # the angle a becomes pi - a
    return ((x + mirrored) / 2)[..., : CELLS // 2]

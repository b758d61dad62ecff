"""Images out of the gradient of one training step: Geiping et al. 2020, arXiv:2003.14053."""

from collections.abc import Callable, Sequence

from federation.networks.optimiser import SGD

import torch
from torch import nn
from tqdm import tqdm

STEPS = 600
RATE, FALLS = 0.1, (225, 375, 525)  # of the search: at these steps its rate falls to a tenth
SMOOTHNESS = 0.03  # weight of the differences between neighbouring pixels


def gradient_of_step(before: nn.Module, after: nn.Module, learning_rate: float) -> list[torch.Tensor]:
    """Of each parameter, from the weights before and after one step of Optimiser without Muon.

    Its momentum was 0 then, so with Nesterov's the step is rate x (1 + momentum) x (gradient + decay x weight).
    """
    factor = learning_rate * (1 + SGD["momentum"])
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return [((old - new) / factor - SGD["weight_decay"] * old).detach() for old, new in pairs]


def invert(
    network: nn.Module,
    wanted: Sequence[torch.Tensor],
    loss: Callable[[torch.Tensor], torch.Tensor],
    bounds: tuple[torch.Tensor, torch.Tensor],
    start: torch.Tensor,
    title: str = "",
) -> torch.Tensor:
    """Inputs within bounds at which the gradient of loss(inputs) points where `wanted` does; sought from start.

    By steps of Adam along the sign of the gradient of 1 - cosine, and a little for smooth images.
    """
    x = start.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=RATE)
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, FALLS, 0.1)
    parameters, norm = list(network.parameters()), _norm(wanted)
    for _ in tqdm(range(STEPS), title, unit=" steps", leave=False, disable=None):
        made = torch.autograd.grad(loss(x), parameters, create_graph=True)
        dot = torch.stack([(one * other).sum() for one, other in zip(made, wanted, strict=True)]).sum()
        rough = x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
        distance = 1 - dot / (norm * _norm(made)).clamp(min=1e-12) + SMOOTHNESS * rough
        (slope,) = torch.autograd.grad(distance, x)
        x.grad = slope.sign()
        adam.step()
        schedule.step()
        with torch.no_grad():
            x.copy_(torch.minimum(torch.maximum(x, bounds[0]), bounds[1]))
    return x.detach()


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of two images in grey levels from 0 to 255, in decibels; infinite for the same."""
    return float(-10 * torch.log10(((one - other) / 255).square().mean()))


def _norm(arrays: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([each.square().sum() for each in arrays]).sum().sqrt()

"""DP-SGD: gradient descent that bounds what its steps tell of any one example (Abadi et al. 2016, arXiv:1607.00133)."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from federation.config import Part, Recipe
from federation.privacy.noise import RandomBytes, poisson_draw, secret_normal
from federation.task.training import Examples, Loss

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

Tensors = dict[str, torch.Tensor]  # by a parameter's name
MOST_NUMBERS = 2**22  # of gradients, one for each example, held at a time: few enough for the caches


@dataclass(frozen=True)
class Plan:
    """The steps of one local training."""

    steps: int
    rate: float  # probability with which a step draws each example
    noise: float  # standard deviation, in clipping norms
    clip: float  # L2 norm that one example's gradient has at most
    learning_rate: Callable[[float], float]  # at each time of the training, from 0 to 1
    proximal_mu: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe, part: Part, size: int, noise: float, clip: float) -> Self:
        """As the recipe has it with so many examples; the learning rate falls in a straight line over all rounds."""

        def learning_rate(t: float) -> float:
            return recipe.learning_rate * (1 - part.start - (part.end - part.start) * t)

        rate, steps = draws(recipe, size)
        return cls(steps, rate, noise, clip, learning_rate, recipe.proximal_mu)


def draws(recipe: Recipe, size: int) -> tuple[float, int]:
    """With which probability a step draws each of so many examples, and how many steps a round has.

    Who has fewer examples than a batch draws all of them in each step.
    """
    rate = min(1.0, recipe.batch_size / size)
    return rate, recipe.local_epochs * round(1 / rate)


def train(
    module: nn.Module, examples: Examples, loss: Loss, plan: Plan, random_bytes: RandomBytes, title: str = ""
) -> Tensors:
    """The parameters after these steps; the module stays as it is.

    loss: the mean over a batch; it is only ever given one example. Inputs may be of half precision, to take less room.

    A step draws each example by itself, adds up their gradients, each shortened to plan.clip, adds noise, and divides
    by how many it draws on average: how many it drew this time would tell of single ones.
    """
    weights = {name: each.detach().clone() for name, each in module.named_parameters() if each.requires_grad}
    start = dict(weights)
    number, first = len(examples[0]), next(iter(weights.values()))
    for step in tqdm(range(plan.steps), title, unit=" steps", leave=False, disable=None):
        drawn = poisson_draw(number, plan.rate, random_bytes)
        batch = tuple(each[drawn].to(first.device) for each in examples)
        batch = tuple(each.to(first.dtype) if each.is_floating_point() else each for each in batch)
        sums = clipped_sum(module, weights, batch, loss, plan.clip)
        noise = secret_normal(sum(each.numel() for each in weights.values()), random_bytes).to(first.device)
        rate = plan.learning_rate((step + 0.5) / plan.steps)
        for part, (name, now) in zip(
            noise.split([each.numel() for each in weights.values()]), weights.items(), strict=True
        ):
            mean = (sums[name] + plan.noise * plan.clip * part.view_as(now)) / (plan.rate * number)
            weights[name] = now - rate * (mean + plan.proximal_mu * (now - start[name]))
    return weights


def clipped_sum(module: nn.Module, weights: Tensors, batch: Examples, loss: Loss, clip: float) -> Tensors:
    """The sum over a batch of each example's gradient, shortened to an L2 norm of clip; 0 where it is not finite."""
    if not len(batch[0]):
        return {name: torch.zeros_like(each) for name, each in weights.items()}
    if isinstance(module, nn.Linear) and len(weights) == len(list(module.parameters())):
        in_closed_form = _of_linear(module, weights, batch, loss, clip)
        if in_closed_form is not None:
            return in_closed_form
    gradients = vmap(
        grad(functools.partial(_loss_of_one, module, loss)), (None, *[0] * len(batch)), randomness="different"
    )
    size = max(1, MOST_NUMBERS // max(1, sum(each.numel() for each in weights.values())))
    total = {name: torch.zeros_like(each) for name, each in weights.items()}
    for part in zip(*(each.split(size) for each in batch), strict=True):
        with warnings.catch_warnings():  # of layers that torch does one example after the other
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            each_one = gradients(weights, *part)
        scale = _scale(torch.stack([g.flatten(1).norm(dim=1) for g in each_one.values()]).norm(dim=0), clip)
        for name, g in each_one.items():
            total[name] += (scale @ _finite(g.flatten(1), scale)).view_as(total[name])
    return total


def _loss_of_one(module: nn.Module, loss: Loss, weights: Tensors, *example: torch.Tensor) -> torch.Tensor:
    """Of a batch of this example alone."""

    def network(*inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(module, weights, inputs)

    return loss(network, tuple(each[None] for each in example))  # type: ignore[arg-type]


def _of_linear(module: nn.Linear, weights: Tensors, batch: Examples, loss: Loss, clip: float) -> Tensors | None:
    """In closed form: an example's gradient is its error's outer product with its input.

    None where the loss asks the network otherwise than once for one row, of which this is not true.
    """

    def of_one(added: torch.Tensor, *example: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        asked: list[torch.Tensor] = []

        def network(x: torch.Tensor) -> torch.Tensor:
            asked.append(x)
            return functional_call(module, weights, (x,)) + added

        return loss(network, tuple(each[None] for each in example)), asked  # type: ignore[arg-type]

    nothing = next(iter(weights.values())).new_zeros(len(batch[0]), module.out_features)
    errors, asked = vmap(grad(of_one, has_aux=True), randomness="different")(nothing, *batch)
    if len(asked) != 1 or asked[0].shape[1:-1] != (1,):
        return None
    inputs = asked[0][:, 0]
    with_bias = inputs.square().sum(1) + (1 if "bias" in weights else 0)
    scale = _scale(errors.norm(dim=1) * with_bias.sqrt(), clip)
    errors = _finite(errors, scale) * scale[:, None]
    sums = {"weight": errors.T @ _finite(inputs, scale)}
    return {**sums, "bias": errors.sum(0)} if "bias" in weights else sums


def _scale(norms: torch.Tensor, clip: float) -> torch.Tensor:
    """What each example's gradient is multiplied with: 0 where it is not finite, as that would tell of it."""
    return torch.where(norms.isfinite(), (clip / norms.clamp(min=1e-12)).clamp(max=1), 0)


def _finite(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Of examples that count for nothing, zeros: 0 times infinity is no number."""
    if (scale > 0).all():
        return values
    return torch.where((scale > 0).view(-1, *[1] * (values.dim() - 1)), values, 0)

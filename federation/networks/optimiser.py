"""The optimiser of local training: SGD, Muon for the kernels of convolutions, and FedProx's term."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.sgd import sgd

SGD: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "dampening": 0.0, "maximize": False}
MUON_MOMENTUM, NEWTON_SCHULZ_STEPS = 0.6, 3
MUON_RATE = 4 / 3  # in learning rates


class Optimiser:
    """Steps of these parameters, in place, with momenta that begin at 0.

    muon: whether kernels of convolutions take the steps of Muon (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon): the momentum with all its singular values near 1, so that all
    directions learn alike. Not depthwise ones, which are no matrices.
    proximal_mu: FedProx, Li et al. 2020, arXiv:1812.06127.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], muon: bool = False, proximal_mu: float = 0.0):
        self.parameters = list(parameters)
        self.kernels = {i for i, p in enumerate(self.parameters) if muon and p.dim() == 4 and p.shape[1] > 1}
        self.momenta: list[torch.Tensor | None] = [None] * len(self.parameters)
        self.proximal_mu = proximal_mu
        self.start = [p.detach().clone() for p in self.parameters] if proximal_mu else []

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor | None], rate: float) -> None:
        """One step at this learning rate; a parameter without a gradient, as forward may skip a layer, stays."""
        usable = {i: gradient for i, gradient in enumerate(gradients) if gradient is not None}
        if self.proximal_mu:  # the gradient of mu / 2 |w - start|^2
            usable = {i: g + self.proximal_mu * (self.parameters[i] - self.start[i]) for i, g in usable.items()}
        for i in self.kernels & set(usable):
            self._muon(i, usable[i], rate)
        used = [i for i in usable if i not in self.kernels]
        own: list[Any] = [[each[i] for i in used] for each in (self.parameters, usable, self.momenta)]
        # torch.optim.SGD as a function: the class imports torch's compiler, a second for each client.
        sgd(*own, lr=rate, **SGD)
        for i, momentum in zip(used, own[2], strict=True):
            self.momenta[i] = momentum

    def _muon(self, i: int, gradient: torch.Tensor, rate: float) -> None:
        old, kernel = self.momenta[i], self.parameters[i]
        momentum = gradient if old is None else old * MUON_MOMENTUM + gradient
        self.momenta[i] = momentum
        step = (gradient + MUON_MOMENTUM * momentum).flatten(1)  # Nesterov's
        kernel -= MUON_RATE * rate * orthogonal(step).view_as(kernel)


def orthogonal(matrix: torch.Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> torch.Tensor:
    """About U V^T of the singular value decomposition U S V^T, for singular values that are not tiny.

    By Muon's quintic Newton-Schulz iteration, x = p(x x^T) x, whose coefficients bring them to between 0.7 and 1.2 in
    few steps. Only the small matrix x x^T is carried from step to step, as p(x x^T) and it commute: half of the work.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonal(matrix.T, steps).T
    x = matrix / (matrix.norm() + 1e-7)
    square, product = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(steps):
        p = (square @ square).mul_(2.0315).add_(square, alpha=-4.7750)
        p.diagonal().add_(3.4445)
        square, product = p @ square @ p, p @ product
    return product @ x

"""Images and their classes out of what clients send after one step on one image each."""

from federation.attacks.gradient_inversion import gradient_of_step, invert
from federation.attacks.updates import Clients
from federation.networks.label_skew import priors

import torch
from torch.nn import functional as F

CPU = torch.device("cpu")
Found = list[tuple[torch.Tensor, int]]  # images (3, side, side) in grey levels from 0 to 255, and their classes


def gradient_of_update(clients: Clients, example: tuple) -> list[torch.Tensor]:
    """From an update of one step, as the server knows the recipe."""
    recipe, rate_at = clients.recipe, clients.task.model.rate_at
    rate = recipe.learning_rate * rate_at(0.5, recipe.own["final_rate"])  # the only step is halfway through the run
    return gradient_of_step(clients.start, clients.update(example), rate)


def classes_of(gradient: list[torch.Tensor], count: int) -> torch.Tensor:
    """Of so many images whose mean gradient this is: the last bias's is negative for a class that is there alone."""
    return gradient[-1].argsort()[:count]


def find(clients: Clients, gradient: list[torch.Tensor], count: int, private: bool = False, title: str = "") -> Found:
    """So many images whose mean gradient is nearest to this one; private: by private training's plain loss."""
    model, network, number = clients.task.model, clients.start, len(clients.classes)
    labels = classes_of(gradient, count)
    log_priors, targets = torch.zeros(count, number), F.one_hot(labels, number).float()
    if not private:
        of_one = [priors(label[None], number, clients.recipe.own, CPU) for label in labels]
        log_priors = torch.stack([log_prior for log_prior, _ in of_one])
        targets = torch.stack([table[label] for label, (_, table) in zip(labels, of_one, strict=True)])
    low, high = (model.to_input(torch.full((1, 3, 1, 1), grey), CPU) for grey in (0, 255))
    begin = 0.1 * torch.randn(
        count, *clients.schema["input_shape"], generator=torch.Generator().manual_seed(clients.seed)
    )

    def loss(inputs: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(network(inputs) + log_priors, targets)

    images = invert(network, gradient, loss, (low, high), begin, title)
    return list(zip(255 * (images - low) / (high - low), labels.tolist(), strict=True))

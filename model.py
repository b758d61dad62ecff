"""The network: how it is built, trained and evaluated; docs/own-federation.md says how to bring your own.

Examples are images, (n, 3, 32, 32) uint8, and labels, (n,) int64; images become floats one batch at a time.
"""

import functools
from collections.abc import Callable

from federation.config import ACCURACY, Part, Recipe
from federation.console import PublicError, say
from federation.networks.filters import cosine_filters
from federation.networks.label_skew import one_epoch, priors
from federation.networks.optimiser import Optimiser
from federation.networks.scattering import Scattering
from federation.task.classification import loss, show
from federation.task.compute import has_bfloat16
from federation.task.image_files import pictures
from federation.task.training import Examples, PrivateParts

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

MEAN = (125.3, 123.0, 113.9)  # of CIFAR-10's training pixels, per colour
STD = (63.0, 62.1, 66.7)
WARM_UP = 0.2  # of the whole run: the rate climbs from 0, then falls in a straight line
FORGET = 0.2  # BatchNorm's momentum: a round is a few hundred steps, so forget quickly
REPEATS = 2  # at most, of an image of a rare class in an epoch; no server can raise it, as updates tell more of such
NAME, METRICS = "cifar10", [ACCURACY]  # the first is the main one; whatever else evaluate() returns is shown too
# What train_round adds to plain FedAvg; 0 and false switch it off: server.py --set label_smoothing=0
SIMPLE = {"label_smoothing": 0.1, "logit_adjustment": True, "repeat_rare": True,
          "muon": False, "mirror": False, "final_rate": 0.0}  # fmt: skip
ADDED = {**SIMPLE, "muon": True, "mirror": True, "final_rate": 0.1, "bfloat16": 0.75}  # of the run: then too coarse
PLAIN = {"label_smoothing": 0.0, "logit_adjustment": False, "repeat_rare": False}  # as all need the class counts
MODELS = {  # each network's own defaults; under "private" what is otherwise with --private-training
    "cnn": {"batch_size": 128, "learning_rate": 0.15, **ADDED},
    "cnn-large": {"batch_size": 128, "learning_rate": 0.15, **ADDED},
    "scattering": {"batch_size": 128, "learning_rate": 4.0, **SIMPLE,
                   "private": {"batch_size": 1024, "learning_rate": 50.0, "local_epochs": 4, **PLAIN}},
    "lenet": {"batch_size": 32, "learning_rate": 0.02, **SIMPLE,
              "private": {"batch_size": 256, "learning_rate": 4.0, **PLAIN}},
}  # fmt: skip


class Cnn(nn.Module):
    """243,136 weights for 10 classes. Pooling comes before the normalisation, which it makes four times cheaper."""

    both_views = True  # predict by the mean of an image and its mirror image

    def __init__(self, num_classes: int, widths: tuple[int, int, int] = (64, 128, 128)):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, stride=2, padding=1, bias=False)
        self.stem.weight.data = cosine_filters(32, 4)
        self.norm = nn.BatchNorm2d(32, momentum=FORGET)
        self.blocks = nn.Sequential(block(32, widths[0]), block(*widths[:2]), block(*widths[1:], pool=False))
        self.head = nn.Linear(widths[2], num_classes, bias=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.both_views and not self.training:
            return (self.logits(x) + self.logits(x.flip(3))) / 2
        return self.logits(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:  # (n, 3, 32, 32); sizes below are for that, and cnn's widths
        x = F.gelu(self.norm(self.stem(x)))  # (n, 32, 16, 16)
        x = self.blocks(x)  # (n, 128, 4, 4)
        return self.head(x.amax((2, 3))) * 0.2  # small first logits keep training stable at the large learning rate


def block(wide_in: int, wide_out: int, pool: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(wide_in, wide_out, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:wide_in])  # some filters begin by passing on what comes in
    halve = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(conv, *halve, nn.BatchNorm2d(wide_out, momentum=FORGET), nn.GELU())


class LeNet(nn.Sequential):
    """The article's network, that of PyTorch's tutorial: 62,006 weights for 10 classes.

    Pooling comes before the ReLU, which it makes four times cheaper: the greatest of four and 0 is the same either way.
    """

    def __init__(self, num_classes: int):
        super().__init__(
            nn.Conv2d(3, 6, 5), nn.MaxPool2d(2), nn.ReLU(),  # (n, 6, 14, 14)
            nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU(),  # (n, 16, 5, 5)
            nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes),
        )  # fmt: skip


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "cnn": Cnn, "cnn-large": functools.partial(Cnn, widths=(96, 192, 256)), "scattering": Scattering, "lenet": LeNet,
}  # fmt: skip


def build(schema: dict, recipe: Recipe) -> nn.Module:
    """The untrained network; PyTorch's random state is the seed's when this is called."""
    name = recipe.model
    if name in ("lenet", "scattering") and schema.get("input_shape", [3, 32, 32]) != [3, 32, 32]:
        raise PublicError(f"{name} takes 32x32 images, data.py makes {schema['input_shape']}; set SIDE, or use cnn")
    network = NETWORKS[name](len(schema["classes"]))
    network.both_views = recipe.own["mirror"]
    return network


def rate_at(t: float, final: float = 0.0) -> float:
    """The learning rate at time t in [0, 1] of the whole run, as a share of its peak; final: at its end."""
    return t / WARM_UP if t < WARM_UP else final + (1 - final) * (1 - t) / (1 - WARM_UP)


def to_input(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Normalised floats, in the memory layout that convolutions on a CPU are quickest with."""
    x = images.to(device).float()
    x = (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def train_round(network: nn.Module, examples: Examples, recipe: Recipe, part: Part) -> dict[str, float]:
    """One client's local training in one server round, in place; for epochs and priors see label_skew.py."""
    images, labels = examples
    parameters: list[torch.Tensor] = [each for each in network.parameters() if each.requires_grad]  # frozen ones stay
    if not parameters:
        say("all layers of the network are frozen: there is nothing to train")
        return {"train_loss": evaluate(network, examples, recipe)["loss"]}
    device = parameters[0].device
    network.train()
    generator = torch.Generator().manual_seed(part.seed)
    orders = [one_epoch(labels, recipe.own["repeat_rare"] * REPEATS, generator) for _ in range(recipe.local_epochs)]
    batches = [batch for order in orders for batch in order.split(max(recipe.batch_size, 2))]
    if len(images) > 1:
        batches = [batch for batch in batches if len(batch) > 1]  # BatchNorm cannot learn from one example
    else:
        network.eval()  # the only way to learn from one: by the statistics that came with the weights
    optimiser = Optimiser(parameters, recipe.own["muon"], recipe.proximal_mu)
    log_prior, targets, total = torch.empty(0), torch.empty(0), 0.0
    for done, batch in enumerate(tqdm(batches, part.title, unit=" batches", leave=False, disable=None)):
        t = part.start + (part.end - part.start) * (done + 0.5) / len(batches)
        seen_images = images[batch]
        if recipe.own["mirror"]:
            mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
            seen_images = torch.where(mirrored, seen_images.flip(3), seen_images)
        with torch.autocast(device.type, torch.bfloat16, has_bfloat16(device) and t < recipe.own.get("bfloat16", 0)):
            logits = logits_of(network, to_input(seen_images, device)).float()
        if not done:
            log_prior, targets = priors(labels[orders[0]], logits.shape[1], recipe.own, device)
        mean = F.cross_entropy(logits + log_prior, targets[labels[batch].to(device)])
        gradients = torch.autograd.grad(mean, parameters, allow_unused=True)
        optimiser.step(gradients, recipe.learning_rate * rate_at(t, recipe.own["final_rate"]))
        total += mean.item() * len(batch)
    return {"train_loss": total / max(sum(len(batch) for batch in batches), 1)}


def private_training(network: nn.Module, examples: Examples) -> PrivateParts:
    """What --private-training trains, on what, by which loss; of scattering the linear layer, on features made once."""
    batches = (to_input(batch, next(network.parameters()).device) for batch in examples[0].split(500))
    if isinstance(network, Scattering):
        return network.head, (torch.cat([network.features(x).half().cpu() for x in batches]), examples[1]), loss
    return network, (torch.cat([x.half().cpu() for x in batches]), examples[1]), loss


def logits_of(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(n, classes); of a network with auxiliary outputs, such as torchvision's GoogLeNet in training, the first."""
    out = network(x)
    return out if isinstance(out, torch.Tensor) else out[0]


@torch.inference_mode()
def evaluate(network: nn.Module, examples: Examples, recipe: Recipe) -> dict[str, float]:
    """Means over these examples, by name: "loss", "accuracy" and whatever you add are shown wherever a run is."""
    images, labels = examples
    device = next(network.parameters()).device
    network.eval()
    total, right = 0.0, 0
    for batch, truth in zip(images.split(500), labels.to(device).split(500), strict=True):
        logits = logits_of(network, to_input(batch, device))  # (500, classes)
        total += F.cross_entropy(logits, truth, reduction="sum").item()
        right += (logits.argmax(1) == truth).sum().item()
    return {"loss": total / len(images), "accuracy": right / len(images)}


@torch.inference_mode()
def predict(network: nn.Module, examples: Examples) -> torch.Tensor:
    """Probabilities (n, classes) on the CPU; the labels are not looked at."""
    device = next(network.parameters()).device
    network.eval()
    batches = examples[0].split(500)
    return torch.cat([logits_of(network, to_input(batch, device)).softmax(1).cpu() for batch in batches])

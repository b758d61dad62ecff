"""The fixed front end for private training: its filters, its features, and what of it trains and travels."""

from federation.networks.scattering import (
    ANGLES,
    FEATURES,
    LONGEST,
    Scattering,
    both_views,
    cell_means,
    normalised,
    wavelets,
)
from federation.task.weights import frozen_weights, get_weights

import pytest
import torch
from torch import nn

import model

CLASSES = 4


@pytest.fixture(scope="module")
def network() -> Scattering:
    return Scattering(CLASSES)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("scale", "size"), [(0, 7), (1, 10)])
def test_a_wavelet_does_not_see_brightness(scale, size):
    filters = wavelets(scale, size)
    assert filters.shape == (2 * ANGLES, 1, size, size)
    assert filters.sum((2, 3)).abs().max() < 1e-6


@pytest.mark.parametrize(("scale", "size"), [(0, 7), (1, 10)])
def test_the_wavelet_at_a_right_angle_is_the_first_one_turned(scale, size):
    real, imaginary = wavelets(scale, size)[:, 0].unflatten(0, (2, ANGLES))
    assert torch.allclose(real[ANGLES // 2], real[0].T, atol=1e-6)
    assert torch.allclose(imaginary[ANGLES // 2], imaginary[0].T, atol=1e-6)


def test_a_wave_is_strongest_at_its_own_angle(network):
    """Upright stripes that repeat after 8 pixels, the fine scale's 2 2/3 and the coarse one's 5 1/3."""
    stripes = torch.cos(torch.arange(32) * 2 * torch.pi / (16 / 3)).expand(1, 1, 32, 32)
    strength = network.moduli(stripes, 1).mean((0, 1, 3, 4))
    assert strength.argmax() == 0
    assert strength[0] > 5 * strength[ANGLES // 2]


@pytest.mark.parametrize("side", [32, 16])
def test_cells_are_means(side):
    means = cell_means(side)
    assert means.shape == (8, side)
    assert torch.allclose(means.sum(1), torch.ones(8))
    assert torch.allclose(means, means.flip(0, 1)), "the last cell is the first one's mirror image"
    assert means[0].argmax() in range(side // 8), "a cell is mostly made of its own pixels"


def test_an_even_image_has_no_features(network):
    grey = torch.tensor([0.7, -1.0, 3.0])[None, :, None, None].expand(1, 3, 32, 32)
    assert network.features(grey).abs().max() < 1e-5


def test_normalised_by_hand():
    """Of 1 and 3 the mean is 2 and the variance 1; each colour of each image by itself."""
    x = torch.tensor([[[1.0, 3.0], [10.0, 30.0], [5.0, 5.0]]])
    assert torch.allclose(normalised(x), torch.tensor([[[-1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]]]), atol=1e-4)


def test_a_brighter_image_has_the_same_features(network, images):
    assert torch.allclose(network.features(images), network.features(images + 2), atol=1e-4)


def test_features_are_about_half_as_long_as_they_can_be(network, images):
    features = network.features(images)
    assert features.shape == (3, FEATURES)
    assert 0.3 * LONGEST < features.norm(dim=1).min() <= features.norm(dim=1).max() <= LONGEST


def test_an_image_has_the_same_features_alone_and_in_a_batch(network, images):
    together = network.features(images.repeat(20, 1, 1, 1))
    assert torch.allclose(network.features(images[1:2]), together[58:59], atol=1e-6)


def test_an_image_and_its_mirror_image_have_the_same_features(network, images):
    assert torch.allclose(network.features(images), network.features(images.flip(3)), atol=1e-6)
    assert not torch.allclose(network.features(images), network.features(images.flip(2)), atol=1e-4)


def test_the_mirror_image_of_an_angle_is_pi_less_the_angle():
    x = torch.zeros(1, 3, ANGLES, 8, 8)
    x[0, 0, 1, 0, 7] = 1.0  # at pi / 8, in the upper right corner
    expected = torch.zeros(1, 3, ANGLES, 8, 4)
    expected[0, 0, 7, 0, 0] = 0.5  # at 7 / 8 pi, in the upper left one
    assert torch.equal(both_views(x), expected)


def test_of_the_filters_nothing_travels_and_nothing_is_saved(network):
    assert [each.shape for each in get_weights(network)] == [(CLASSES, FEATURES)]
    assert frozen_weights(network) == {}
    assert list(network.state_dict()) == ["head.weight"]


def test_the_filters_are_those_of_formulas_whatever_the_seed():
    torch.manual_seed(1)
    one = dict(Scattering(CLASSES).named_buffers())
    torch.manual_seed(2)
    two = dict(Scattering(CLASSES).named_buffers())
    assert all(torch.equal(one[name], two[name]) for name in one)


def examples(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.arange(n) % CLASSES


def test_of_scattering_the_linear_layer_trains_privately_on_features(network):
    images, labels = examples(5)
    module, (features, targets), loss = model.private_training(network, (images, labels))
    x = model.to_input(images, torch.device("cpu"))
    assert module is network.head
    assert torch.equal(targets, labels)
    assert torch.allclose(features.float(), network.features(x), atol=1e-4), "in half of the memory"
    logits = features.float() @ module.weight.T
    assert loss(module, (features.float(), labels)).item() == pytest.approx(
        nn.functional.cross_entropy(logits, labels).item()
    )


def test_of_lenet_all_trains_privately_on_images():
    network, (images, labels) = model.LeNet(CLASSES), examples(2)
    module, (inputs, targets), _ = model.private_training(network, (images, labels))
    assert module is network
    assert torch.equal(inputs, model.to_input(images, torch.device("cpu")).half())
    assert torch.equal(targets, labels)

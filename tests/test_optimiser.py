"""The optimiser of local training: Muon for kernels, SGD for the rest, FedProx for both."""

from federation.networks.filters import cosine_filters
from federation.networks.optimiser import Optimiser, orthogonal

import pytest
import torch


def three_times(value: float) -> float:
    """Newton-Schulz on a number: what becomes of each singular value."""
    for _ in range(3):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


def test_each_singular_value_goes_its_own_way_towards_1():
    found = orthogonal(torch.diag(torch.tensor([3.0, 4.0])))
    expected = torch.diag(torch.tensor([three_times(0.6), three_times(0.8)]))
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(0.6 < value < 1.3 for value in (three_times(0.6), three_times(0.8), three_times(0.2)))


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16)])
def test_a_matrix_of_any_shape_becomes_about_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix * 1e3, steps=5))
    assert 0.6 < values.min() <= values.max() < 1.3
    assert orthogonal(matrix).shape == shape


def test_a_gradient_of_zeros_moves_nothing():
    kernel = torch.ones(2, 4, 3, 3)
    Optimiser([kernel], muon=True).step([torch.zeros_like(kernel)], 0.1)
    assert torch.equal(kernel, torch.ones(2, 4, 3, 3))


def test_two_steps_of_muon_by_hand():
    """Kernels of 1x1: a matrix with one singular value, which becomes three_times(1) whatever its size."""
    size = 4 / 3 * three_times(1.0)  # Muon's rate is 4/3 of the learning rate
    kernel = torch.zeros(1, 4, 1, 1)
    gradient = torch.tensor([0.0, 5.0, 0.0, 0.0]).reshape(1, 4, 1, 1)
    other = torch.tensor([0.0, 0.0, 16.0, 0.0]).reshape(1, 4, 1, 1)
    optimiser = Optimiser([kernel], muon=True)
    optimiser.step([gradient], 0.1)
    assert kernel.ravel().tolist() == pytest.approx([0, -0.1 * size, 0, 0], abs=1e-6)
    optimiser.step([other], 0.1)  # the momentum is (3, 16); Nesterov's step other + 0.6 of it: (1.8, 25.6)
    length = (1.8**2 + 25.6**2) ** 0.5
    second = [0, -0.1 * size * (1 + 1.8 / length), -0.1 * size * 25.6 / length, 0]
    assert kernel.ravel().tolist() == pytest.approx(second, abs=1e-6)


def test_muon_is_for_kernels_that_are_matrices_and_sgd_for_the_rest():
    first, kernel, depthwise, linear, bias = (
        torch.zeros(shape) for shape in [(8, 3, 4, 4), (8, 8, 3, 3), (8, 1, 3, 3), (2, 8), (2,)]
    )
    every = [first, kernel, depthwise, linear, bias]
    assert Optimiser(every, muon=True).kernels == {0, 1}
    assert Optimiser(every).kernels == set()
    Optimiser(every, muon=True).step([torch.ones_like(each) for each in every], 0.5)
    assert all(torch.allclose(each, torch.tensor(-0.5 * 1.9)) for each in (depthwise, linear, bias))
    for each in (first, kernel):
        assert each.norm().item() == pytest.approx(0.5 * 4 / 3 * three_times(1.0), abs=1e-4)


@pytest.mark.parametrize("muon", [False, True])
def test_what_has_no_gradient_stays_and_has_no_momentum(muon):
    one, other = torch.ones(4, 4, 1, 1), torch.ones(4, 4, 1, 1)
    optimiser = Optimiser([one, other], muon)
    optimiser.step([None, torch.ones_like(other)], 0.1)
    assert torch.equal(one, torch.ones_like(one))
    assert not torch.equal(other, one)
    assert optimiser.momenta[0] is None


@pytest.mark.parametrize("muon", [False, True])
def test_fedprox_pulls_back_to_where_the_training_began(muon):
    kernel = torch.ones(1, 4, 1, 1)
    optimiser = Optimiser([kernel], muon, proximal_mu=2.0)
    kernel += 3.0
    optimiser.step([torch.zeros_like(kernel)], 0.01)
    # SGD: mu (4 - 1) + weight decay 5e-4 * 4, times 1.9 with Nesterov's momentum. Muon: of four equal numbers, a half.
    expected = 4 - 0.01 * (4 / 3 * three_times(1.0) / 2 if muon else 1.9 * (6 + 5e-4 * 4))
    assert kernel.ravel().tolist() == pytest.approx([expected] * 4, abs=1e-5)


def test_the_first_filters_are_waves_of_length_one_with_their_negatives():
    filters = cosine_filters(32, 4)
    assert filters.shape == (32, 3, 4, 4)
    assert torch.allclose(filters[0], torch.full((3, 4, 4), 48**-0.5))  # the mean brightness
    assert torch.equal(filters[0::2], -filters[1::2])
    products = filters[0::2].flatten(1) @ filters[0::2].flatten(1).T
    assert torch.allclose(products, torch.eye(16), atol=1e-6)

"""What a server can read from an update: the attacks' arithmetic, by hand, and the program."""

import math

from federation.attacks import class_counts, gradient_inversion, images, membership
from federation.attacks.updates import Clients, mean
from federation.console import PublicError
from federation.privacy import accounting
from federation.task.task import open_task

import numpy as np
import pytest
import torch
from helpers.example_runs import call
from torch import nn
from torch.nn import functional as F

import leak
import model


@pytest.fixture(autouse=True)
def _threads():
    """As they were, for the program sets them for this whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clients():
    task = open_task()
    return Clients(task, task.open_dataset("synthetic"), "lenet", 0)


def example(label: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(label))
    return pixels, torch.tensor([label])


def linear(weight: list, bias: list) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
    return layer


# An image


def test_an_error_of_a_tenth_of_the_range_is_20_decibels():
    black = torch.zeros(3, 2, 2)
    assert gradient_inversion.psnr(black + 25.5, black) == pytest.approx(20)
    assert gradient_inversion.psnr(black + 255, black) == pytest.approx(0, abs=1e-5)
    assert gradient_inversion.psnr(black, black) == math.inf


@pytest.mark.parametrize("label", [0, 7])
def test_the_gradient_recovered_from_one_step_is_that_of_the_loss(clients, label):
    pixels, labels = example(label)
    frequencies = torch.full((10,), 0.01)
    frequencies[label] += 1
    frequencies /= frequencies.sum()
    target = 0.9 * F.one_hot(labels, 10) + 0.1 * frequencies  # smoothed by a tenth
    inputs = (pixels.float() - torch.tensor(model.MEAN).view(3, 1, 1)) / torch.tensor(model.STD).view(3, 1, 1)
    loss = F.cross_entropy(clients.start(inputs) + frequencies.log(), target)
    expected = torch.autograd.grad(loss, list(clients.start.parameters()))
    found = images.gradient_of_update(clients, (pixels, labels))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6


def test_the_class_of_one_image_is_read_from_the_last_bias(clients):
    found = [images.classes_of(images.gradient_of_update(clients, example(label)), 1).item() for label in (0, 4, 9)]
    assert found == [0, 4, 9]


def test_the_classes_of_three_images_are_read_from_the_mean_of_their_gradients(clients):
    each = [images.gradient_of_update(clients, example(label)) for label in (8, 1, 5)]
    summed = [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)]
    assert sorted(images.classes_of(summed, 3).tolist()) == [1, 5, 8]


@pytest.mark.slow
def test_a_private_gradient_without_noise_is_the_gradient_cut_to_a_norm_of_1(clients):
    pixels, labels = example(3)
    inputs = model.to_input(pixels.clone(), torch.device("cpu")).half().float()  # as private training keeps them
    loss = F.cross_entropy(clients.start(inputs), labels)
    expected = torch.autograd.grad(loss, list(clients.start.parameters()))
    norm = math.sqrt(sum(each.square().sum().item() for each in expected))
    assert norm > 1
    for one, other in zip(clients.private_gradient((pixels, labels), 0.0), expected, strict=True):
        torch.testing.assert_close(one, other / norm, rtol=1e-3, atol=1e-5)


def test_noise_of_a_private_gradient_is_drawn_anew_each_time_whatever_the_seed(clients):
    torch.manual_seed(0)
    first = clients.private_gradient(example(3), 1.0)[-1]
    torch.manual_seed(0)
    assert not torch.equal(first, clients.private_gradient(example(3), 1.0)[-1])


@pytest.mark.slow
def test_inverting_a_linear_layers_gradient_finds_the_only_input_that_has_it(monkeypatch):
    """Of the loss w * x with one weight the gradient is x itself, of which a cosine tells the sign and no size."""
    monkeypatch.setattr(gradient_inversion, "SMOOTHNESS", 0.0)
    network = nn.Linear(4, 1, bias=False)
    truth = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]])

    def loss(x):
        return network(x.flatten(1)).sum()

    wanted = torch.autograd.grad(loss(truth), list(network.parameters()))
    bounds = torch.tensor(-2.0), torch.tensor(2.0)
    found = gradient_inversion.invert(network, list(wanted), loss, bounds, torch.full((1, 1, 2, 2), 0.1))
    assert F.cosine_similarity(found.flatten(), truth.flatten(), 0) > 0.99
    assert found.abs().max() <= 2


# Members


@pytest.mark.parametrize(
    ("inside", "outside", "area"),
    [
        ([1, 2], [3, 4], 1),
        ([3, 4], [1, 2], 0),
        ([1, 1], [1, 1], 0.5),
        ([1, 2], [2, 3], 0.875),  # of four pairs three are right and one is a tie
        ([1, 5], [2, 3, 4], 0.5),
    ],
)
def test_the_area_is_how_often_a_member_has_the_smaller_loss_and_ties_count_half(inside, outside, area):
    assert membership.members_found(torch.tensor(inside).float(), torch.tensor(outside).float()) == area


def test_the_curve_says_at_each_limit_whom_it_takes_for_a_member():
    strangers, members = membership.curve(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
    assert strangers.tolist() == [0, 0.5, 0.5, 1]
    assert members.tolist() == [0.5, 1, 1, 1]


def test_the_loss_of_each_example_is_that_of_its_own_class():
    network, inputs = linear([[0.0], [0.0]], [0.0, math.log(3)]), torch.zeros(2, 1)
    found = membership.losses(network, (inputs, torch.tensor([0, 1])))
    torch.testing.assert_close(found, torch.tensor([math.log(4), math.log(4 / 3)]))


# Class counts


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 2, 4, 3], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1, 1, 2], [1, 2, 3], math.sqrt(3) / 2),  # ranks 1.5, 1.5, 3
    ],
)
def test_rank_correlation(one, other, expected):
    assert class_counts.rank_correlation(np.array(one), np.array(other)) == pytest.approx(expected)


def test_there_is_no_rank_correlation_with_what_is_constant():
    assert math.isnan(class_counts.rank_correlation(np.array([1, 1, 1]), np.array([1, 2, 3])))


def test_movement_is_read_class_by_class_from_the_last_layer():
    before = nn.Sequential(nn.Linear(1, 2), linear([[0.0, 0.0], [1.0, 1.0]], [0.0, 1.0]))
    after = nn.Sequential(nn.Linear(1, 2), linear([[3.0, 4.0], [1.0, 1.0]], [2.0, 0.5]))
    assert class_counts.row_lengths(before, after).tolist() == [5, 0]
    assert class_counts.bias_steps(before, after).tolist() == [2, -0.5]


# What all three look at


def test_the_mean_is_that_of_each_number():
    found = mean([linear([[1.0]], [0.0]), linear([[2.0]], [3.0]), linear([[6.0]], [0.0])])
    assert (found.weight.item(), found.bias.item()) == (3, 1)


def test_a_data_set_with_too_few_images_is_named(clients):
    with pytest.raises(PublicError, match=r"takes 6,001 training images, the data set has 6,000"):
        clients.draw(6001)


def test_updates_begin_with_the_same_weights_and_leave_them_as_they_were(clients):
    before = [each.clone() for each in clients.start.parameters()]
    clients.update(example(1))
    clients.private_gradient(example(1), 1.0)
    assert all(torch.equal(*pair) for pair in zip(before, clients.start.parameters(), strict=True))


# The program


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["faces"], "ATTACK must be one of image, members, classes, got 'faces'"),
        (["image", "--seed", -1], "--seed must be between 0 and 4294967295, got -1"),
    ],
)
def test_wrong_use_is_one_line(words, says, capsys):
    assert call(leak.main, *words) == 2
    assert capsys.readouterr().err == f"leak: error: {says}\n"


def test_data_that_is_not_there_is_one_line(capsys):
    assert call(leak.main, "--dataset", "nowhere") == 1
    err = capsys.readouterr().err
    assert err.startswith("leak: error: --dataset 'nowhere' is neither")
    assert err.count("\n") == 1


def test_without_dp_accounting_it_says_what_to_install(capsys, monkeypatch):
    def missing():
        raise PublicError("private training needs: pip install dp-accounting")

    monkeypatch.setattr(accounting, "_dp_accounting", missing)
    leak.noise_for.cache_clear()
    assert call(leak.main, "classes", "--dataset", "synthetic") == 1
    assert capsys.readouterr().err == "leak: error: private training needs: pip install dp-accounting\n"


def test_class_counts_of_generated_images_are_read_and_drawn(federation, tmp_path):
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    out = tmp_path / "leaks"
    said = federation.start("leak", "leak.py", "classes", "--dataset", "synthetic", "--out", out).ends(0)
    (single,) = (line for line in said.splitlines() if "one update, rows" in line)
    assert np.mean([float(word) for word in single.split()[-3:]]) > 0.6
    assert (out / "classes.png").read_bytes().startswith(b"\x89PNG")

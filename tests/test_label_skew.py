"""What training does where a client's classes are not as frequent as the others'; answers worked out by hand."""

import math
from collections import Counter

from federation.networks.label_skew import one_epoch

import pytest
import torch
from helpers.tasks import recipe
from torch import nn

import model


def taken(labels: list[int], most: int = 8, epochs: int = 1) -> Counter[int]:
    """How many times each example's place comes."""
    generator = torch.Generator().manual_seed(0)
    of_labels = torch.tensor(labels, dtype=torch.int64)
    orders = [one_epoch(of_labels, most, generator) for _ in range(epochs)]
    assert all(len(order) == len(labels) for order in orders)
    return Counter(torch.cat(orders).tolist())


def test_an_epoch_has_as_many_examples_as_there_are_those_of_rare_classes_as_the_root_of_their_rarity_has_it():
    """Of 36 and 4 the four are in the pool three times each, the root of 36 / 4: in 48 places, of which 40 come."""
    come = taken([0] * 36 + [1] * 4, epochs=1000)
    assert [come[0] / 1000, come[36] / 1000] == pytest.approx([40 / 48, 3 * 40 / 48], abs=0.05)
    assert max(taken([0] * 36 + [1] * 4).values()) <= 3


@pytest.mark.parametrize(("most", "times"), [(8, 8), (3, 3)])
def test_one_example_comes_at_most_so_many_times(most, times):
    """The root of 100 / 1 is 10; of a pool of 100 and `times`, 101 come: all but a few."""
    come = taken([0] * 100 + [1], most, epochs=1000)
    assert come[100] / 1000 == pytest.approx(times * 101 / (100 + times), abs=0.1)


@pytest.mark.parametrize(
    ("labels", "most"),
    [
        ([0, 1, 2] * 5, 8),
        ([0] * 20 + [1] * 9, 8),  # the root of 2.22 is 1.49
        ([0] * 100 + [1], 1),
        ([0] * 100 + [1], 0),
        ([0, 0, 3], 8),  # classes without any
        ([7], 8),
        ([], 8),
    ],
)
def test_with_nearly_even_classes_or_without_repeats_each_comes_once(labels, most):
    assert taken(labels, most) == Counter(range(len(labels)))


class Spy(nn.Module):
    """Gives the logits 0 whatever it sees, and keeps the first number of each image, batch by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(2))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x[:, 0, 0, 0])
        return self.zero.expand(len(x), 2)


def epoch(labels: list[int], **own: object) -> tuple[float, Spy]:
    """The training loss of an epoch in one batch of images that are as black or white as their label."""
    made, network = recipe(batch_size=100, own={"mirror": False, **own}), Spy()
    images = 255 * torch.tensor(labels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    return model.train_round(network, (images, torch.tensor(labels)), made, made.part(0, 1))["train_loss"], network


def test_label_smoothing_and_logit_adjustment_by_hand():
    """Of four examples three are of class 0; adjusted, the network expects just that before it learns anything."""
    prior = [3.01 / 4.02, 1.01 / 4.02]
    entropy = -sum(p * math.log(p) for p in prior)
    adjusted = -(0.75 * math.log(prior[0]) + 0.25 * math.log(prior[1]))
    labels, once = [0, 0, 0, 1], {"repeat_rare": False}
    assert epoch(labels, label_smoothing=0, logit_adjustment=False, **once)[0] == pytest.approx(math.log(2))
    assert epoch(labels, label_smoothing=0, **once)[0] == pytest.approx(adjusted)
    assert epoch(labels, **once)[0] == pytest.approx(0.9 * adjusted + 0.1 * entropy)


def test_the_logits_are_adjusted_to_the_classes_of_the_epoch():
    """Of 40 examples the four of class 1 come more than four times."""
    loss, network = epoch([0] * 36 + [1] * 4, label_smoothing=0)
    (batch,) = network.seen
    rare = int((batch > 0).sum())
    assert (len(batch), rare > 4) == (40, True)
    frequencies = [(40 - rare + 0.01) / 40.02, (rare + 0.01) / 40.02]
    assert loss == pytest.approx(
        -sum(f * math.log(p) for f, p in zip([1 - rare / 40, rare / 40], frequencies, strict=True))
    )

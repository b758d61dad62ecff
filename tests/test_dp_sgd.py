"""DP-SGD beside gradients by hand and by autograd of one example after the other, and what bounds one example."""

import math
import os

from federation.privacy import dp_sgd
from federation.privacy.dp_sgd import Plan, clipped_sum, train
from federation.task import classification, regression

import pytest
import torch
from torch import nn

FAR = 1e6  # a clipping norm that nothing reaches


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in module.named_parameters() if each.requires_grad}


def by_autograd(module: nn.Module, batch, loss, clip: float) -> dict[str, torch.Tensor]:
    """One example after the other."""
    names = list(weights_of(module))
    total = {name: torch.zeros_like(each) for name, each in weights_of(module).items()}
    for i in range(len(batch[0])):
        trained = [each for each in module.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(loss(module, tuple(each[i : i + 1] for each in batch)), trained)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        for name, g in zip(names, gradients, strict=True):
            total[name] += g * min(1, clip / norm)
    return total


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return math.sqrt(sum((one[name] - other[name]).double().square().sum().item() for name in one))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(30, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(x).relu())


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))


def embedding_bag() -> nn.Module:  # as examples/text has it
    return nn.Sequential(nn.EmbeddingBag(30, 4, mode="mean", padding_idx=0), nn.Linear(4, 3))


def double_loss(network, batch):
    """Asks the network twice."""
    return classification.loss(network, batch) + network(batch[0] / 2).square().mean()


def scaled_loss(network, batch):
    """The network gets something else than the example."""
    return classification.loss(network, (batch[0] / 10, batch[1]))


CLASSES = torch.arange(7) % 3
NORMAL = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = torch.tensor([[1, 2, 0], [3, 4, 5], [1, 1, 0], [7, 0, 0], [8, 29, 2], [5, 5, 5], [6, 1, 2]])
KINDS = {
    "linear": (lambda: nn.Linear(3, 3), (NORMAL, CLASSES), classification.loss),
    "linear without bias": (lambda: nn.Linear(3, 3, bias=False), (NORMAL, CLASSES), classification.loss),
    "linear asked twice": (lambda: nn.Linear(3, 3), (NORMAL, CLASSES), double_loss),
    "linear of scaled inputs": (lambda: nn.Linear(3, 3), (NORMAL, CLASSES), scaled_loss),
    "linear regression": (lambda: nn.Linear(3, 1), (NORMAL, CLASSES.float()), regression.loss),
    "regression of two": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
                          (NORMAL, NORMAL[:, :2] * 3), regression.loss),
    "convolutions": (convolutions, (IMAGES, CLASSES), classification.loss),
    "embedding": (Bag, (WORDS, CLASSES), classification.loss),
    "embedding bag": (embedding_bag, (WORDS, CLASSES), classification.loss),
    "tied weights": (Tied, (NORMAL, CLASSES), classification.loss),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request):
    build, batch, loss = KINDS[request.param]
    torch.manual_seed(0)
    return build(), batch, loss


# By hand


def test_a_linear_layer_s_gradient_is_error_times_input():
    """Zero weights: probabilities of a half, so the error is (-1/2, 1/2) where the class is 0."""
    module = nn.Linear(2, 2)
    weights = {name: torch.zeros_like(each) for name, each in weights_of(module).items()}
    sums = clipped_sum(module, weights, (torch.tensor([[4.0, 6.0]]), torch.tensor([0])), classification.loss, FAR)
    assert sums["weight"].tolist() == [[-2, -3], [2, 3]]
    assert sums["bias"].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("wrapped", [False, True], ids=["closed form", "general"])
def test_a_gradient_of_norm_5_is_a_fifth_when_clipped_to_1_and_a_short_one_stays(wrapped):
    """The error of half a square is output minus target, twice that of the mean square: -1 times input (3, 4)."""
    linear = nn.Linear(2, 1, bias=False)
    module = nn.Sequential(linear) if wrapped else linear
    zero = {name: torch.zeros_like(each) for name, each in weights_of(module).items()}
    for x, expected in (([3.0, 4.0], [-0.6, -0.8]), ([0.3, 0.4], [-0.3, -0.4])):
        (clipped,) = clipped_sum(module, zero, (torch.tensor([x]), torch.tensor([0.5])), regression.loss, 1.0).values()
        assert clipped[0].tolist() == pytest.approx(expected)


# Beside autograd


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of EmbeddingBag
@pytest.mark.parametrize("clip", [FAR, 0.3])
def test_the_sum_is_that_of_single_examples(kind, clip):
    module, batch, loss = kind
    assert distance(clipped_sum(module, weights_of(module), batch, loss, clip), by_autograd(*kind, clip)) < 1e-5


def test_the_closed_form_is_the_general_way(monkeypatch):
    module = nn.Linear(3, 3)
    arguments = module, weights_of(module), (NORMAL, CLASSES), classification.loss, 0.3
    closed = clipped_sum(*arguments)
    monkeypatch.setattr(dp_sgd, "_of_linear", lambda *_: None)
    assert distance(closed, clipped_sum(*arguments)) < 1e-6


def test_a_batch_is_the_same_in_parts(monkeypatch):
    module, batch, loss = KINDS["convolutions"][0](), *KINDS["convolutions"][1:]
    whole = clipped_sum(module, weights_of(module), batch, loss, 0.3)
    monkeypatch.setattr(dp_sgd, "MOST_NUMBERS", 200)
    assert distance(whole, clipped_sum(module, weights_of(module), batch, loss, 0.3)) < 1e-6


# What one example can do


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_another_example_or_one_more_changes_the_sum_by_clip_at_most(kind):
    module, batch, loss = kind
    clip, weights = 0.2, weights_of(module)
    without = clipped_sum(module, weights, tuple(each[1:] for each in batch), loss, clip)
    more = clipped_sum(module, weights, batch, loss, clip)
    far = tuple(each * 1000 if each.is_floating_point() else each for each in batch)
    replaced = tuple(torch.cat([many[1:], one[:1]]) for one, many in zip(far, batch, strict=True))
    assert 0 < distance(without, more) <= clip + 1e-5
    assert distance(without, clipped_sum(module, weights, replaced, loss, clip)) <= clip + 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("name", ["linear", "linear regression", "regression of two", "convolutions"])
def test_an_example_without_a_finite_gradient_counts_for_nothing(name, bad):
    torch.manual_seed(0)
    module, batch, loss = KINDS[name][0](), *KINDS[name][1:]
    spoilt = batch[0].clone()
    spoilt[2].view(-1)[1] = bad
    others = [i for i in range(len(spoilt)) if i != 2]
    clip, weights = 0.2, weights_of(module)
    sums = clipped_sum(module, weights, (spoilt, *batch[1:]), loss, clip)
    without = clipped_sum(module, weights, tuple(each[others] for each in batch), loss, clip)
    assert distance(sums, without) <= (clip if math.isfinite(bad) else 0) + 1e-5


def test_no_examples_are_a_sum_of_zeros(kind):
    module, batch, loss = kind
    sums = clipped_sum(module, weights_of(module), tuple(each[:0] for each in batch), loss, 1.0)
    assert all(not each.any() for each in sums.values())
    assert sums.keys() == weights_of(module).keys()


# Steps


def plan(**values: object) -> Plan:
    return Plan(**{"steps": 1, "rate": 1, "noise": 0.0, "clip": FAR, "learning_rate": lambda t: 0.5, **values})


def test_without_noise_and_clipping_it_is_plain_gradient_descent():
    module, batch, loss = KINDS["convolutions"][0](), *KINDS["convolutions"][1:]
    before = weights_of(module)
    trained = train(module, batch, loss, plan(steps=3), bytes_of_zeros)
    assert distance(before, weights_of(module)) == 0  # the module stays as it is
    for _ in range(3):
        gradients = torch.autograd.grad(loss(module, batch), list(module.parameters()))
        with torch.no_grad():
            for each, g in zip(module.parameters(), gradients, strict=True):
                each -= 0.5 * g
    assert distance(trained, weights_of(module)) < 1e-6


def bytes_of_zeros(size: int) -> bytes:
    """Each example is drawn, at whatever rate."""
    return bytes(size)


def test_it_divides_by_how_many_it_draws_on_average():
    """All seven are drawn, and half of seven is on average: twice the mean gradient."""
    module = nn.Linear(3, 3)
    trained = train(module, (NORMAL, CLASSES), classification.loss, plan(rate=0.5), bytes_of_zeros)
    sums = by_autograd(module, (NORMAL, CLASSES), classification.loss, FAR)
    expected = {name: each - 0.5 * sums[name] / 3.5 for name, each in weights_of(module).items()}
    assert distance(trained, expected) < 1e-6


def test_a_step_that_draws_none_still_adds_noise():
    """noise 3, clip 2, rate 0.5, 1/1000 of 7 examples on average: steps of 0.5 * 6 / 0.007, normal."""
    module = nn.Linear(100, 100)
    examples = torch.zeros(7, 100), CLASSES

    def highest(size: int) -> bytes:
        return b"\xff" * size if size == 7 * 8 else os.urandom(size)

    trained = train(module, examples, classification.loss, plan(rate=1e-3, noise=3.0, clip=2.0), highest)
    step = (trained["weight"] - weights_of(module)["weight"]).double()
    deviation = 0.5 * 3 * 2 / 0.007
    assert step.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * step.numel()))
    assert step.mean().item() == pytest.approx(0, abs=5 * deviation / math.sqrt(step.numel()))


def test_frozen_parameters_don_t_move_and_get_no_noise():
    module = convolutions()
    module[0].requires_grad_(False)
    trained = train(module, (IMAGES, CLASSES), classification.loss, plan(noise=1.0, clip=1.0), bytes_of_zeros)
    assert set(trained) == {"4.weight", "4.bias"}
    half = nn.Linear(3, 3)
    half.bias.requires_grad_(False)  # closed form is of all parameters only
    assert set(train(half, (NORMAL, CLASSES), classification.loss, plan(), bytes_of_zeros)) == {"weight"}


def test_the_proximal_term_pulls_towards_the_start():
    """One weight w from 0, input 1, target 1: the gradient is 2 (w - 1), and mu w. Rate 0.25, mu 2: 0.5, then 0.5."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    examples = torch.ones(1, 1), torch.ones(1)
    for steps, expected in ((1, 0.5), (2, 0.5)):
        values = plan(steps=steps, learning_rate=lambda t: 0.25, proximal_mu=2.0)
        trained = train(module, examples, regression.loss, values, bytes_of_zeros)
        assert trained["weight"].item() == pytest.approx(expected)


def test_the_rate_is_asked_for_at_the_middle_of_each_step():
    asked = []

    def rate(t: float) -> float:
        asked.append(t)
        return 0.0

    train(nn.Linear(3, 3), (NORMAL, CLASSES), classification.loss, plan(steps=4, learning_rate=rate), bytes_of_zeros)
    assert asked == [0.125, 0.375, 0.625, 0.875]


def test_inputs_of_half_precision_give_what_their_values_give():
    halves = torch.tensor([[0.5, -2.0], [1.0, 0.25]]).half()
    targets = torch.tensor([0, 1])
    plan = Plan(steps=1, rate=1.0, noise=0.0, clip=1e9, learning_rate=lambda t: 1.0)
    module = nn.Linear(2, 2)
    one, other = (
        train(module, (each, targets), classification.loss, plan, os.urandom) for each in (halves, halves.float())
    )
    assert one["weight"].dtype == torch.float32
    assert torch.equal(one["weight"], other["weight"])

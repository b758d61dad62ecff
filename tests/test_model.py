"""The contract of model.py, for every network in it: replace the networks, and these still hold."""

import copy
import math

from federation.config import MODELS, Recipe

import numpy as np
import pytest
import torch
from torch import nn

import model

CLASSES = 4


def examples(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
    return torch.from_numpy(images), torch.from_numpy(rng.integers(0, CLASSES, n))


def train(network, n: int, span=(0.0, 1.0), partition: int = 0, **recipe) -> float:
    """The training loss of one local training on n examples, in batches of four."""
    made = Recipe(**{"batch_size": 4, "learning_rate": 0.01, "seed": 1, **recipe})
    return model.train_round(network, *examples(n), made, partition, 1, span)["train_loss"]


def same_bits(one: list[np.ndarray], two: list[np.ndarray]) -> bool:
    pairs = zip(one, two, strict=True)
    return all((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in pairs)


@pytest.fixture(autouse=True)
def one_thread():
    """For batches of four, threads that wait for each other cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=model.NETWORKS)
def name(request) -> str:
    return request.param


@pytest.fixture
def network(name):
    return model.build(name, CLASSES, seed=0)


def test_the_server_offers_exactly_the_networks_that_there_are():
    assert sorted(MODELS) == sorted(model.NETWORKS)


# Building


def test_a_network_is_a_function_of_the_seed(name, network):
    weights = model.get_weights(network)
    assert same_bits(model.get_weights(model.build(name, CLASSES, seed=0)), weights)
    assert not same_bits(model.get_weights(model.build(name, CLASSES, seed=1)), weights)


def test_building_leaves_the_global_random_state_alone(name):
    before = torch.get_rng_state()
    model.build(name, CLASSES, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("classes", [2, 10, 101])
def test_there_is_an_output_for_every_class(name, classes):
    network = model.build(name, classes, seed=0)
    assert model.predict(network, examples(3)[0]).shape == (3, classes)


# Weights in and out


def test_weights_come_and_go_by_position_with_their_own_types(name, network):
    state = network.state_dict()
    weights = model.get_weights(network)
    assert [(a.shape, str(a.dtype)) for a in weights] == [
        (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in state.values()
    ]
    other = model.build(name, CLASSES, seed=1)
    model.set_weights(other, weights)
    assert same_bits(model.get_weights(other), weights)
    images = examples(5)[0]
    assert np.array_equal(model.predict(other, images), model.predict(network, images))


def test_counters_beyond_what_a_float_can_count_survive(network):
    weights = model.get_weights(network)
    counters = [i for i, array in enumerate(weights) if array.dtype == np.int64]
    for i in counters:
        weights[i] = np.full(weights[i].shape, 2**53 + 1)
    model.set_weights(network, weights)
    assert all((model.get_weights(network)[i] == 2**53 + 1).all() for i in counters)


def test_read_only_weights_as_they_come_from_the_wire_are_taken(network):
    weights = model.get_weights(network)
    for array in weights:
        array.setflags(write=False)
    model.set_weights(network, weights)
    train(network, 4)  # would fail, or warn, on memory that can't be written
    assert not same_bits(model.get_weights(network), weights)


def refusal(network, weights: list[np.ndarray]) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        model.set_weights(network, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_or_too_many_weights_are_refused(network):
    weights = model.get_weights(network)
    for wrong in (weights[:-1], [*weights, weights[0]], []):
        words = refusal(network, wrong)
        assert str(len(wrong)) in words
        assert str(len(weights)) in words


def test_a_weight_of_another_shape_is_refused_by_name(network):
    for position, key in enumerate(network.state_dict()):
        weights = model.get_weights(network)
        weights[position] = weights[position][None]
        assert key in refusal(network, weights)


def test_a_weight_of_another_type_is_refused_by_name(network):
    for position, key in enumerate(network.state_dict()):
        weights = model.get_weights(network)
        weights[position] = weights[position].astype(np.float64)
        assert key in refusal(network, weights)


def test_buffer_positions_are_of_what_is_measured_and_not_trained(network):
    trained = {key for key, _ in network.named_parameters()}
    measured = [i for i, key in enumerate(network.state_dict()) if key not in trained]
    assert list(model.buffer_positions(network)) == measured


# Training


def test_training_is_a_function_of_the_seed_whatever_ran_before(network):
    results = {}
    for run, seed in (("one", 1), ("two", 1), ("other", 2)):
        copied = copy.deepcopy(network)
        torch.manual_seed(len(results))
        np.random.seed(len(results))
        loss = train(copied, 10, seed=seed)
        results[run] = [*model.get_weights(copied), np.array(loss)]
    assert same_bits(results["one"], results["two"])
    assert not same_bits(results["one"], results["other"])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])  # in batches of 4: fewer than a batch, and one left over
def test_any_number_of_images_trains_to_numbers(network, n):
    before = model.get_weights(network)
    before = [array.copy() for array in before]
    loss = train(network, n)
    assert isinstance(loss, float)
    assert np.isfinite(loss)
    assert loss > 0
    after = model.get_weights(network)
    assert all(np.isfinite(array).all() for array in after)
    assert not same_bits(before, after)


def test_frozen_weights_stay_while_the_others_learn(network):
    frozen, *learning = network.parameters()
    frozen.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in (frozen, *learning)]
    train(network, 8)
    assert torch.equal(frozen, before[0])
    assert not any(torch.equal(now, old) for now, old in zip(learning, before[1:], strict=True))


def test_training_again_after_evaluation_goes_on_measuring(network):
    train(network, 8)
    model.evaluate(network, *examples(8))
    before = [array.copy() for array in model.get_weights(network)]
    train(network, 8)
    after = model.get_weights(network)
    assert all((after[i] != before[i]).any() for i in model.buffer_positions(network))


def test_the_learning_rate_follows_a_schedule_over_all_rounds(network):
    early, late = copy.deepcopy(network), copy.deepcopy(network)
    train(early, 8, span=(0.2, 0.4))
    train(late, 8, span=(0.8, 1.0))
    assert not same_bits(model.get_weights(early), model.get_weights(late))


def test_a_round_is_its_own_part_of_the_run_unless_another_is_given(network):
    one, other = copy.deepcopy(network), copy.deepcopy(network)
    recipe = Recipe(rounds=4, batch_size=4, learning_rate=0.01)
    model.train_round(one, *examples(8), recipe, 0, 2)
    model.train_round(other, *examples(8), recipe, 0, 2, span=(0.25, 0.5))
    assert same_bits(model.get_weights(one), model.get_weights(other))


def test_the_progress_bar_counts_the_batches_of_all_epochs_under_its_title(network, monkeypatch):
    bars = []
    monkeypatch.setattr(model, "tqdm", lambda batches, title, **how: bars.append((len(batches), title)) or batches)
    recipe = Recipe(batch_size=4, learning_rate=0.01, local_epochs=2)
    model.train_round(network, *examples(8), recipe, 0, 1, title="round 1 of 3")
    assert bars == [(4, "round 1 of 3")]


def distance(one: list[np.ndarray], two: list[np.ndarray]) -> float:
    return sum(float(((a - b) ** 2).sum()) for a, b in zip(one, two, strict=True)) ** 0.5


def test_fedprox_keeps_the_weights_near_the_start_and_is_off_at_0(network):
    start = [each.detach().clone() for each in network.parameters()]
    steps, bits = {}, {}
    for mu in (None, 0.0, 10.0):
        copied = copy.deepcopy(network)
        train(copied, 16, local_epochs=3, learning_rate=0.05, **({} if mu is None else {"proximal_mu": mu}))
        steps[mu] = distance([each.detach().numpy() for each in copied.parameters()], [each.numpy() for each in start])
        bits[mu] = [array.tobytes() for array in model.get_weights(copied)]
    assert bits[None] == bits[0.0] != bits[10.0]
    assert steps[10.0] < 0.8 * steps[0.0]


class Sum(nn.Module):
    """The first of two logits is the sum of the weights, whatever the image; they share one gradient tensor."""

    def __init__(self, *weights: float):
        super().__init__()
        self.weights = nn.ParameterList(torch.tensor(weight) for weight in weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = sum(self.weights).expand(len(x))
        return torch.stack([first, torch.zeros_like(first)], 1)


@pytest.mark.parametrize("start", [(1.0,), (1.0, 0.5)])
@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_two_steps_of_fedprox_by_hand(start, mu):
    network = Sum(*start)
    recipe = Recipe(rounds=1, local_epochs=2, batch_size=2, learning_rate=0.1, proximal_mu=mu)
    model.train_round(network, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), recipe, 0, 1)
    weights, momenta = list(start), [0.0 for _ in start]
    for rate in (0.1 * 0.75 / 0.8, 0.1 * 0.25 / 0.8):  # at a quarter and at three quarters of the run
        slope = 1 / (1 + math.exp(-sum(weights))) - 0.5  # of the loss; half the labels are 0
        for i, first in enumerate(start):
            gradient = slope + mu * (weights[i] - first) + 5e-4 * weights[i]
            momenta[i] = 0.9 * momenta[i] + gradient
            weights[i] -= rate * (gradient + 0.9 * momenta[i])
    assert [weight.item() for weight in network.weights] == pytest.approx(weights, abs=1e-6)


def test_training_lowers_the_loss_on_what_it_is_trained_on(network):
    images, labels = examples(16)
    before = model.evaluate(network, images, labels)["loss"]
    train(network, 16, local_epochs=10)
    after = model.evaluate(network, images, labels)["loss"]
    assert after < before


# Evaluation and prediction


@pytest.mark.parametrize("n", [1, 3, 1203])  # 1203: uneven, whatever the batches are
def test_loss_and_accuracy_are_means_over_examples(network, n):
    images, labels = examples(n)
    loss, accuracy = (model.evaluate(network, images, labels)[name] for name in ("loss", "accuracy"))
    probabilities = np.asarray(model.predict(network, images), np.float64)
    chosen = probabilities[np.arange(n), labels.numpy()]
    assert loss == pytest.approx(-np.log(chosen).mean(), rel=1e-4)
    assert accuracy == pytest.approx((probabilities.argmax(1) == labels.numpy()).mean(), abs=1e-9)


def test_evaluation_measures_nothing_into_the_network(network):
    train(network, 8)
    before = [array.copy() for array in model.get_weights(network)]
    images, labels = examples(9)
    first = model.evaluate(network, images, labels)
    model.predict(network, images)
    assert model.evaluate(network, images, labels) == first
    assert same_bits(model.get_weights(network), before)


def test_an_example_is_judged_alone_whatever_is_evaluated_beside_it(network):
    train(network, 8)
    images, _ = examples(9)
    together, alone = model.predict(network, images), model.predict(network, images[:1])
    assert np.asarray(together)[0] == pytest.approx(np.asarray(alone)[0], abs=1e-6)


def test_probabilities_sum_to_1(network):
    probabilities = np.asarray(model.predict(network, examples(7)[0]))
    assert (probabilities >= 0).all()
    assert probabilities.sum(1) == pytest.approx(np.ones(7), abs=1e-5)

"""The project's own model.py, for every network in it: replace the networks, and these still hold."""

import copy
import math

from federation.config import Recipe
from federation.console import PublicError
from federation.task.task import open_task
from federation.task.weights import buffer_positions, get_weights, set_weights

import numpy as np
import pytest
import torch
from helpers.processes import ROOT
from helpers.tasks import build, other_tasks, recipe, write_task  # noqa: F401 (a fixture)
from torch import nn

import model

CLASSES = 4


def examples(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 3, 32, 32), np.uint8)
    return torch.from_numpy(images), torch.from_numpy(rng.integers(0, CLASSES, n))


def train(network, n: int, span=(0.0, 1.0), partition: int = 0, **values) -> float:
    """The training loss of one local training on n examples, in batches of four."""
    made = recipe(**{"batch_size": 4, "learning_rate": 0.01, "seed": 1, **values})
    return model.train_round(network, examples(n), made, made.part(partition, 1, span=span))["train_loss"]


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


SLOW = "cnn-large"  # cnn but wider: what holds for that is looked at by `make test`


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name == SLOW)) for name in model.NETWORKS])
def name(request) -> str:
    return request.param


@pytest.fixture
def network(name):
    return build(name, CLASSES, seed=0)


def test_the_task_offers_exactly_the_networks_that_there_are():
    assert sorted(open_task().models) == sorted(model.NETWORKS)


def test_without_a_word_it_is_the_first_network_with_its_own_defaults_and_each_network_has_its_own():
    cnn, lenet = recipe(), recipe(model="lenet")
    assert (cnn.model, cnn.batch_size, cnn.learning_rate) == ("cnn", 128, 0.15)
    assert (lenet.batch_size, lenet.learning_rate) == (32, 0.02)
    added = {"label_smoothing": 0.1, "logit_adjustment": True, "repeat_rare": True}
    assert cnn.own == {**added, "muon": True, "mirror": True, "final_rate": 0.1, "bfloat16": 0.75}
    assert lenet.own == {**added, "muon": False, "mirror": False, "final_rate": 0.0}


# Building


def test_a_network_is_a_function_of_the_seed(name, network):
    weights = get_weights(network)
    assert same_bits(get_weights(build(name, CLASSES, seed=0)), weights)
    begins_at_0 = name == "scattering"
    assert same_bits(get_weights(build(name, CLASSES, seed=1)), weights) == begins_at_0


def test_building_leaves_the_global_random_state_alone(name):
    before = torch.get_rng_state()
    build(name, CLASSES, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("classes", [2, 10, 101])
def test_there_is_an_output_for_every_class(name, classes):
    network = build(name, classes, seed=0)
    assert model.predict(network, examples(3)).shape == (3, classes)


def test_a_network_for_images_of_one_size_says_so_where_data_py_makes_others():
    schema = {"classes": ["cat", "dog"], "input_shape": [3, 64, 64]}
    words = r"^lenet takes 32x32 images, data\.py makes \[3, 64, 64\]; set SIDE, or use cnn$"
    with pytest.raises(ValueError, match=words):
        open_task().build(schema, recipe(model="lenet"))
    network = open_task().build(schema, recipe(model="cnn"))
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert model.predict(network, (images, torch.zeros(2))).shape == (2, 2)


# Weights in and out


def test_weights_come_and_go_by_position_with_their_own_types(name, network):
    state = network.state_dict()
    weights = get_weights(network)
    assert [(a.shape, str(a.dtype)) for a in weights] == [
        (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in state.values()
    ]
    other = build(name, CLASSES, seed=1)
    set_weights(other, weights)
    assert same_bits(get_weights(other), weights)
    assert np.array_equal(model.predict(other, examples(5)), model.predict(network, examples(5)))


def test_counters_beyond_what_a_float_can_count_survive(network):
    weights = get_weights(network)
    counters = [i for i, array in enumerate(weights) if array.dtype == np.int64]
    for i in counters:
        weights[i] = np.full(weights[i].shape, 2**53 + 1)
    set_weights(network, weights)
    assert all((get_weights(network)[i] == 2**53 + 1).all() for i in counters)


def test_read_only_weights_as_they_come_from_the_wire_are_taken(network):
    weights = get_weights(network)
    for array in weights:
        array.setflags(write=False)
    set_weights(network, weights)
    train(network, 4)  # would fail, or warn, on memory that can't be written
    assert not same_bits(get_weights(network), weights)


def refusal(network, weights: list[np.ndarray]) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        set_weights(network, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_or_too_many_weights_are_refused(network):
    weights = get_weights(network)
    for wrong in (weights[:-1], [*weights, weights[0]], []):
        words = refusal(network, wrong)
        assert str(len(wrong)) in words
        assert str(len(weights)) in words


def test_a_weight_of_another_shape_is_refused_by_name(network):
    for position, key in enumerate(network.state_dict()):
        weights = get_weights(network)
        weights[position] = weights[position][None]
        assert key in refusal(network, weights)


def test_a_weight_of_another_type_is_refused_by_name(network):
    for position, key in enumerate(network.state_dict()):
        weights = get_weights(network)
        weights[position] = weights[position].astype(np.float64)
        assert key in refusal(network, weights)


def test_buffer_positions_are_of_what_is_measured_and_not_trained(network):
    trained = {key for key, _ in network.named_parameters()}
    measured = [i for i, key in enumerate(network.state_dict()) if key not in trained]
    assert list(buffer_positions(network)) == measured


# Training


def test_training_is_a_function_of_the_seed_whatever_ran_before(network):
    results = {}
    for run, seed in (("one", 1), ("two", 1), ("other", 2)):
        copied = copy.deepcopy(network)
        torch.manual_seed(len(results))
        np.random.seed(len(results))
        loss = train(copied, 10, seed=seed)
        results[run] = [*get_weights(copied), np.array(loss)]
    assert same_bits(results["one"], results["two"])
    assert not same_bits(results["one"], results["other"])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])  # in batches of 4: fewer than a batch, and one left over
def test_any_number_of_images_trains_to_numbers(network, n):
    before = get_weights(network)
    before = [array.copy() for array in before]
    loss = train(network, n)
    assert isinstance(loss, float)
    assert np.isfinite(loss)
    assert loss > 0
    after = get_weights(network)
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
    model.evaluate(network, examples(8), recipe())
    before = [array.copy() for array in get_weights(network)]
    train(network, 8)
    after = get_weights(network)
    assert all((after[i] != before[i]).any() for i in buffer_positions(network))


def test_the_learning_rate_follows_a_schedule_over_all_rounds(network):
    early, late = copy.deepcopy(network), copy.deepcopy(network)
    train(early, 8, span=(0.2, 0.4))
    train(late, 8, span=(0.8, 1.0))
    assert not same_bits(get_weights(early), get_weights(late))


def test_the_rate_climbs_to_its_peak_and_falls_to_its_end_in_straight_lines():
    assert [model.rate_at(t) for t in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [model.rate_at(t, 0.2) for t in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.5, 1, 0.6, 0.2])


def test_each_addition_to_plain_fedavg_can_be_switched_off():
    made, network = {}, build("cnn", CLASSES)
    for own in (
        {},
        {"muon": False},
        {"mirror": False},
        {"label_smoothing": 0},
        {"final_rate": 0.0},
        {"repeat_rare": False},
    ):
        copied = copy.deepcopy(network)
        train(copied, 16, span=(0.8, 1.0), own=own)
        made[str(own)] = [array.tobytes() for array in get_weights(copied)]
    usual = made.pop("{}")
    assert [what for what, bits in made.items() if bits == usual] == []


def test_training_is_in_bfloat16_to_its_share_of_the_run_where_the_processor_is_quicker_with_it(monkeypatch):
    class Spy(nn.Linear):
        def forward(self, x):
            logits = super().forward(x.flatten(1))
            dtypes.append(logits.dtype)
            return logits

    whole, half = torch.float32, torch.bfloat16
    for quicker, share, expected in (
        (True, 0.5, [half, half, whole, whole]),
        (True, 0.0, [whole] * 4),
        (False, 1.0, [whole] * 4),
    ):
        dtypes: list[torch.dtype] = []
        monkeypatch.setattr(model, "has_bfloat16", lambda device, quicker=quicker: quicker)
        network = Spy(3 * 32 * 32, CLASSES)
        train(network, 8, own={"bfloat16": share}, batch_size=2)
        assert dtypes == expected
        model.evaluate(network, examples(4), recipe(own={"bfloat16": share}))
        assert dtypes[-1] == whole
        assert all(weight.dtype == whole for weight in network.parameters())


def test_mirrored_images_are_some_of_them_and_other_ones_in_each_round(monkeypatch):
    seen = []
    monkeypatch.setattr(model, "to_input", lambda x, device: (seen.append(x), x.float())[1])
    images = torch.arange(2, dtype=torch.uint8).expand(64, 3, 1, 2).contiguous()  # 0 on the left, 1 on the right
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    made = recipe(batch_size=64)
    for number in (1, 2):
        model.train_round(network, (images, torch.zeros(64, dtype=torch.int64)), made, made.part(0, number))
    first, second = (set(torch.nonzero(each[:, 0, 0, 0]).ravel().tolist()) for each in seen)
    assert 10 < len(first) < 54
    assert first != second
    assert all(torch.equal(each.sort(3).values, images) for each in seen)


def test_an_image_and_its_mirror_image_are_predicted_alike_unless_that_is_switched_off():
    images, labels = examples(4)
    for mirror, alike in ((True, True), (False, False)):
        network = build("cnn", CLASSES, mirror=mirror)
        one, other = (model.predict(network, (each, labels)) for each in (images, images.flip(3)))
        assert torch.allclose(one, other, atol=1e-6) == alike


def test_a_round_is_its_own_part_of_the_run_unless_another_is_given(network):
    one, other = copy.deepcopy(network), copy.deepcopy(network)
    made = recipe(rounds=4, batch_size=4, learning_rate=0.01)
    model.train_round(one, examples(8), made, made.part(0, 2))
    model.train_round(other, examples(8), made, made.part(0, 2, span=(0.25, 0.5)))
    assert same_bits(get_weights(one), get_weights(other))


def test_the_progress_bar_counts_the_batches_of_all_epochs_under_its_title(network, monkeypatch):
    bars = []
    monkeypatch.setattr(model, "tqdm", lambda batches, title, **how: bars.append((len(batches), title)) or batches)
    made = recipe(batch_size=4, learning_rate=0.01, local_epochs=2)
    model.train_round(network, examples(8), made, made.part(0, 1, "round 1 of 3"))
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
        bits[mu] = [array.tobytes() for array in get_weights(copied)]
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
    made = recipe(rounds=1, local_epochs=2, batch_size=2, learning_rate=0.1, proximal_mu=mu)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    model.train_round(network, (images, torch.tensor([0, 1])), made, made.part(0, 1))
    weights, momenta = list(start), [0.0 for _ in start]
    # At a quarter and at three quarters of the run; the rate falls to a tenth of its peak.
    for rate in (0.1 * (0.1 + 0.9 * 0.75 / 0.8), 0.1 * (0.1 + 0.9 * 0.25 / 0.8)):
        slope = 1 / (1 + math.exp(-sum(weights))) - 0.5  # of the loss; half the labels are 0
        for i, first in enumerate(start):
            gradient = slope + mu * (weights[i] - first) + 5e-4 * weights[i]
            momenta[i] = 0.9 * momenta[i] + gradient
            weights[i] -= rate * (gradient + 0.9 * momenta[i])
    assert [weight.item() for weight in network.weights] == pytest.approx(weights, abs=1e-6)


def test_training_lowers_the_loss_on_what_it_is_trained_on(network):
    before = model.evaluate(network, examples(16), recipe())["loss"]
    train(network, 16, local_epochs=10)
    after = model.evaluate(network, examples(16), recipe())["loss"]
    assert after < before


# Evaluation and prediction


@pytest.mark.parametrize("n", [1, 3, 1203])  # 1203: uneven, whatever the batches are
@pytest.mark.slow
def test_loss_and_accuracy_are_means_over_examples(network, n):
    images, labels = examples(n)
    loss, accuracy = (model.evaluate(network, (images, labels), recipe())[name] for name in ("loss", "accuracy"))
    probabilities = np.asarray(model.predict(network, (images, labels)), np.float64)
    chosen = probabilities[np.arange(n), labels.numpy()]
    assert loss == pytest.approx(-np.log(chosen).mean(), rel=1e-4)
    assert accuracy == pytest.approx((probabilities.argmax(1) == labels.numpy()).mean(), abs=1e-9)


def test_evaluation_measures_nothing_into_the_network(network):
    train(network, 8)
    before = [array.copy() for array in get_weights(network)]
    first = model.evaluate(network, examples(9), recipe())
    model.predict(network, examples(9))
    assert model.evaluate(network, examples(9), recipe()) == first
    assert same_bits(get_weights(network), before)


def test_an_example_is_judged_alone_whatever_is_evaluated_beside_it(network):
    train(network, 8)
    images, labels = examples(9)
    together, alone = model.predict(network, (images, labels)), model.predict(network, (images[:1], labels[:1]))
    assert np.asarray(together)[0] == pytest.approx(np.asarray(alone)[0], abs=1e-6)


def test_probabilities_sum_to_1(network):
    probabilities = np.asarray(model.predict(network, examples(7)))
    assert (probabilities >= 0).all()
    assert probabilities.sum(1) == pytest.approx(np.ones(7), abs=1e-5)


# Images of another size


@pytest.mark.usefixtures("other_tasks")
def test_the_size_of_images_stands_in_one_place_and_all_else_follows_or_says_that_it_cant(tmp_path):
    larger = (ROOT / "data.py").read_text().replace("SIDE = 32", "SIDE = 48")
    task = write_task(tmp_path / "larger", larger, (ROOT / "model.py").read_text())
    dataset = task.open_dataset("synthetic")
    schema, told = task.schema(dataset), task.complete(Recipe(batch_size=4))
    assert schema["input_shape"] == [3, 48, 48]
    examples = task.load(dataset, "train", np.arange(8), 0)
    assert examples[0].shape == (8, 3, 48, 48)
    assert examples[0][:, :, 32:].float().std() > 20, "shapes are drawn over the whole of it"
    network = task.build(schema, told)
    assert task.train_round(network, examples, told, told.part(0, 1)).keys() == {"train_loss"}
    with pytest.raises(
        PublicError, match=r"^lenet takes 32x32 images, data.py makes \[3, 48, 48\]; set SIDE, or use cnn$"
    ):
        task.build(schema, task.complete(Recipe(model="lenet")))

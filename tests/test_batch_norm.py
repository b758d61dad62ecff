"""BatchNorm's statistics measured anew: what a client measures, and on what."""

import copy
from types import SimpleNamespace

from federation.client.summary import measure_batchnorm
from federation.config import MEASURED
from federation.networks.batch_norm import measure
from federation.protocol import Assignment
from federation.task.task import Task, TaskError, open_task
from federation.task.weights import batchnorm_positions, keep_frozen
from federation.task.weights import measure_batchnorm as measured_arrays

import numpy as np
import pytest
import torch
from helpers.tasks import MODEL, build, other_tasks, recipe, write_task  # noqa: F401 (a fixture)
from torch import nn

from client import TaskClient


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def run(network: nn.Module, *batches: torch.Tensor):
    """As a task's evaluate() does: in evaluation mode, batch by batch."""

    @torch.inference_mode()
    def evaluate():
        network.eval()
        return [network(batch) for batch in batches]

    return evaluate


def test_mean_and_variance_are_those_of_all_examples_whatever_the_batches():
    network = nn.Sequential(nn.BatchNorm1d(1))
    for batches in ([column(1, 2, 3, 6)], [column(1, 2, 3), column(6)], [column(1, 2), column(3, 6)]):
        # (4 + 1 + 0 + 9) / 3; a batch of one value, which has no variance, is left out.
        expected = (2.0, 1.0) if len(batches[-1]) == 1 else (3.0, 14 / 3)
        found = measure(network, {"0"}, run(network, *batches))
        assert (found["0.running_mean"].item(), found["0.running_var"].item()) == pytest.approx(expected)


def test_of_images_each_pixel_counts():
    network = nn.Sequential(nn.BatchNorm2d(1))
    found = measure(network, {"0"}, run(network, torch.tensor([1.0, 2, 3, 6]).reshape(1, 1, 2, 2)))
    assert (found["0.running_mean"].item(), found["0.running_var"].item()) == pytest.approx((3.0, 14 / 3))


def test_a_later_layer_is_measured_on_what_the_batch_itself_normalises():
    first, second = nn.BatchNorm1d(1, eps=1e-12), nn.BatchNorm1d(1)
    first.running_mean.fill_(100.0)  # of another model: an averaged one's mean of statistics may be far off
    network = nn.Sequential(first, second)
    found = measure(network, {"0", "1"}, run(network, column(1, 3), column(11, 13)))
    assert found["0.running_mean"].item() == pytest.approx(7.0)
    assert found["1.running_mean"].item() == pytest.approx(0.0)
    assert found["1.running_var"].item() == pytest.approx(4 / 3)  # of -1, 1, -1, 1


def state_of(network: nn.Module) -> list:
    arrays = [tensor.numpy().tobytes() for tensor in network.state_dict().values()]
    return [arrays, [(m.training, m._forward_pre_hooks, "train" in vars(m)) for m in network.modules()]]


def test_measuring_leaves_the_network_as_it_was_even_where_it_fails():
    network = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).eval()
    before = state_of(copy.deepcopy(network))
    measure(network, {"1"}, run(network, column(1, 2, 3)))
    assert state_of(network) == before
    with pytest.raises(RuntimeError):
        measure(network, {"1"}, run(network, torch.zeros(2, 7)))
    assert state_of(network) == before
    assert network[1].track_running_stats
    assert all(not module.training for module in network.train(False).modules())


def test_all_else_is_in_evaluation_mode():
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(1))
    found = measure(network, {"1"}, run(network, column(1, 2, 3)))
    assert found["1.running_mean"].item() == pytest.approx(2.0)


def test_a_layer_that_nothing_reaches_keeps_the_statistics_it_has():
    network = nn.ModuleDict({"used": nn.BatchNorm1d(1), "head": nn.BatchNorm1d(1)})
    network["head"].running_mean.fill_(5.0)
    found = measure(network, {"used", "head"}, run(network["used"], column(1, 3)))
    assert found["head.running_mean"].item() == 5.0
    assert found["used.running_mean"].item() == 2.0


def test_layers_that_keep_no_statistics_and_frozen_ones_are_not_measured():
    frozen = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)).requires_grad_(False)
    network = keep_frozen(nn.Sequential(frozen, nn.BatchNorm1d(1), nn.BatchNorm1d(1, track_running_stats=False)))
    assert list(network.state_dict())[7:10] == ["1.weight", "1.bias", "1.running_mean"]
    assert batchnorm_positions(network) == [2, 3]  # of what travels, which is 1.* and 2.*
    mean, _ = measured_arrays(network, run(network, column(1, 3)))
    assert mean.shape == (1,)
    assert batchnorm_positions(network.requires_grad_(False)) == []  # then all travels, and nothing changes


def test_the_positions_are_of_mean_and_variance_by_turns():
    network = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1), nn.BatchNorm1d(1))
    names = list(network.state_dict())
    statistics = ["running_mean", "running_var"] * 2
    assert [names[i].rpartition(".")[2] for i in batchnorm_positions(network)] == statistics
    assert batchnorm_positions(nn.Linear(1, 1)) == []


def test_a_client_measures_on_the_same_examples_each_round_in_random_order(monkeypatch):
    task, seen = open_task(), []
    monkeypatch.setattr(task, "measure_batchnorm", lambda network, examples, recipe: seen.append(examples))
    rows = np.arange(100, 100 + MEASURED + 500)
    examples = (torch.arange(len(rows)), torch.arange(len(rows)) % 10)
    client = SimpleNamespace(task=task, dataset=None, network=None, train_set=examples, train_rows=rows, partition=1)
    client.recipe = recipe(model="cnn")
    for _ in range(2):
        measure_batchnorm(client)
    first, second = seen
    assert first is second
    assert len(first[0]) == len(first[0].unique()) == MEASURED
    assert not torch.equal(first[0], first[0].sort().values)  # classes lie one after another in a folder
    assert torch.equal(first[0] % 10, first[1])


def test_examples_that_are_no_tensors_are_read_anew_in_their_own_order(tmp_path):
    data = SimpleNamespace(load=lambda dataset, split, rows, seed: ["read", split, *rows.tolist()])
    task = SimpleNamespace(load=data.load)
    kind, split, *rows = Task.draw(task, None, object(), np.arange(50, 60), 4, seed=0)
    assert (kind, split, rows, len(set(rows))) == ("read", "train", sorted(rows), 4)
    assert set(rows) <= set(range(50, 60))


def test_a_task_may_leave_it_in_a_word(tmp_path, other_tasks):  # noqa: F811
    assert write_task(tmp_path / "usual").measures_batchnorm
    assert not write_task(tmp_path / "left", model=MODEL + "\nMEASURE_BATCHNORM = False\n").measures_batchnorm
    with pytest.raises(TaskError, match="MEASURE_BATCHNORM must give True or False"):
        write_task(tmp_path / "odd", model=MODEL + "\nMEASURE_BATCHNORM = 'no'\n").measures_batchnorm  # noqa: B018


class Images:
    """Ten random images of two classes."""

    classes = ("cat", "dog")

    def labels(self, split, seed):
        return np.arange(10) % 2

    def images(self, split, rows, seed):
        return np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), np.uint8)[rows]


def test_the_projects_client_measures_and_evaluates_with_what_all_measured():
    client = TaskClient(open_task(), Images(), Assignment(0, 1, recipe(model="cnn")))
    weights = client.get_parameters({})
    statistics, examples, metrics = client.measure(weights, {"server_round": 1, "measure": True})
    assert (len(statistics), examples, metrics) == (2 * 4, 10, {})
    assert all(statistics[i].shape == weights[at].shape for i, at in enumerate(client.batchnorm_positions))
    assert all((variance > 0).all() for variance in statistics[1::2])
    again, *_ = client.measure(weights, {"server_round": 2, "measure": True})
    assert [array.tobytes() for array in again] == [array.tobytes() for array in statistics]
    unchanged = client.get_parameters({})
    assert [array.tobytes() for array in unchanged] == [array.tobytes() for array in weights]
    assert TaskClient(open_task(), Images(), Assignment(0, 1, recipe(model="lenet"))).batchnorm_positions == []

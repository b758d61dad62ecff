"""Training without federation: on exactly the clients' examples, with the run's recipe, and nothing else."""

import dataclasses
import json
import re

from federation.config import Recipe
from federation.partition import shares
from federation.protocol import Assignment
from federation.results import report
from federation.results.run_folder import RunFolder
from federation.task.task import open_task
from federation.task.weights import set_weights

import numpy as np
import pytest
import torch
from helpers.example_runs import CLASSES, RECIPE, call, make_history, make_images, make_run, make_task_run
from helpers.processes import Process
from helpers.tasks import build, other_tasks, write_task  # noqa: F401 (a fixture)

import baseline
import evaluate
import model
from client import TaskClient
from data import load, open_dataset


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def _one_thread():
    """More would only cost time on images so few; and the programs set the number for this whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def share(dataset, partition: int, clients: int, recipe: Recipe) -> np.ndarray:
    """The training examples of one client."""
    labels, test_labels = dataset.labels("train", recipe.seed), dataset.labels("test", recipe.seed)
    return shares(labels, test_labels, clients, recipe.partitioner, recipe.alpha, recipe.seed)[0][partition]


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "shards", "quantity-skew"])
def test_a_clients_examples_are_those_it_held_in_the_federation(images, partitioner):
    dataset, recipe = open_dataset(str(images), ""), dataclasses.replace(RECIPE, partitioner=partitioner)
    parts = baseline.clients_examples(open_task(), dataset, recipe, make_history(recipe, clients=3))
    for partition, part in enumerate(parts):
        np.testing.assert_array_equal(part, share(dataset, partition, 3, recipe))


@pytest.mark.slow
def test_centralised_trains_on_all_the_clients_examples_and_each_alone_on_its_own(images, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, partitioner="quantity-skew", local_epochs=3)
    folder = make_run(tmp_path / "run", images, recipe)
    trained = []

    def record(network, examples, recipe, part):
        trained.append((*(each.clone() for each in examples), recipe, dataclasses.replace(part, title="")))
        return {"train_loss": 0.0}

    monkeypatch.setattr(model, "train_round", record)
    assert call(baseline.main, "--run", folder.path, "--dataset", images) == 0
    dataset = open_dataset(str(images), "")
    parts = [share(dataset, p, 2, recipe) for p in range(2)]
    held = [np.sort(np.concatenate(parts)), *parts]
    assert len(trained) == 3 * recipe.rounds
    for i, (pixels, labels, used, part) in enumerate(trained):
        theirs, truth = load(dataset, "train", held[i // recipe.rounds], recipe.seed)
        assert torch.equal(pixels, theirs)
        assert torch.equal(labels, truth)
        stream = [2, 0, 1][i // recipe.rounds]  # its own partition's, and centralised one that nobody has
        assert (used, part) == (recipe, recipe.part(stream, i % 2 + 1))


def test_a_client_alone_learns_what_it_learns_as_a_federation_of_one(images):
    task, dataset = open_task(), open_dataset(str(images), "")
    client = TaskClient(task, dataset, Assignment(1, 2, RECIPE))
    weights = client.get_parameters({})
    for server_round in (1, 2):
        weights, _, _ = client.fit(weights, {"server_round": server_round})
    trainer = baseline.Trainer(task, dataset, RECIPE, 2, "cpu")
    alone = trainer.run("alone", share(dataset, 1, 2, RECIPE), stream=1)
    set_weights(client.network, weights)
    test = load(dataset, "test", np.arange(24), 0)
    assert alone.rounds[2].metrics == task.evaluate(client.network, test, RECIPE)


@pytest.mark.slow
def test_as_many_rounds_are_trained_as_the_federation_finished(images, tmp_path):
    recipe = dataclasses.replace(RECIPE, rounds=5)
    folder = make_run(tmp_path / "run", images, recipe)
    history = folder.load_history()
    history.rounds = history.rounds[:2]  # --target ended it after round 1
    folder.save_history(history)
    assert call(baseline.main, "--run", folder.path, "--dataset", images) == 0
    result = json.loads((folder.path / "baseline.json").read_text())
    assert [row["round"] for row in result["centralised"]["rounds"]] == [0, 1]
    assert result["test_images"] == 24
    assert (result["centralised"]["images"], [one["images"] for one in result["alone"]]) == (72, [36, 36])


def test_bad_input_is_one_line_and_trains_nothing(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "train_round", lambda network, examples, recipe, part: pytest.fail("trained"))
    others = make_images(tmp_path / "others", train=23)
    run = make_run(tmp_path / "run", images).path
    whole = make_run(tmp_path / "whole", images, dataclasses.replace(RECIPE, partitioner="local")).path
    young = make_run(tmp_path / "young", images)
    history = young.load_history()
    history.rounds = history.rounds[:1]
    young.save_history(history)
    cases = [
        (["--run", tmp_path, "--dataset", images], 2, "holds no run"),
        (["--run", run, "--dataset", tmp_path / "nowhere"], 1, "nor a folder that exists"),
        (["--run", run, "--dataset", "synthetic"], 2, "has other classes than the run [blue, green, red]"),
        (["--run", run, "--dataset", others], 2, "holds other examples than client 0 had"),
        (["--run", whole, "--dataset", images], 2, "brought data of their own"),
        (["--run", young.path, "--dataset", images], 2, "has not finished its first round"),
    ]
    for argv, code, words in cases:
        assert call(baseline.main, *argv) == code
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1, error


def test_confusion_has_a_row_for_each_truth():
    confusion = evaluate.confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert evaluate.by_class(confusion, CLASSES) == [
        ["class", "examples", "right", "mostly mistaken for"],
        ["blue", "2", "0.5000", "green (0.50)"],
        ["green", "1", "1.0000", "–"],
        ["red", "1", "0.0000", "blue (1.00)"],
    ]


@pytest.mark.slow
def test_evaluate_scores_the_final_model_on_the_whole_test_set(images, tmp_path, capsys):
    folder = make_run(tmp_path / "run", images)
    assert call(evaluate.main, "--run", folder.path, "--dataset", images) == 0
    test = load(open_dataset(str(images), ""), "test", np.arange(24), 0)
    accuracy = model.evaluate(build("lenet"), test, RECIPE)["accuracy"]
    said = capsys.readouterr().out
    assert f"{folder.path / 'model.safetensors'}:\n{round(24 * accuracy)} of 24 test examples right" in said
    assert f"accuracy {accuracy:.4f}" in said
    with np.load(folder.path / "predictions.npz", allow_pickle=False) as found:
        assert found["confusion"].sum() == 24
        assert found["confusion"].trace() == round(24 * accuracy)
        assert "images" not in found.files
    for name in ("confusion.png", "partitions.png", "accuracy.png", "report.html"):
        assert (folder.path / name).stat().st_size > 1000
    assert not (folder.path / "predictions.png").exists()


@pytest.mark.slow
def test_test_images_get_into_folder_and_page_only_where_that_is_asked_for(images, tmp_path, capsys):
    folder = make_run(tmp_path / "run", images)
    assert call(evaluate.main, "--run", folder.path, "--dataset", images, "--show-images") == 0
    with np.load(folder.path / "predictions.npz", allow_pickle=False) as found:
        assert found["images"].shape == (24, 3, 32, 32)
    page = (folder.path / "report.html").read_text()
    assert "<h2>Predictions</h2>" in page
    assert call(report.main, folder.path) == 0  # passed on without being asked for
    assert "<h2>Predictions</h2>" not in (folder.path / "report.html").read_text()
    assert call(report.main, folder.path, "--show-images") == 0
    assert (folder.path / "report.html").read_text() == page


def test_a_run_without_its_final_model_is_one_line(images, tmp_path, capsys):
    folder = make_run(tmp_path / "run", images)
    (folder.path / "model.safetensors").unlink()
    assert call(evaluate.main, "--run", folder.path, "--dataset", images) == 1
    assert "model.safetensors can't be read (No such file or directory)" in capsys.readouterr().err


NUMBERS_DATA = """
import numpy as np
import torch

DATASET = "numbers"


def open_dataset(source):
    return source


def size(dataset, split, seed):
    return {"train": 8, "test": 4}[split]


def load(dataset, split, rows, seed):
    return torch.from_numpy(rows).float()[:, None], torch.from_numpy(rows * 2.0 + 1).float()
"""
NUMBERS_MODEL = """
from federation.task.regression import METRICS, evaluate, predict, show, train_round
from torch import nn

NAME = "numbers"
MODELS = {"line": {"learning_rate": 0.01, "batch_size": 2}}


def build(schema, recipe):
    network = nn.Linear(1, 1)
    nn.init.constant_(network.weight, 2), nn.init.zeros_(network.bias)
    return network
"""


@pytest.mark.usefixtures("other_tasks")
@pytest.mark.slow
def test_of_a_task_of_numbers_evaluate_says_each_metric_and_baseline_compares_by_the_main_one(tmp_path, capsys):
    """The true numbers are 2 x + 1, the untrained network says 2 x."""
    task = write_task(tmp_path / "numbers", NUMBERS_DATA, NUMBERS_MODEL)
    folder = make_task_run(tmp_path / "run", task)
    where = ("--run", folder.path, "--task", task.folder)
    assert call(evaluate.main, *where) == 0
    said = capsys.readouterr().out
    for line in ("mae 1.000", "loss 1.000", "r2 0.8000"):  # 0, 2, 4, 6 have the variance 5
        assert f"{line} on all 4 test examples\n" in said
    assert not (folder.path / "predictions.npz").exists()
    assert call(baseline.main, *where) == 0
    said = capsys.readouterr().out
    assert re.search(r"^centralised, round 1: 8 examples in \d+\.\d s, mae \d\.\d{3}$", said, re.MULTILINE)
    assert "all on the same 4 test examples" in said
    assert "\nr2:\n" in said
    stored = json.loads((folder.path / "baseline.json").read_text())
    assert stored["centralised"]["rounds"][0]["mae"] == 1.0
    assert stored["centralised"]["rounds"][-1]["mae"] < 1.0


@pytest.mark.usefixtures("other_tasks")
def test_a_run_of_another_task_is_refused_with_the_remedy(images, tmp_path, capsys):
    task = write_task(tmp_path / "numbers", NUMBERS_DATA, NUMBERS_MODEL)
    run = make_task_run(tmp_path / "run", task)
    for program in (evaluate, baseline):
        assert call(program.main, "--run", run.path, "--dataset", images) == 2
        words = f"--run {run.path} is of the task 'numbers', not of 'cifar10'; give its folder as --task"
        assert words in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_the_demo_and_its_comparison_are_one_command(images, tmp_path):
    """Real processes, all of them: what `make compare` runs."""
    flags = ["--clients", 2, "--rounds", 1, "--dataset", images, "--run-dir", tmp_path / "run", "--compare"]
    demo = Process("demo", ["demo.py", *flags, "--", "--model", "lenet", "--batch-size", 8])
    try:
        output = demo.ends(0, seconds=280)
    finally:
        demo.end()
    assert "federated  centralised  alone, mean  client 0  client 1" in output
    history, result = (json.loads((tmp_path / "run" / name).read_text()) for name in ("history.json", "baseline.json"))
    assert history["config"]["class_counts"].keys() == {"0", "1"}
    untrained = [history, result["centralised"], *result["alone"]]
    assert len({one["rounds"][0]["accuracy"] for one in untrained}) == 1  # the same model on the same test images
    assert RunFolder(tmp_path / "run").load_history().config["model"] == Recipe(model="lenet").model

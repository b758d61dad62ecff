"""Training without federation: on exactly the clients' images, with the run's recipe, and nothing else."""

import dataclasses
import json

from federation.config import Recipe
from federation.partition import shares
from federation.protocol import Assignment
from federation.results import report
from federation.results.run_folder import RunFolder

import numpy as np
import pytest
import torch
from helpers.example_runs import CLASSES, RECIPE, call, make_history, make_images, make_run
from helpers.processes import Process

import baseline
import evaluate
import model
from client import CifarClient
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
def test_a_clients_images_are_those_it_held_in_the_federation(images, partitioner):
    dataset, recipe = open_dataset(str(images), ""), dataclasses.replace(RECIPE, partitioner=partitioner)
    parts = baseline.clients_images(dataset, recipe, make_history(recipe, clients=3))
    for partition, part in enumerate(parts):
        np.testing.assert_array_equal(part, share(dataset, partition, 3, recipe))


def test_centralised_trains_on_all_the_clients_images_and_each_alone_on_its_own(images, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, partitioner="quantity-skew", local_epochs=3)
    folder = make_run(tmp_path / "run", images, recipe)
    trained = []

    def record(network, images, labels, *how, title):
        trained.append((images.clone(), labels.clone(), how))
        return {"train_loss": 0.0}

    monkeypatch.setattr(model, "train_round", record)
    assert call(baseline.main, "--run", folder.path, "--dataset", images) == 0
    dataset = open_dataset(str(images), "")
    parts = [share(dataset, p, 2, recipe) for p in range(2)]
    held = [np.sort(np.concatenate(parts)), *parts]
    assert len(trained) == 3 * recipe.rounds
    for i, (pixels, labels, how) in enumerate(trained):
        theirs, truth = load(dataset, "train", held[i // recipe.rounds], recipe.seed)
        assert torch.equal(pixels, theirs)
        assert torch.equal(labels, truth)
        stream = [2, 0, 1][i // recipe.rounds]  # its own partition's, and centralised one that nobody has
        assert how == (recipe, stream, i % 2 + 1)


def test_a_client_alone_learns_what_it_learns_as_a_federation_of_one(images):
    dataset = open_dataset(str(images), "")
    client = CifarClient(dataset, Assignment(1, 2, RECIPE))
    weights = client.get_parameters({})
    for server_round in (1, 2):
        weights, _, _ = client.fit(weights, {"server_round": server_round})
    trainer = baseline.Trainer(RECIPE, 2, 3, "cpu")
    trainer.train = load(dataset, "train", np.arange(72), 0)
    trainer.test = load(dataset, "test", np.arange(24), 0)
    alone = trainer.run("alone", share(dataset, 1, 2, RECIPE), stream=1)
    model.set_weights(client.network, weights)
    assert alone.rounds[2].metrics == model.evaluate(client.network, *trainer.test)


def test_as_many_rounds_are_trained_as_the_federation_finished(images, tmp_path):
    recipe = dataclasses.replace(RECIPE, rounds=5)
    folder = make_run(tmp_path / "run", images, recipe)
    history = folder.load_history()
    history.rounds = history.rounds[:2]  # --target-accuracy ended it after round 1
    folder.save_history(history)
    assert call(baseline.main, "--run", folder.path, "--dataset", images) == 0
    result = json.loads((folder.path / "baseline.json").read_text())
    assert [row["round"] for row in result["centralised"]["rounds"]] == [0, 1]
    assert result["test_images"] == 24
    assert (result["centralised"]["images"], [one["images"] for one in result["alone"]]) == (72, [36, 36])


def test_bad_input_is_one_line_and_trains_nothing(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "train_round", None)
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
        (["--run", run, "--dataset", others], 2, "holds other images than client 0 had"),
        (["--run", whole, "--dataset", images], 2, "brought images of their own"),
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
        ["class", "images", "right", "mostly mistaken for"],
        ["blue", "2", "0.5000", "green (0.50)"],
        ["green", "1", "1.0000", "–"],
        ["red", "1", "0.0000", "blue (1.00)"],
    ]


def test_evaluate_scores_the_final_model_on_the_whole_test_set(images, tmp_path, capsys):
    folder = make_run(tmp_path / "run", images)
    assert call(evaluate.main, "--run", folder.path, "--dataset", images) == 0
    test = load(open_dataset(str(images), ""), "test", np.arange(24), 0)
    accuracy = model.evaluate(model.build("lenet", 3, 0), *test)["accuracy"]
    assert f"accuracy {accuracy:.4f}" in capsys.readouterr().out
    with np.load(folder.path / "predictions.npz", allow_pickle=False) as found:
        assert found["confusion"].sum() == 24
        assert found["confusion"].trace() == round(24 * accuracy)
        assert "images" not in found.files
    for name in ("confusion.png", "partitions.png", "accuracy.png", "report.html"):
        assert (folder.path / name).stat().st_size > 1000
    assert not (folder.path / "predictions.png").exists()


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
    (folder.path / "model.npz").unlink()
    assert call(evaluate.main, "--run", folder.path, "--dataset", images) == 1
    assert "model.npz can't be read (No such file or directory)" in capsys.readouterr().err


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

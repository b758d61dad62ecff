"""Run folders of version 1.0.0: they are resumed, drawn and classified with as if they were today's.

tests/data/runs-of-1.0.0.json holds three, as that version left them, packed by tar and xz, as base64:

fedadam    tiny clients, --partitioner sizes (today quantity-skew), stopped after round 2 of 4; and the
           final model of a run that was not stopped
async      tiny clients, --partitioner whole (today local), stopped after version 3
lenet      finished; its clients made a network of zeros, and added [0, 3] to its last biases in each of two rounds
"""

import base64
import io
import json
import math
import tarfile

from federation.results import report
from federation.results.run_folder import RunFolder

import numpy as np
import pytest
from helpers.example_runs import CLASSES, call, make_images
from helpers.processes import ROOT, Federation
from helpers.replays import model_bytes, replayed_tiny

import classify
import evaluate

RUNS = json.loads((ROOT / "tests/data/runs-of-1.0.0.json").read_text())


def unpack(name: str, federation: Federation) -> None:
    packed = io.BytesIO(base64.b64decode("".join(RUNS[name])))
    with tarfile.open(fileobj=packed, mode="r:xz") as archive:
        archive.extractall(federation.folder, filter="data")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_version_1_0_0_is_drawn(name, federation, capsys):
    unpack(name, federation)
    history = RunFolder(federation.run_dir).load_history()
    assert [record.round for record in history.rounds][:3] == [0, 1, 2]
    assert history.rounds[-1].unit == ("version" if name == "async" else "round")
    assert call(report.main, federation.run_dir) == 0
    assert (federation.run_dir / "report.html").stat().st_size > 1000


def test_a_run_of_version_1_0_0_goes_on_to_the_weights_that_a_quiet_one_had_then(federation):
    unpack("fedadam", federation)
    server = federation.server("--resume", federation.run_dir)
    for partition in range(3):
        federation.tiny("--partition-id", partition)
    assert "after round 2" in server.ends(0)
    with np.load(federation.folder / "quiet-model.npz") as then:
        assert model_bytes(federation) == [then[f"w{i:05d}"].tobytes() for i in range(3)]


def test_an_asynchronous_run_of_version_1_0_0_goes_on_and_a_replay_of_both_parts_gives_the_same_bits(federation):
    unpack("async", federation)
    before = len(RunFolder(federation.run_dir).load_history().rounds)
    server = federation.server("--resume", federation.run_dir)
    for partition in range(3):
        federation.tiny("--partition-id", partition)
    server.ends(0)
    rows = federation.history()["rounds"]
    assert [row["round"] for row in rows] == list(range(len(rows)))
    assert sum(len(row["updates"]) for row in rows) == 4 * 3
    assert len(rows) > before
    assert replayed_tiny(federation) == model_bytes(federation)


def test_the_model_of_version_1_0_0_classifies_images(federation, capsys):
    """The logits are [0, 6] for every image."""
    unpack("lenet", federation)
    images = make_images(federation.folder / "images", train=1, test=1)
    assert call(classify.main, "--model", federation.run_dir / "model.npz", "--json", images / "test/red/00.png") == 0
    first, second = json.loads(capsys.readouterr().out)["classes"]
    assert [first["class"], second["class"]] == ["dog", "cat"]
    assert first["probability"] == pytest.approx(math.exp(6) / (1 + math.exp(6)))


def test_the_final_model_of_a_run_of_version_1_0_0_is_scored(federation, capsys):
    """It takes every image for a dog."""
    unpack("lenet", federation)
    images = make_images(federation.folder / "images", train=1, test=2)
    for split in ("train", "test"):
        (images / split / CLASSES[0]).rename(images / split / "cat")
        (images / split / CLASSES[1]).rename(images / split / "dog")
        (images / split / CLASSES[2]).rename(federation.folder / f"{split} of no class")
    assert call(evaluate.main, "--run", federation.run_dir, "--dataset", images) == 0
    said = capsys.readouterr().out
    assert f"{federation.run_dir / 'model.npz'}:\n2 of 4 test examples right\naccuracy 0.5000\n" in said
    assert (federation.run_dir / "predictions.npz").exists()


def test_where_a_run_has_both_kinds_of_file_its_model_is_todays(tmp_path):
    folder = RunFolder(tmp_path)
    assert evaluate.model_path(folder).name == "model.safetensors"
    (tmp_path / "model.npz").touch()
    assert evaluate.model_path(folder).name == "model.npz"
    (tmp_path / "model.safetensors").touch()
    assert evaluate.model_path(folder).name == "model.safetensors"

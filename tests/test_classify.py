"""Model files and what is done with them: every kind of image, every kind of wrong file."""

import io
import json
import pickle
import subprocess
import sys
import zipfile

from federation.client import model_file
from federation.client.session import Session
from federation.client.summary import show_final_model
from federation.config import Recipe
from federation.protocol import Assignment
from federation.results.run_folder import RunFolder

import numpy as np
import pytest
import torch
from helpers.example_runs import CLASSES, call, make_images
from helpers.processes import CLEAN, ROOT, Process
from PIL import Image

import classify
import client
import model
from data import open_dataset, read_image


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), train=4, test=4)


@pytest.fixture(scope="module")
def network():
    return model.build("lenet", 3, seed=7)


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "final.pt"
    model_file.save(path, network, "lenet", CLASSES)
    return path


def test_what_a_client_saves_loads_into_pytorch_and_carries_the_class_names(images, tmp_path):
    one = client.CifarClient(open_dataset(str(images), ""), Assignment(0, 2, Recipe(model="lenet")))
    model_file.save(tmp_path / "final.pt", one.network, "lenet", one.classes)
    plain = model.build("lenet", 3, seed=99)
    plain.load_state_dict(torch.load(tmp_path / "final.pt", weights_only=True))
    network, classes = model_file.load(tmp_path / "final.pt", model)
    assert classes == CLASSES
    for mine, theirs, loaded in zip(*map(model.get_weights, (one.network, plain, network)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(mine, loaded)


def test_a_client_shows_the_final_models_accuracy_and_ten_of_its_images(images, capsys):
    one = client.CifarClient(open_dataset(str(images), ""), Assignment(0, 1, Recipe(model="lenet")))
    session = Session(lambda assignment: one, one.classes)
    session.client, session.metrics = one, {"accuracy": 0.25, "loss": 1.0}
    show_final_model(session, "final.pt", lambda some: model.predict(one.network, some))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "accuracy of the final global model on this client's 12 test images: 0.2500"
    assert said[1] == "saved the final global model as final.pt"
    assert len([line for line in said if " → " in line and line.startswith(("  ✓", "  ✗"))]) == 10


@pytest.mark.parametrize("name", list(model.NETWORKS))
def test_the_servers_file_and_the_clients_file_are_the_same_model(tmp_path, name):
    network = model.build(name, 3, seed=7)
    RunFolder(tmp_path).save_model(model.get_weights(network), name, CLASSES)
    model_file.save(tmp_path / "final.pt", network, name, CLASSES)
    for path in ("model.npz", "final.pt"):
        loaded, classes = model_file.load(tmp_path / path, model)
        assert classes == CLASSES
        for mine, theirs in zip(model.get_weights(network), model.get_weights(loaded), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("mode", "size", "kind"),
    [("RGB", (32, 32), "png"), ("L", (500, 300), "jpg"), ("RGBA", (7, 90), "png"), ("P", (64, 64), "gif")],
)
def test_an_image_of_any_size_and_mode_gets_three_classes_likeliest_first(
    network, saved, tmp_path, capsys, mode, size, kind
):
    path = tmp_path / f"one.{kind}"
    Image.new(mode, size, 100).save(path)
    assert call(classify.main, "--model", saved, "--json", path) == 0
    answer = json.loads(capsys.readouterr().out)
    found = [one["probability"] for one in answer["classes"]]
    assert answer["image"] == str(path)
    assert sorted(one["class"] for one in answer["classes"]) == CLASSES
    assert found == sorted(found, reverse=True)
    assert sum(found) == pytest.approx(1)
    expected = model.predict(network, torch.from_numpy(read_image(path).copy())[None])[0]
    assert found == pytest.approx(sorted(expected.tolist(), reverse=True))


def test_a_line_for_people_names_image_classes_and_probabilities(saved, images, capsys):
    assert call(classify.main, "--model", saved, images / "test/red/00.png") == 0
    words = capsys.readouterr().out
    assert words.startswith(f"{images / 'test/red/00.png'}: ")
    assert sorted(word.split()[0] for word in words.split(": ")[1].split(", ")) == CLASSES


def test_a_model_of_two_classes_prints_two(tmp_path, images, capsys):
    model_file.save(tmp_path / "two.pt", model.build("lenet", 2, seed=0), "lenet", ["cat", "dog"])
    assert call(classify.main, "--model", tmp_path / "two.pt", images / "test/red/00.png") == 0
    assert capsys.readouterr().out.count(",") == 1


def test_an_unreadable_image_is_named_and_the_others_are_done(saved, images, tmp_path, capsys):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8 torn")
    good = images / "test/red/00.png"
    bad = [tmp_path / "torn.jpg", tmp_path / "missing.png", tmp_path]
    assert call(classify.main, "--model", saved, *bad, good) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}: ")
    assert [line.split(" is not a readable image")[0] for line in err.splitlines()] == [f"classify: {b}" for b in bad]
    assert call(classify.main, "--model", saved, "--json", *bad, good) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in line for line in lines] == [True, True, True, False]


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def torch_file(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def zip_of(name, content):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


WEIGHTS = model.get_weights(model.build("lenet", 3, seed=0))
NAMES = {"model": np.array("lenet"), "classes": np.array(CLASSES)}
ARRAYS = {f"w{i:05d}": array for i, array in enumerate(WEIGHTS)}
WRONG_FILES = {
    "text": (b"dear model", "is no model file"),
    "empty": (b"", "is no model file"),
    "torn": (npz(**NAMES, **ARRAYS)[:5000], "is no model file"),
    "zip": (zip_of("readme.txt", "hello"), "is no model file"),
    "pickle": (pickle.dumps(WEIGHTS), "is no model file"),
    "evil pickle": (torch_file(Evil()), "is no model file"),
    "objects": (npz(model=np.array("lenet"), classes=np.array([Evil()], object)), "is no model file"),
    "tensor": (torch_file(torch.zeros(3)), "is no model file"),
    "nameless": (torch_file({"weight": torch.zeros(3)}), "without class names"),
    "other network": (npz(model=np.array("vgg"), classes=np.array(CLASSES), **ARRAYS), "network 'vgg'"),
    "fewer arrays": (npz(**NAMES, w00000=WEIGHTS[0]), "does not fit the network lenet"),
    "other shapes": (npz(**NAMES, **{**ARRAYS, "w00000": WEIGHTS[1]}), "does not fit the network lenet"),
    "more classes": (npz(**{**NAMES, "classes": np.array(["a"] * 4)}, **ARRAYS), "does not fit the network lenet"),
}


@pytest.mark.parametrize("kind", list(WRONG_FILES))
def test_a_wrong_model_file_is_one_line(tmp_path, images, capfd, kind):
    content, words = WRONG_FILES[kind]
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    assert call(classify.main, "--model", path, images / "test/red/00.png") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"classify: error: --model {path} ")
    assert words in err
    assert err.count("\n") == 1


def test_a_model_file_that_is_not_there_is_one_line(tmp_path, images, capsys):
    assert call(classify.main, "--model", tmp_path / "none.pt", images / "test/red/00.png") == 1
    assert call(classify.main, "--model", tmp_path, images / "test/red/00.png") == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error.split("can't be read ")[1] for error in errors] == ["(No such file or directory)", "(Is a directory)"]


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_a_model_for_images_of_another_size_is_refused(network, tmp_path, images, capsys, kind):
    path = tmp_path / f"model.{kind}"
    if kind == "npz":
        RunFolder(tmp_path).save_model(model.get_weights(network), "lenet", CLASSES, [3, 128, 128])
    else:
        model_file.save(path, network, "lenet", CLASSES, [3, 128, 128])
    assert call(classify.main, "--model", path, images / "test/red/00.png") == 1
    words = f"{path} is for inputs of shape [3, 128, 128], and data.py makes [3, 32, 32]; set SIDE there"
    assert words in capsys.readouterr().err


def test_nothing_to_do_is_wrong_use(saved, capsys):
    assert call(classify.main, "--model", saved) == 2
    assert "name at least one IMAGE, or --onnx FILE" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(model.NETWORKS))
def test_the_exported_model_gives_the_same_logits_without_pytorch(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    network = model.build(name, 3, seed=7)
    model_file.save(tmp_path / "final.pt", network, name, CLASSES)
    export = Process("classify", ["classify.py", "--model", tmp_path / "final.pt", "--onnx", tmp_path / "final.onnx"])
    assert export.ends(0, seconds=200).count("\n") == 1
    export.end()
    session = onnxruntime.InferenceSession(tmp_path / "final.onnx")
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"images": images})
    pixels = torch.from_numpy(images)
    with torch.inference_mode():
        expected = network.eval()(model.to_input(pixels, torch.device("cpu")))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities, model.predict(network, pixels), atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES


def test_export_without_its_packages_says_how_to_install_them(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert call(classify.main, "--model", saved, "--onnx", tmp_path / "final.onnx") == 1
    assert "pip install onnx onnxscript" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_it_in_silence(saved, images):
    command = [sys.executable, "classify.py", "--model", str(saved), *[str(images / "test/red/00.png")] * 50]
    with subprocess.Popen(command, cwd=ROOT, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""

"""Model files and what is done with them: every kind of image, every kind of wrong file."""

import io
import json
import pickle
import subprocess
import sys
import zipfile

from federation import model_file
from federation.client.session import Session
from federation.client.summary import about, show_final_model
from federation.config import Recipe
from federation.protocol import Assignment
from federation.results.run_folder import RunFolder
from federation.task import saved_model
from federation.task.image_files import read_image
from federation.task.task import open_task
from federation.task.weights import get_weights

import numpy as np
import pytest
import safetensors.numpy
import torch
from helpers.example_runs import CLASSES, call, make_images
from helpers.processes import CLEAN, ROOT, Process
from helpers.tasks import MODEL, build, other_tasks, recipe, write_task  # noqa: F401 (a fixture)
from PIL import Image
from safetensors.torch import load_file

import classify
import client
import model
from data import INPUT_SHAPE, SIDE, open_dataset


def about_model(name: str = "lenet", classes: list[str] = CLASSES, input_shape: list[int] = INPUT_SHAPE) -> dict:
    """What a file of such a network says of it."""
    schema = {"classes": classes, "input_shape": input_shape}
    return model_file.about("cifar10", {"model": name}, schema, {})


def named(network) -> dict[str, np.ndarray]:
    """All arrays of a network, of which none is frozen."""
    return dict(zip(network.state_dict(), get_weights(network), strict=True))


def old_pt(network, name: str, classes: list[str], **more: object) -> bytes:
    """As version 1.0.0 saved it."""
    state = network.state_dict()
    state._metadata[""].update(model=name, classes=classes, **more)
    return torch_file(state)


def old_npz(network, name: str, classes: list[str], **more: object) -> bytes:
    """As a server of version 1.0.0 wrote it; more: arrays."""
    arrays = {f"w{i:05d}": array for i, array in enumerate(get_weights(network))}
    return npz(**{"model": np.array(name), "classes": np.array(classes), **arrays, **more})


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def torch_file(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def tensors(arrays: dict, told: dict | None = None, metadata: dict | None = None) -> bytes:
    return safetensors.numpy.save(arrays, metadata or {"federation": json.dumps(told)})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), train=4, test=4)


@pytest.fixture(scope="module")
def network():
    return build("lenet", seed=7)


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "final.safetensors"
    saved_model.save(path, network, about_model())
    return path


def make_client(images, partitions: int, name: str = "lenet") -> client.TaskClient:
    return client.TaskClient(
        open_task(), open_dataset(str(images), ""), Assignment(0, partitions, recipe(model=name, seed=7))
    )


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_what_a_client_saves_loads_into_pytorch_and_carries_the_class_names(images, tmp_path, kind):
    one, path = make_client(images, 2), tmp_path / f"final.{kind}"
    saved_model.save(path, one.network, about(one))
    plain = build("lenet", seed=99)
    plain.load_state_dict(load_file(path) if kind == "safetensors" else torch.load(path, weights_only=True))
    loaded = saved_model.load(path, open_task())
    assert (loaded.classes, loaded.schema) == (CLASSES, one.schema)
    assert loaded.recipe == recipe(model="lenet")
    for mine, theirs, again in zip(*map(get_weights, (one.network, plain, loaded.network)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(mine, again)


def test_a_client_shows_the_final_models_accuracy_and_ten_of_its_examples(images, capsys):
    one = make_client(images, 1)
    session = Session(lambda assignment: one, CLASSES)
    session.client, session.metrics = one, {"accuracy": 0.25, "loss": 1.0}
    show_final_model(session, "final.pt")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "accuracy of the final global model on this client's 12 test examples: 0.2500"
    assert said[1] == "saved the final global model as final.pt"
    assert len([line for line in said if " → " in line and line.startswith(("  ✓", "  ✗"))]) == 10


@pytest.mark.parametrize("name", list(model.NETWORKS))
def test_the_servers_file_and_the_clients_file_are_the_same_model(images, tmp_path, name):
    one = make_client(images, 2, name)
    task = one.task_summary
    schema = {"classes": CLASSES, **task.schema}  # as the server knows them
    RunFolder(tmp_path).save_model(named(one.network), model_file.about(task.name, task.recipe, schema, {}))
    saved_model.save(tmp_path / "final.safetensors", one.network, about(one))
    saved_model.save(tmp_path / "final.pt", one.network, about(one))
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "final.safetensors").read_bytes()
    for path in ("model.safetensors", "final.pt"):
        same_model(saved_model.load(tmp_path / path, open_task()), one.network)


def same_model(loaded: saved_model.SavedModel, network) -> None:
    assert loaded.classes == CLASSES
    for mine, theirs in zip(get_weights(network), get_weights(loaded.network), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", list(model.NETWORKS))
@pytest.mark.parametrize("write", [old_npz, old_pt])
def test_files_of_version_1_0_0_are_read_as_what_they_were(tmp_path, name, write):
    network, path = build(name, seed=7), tmp_path / "model.npz"
    path.write_bytes(write(network, name, CLASSES))
    loaded = saved_model.load(path, open_task())
    same_model(loaded, network)
    assert (loaded.recipe, loaded.schema["input_shape"]) == (recipe(model=name), [3, 32, 32])


def test_a_file_says_what_its_task_is_and_another_task_is_refused_with_the_remedy(tmp_path, images, capsys):
    told = {**about_model(), "task": "my task"}
    path = tmp_path / "model.bin"
    path.write_bytes(tensors(named(build("lenet")), told))
    assert call(classify.main, "--model", path, images / "test/red/00.png") == 1
    words = f"--model {path} is of the task 'my task', not of 'cifar10'; give its folder as --task"
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("other_tasks")
def test_a_task_that_reads_no_single_files_says_what_it_would_need(tmp_path, capsys):
    task = write_task(tmp_path / "folder", model=MODEL + '\nNAME = "mine"\n')
    path = tmp_path / "model.safetensors"
    told = model_file.about("mine", {"model": "network"}, {}, {})
    saved_model.save(path, task.build({}, task.complete(Recipe())), told)
    where = ("--task", task.folder, "--model", path)
    assert call(classify.main, *where, "one.csv") == 2
    words = "the task mine classifies no single files: that needs classes, read_example and predict"
    assert words in capsys.readouterr().err
    assert call(classify.main, *where, "--onnx", tmp_path / "final.onnx") == 2
    words = "--onnx is for tasks of images; mine has no to_input(examples, device) and no input_shape"
    assert words in capsys.readouterr().err


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
    pixels = torch.from_numpy(read_image(path, SIDE).copy())[None]
    expected = model.predict(network, (pixels, torch.zeros(1)))[0]
    assert found == pytest.approx(sorted(expected.tolist(), reverse=True))


def test_a_line_for_people_names_image_classes_and_probabilities(saved, images, capsys):
    assert call(classify.main, "--model", saved, images / "test/red/00.png") == 0
    words = capsys.readouterr().out
    assert words.startswith(f"{images / 'test/red/00.png'}: ")
    assert sorted(word.split()[0] for word in words.split(": ")[1].split(", ")) == CLASSES


def test_a_model_of_two_classes_prints_two(tmp_path, images, capsys):
    saved_model.save(tmp_path / "two.pt", build("lenet", 2), about_model(classes=["cat", "dog"]))
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


def zip_of(name, content):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, content)
    return stream.getvalue()


class Evil:
    def __reduce__(self):
        return print, ("this must never be printed",)


LENET = build("lenet")
WEIGHTS, BY_NAME = get_weights(LENET), named(LENET)
FIRST = next(iter(BY_NAME))
WRONG_FILES = {
    "text": (b"dear model", "is no model file"),
    "empty": (b"", "is no model file"),
    "torn": (old_npz(LENET, "lenet", CLASSES)[:5000], "is no model file"),
    "zip": (zip_of("readme.txt", "hello"), "is no model file"),
    "pickle": (pickle.dumps(WEIGHTS), "is no model file"),
    "evil pickle": (torch_file(Evil()), "is no model file"),
    "objects": (npz(model=np.array("lenet"), classes=np.array([Evil()], object)), "is no model file"),
    "tensor": (torch_file(torch.zeros(3)), "is no model file"),
    "torn safetensors": (tensors(BY_NAME, about_model())[:5000], "is no model file"),
    "safetensors that say no JSON": (tensors(BY_NAME, metadata={"federation": "{"}), "is no model file"),
    "nameless": (torch_file({"weight": torch.zeros(3)}), "holds weights without saying of what"),
    "nameless safetensors": (tensors(BY_NAME, metadata={"format": "pt"}), "holds weights without saying of what"),
    "half of the words": (tensors(BY_NAME, {"recipe": {}}), "holds weights without saying of what"),
    "a list of words": (tensors(BY_NAME, []), "holds weights without saying of what"),
    "other network": (
        old_npz(LENET, "vgg", CLASSES),
        "does not fit the task cifar10: --model must be one of the task's (cnn, cnn-large, scattering, lenet), got",
    ),
    "other settings": (
        tensors(BY_NAME, {**about_model(), "recipe": {"model": "lenet", "own": {"hidden": 3}}}),
        "does not fit the task cifar10: --set hidden: the task has no such setting for lenet",
    ),
    "no recipe of ours": (
        tensors(BY_NAME, {**about_model(), "recipe": {"hidden": 3}}),
        "does not fit the task cifar10: ",
    ),
    "fewer arrays": (
        npz(model=np.array("lenet"), classes=np.array(CLASSES), w00000=WEIGHTS[0]),
        "does not fit the network lenet of model.py: the network has 10 arrays, was given 1",
    ),
    "other shapes": (old_npz(LENET, "lenet", CLASSES, w00000=WEIGHTS[1]), "does not fit the network lenet"),
    "more classes": (old_npz(LENET, "lenet", ["a"] * 4), "does not fit the network lenet"),
    "no such array": (
        tensors({"mine" if name == FIRST else name: array for name, array in BY_NAME.items()}, about_model()),
        f"does not fit the network lenet of model.py: array {FIRST} should be (6, 3, 5, 5) float32, is nothing",
    ),
    "an array more": (
        tensors({**BY_NAME, "a": np.zeros(2)}, about_model()),
        "does not fit the network lenet of model.py: array a should be nothing, is (2,) float64",
    ),
    "other dtype": (
        tensors({**BY_NAME, FIRST: BY_NAME[FIRST].astype(np.float16)}, about_model()),
        f"array {FIRST} should be (6, 3, 5, 5) float32, is (6, 3, 5, 5) float16",
    ),
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


@pytest.mark.parametrize("kind", ["npz", "pt", "safetensors", "old pt"])
def test_a_model_for_images_of_another_size_is_refused(network, tmp_path, images, capsys, kind):
    path, shape = tmp_path / f"model.{kind}", [3, 128, 128]
    if kind == "npz":
        path.write_bytes(old_npz(network, "lenet", CLASSES, input_shape=np.array(shape)))
    elif kind == "old pt":
        path.write_bytes(old_pt(network, "lenet", CLASSES, input_shape=shape))
    else:
        saved_model.save(path, network, about_model(input_shape=shape))
    assert call(classify.main, "--model", path, images / "test/red/00.png") == 1
    words = f"{path} is for inputs of shape [3, 128, 128], and data.py makes [3, 32, 32]; set SIDE there"
    assert words in capsys.readouterr().err


def test_a_disk_that_wont_take_a_model_is_one_line(network, tmp_path):
    for kind in ("safetensors", "pt"):
        path = tmp_path / "nowhere" / f"final.{kind}"
        with pytest.raises(saved_model.ModelFileError) as caught:
            saved_model.save(path, network, about_model())
        assert str(caught.value) == f"{path} can't be written (No such file or directory)"


def test_nothing_to_do_is_wrong_use(saved, capsys):
    assert call(classify.main, "--model", saved) == 2
    assert "name at least one IMAGE, or --onnx FILE" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cnn"])
def test_the_exported_model_gives_the_same_logits_without_pytorch(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    network = build(name, seed=7)
    saved_model.save(tmp_path / "final.pt", network, about_model(name))
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
    np.testing.assert_allclose(probabilities, model.predict(network, (pixels, torch.zeros(5))), atol=1e-4)
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

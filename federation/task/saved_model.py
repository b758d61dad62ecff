"""A trained model read back into its network; and, exported, as ONNX."""

import dataclasses
import json
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federation import model_file
from federation.config import Recipe
from federation.console import clean
from federation.process import write_content, write_whole
from federation.task.task import Task
from federation.task.weights import frozen_weights, get_weights, keep_frozen, travelling

import numpy as np
import torch


class ModelFileError(Exception):
    """The file can't be used; the text is one line with its path and the way out."""


@dataclass
class SavedModel:
    """A network and what it was trained for."""

    network: torch.nn.Module
    recipe: Recipe  # of which only the task's own part is known
    schema: dict
    statistics: dict = field(default_factory=dict)  # of columns, by name

    @property
    def classes(self) -> list[str]:
        return self.schema.get("classes", [])


def save(path: str, network: torch.nn.Module, about: dict) -> None:
    """Write a safetensors file, or, where the name ends in .pt, a PyTorch state_dict; about: model_file.about's.

    Raises ModelFileError where the disk won't take it.
    """
    state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    try:
        if Path(path).suffix in (".pt", ".pth"):
            pickled = network.state_dict()
            for name, tensor in state.items():
                pickled[name] = tensor
            pickled._metadata[""].update(federation=json.dumps(about))  # type: ignore[attr-defined]
            write_whole(Path(path), lambda file: torch.save(pickled, file))
        else:
            named = dict(zip(travelling(network), get_weights(network), strict=True))
            model_file.write(Path(path), {**frozen_weights(network), **named}, about)
    except OSError as error:
        raise ModelFileError(f"{path} can't be written ({error.strerror})") from None


def load(path: str, task: Task) -> SavedModel:
    """From a server's or client's file, or from a model.npz or .pt of version 1.0.0. Raises ModelFileError."""
    try:
        about, arrays = _read(path)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError, EOFError, RuntimeError, TypeError):
        words = "is no model file, or a damaged one; give a server's model.safetensors, or what a client's --save wrote"
        raise ModelFileError(f"{path} {words}") from None
    if not isinstance(about, dict) or not {"task", "recipe", "schema"} <= set(about):
        raise ModelFileError(f"{path} holds weights without saying of what; save them with client.py --save")
    if about["task"] not in (None, task.name):
        words = f"is of the task {clean(about['task'], 40)!r}, not of {task.name!r}; give its folder as --task"
        raise ModelFileError(f"{path} {words}")
    try:
        recipe = dataclasses.replace(Recipe(), **about["recipe"]).complete(task.models)
    except (ValueError, TypeError) as error:
        raise ModelFileError(f"{path} does not fit the task {task.name}: {error}") from None
    schema = about["schema"]
    own = getattr(task.data, "INPUT_SHAPE", None)
    if schema.get("input_shape") and own and schema["input_shape"] != own:
        words = f"{path} is for inputs of shape {schema['input_shape']}, and data.py makes {own}; set SIDE there"
        raise ModelFileError(words)
    if own:
        schema.setdefault("input_shape", own)  # which files of 1.0.0 may lack
    network = keep_frozen(task.build(schema, recipe))
    try:
        _fill(network, arrays)
    except (ValueError, RuntimeError) as error:
        words = " ".join(str(error).split())
        raise ModelFileError(f"{path} does not fit the network {recipe.model} of model.py: {words}") from None
    return SavedModel(network, recipe, schema, about.get("columns") or {})


def _fill(network: torch.nn.Module, arrays: dict[str, np.ndarray] | list[np.ndarray]) -> None:
    """Raises ValueError or RuntimeError where names, shapes or dtypes differ."""
    state = network.state_dict()
    if isinstance(arrays, list):  # of 1.0.0, by position
        if len(arrays) != len(state):
            raise ValueError(f"the network has {len(state)} arrays, was given {len(arrays)}")
        arrays = dict(zip(state, arrays, strict=True))
    for name in sorted({*state, *arrays}):
        has, needs = (
            f"{tuple(each[name].shape)} {_kind(each[name])}" if name in each else "nothing" for each in (arrays, state)
        )
        if has != needs:
            raise ValueError(f"array {name} should be {needs}, is {has}")
    network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})


def _kind(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _read(path: str) -> tuple[dict, Any]:
    """What the file says of itself, and its arrays; the content tells the kind, not the name."""
    if not zipfile.is_zipfile(path):
        arrays, about = model_file.read(Path(path))
        return about, arrays
    with zipfile.ZipFile(path) as archive:
        npz = "model.npy" in archive.namelist()
    return _read_npz(path) if npz else _read_pt(path)


def _read_npz(path: str) -> tuple[dict, list[np.ndarray]]:
    """A server's, of 1.0.0."""
    with np.load(path, allow_pickle=False) as file:
        weights = [file[key] for key in sorted(file.files) if key.startswith("w")]
        shape = file["input_shape"].tolist() if "input_shape" in file.files else []
        return _old(str(file["model"]), [str(name) for name in file["classes"]], shape), weights


def _read_pt(path: str) -> tuple[dict, Any]:
    """weights_only: a pickle from elsewhere could run anything."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    told = getattr(state, "_metadata", {}).get("", {})
    if "federation" in told:
        return json.loads(told["federation"]), {name: tensor.numpy() for name, tensor in state.items()}
    about = _old(told["model"], told.get("classes", []), told.get("input_shape")) if told.get("model") else {}
    return about, [value.numpy() for value in state.values()]


def _old(model: str, classes: list[str], input_shape: list[int] | None) -> dict:
    schema = {"classes": classes, **({"input_shape": input_shape} if input_shape else {})}
    return {"task": None, "recipe": {"model": model}, "schema": schema}


def export_onnx(path: str, task: Task, saved: SavedModel) -> None:
    """Write the model for programs without PyTorch: images (n, *input_shape) uint8 in, logits and probabilities out.

    Normalisation is inside. The class names are in the file's metadata, as JSON. Raises ImportError
    where the packages onnx and onnxscript are not installed.
    """
    import onnx  # both optional, and only here
    import onnxscript  # noqa: F401

    example = torch.zeros(2, *saved.schema["input_shape"], dtype=torch.uint8)
    any_number = {"images": {0: torch.export.Dim("n")}}
    program = torch.onnx.export(
        _Predictor(saved.network, task).eval(),
        (example,),
        input_names=["images"],
        output_names=["logits", "probabilities"],
        dynamic_shapes=any_number,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    exported = program.model_proto
    onnx.helper.set_model_props(exported, {"classes": json.dumps(saved.classes)})
    onnx.checker.check_model(exported)
    write_content(Path(path), exported.SerializeToString())


class _Predictor(torch.nn.Module):
    """From uint8 images to what model.predict gives, as a module, which is what the exporter takes."""

    def __init__(self, network: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.network = network
        self.to_input = task.model.to_input

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.network(self.to_input(images, torch.device("cpu")))  # (n, classes)
        return logits, logits.softmax(1)

"""A trained model as a file: its weights, the network's name and the class names; and, exported, as ONNX.

`model` is the module model.py, which knows the networks; it is given, so that this file imports no task.
"""

import json
import pickle
import zipfile
from pathlib import Path
from types import ModuleType

from federation.client.weights import set_weights
from federation.process import write_whole

import numpy as np
import torch


class ModelFileError(Exception):
    """The file can't be used; the text is one line with its path and the way out."""


def save(
    path: str, network: torch.nn.Module, name: str, classes: list[str], input_shape: list[int] | None = None
) -> None:
    """Write a PyTorch state_dict: network.load_state_dict(torch.load(path, weights_only=True)) takes it as it is.

    The network's name and the class names ride along in the state_dict's own metadata, which PyTorch
    keeps for the versions of its layers and otherwise lets be. Raises ModelFileError where the disk won't take it.
    """
    state = network.state_dict()
    for key in list(state):
        state[key] = state[key].cpu()
    state._metadata[""].update(model=name, classes=list(classes), input_shape=input_shape)  # type: ignore[attr-defined]
    try:
        write_whole(Path(path), lambda file: torch.save(state, file))
    except OSError as error:
        raise ModelFileError(f"{path} can't be written ({error.strerror})") from None


def load(path: str, model: ModuleType, input_shape: list[int] | None = None) -> tuple[torch.nn.Module, list[str]]:
    """The network and the class names from a client's .pt or a server's model.npz. Raises ModelFileError.

    input_shape: of one example, as data.py makes it; a file that says another is refused.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # both kinds are zip files; the content tells, not the name
            read = _read_npz if "model.npy" in archive.namelist() else _read_pt
        name, classes, weights, shape = read(path)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError, EOFError, RuntimeError, TypeError):
        words = "is no model file, or a damaged one; give a server's model.npz, or what a client's --save wrote"
        raise ModelFileError(f"{path} {words}") from None
    if name is None:
        raise ModelFileError(f"{path} holds weights without class names; save them with client.py --save")
    if name not in model.NETWORKS:
        raise ModelFileError(f"{path} is for a network {name!r} that model.py has not ({', '.join(model.NETWORKS)})")
    if shape and input_shape and shape != input_shape:
        raise ModelFileError(f"{path} is for inputs of shape {shape}, and data.py makes {input_shape}; set SIDE there")
    network = model.build(name, len(classes), seed=0)
    try:
        set_weights(network, weights)
    except (ValueError, RuntimeError) as error:
        words = " ".join(str(error).split())
        raise ModelFileError(f"{path} does not fit the network {name} of model.py: {words}") from None
    return network, classes


def _read_npz(path: str) -> tuple[str, list[str], list[np.ndarray], list[int]]:
    with np.load(path, allow_pickle=False) as file:
        weights = [file[key] for key in sorted(file.files) if key.startswith("w")]
        shape = file["input_shape"].tolist() if "input_shape" in file.files else []
        return str(file["model"]), [str(name) for name in file["classes"]], weights, shape


def _read_pt(path: str) -> tuple[str | None, list[str], list[np.ndarray], list[int]]:
    """weights_only: a pickle from elsewhere could run anything."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    names = getattr(state, "_metadata", {}).get("", {})
    weights = [value.numpy() for value in state.values()]
    return names.get("model"), names.get("classes", []), weights, names.get("input_shape") or []


def export_onnx(path: str, model: ModuleType, network: torch.nn.Module, classes: list[str]) -> None:
    """Write the model for programs without PyTorch: images (n, 3, 32, 32) uint8 in, logits and probabilities out.

    Normalisation is inside. The class names are in the file's metadata, as JSON. Raises ImportError
    where the packages onnx and onnxscript are not installed.
    """
    import onnx  # both optional, and only here
    import onnxscript  # noqa: F401

    example = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    any_number = {"images": {0: torch.export.Dim("n")}}
    program = torch.onnx.export(
        _Predictor(network, model).eval(),
        (example,),
        input_names=["images"],
        output_names=["logits", "probabilities"],
        dynamic_shapes=any_number,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    exported = program.model_proto
    onnx.helper.set_model_props(exported, {"classes": json.dumps(classes)})
    onnx.checker.check_model(exported)
    write_whole(Path(path), lambda file: file.write(exported.SerializeToString()))


class _Predictor(torch.nn.Module):
    """From uint8 images to what model.predict gives, as a module, which is what the exporter takes."""

    def __init__(self, network: torch.nn.Module, model: ModuleType) -> None:
        super().__init__()
        self.network = network
        self.to_input = model.to_input

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.network(self.to_input(images, torch.device("cpu")))  # (n, classes)
        return logits, logits.softmax(1)

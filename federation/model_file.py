"""A trained model as a safetensors file: PyTorch's own names, the same bytes wherever it is written.

`safetensors.torch.load_file(path)` gives a state_dict; what the model is rides along as one text of metadata.
"""

import hashlib
import json
from pathlib import Path

from federation.process import write_content

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

ABOUT = "federation"  # the one key of the metadata: with several, their order would differ from process to process


def write(path: Path, arrays: dict[str, np.ndarray], about: dict) -> None:
    """Whole or not at all. Raises OSError."""
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    content = save(contiguous, {ABOUT: json.dumps(about, sort_keys=True)})
    write_content(path, content)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays by name, and what the file says of itself. Raises OSError, or ValueError where it is no such file."""
    with open(path, "rb"):  # for an OSError with its own words
        pass
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"no safetensors file ({error})") from None


def about(task: str, recipe: dict, schema: dict, statistics: dict) -> dict:
    """What a model's file says of it: enough to build the network again, and to read an example as it needs it.

    recipe: the part of it that is the task's; schema: with the classes; statistics: of columns, by name.
    """
    return {"task": task, "recipe": recipe, "schema": schema, "columns": statistics}


def hash_of(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, dtypes, shapes and values; "" of none."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return digest.hexdigest() if arrays else ""


def hash_sorted(arrays: dict[str, np.ndarray]) -> str:
    """hash_of in the order of the names: a file keeps its arrays in an order of its own."""
    return hash_of(dict(sorted(arrays.items())))

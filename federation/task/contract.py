"""What a task's model.py and data.py must have, as docs/own-federation.md says it; whoever breaks it hears of it."""

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from federation.console import clean, show_fault

PAGE = "docs/own-federation.md"
NEEDED = {  # functions of each file, as they are called
    "data": {"open_dataset": ["source"], "load": ["dataset", "split", "rows", "seed"]},
    "model": {
        "build": ["schema", "recipe"],
        "train_round": ["network", "examples", "recipe", "part"],
        "evaluate": ["network", "examples", "recipe"],
    },
}
OPTIONAL = {
    "data": {
        "schema": ["dataset"],
        "size": ["dataset", "split", "seed"],
        "labels": ["dataset", "split", "seed"],
        "adopt": ["dataset", "classes"],
        "columns": ["dataset", "rows", "seed"],
        "scale": ["dataset", "statistics"],
        "read_example": ["path", "schema"],
    },
    "model": {
        "predict": ["network", "examples"],
        "show": ["schema", "examples", "predictions"],
        "pictures": ["examples"],
        "private_training": ["network", "examples"],
        "to_input": ["examples", "device"],
    },
}


class DataError(Exception):
    """The data can't be had; the text is one line with the path or the reason, and the way out.

    public: the same for other eyes, a kind and a number: no path, no name.
    """

    def __init__(self, text: str, public: str = "its data can't be read"):
        super().__init__(text)
        self.public = public


class TaskError(Exception):
    """The task does not keep the contract; the text is one line with the file and the function."""

    def __init__(self, text: str, public: str = "its task does not keep the contract"):
        super().__init__(text)
        self.public = public


def open_file(path: Path) -> ModuleType:
    """The module of a task's model.py or data.py, if it keeps the contract. Raises TaskError."""
    name, folder = path.stem, str(path.parent)
    if not path.is_file():
        raise TaskError(f"{folder} has no {name}.py; a task is a folder with model.py and data.py: see {PAGE}")
    if sys.path[0] != folder:
        sys.path.insert(0, folder)
    loaded = sys.modules.get(name)
    if loaded is not None and Path(str(loaded.__file__)).resolve() != path.resolve():
        del sys.modules[name]  # that of another task
    try:
        module = importlib.import_module(name)
    except (DataError, TaskError):  # the task's own words
        raise
    except Exception as error:
        show_fault(error)
        raise TaskError(f"{path} can't be imported ({type(error).__name__}: {clean(error)})") from None
    for function, parameters in {**NEEDED[name], **OPTIONAL[name]}.items():
        _check(path, getattr(module, function, None), function, parameters)
    if hasattr(module, "columns") != hasattr(module, "scale"):
        raise missing(path, "scale" if hasattr(module, "columns") else "columns", "to go with the other")
    return module


def _check(path: Path, code: Any, function: str, parameters: list[str]) -> None:
    if code is None and function in OPTIONAL[path.stem]:
        return
    if not callable(code):
        raise missing(path, function)
    try:
        inspect.signature(code).bind(*parameters)
    except TypeError:
        takes = ", ".join(inspect.signature(code).parameters)
        called = f"{function}({', '.join(parameters)})"
        raise TaskError(f"{path}: {function} takes ({takes}), but is called as {called}") from None
    except ValueError:  # no signature to be had
        pass


def missing(path: Path, function: str, other: str = "") -> TaskError:
    """What to raise where a file lacks a function that it needs."""
    called = f"{function}({', '.join({**NEEDED[path.stem], **OPTIONAL[path.stem]}[function])})"
    words = f"has no function {called}{' ' + other if other else ''}"
    return TaskError(f"{path} {words}; {PAGE} says more", f"its task's {path.name} {words}")


def broken(path: Path, function: str, must: str, was: Any) -> TaskError:
    """What to raise where a function gives what it must not; its value stays with the client."""
    what = f"{type(was).__name__} {clean(was, 60)}" if not isinstance(was, str) else clean(was, 60)
    words = f"{function} of the task's {path.name} must give {must}"
    return TaskError(f"{path}: {function} must give {must}, gave {what}", words)

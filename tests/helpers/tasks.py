"""The project's own task as tests need it, and tasks made up for one test."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from federation.config import Recipe
from federation.task.task import Task, open_task

import pytest

from data import INPUT_SHAPE

DATA = """\
import numpy as np
import torch


def open_dataset(source):
    return source


def size(dataset, split, seed):
    return {"train": 20, "test": 10}[split]


def load(dataset, split, rows, seed):
    return torch.ones(len(rows), 2), torch.from_numpy(rows % 2)
"""
MODEL = """\
from federation.task.classification import evaluate, train_round
from torch import nn


def build(schema, recipe):
    return nn.Linear(2, 2)
"""


def recipe(**values: object) -> Recipe:
    """With the defaults of the project's own task: as its functions need it."""
    return open_task().complete(Recipe(**values))


def build(name: str, classes: int = 3, seed: int = 0, **own: object):  # -> torch.nn.Module
    """An untrained network of the project's own, for so many classes, with these own settings."""
    schema = {"classes": [f"class {i}" for i in range(classes)], "input_shape": INPUT_SHAPE}
    return open_task().build(schema, recipe(model=name, seed=seed, own=own))


def write_task(folder: Path, data: str = DATA, model: str = MODEL) -> Task:
    """A task of these two files, opened: the smallest that keeps the contract, where a test gives no other."""
    folder.mkdir(parents=True)
    (folder / "data.py").write_text(data)
    (folder / "model.py").write_text(model)
    importlib.invalidate_caches()  # the folder may be new within the file system's grain of time
    return Task(folder, only_data=True)


@pytest.fixture
def other_tasks() -> Iterator[None]:
    """Tasks may be opened in this test: the modules model and data of all other tests are back after it."""
    path, modules = [*sys.path], {name: sys.modules.get(name) for name in ("data", "model")}
    yield
    sys.path[:] = path
    for name, module in modules.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module

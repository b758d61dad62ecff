"""What all clients must have alike, or the mean of their weights has no meaning."""

import json
from collections.abc import Iterator
from typing import Any

from federation import model_file
from federation.console import clean
from federation.protocol import DataSummary, TaskSummary

import numpy as np


def conflict(theirs: DataSummary, ours: DataSummary) -> str | None:
    """Why a client can't be one of this federation, with both sides' values; None where it can.

    What one of the two does not say (clients of version 1.0.0) is not compared.
    """
    return next(_conflicts(theirs, ours), None)


def initial_conflict(task: TaskSummary | None, initial: dict[str, np.ndarray]) -> str | None:
    """Why a client can't begin with the weights that the server was given; None where it can."""
    if task is None:
        return "is of a version that --initial-weights can't be used with; update it"
    for name, shape, dtype in [*task.arrays, *task.frozen_arrays]:
        there = initial.get(name)
        if there is None or [list(there.shape), str(there.dtype)] != [shape, dtype]:
            has = _array([name, shape, dtype])
            other = _array([name, there.shape, there.dtype]) if there is not None else "none of that name"
            return f"has an array {has}, --initial-weights has {other}; give the weights of this network"
    if model_file.hash_of({name: initial[name] for name, *_ in task.frozen_arrays}) != task.frozen:
        return "has other frozen weights than --initial-weights; give both the same file"
    return None


def remark(theirs: TaskSummary | None, ours: TaskSummary | None) -> str | None:
    """What is worth a line, but does no harm to the mean."""
    if theirs and ours and theirs.code != ours.code:
        return f"its task's code is another (hash {theirs.code[:12]}, the others' {ours.code[:12]})"
    if theirs and ours and theirs.start != ours.start:
        return "its untrained weights are others than the first client's, which all begin with"
    return None


def _conflicts(theirs: DataSummary, ours: DataSummary) -> Iterator[str]:
    if theirs.task and ours.task:
        yield from _of_tasks(theirs.task, ours.task)
    if theirs.buffer_positions != ours.buffer_positions:
        yield "measures other arrays of the network (BatchNorm's) than the others; use one model.py"
    if theirs.batchnorm and ours.batchnorm and theirs.batchnorm != ours.batchnorm:
        yield "measures BatchNorm's statistics of other layers than the others; use one model.py"
    if theirs.input_shape and ours.input_shape and theirs.input_shape != ours.input_shape:
        yield f"has inputs of shape {theirs.input_shape}, the others {ours.input_shape}; use one data.py"


def _of_tasks(theirs: TaskSummary, ours: TaskSummary) -> Iterator[str]:
    recipes = [{**each.recipe, **(each.recipe.get("own") or {}), "own": None} for each in (theirs, ours)]
    for name in sorted({*recipes[0], *recipes[1]}):
        one, other = (recipe.get(name) for recipe in recipes)
        if one != other:
            yield f"trains with {name} {clean(one, 80)}, the others with {clean(other, 80)}; use one model.py"
    for key in sorted({*theirs.schema, *ours.schema}):
        one, other = theirs.schema.get(key), ours.schema.get(key)
        if json.dumps(one) != json.dumps(other):  # the order of keys counts, too
            yield f"{_apart(key, one, other)}; use one data.py, and the same order"
    for here, there in zip(theirs.arrays, ours.arrays, strict=False):
        if here != there:
            yield f"has an array {_array(here)} where the others have {_array(there)}; use one model.py"
    if len(theirs.arrays) != len(ours.arrays):
        yield f"has a network of {len(theirs.arrays)} arrays, the others {len(ours.arrays)}; use one model.py"
    if theirs.frozen != ours.frozen:
        one, other = (each.frozen[:12] or "none" for each in (theirs, ours))
        yield f"has other frozen weights (hash {one}, the others' {other}); give all the same file of them"
    one, other = ([metric.name for metric in each.metrics] for each in (theirs, ours))
    if one != other:
        yield f"{_apart('metrics', one, other)}; use one model.py"
    for metric, same in zip(theirs.metrics, ours.metrics, strict=False):
        for key, value in vars(metric).items():
            if value != getattr(same, key):
                words = f"{key} {value}, the others with {getattr(same, key)}"
                yield f"has the metric {metric.name} with {words}; use one model.py"
    if theirs.columns != ours.columns:
        yield f"{_apart('columns', theirs.columns, ours.columns)}; use one data.py"


def _array(told: list) -> str:
    name, shape, dtype = told
    return f"{clean(name, 100)} {clean(tuple(shape), 40)} {dtype}"


def _apart(key: str, one: Any, other: Any) -> str:
    """Two values that differ; of two long lists, the first place where they do."""
    if isinstance(one, list) and isinstance(other, list) and max(len(one), len(other)) > 8:
        if len(one) != len(other):
            odd = [each for each in one if each not in other] + [each for each in other if each not in one]
            return f"has {len(one)} {key}, the others {len(other)} (in one only: {clean(', '.join(map(str, odd)), 60)})"
        place = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), 0)
        return f"has {clean(one[place], 40)} for number {place + 1} of its {key}, the others {clean(other[place], 40)}"
    return f"has {key} {clean(one, 80)}, the others {clean(other, 80)}"

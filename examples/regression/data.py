"""scikit-learn's diabetes data: how far the disease has come after a year, from ten measurements of 442 people."""

from federation.task.task import DataError

import numpy as np

DATASET = "diabetes"  # without --dataset
TEST = 88  # of 442, which ones is the seed's choice

# Networks learn best from numbers of size one. The package's inputs have a mean of 0 and a spread of 1 / sqrt(442);
# the targets go from 25 to 346. These constants are the same at all clients, as they are written here.
INPUT_SPREAD = 442**-0.5
TARGET_MEAN, TARGET_SPREAD = 150.0, 80.0


def open_dataset(source: str) -> dict:
    """Names of the columns, inputs (442, 10) and targets (442,). Raises DataError where they can't be had."""
    if source != DATASET:
        raise DataError(f"--dataset {source!r} is not {DATASET}; for data of your own see README.md beside data.py")
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        words = "scikit-learn is missing; install it: pip install scikit-learn"
        raise DataError(f"--dataset {DATASET}: {words}", words) from None
    people = load_diabetes()
    return {"columns": list(people.feature_names), "inputs": people.data, "targets": people.target}


def schema(dataset: dict) -> dict:
    return {"columns": dataset["columns"]}


def size(dataset: dict, split: str, seed: int) -> int:
    return len(_people(dataset, split, seed))


def load(dataset: dict, split: str, rows: np.ndarray, seed: int):  # -> tuple[torch.Tensor, torch.Tensor]
    """Inputs (n, 10) and targets (n,), both float32 and scaled."""
    import torch

    people = _people(dataset, split, seed)[rows]
    inputs, targets = dataset["inputs"][people] / INPUT_SPREAD, (dataset["targets"][people] - TARGET_MEAN)
    return torch.from_numpy(inputs).float(), torch.from_numpy(targets / TARGET_SPREAD).float()


def _people(dataset: dict, split: str, seed: int) -> np.ndarray:
    """Which rows of the table belong to a split."""
    order = np.random.default_rng(seed).permutation(len(dataset["targets"]))
    return order[:TEST] if split == "test" else order[TEST:]

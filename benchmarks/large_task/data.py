"""A few rows of noise in two classes."""

import numpy as np
import torch

DATASET = "noise"
SIZES = {"train": 320, "test": 160}


def open_dataset(source: str) -> str:
    return source


def schema(dataset: str) -> dict:
    return {"classes": ["left", "right"]}


def labels(dataset: str, split: str, seed: int) -> np.ndarray:
    return np.arange(SIZES[split]) % 2


def load(dataset: str, split: str, rows: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = np.random.default_rng([seed, SIZES[split]]).normal(size=(SIZES[split], 8)).astype(np.float32)
    classes = labels(dataset, split, seed)
    return torch.from_numpy(inputs[rows]), torch.from_numpy(classes[rows])

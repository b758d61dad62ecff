"""Images in memory: CIFAR-10, a folder of image files, or generated shapes.

A data set has class names, labels(split, seed) for all its examples, and images(split, indices, seed) that reads only
those. Splits are "train" and "test"; images are (n, 3, SIDE, SIDE) uint8, labels (n,) int64. The functions at the end
are what a task's data.py must have: docs/own-federation.md.
"""

from pathlib import Path

from federation.console import say
from federation.task import image_files
from federation.task.cifar10 import load_cifar10
from federation.task.task import DataError

import numpy as np

SIDE = 32  # pixels; the one place for the images' size
INPUT_SHAPE = [3, SIDE, SIDE]


class Folder:
    """train/<class>/* and test/<class>/*, image files of any size (torchvision's ImageFolder layout)."""

    def __init__(self, root: str, skip_damaged: bool = False):
        self.root = Path(root)
        self._files = {split: self._list(split) for split in ("train", "test")}
        self.classes = list(self._files["train"])
        if self.classes != list(self._files["test"]):
            odd = sorted(set(self.classes) ^ set(self._files["test"]))
            raise DataError(
                f"{self.root}: train and test have different classes ({', '.join(odd)} in one only); "
                "give both the same subfolders, an empty one where there is no image"
            )
        if skip_damaged:
            self._skip_damaged()

    def _list(self, split: str) -> dict[str, list[str]]:
        folder = self.root / split
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; --dataset FOLDER must hold train/<class>/* and test/<class>/*")
        files, left_out = image_files.list_images(folder)
        if left_out:
            commonest = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
            kinds = ", ".join(f"{number} {ending}" for ending, number in commonest)
            say(f"{folder}: left out what is no image file: {kinds}")
        if not any(files.values()):
            raise DataError(f"{folder} holds no image files in class folders; put some there")
        return files

    def adopt(self, classes: list[str]) -> None:
        """Take these for the classes, as other clients of the federation have some that are not here."""
        self._files = {split: {name: files.get(name, []) for name in classes} for split, files in self._files.items()}
        self.classes = classes

    def _skip_damaged(self) -> None:
        for split, files in self._files.items():
            for name, paths in files.items():
                _, errors = image_files.read_images(paths, SIDE, f"checking {split} images")
                files[name] = [path for i, path in enumerate(paths) if i not in errors]
                for error in errors.values():
                    say(f"left out: {error}")

    def labels(self, split: str, seed: int) -> np.ndarray:
        return np.repeat(np.arange(len(self.classes)), [len(files) for files in self._files[split].values()])

    def images(self, split: str, indices: np.ndarray, seed: int) -> np.ndarray:
        paths = [path for files in self._files[split].values() for path in files]
        images, errors = image_files.read_images([paths[i] for i in indices], SIDE, f"reading {split} images")
        if errors:
            raise image_files.damaged(list(errors.values()), len(indices))
        return images


class Cifar10:
    """CIFAR-10 by torchvision: downloaded once into data_dir, checked by its checksum."""

    def __init__(self, data_dir: str):
        self.root = data_dir
        test = load_cifar10(data_dir, "test")
        self.classes = list(test.classes)
        self._labels = {"test": np.array(test.targets, np.int64)}

    def labels(self, split: str, seed: int) -> np.ndarray:
        if split not in self._labels:  # kept, as every load takes a second for its checksums
            self._labels[split] = np.array(load_cifar10(self.root, split).targets, np.int64)
        return self._labels[split]

    def images(self, split: str, indices: np.ndarray, seed: int) -> np.ndarray:
        return np.ascontiguousarray(load_cifar10(self.root, split).data[indices].transpose(0, 3, 1, 2))


class Synthetic:
    """Ten shapes of random place, size and colour in noise: no download, a function of the seed alone."""

    def __init__(self) -> None:
        self.classes = ["checks", "cross", "diagonal", "disc", "frame", "lines", "ring", "rungs", "square", "triangle"]
        self.sizes = {"train": 6000, "test": 1500}
        self.noise = 35.0  # standard deviation, in grey levels of 255: learnable, but not after one round

    def labels(self, split: str, seed: int) -> np.ndarray:
        return np.arange(self.sizes[split]) % len(self.classes)

    def images(self, split: str, indices: np.ndarray, seed: int) -> np.ndarray:
        """All of the split is drawn, so that an image doesn't depend on which others are asked for."""
        rng = np.random.default_rng([seed, split == "test"])
        n = self.sizes[split]
        x0, y0 = (rng.uniform(11, 21, (2, n, 1, 1)) * (SIDE / 32)).astype(np.float32)
        radius = (rng.uniform(6, 10, (n, 1, 1)) * (SIDE / 32)).astype(np.float32)
        paper, ink = rng.uniform(0, 255, (2, n, 3, 1, 1)).astype(np.float32)
        noise = rng.standard_normal((n, 1, SIDE, SIDE), np.float32) * self.noise
        pixels = np.arange(SIDE, dtype=np.float32)
        x = (pixels[None, None, :] - x0[indices]) / radius[indices]  # (n, 1, 32), in radii from the centre
        y = (pixels[None, :, None] - y0[indices]) / radius[indices]  # (n, 32, 1)
        mask = np.choose(self.labels(split, seed)[indices, None, None], _shapes(x, y))
        images = np.where(mask[:, None], ink[indices], paper[indices]) + noise[indices]
        return images.clip(0, 255).astype(np.uint8)


def _shapes(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Which pixels belong to the shape, for each of Synthetic.classes; every shape fits into |x|, |y| < 1."""
    square, distance = np.maximum(abs(x), abs(y)), np.hypot(x, y)
    inside = square < 1
    return [
        inside & ((np.floor(x * 2) + np.floor(y * 2)) % 2 == 0),  # checks
        inside & (np.minimum(abs(x), abs(y)) < 0.3),  # cross
        inside & (np.minimum(abs(x - y), abs(x + y)) < 0.4),  # diagonal
        distance < 1,  # disc
        inside & (square > 0.6),  # frame
        inside & (np.floor(x * 2.5) % 2 == 0),  # lines
        (distance < 1) & (distance > 0.6),  # ring
        inside & (np.floor(y * 2.5) % 2 == 0),  # rungs
        inside,  # square
        inside & (abs(x) < (y + 1) / 2),  # triangle
    ]


DATASET, FALLBACK = "cifar10", "synthetic"  # without --dataset; for a demo where that can't be had


def open_dataset(source: str, data_dir: str = "data", skip_damaged: bool = False) -> Folder | Cifar10 | Synthetic:
    """The data set of --dataset: cifar10, synthetic, or a folder's path. Raises DataError where it can't be had."""
    if source == "synthetic":
        return Synthetic()
    if source == "cifar10":
        return Cifar10(data_dir)
    if not Path(source).exists():
        raise DataError(f"--dataset {source!r} is neither cifar10, nor synthetic, nor a folder that exists")
    try:
        return Folder(source, skip_damaged)
    except OSError as error:
        raise DataError(f"{error.filename} can't be read ({error.strerror}); give this user the right to") from None


def schema(dataset) -> dict:
    return {"classes": dataset.classes, "input_shape": INPUT_SHAPE}


def labels(dataset, split: str, seed: int) -> np.ndarray:
    return dataset.labels(split, seed)


def adopt(dataset, classes: list[str]) -> None:
    dataset.adopt(classes)


def load(dataset, split: str, rows: np.ndarray, seed: int):  # -> tuple[torch.Tensor, torch.Tensor]
    """Images (n, 3, SIDE, SIDE) uint8 and labels (n,) int64 of these examples, as the network takes them."""
    import torch  # only here: who only lists a data set does without

    known = dataset.labels(split, seed)[rows]
    return torch.from_numpy(dataset.images(split, rows, seed)), torch.from_numpy(known)


def read_example(path: str, schema: dict):  # -> tuple[torch.Tensor, torch.Tensor]
    """Any image file as one example, with no label to speak of. Raises DataError with the path where it is none."""
    import torch

    return torch.from_numpy(image_files.read_image(path, SIDE).copy())[None], torch.zeros(1, dtype=torch.int64)

"""Chest films of two classes: folders of PNG, DICOM and other images, or generated ones.

`python examples/xray/data.py FOLDER` writes the generated films of three hospitals, a folder for each.
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the project's folder, where this file is run by itself

from federation.console import Parser, fail, say
from federation.task import image_files
from federation.task.task import DataError

import numpy as np

SIDE = 128  # pixels
INPUT_SHAPE = [1, SIDE, SIDE]
CLASSES = ["normal", "opacity"]  # the second, in the alphabet's order, is the finding
DICOM = {".dcm", ".dicom"}
DATASET = "generated"
SPLITS = ["train", "test", "reference"]  # the last are nobody's: they only set the scale of the network's features
REFERENCE = 50  # of each hospital's kind
HOSPITALS = {  # training and test films, part with the finding, bits of grey, its darkest and lightest, gamma
    "a": (600, 60, 0.5, 8, 0.0, 1.0, 1.0),
    "b": (450, 50, 0.4, 12, 0.1, 0.9, 0.7),
    "c": (300, 40, 0.3, 16, 0.3, 0.8, 1.4),
}


def open_dataset(source: str, skip_damaged: bool = False) -> dict:
    """Class names, and by split films (n, 1, SIDE, SIDE) uint8 and their classes (n,) int64. Raises DataError.

    source: "generated", for the films of all three hospitals, or a folder of train|test/<class>/*.
    """
    if source == DATASET:
        return {"classes": CLASSES, **{split: generated(list(HOSPITALS), split) for split in ("train", "test")}}
    if not Path(source).is_dir():
        raise DataError(f"--dataset {source!r} is neither {DATASET} nor a folder that exists")
    try:
        files = {split: _list(Path(source) / split) for split in ("train", "test")}
        if list(files["train"]) != list(files["test"]) or len(files["train"]) != 2:
            found = "; ".join(f"{split} has {', '.join(names) or 'none'}" for split, names in files.items())
            raise DataError(f"{source} needs the same two class folders in train and test, but {found}")
        films = {split: _read(each, skip_damaged) for split, each in files.items()}
    except OSError as error:
        where = f"{error.filename} can't be read ({error.strerror})"
        raise DataError(f"{where}; a data set is a folder of train/<class>/* and test/<class>/*") from None
    if not len(films["train"][1]) or len(set(films["test"][1])) < 2:
        raise DataError(f"{source} needs training films, and test films of both classes for an AUC; put some there")
    return {"classes": list(files["train"]), **films}


def schema(dataset: dict) -> dict:
    return {"classes": dataset["classes"], "input_shape": INPUT_SHAPE}


def labels(dataset: dict, split: str, seed: int) -> np.ndarray:
    return dataset[split][1]


def load(dataset: dict, split: str, rows: np.ndarray, seed: int):  # -> tuple[torch.Tensor, torch.Tensor]
    import torch  # only here: who only writes films does without

    return tuple(torch.from_numpy(array[rows]) for array in dataset[split])


def read_example(path: str, schema: dict):  # -> tuple[torch.Tensor, torch.Tensor]
    return load({"one": (_read_film(Path(path))[None], np.zeros(1, np.int64))}, "one", np.arange(1), 0)


def _list(folder: Path) -> dict[str, list[Path]]:
    """Paths by class, both sorted."""
    files, left_out = image_files.list_images(folder, image_files.IMAGE_FILES | DICOM)
    if left_out:
        say(f"{folder}: left out {left_out.total()} files that are neither images nor {', '.join(sorted(DICOM))}")
    return {name: [Path(path) for path in paths] for name, paths in files.items()}


def _read(files: dict[str, list[Path]], skip_damaged: bool) -> tuple[np.ndarray, np.ndarray]:
    """Raises one DataError for all that can't be read; with skip_damaged they are named and left out."""
    paths = [path for each in files.values() for path in each]
    dicom = sum(path.suffix.lower() in DICOM for path in paths)
    if dicom and not find_spec("pydicom"):
        raise DataError(f"{dicom} of {len(paths)} films are DICOM; to read them: pip install pydicom")
    films, errors = np.zeros((len(paths), *INPUT_SHAPE), np.uint8), {}
    for row, path in enumerate(paths):
        try:
            films[row] = _read_film(path)
        except DataError as error:
            errors[row] = error
    if errors and not skip_damaged:
        raise image_files.damaged(list(errors.values()), len(paths))
    for error in errors.values():
        say(f"left out: {error}")
    good = [row for row in range(len(paths)) if row not in errors]
    return films[good], np.repeat(np.arange(len(files)), [len(each) for each in files.values()])[good]


def _read_film(path: Path) -> np.ndarray:
    """(1, SIDE, SIDE) uint8, light where a film is light. Raises DataError."""
    if path.suffix.lower() not in DICOM:
        return image_files.read_image(str(path), SIDE)[:1]
    if not find_spec("pydicom"):
        raise DataError(f"{path} is DICOM; to read it: pip install pydicom")
    import pydicom
    from PIL import Image, ImageOps

    try:
        file = pydicom.dcmread(path)
        grey = image_files.to_8_bits(file.pixel_array)
        grey = ~grey if file.get("PhotometricInterpretation") == "MONOCHROME1" else grey
        return np.asarray(ImageOps.fit(Image.fromarray(grey).convert("L"), (SIDE, SIDE)))[None]
    except Exception as error:  # pydicom's decoders raise many kinds
        raise DataError(f"{path} is no readable grey DICOM image ({type(error).__name__})") from None


def generated(hospitals: list[str], split: str) -> tuple[np.ndarray, np.ndarray]:
    """As they would be read from their files."""
    films, classes = zip(*(pair for name in hospitals for pair in stored(name, split)), strict=True)
    return np.stack([image_files.to_8_bits(film)[None] for film in films]), np.array(classes)


def stored(hospital: str, split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Films (SIDE, SIDE) in the hospital's depth and contrast, and their classes; always the same."""
    *numbers, part, bits, darkest, lightest, gamma = HOSPITALS[hospital]
    which = SPLITS.index(split)
    rng, number = np.random.default_rng([ord(hospital), which]), [*numbers, REFERENCE][which]
    for finding in np.arange(number) < part * number:
        grey = darkest + (lightest - darkest) * _film(rng, finding) ** gamma
        yield np.rint(grey * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16), int(finding)


def _film(rng: np.random.Generator, opacity: bool) -> np.ndarray:
    """(SIDE, SIDE) from 0 to 1: two dark lung fields with ribs on light ground, and maybe a soft bright spot in one."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    width, height, centre = rng.uniform(0.28, 0.36), rng.uniform(0.55, 0.72), rng.uniform(-0.08, 0.08, 2)
    grey = 0.8 - 0.1 * y + 0.04 * np.sin(y * rng.uniform(18, 24) + 3 * abs(x) + rng.uniform(0, 6))
    for side in (-0.45, 0.45):
        distance = np.hypot((x - centre[0] - side) / width, (y - centre[1]) / height)  # 1 at the edge
        grey -= rng.uniform(0.4, 0.55) / (1 + np.exp(12 * (distance - 1)))
    if opacity:
        angle, radius, size = rng.uniform(0, 6.28), rng.uniform(0, 0.7), rng.uniform(0.07, 0.16)
        spot_x = centre[0] + rng.choice([-0.45, 0.45]) + radius * width * np.cos(angle)
        spot_y = centre[1] + radius * height * np.sin(angle)
        grey += rng.uniform(0.15, 0.35) * np.exp(-((x - spot_x) ** 2 + (y - spot_y) ** 2) / (2 * size**2))
    return (grey + rng.normal(0, 0.04, grey.shape)).clip(0, 1)


def write(folder: Path) -> None:
    """Every tenth film of hospital c as DICOM, where pydicom is installed."""
    from PIL import Image

    for hospital in HOSPITALS:
        for split in ("train", "test"):
            for i, (film, label) in enumerate(stored(hospital, split)):
                path = folder / hospital / split / CLASSES[label] / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if hospital == "c" and i % 10 == 0 and find_spec("pydicom"):
                    _write_dicom(path.with_suffix(".dcm"), film)
                else:
                    Image.fromarray(film).save(path)
        say(f"wrote {folder / hospital}: {HOSPITALS[hospital][0]} training and {HOSPITALS[hospital][1]} test films")


def _write_dicom(path: Path, film: np.ndarray) -> None:
    from pydicom import Dataset, dataset, uid

    file = Dataset()
    file.file_meta = dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    file.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    file.SOPInstanceUID = uid.generate_uid(entropy_srcs=[film.tobytes().hex()])  # the same each time
    file.set_pixel_data(film, "MONOCHROME2", bits_stored=16, generate_instance_uid=False)
    file.save_as(path, enforce_file_format=True)


if __name__ == "__main__":
    parser = Parser("Write generated films of three hospitals, each a folder for one client.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new one")
    args = parser.parse_args()
    try:
        args.folder.mkdir(parents=True)
        write(args.folder)
    except OSError as error:
        fail(f"{error.filename} can't be written ({error.strerror}); name a new folder", 2)

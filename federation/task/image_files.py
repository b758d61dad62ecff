"""Folders of image files as people have them: <class>/*, read as squares of 8 bits a colour."""

import os
import unicodedata
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from federation.task.contract import DataError

import numpy as np
from tqdm import tqdm

IMAGE_FILES = {
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
}
SYSTEM = {"$recycle.bin", "__macosx", "__pycache__", "@eadir", "lost+found", "system volume information", "thumbs.db"}
SYSTEM |= {"desktop.ini"}
LISTED = 20  # damaged files, of more the number is said


def list_images(
    folder: Path, endings: Collection[str] = frozenset(IMAGE_FILES)
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Paths of images by class, both sorted, so that the order is the same on every machine; what was left out.

    A class is a subfolder, by its name in Unicode's composed form; its images may lie deeper, as torchvision's
    ImageFolder has it. Hidden and system folders and files are neither. endings: of files that are images, in small
    letters. Left out: files by their ending.
    """
    files: dict[str, list[str]] = {}
    left_out: Counter[str] = Counter()
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name)):
        found = files.setdefault(unicodedata.normalize("NFC", name), [])
        found += _images_below(f"{folder}/{name}", endings, left_out)
    return files, left_out


def is_hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.lower() in SYSTEM


def _images_below(folder: str, endings: Collection[str], left_out: Counter[str]) -> list[str]:
    paths, folders = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            folders.append(entry.path)
            continue
        ending = os.path.splitext(entry.name)[1].lower()
        if ending in endings:
            paths.append(entry.path)
        else:
            left_out[ending or "no ending"] += 1
    return paths + [path for each in folders for path in _images_below(each, endings, left_out)]


def damaged(errors: list[DataError], total: int) -> DataError:
    """One error for all images that can't be read."""
    remedy = "repair or remove them, or leave them out with --skip-damaged"
    public = f"{len(errors)} of its {total:,} images can't be read"
    if len(errors) == 1:
        return DataError(f"{errors[0]}; repair or remove it, or leave it out with --skip-damaged", public)
    listed = "; ".join(str(error) for error in errors[:LISTED])
    more = f"; and {len(errors) - LISTED:,} more" if len(errors) > LISTED else ""
    return DataError(f"{len(errors):,} images can't be read: {listed}{more}. {remedy.capitalize()}", public)


def read_images(paths: list[str], side: int, title: str) -> tuple[np.ndarray, dict[int, DataError]]:
    """Images (n, 3, side, side) uint8, and why some at these positions can't be read."""
    images, errors = np.zeros((len(paths), 3, side, side), np.uint8), {}
    # One thread: for small files four are slower, as opening one is mostly Python.
    for row, path in enumerate(tqdm(paths, title, delay=2, leave=False, disable=None)):
        try:
            images[row] = read_image(path, side)
        except DataError as error:
            errors[row] = error
    return images, errors


def read_image(path: str, side: int) -> np.ndarray:
    """Any image file as (3, side, side) uint8, turned as its EXIF data says: greyscale becomes RGB, transparency
    white, oblongs are cropped to squares, other depths are brought to 8 bits (see to_8_bits).

    Raises DataError with the path where the file is no readable image.
    """
    import io

    from PIL import Image, ImageOps  # only here: generated images do without

    try:
        # In one piece: Pillow's many small reads take longer from a file.
        with open(path, "rb") as file, Image.open(io.BytesIO(file.read())) as opened:
            image: Image.Image = opened
            deep = image.mode in ("RGB", "RGBA", "LA") and ";16" in str([tile[3] for tile in opened.tile])
            if opened.format == "TIFF" or "exif" in image.info:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":
                image = Image.fromarray(to_8_bits(np.asarray(image)))
            elif deep and 0 < np.asarray(image).max() < 16:  # of 12 bits in 16, Pillow leaves the upper 4
                raise ValueError("of its 16 bits a colour it uses few; convert it to 8")
            if image.mode not in ("RGB", "L") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode != "RGB":
                image = image.convert("RGB")
            if image.size != (side, side):
                image = ImageOps.fit(image, (side, side))
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = str(error) if type(error) is ValueError and len(str(error)) < 80 else type(error).__name__
        raise DataError(f"{path} is not a readable image ({reason})") from None


def to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values of any depth as uint8, as a person would see them. Raises ValueError where some are no numbers.

    Whole numbers from 0 up fill the fewest of 8, 10, 12, 14 or 16 bits that hold them; fractions from 0 to 1 are
    parts of white. All others, such as a CT's negative ones, go from black for the least to white for the greatest.
    """
    if not np.isfinite(grey).all():
        raise ValueError("it holds values that are no numbers")
    least, most = float(grey.min()), float(grey.max())
    if grey.dtype.kind in "iu" and least >= 0 and most < 2**16:
        bits = next(bits for bits in (8, 10, 12, 14, 16) if most < 2**bits)
        return (grey.astype(np.int64) >> (bits - 8)).astype(np.uint8)
    values = grey.astype(np.float64)
    if grey.dtype.kind == "f" and least >= 0 and most <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if least >= 0 and most <= 255:
        return np.rint(values).astype(np.uint8)
    return np.rint((values - least) * (255 / max(most - least, 1e-300))).astype(np.uint8)


def pictures(examples: tuple) -> np.ndarray:
    """A model.py's function for examples that begin with images, (n, 3, height, width) uint8: these, to be drawn."""
    return examples[0].numpy()

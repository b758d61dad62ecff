"""A table with a row for each case: each client's own CSV file, or scikit-learn's breast cancer data.

For tables of your own, edit the constants. Run by itself, this file writes the data as three CSV files.
"""

import contextlib
import csv
import io
import math
import sys
import unicodedata
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # the project's folder, where federation/ is

from federation.console import clean, fail, read_text, say
from federation.task.task import DataError

import numpy as np

TARGET = "diagnosis"  # the column with the class
CATEGORIES: dict[str, list[str]] = {}  # the columns of text, and all their values: {"sex": ["female", "male"]}
LEFT_OUT: list[str] = []  # columns not to learn from, such as a patient's number; all others must hold numbers
MISSING = ("", "na", "n/a", "nan", "null", "?")  # how a missing value is written, in lower case

DATASET = "breast-cancer"  # without --dataset
FILES = {"hospital-a.csv": 0.6, "hospital-b.csv": 0.3, "hospital-c.csv": 0.1}  # and their shares of its rows


class Table:
    """What was read of a table: values[i] holds row i's numbers, then 0 or 1 for each value of each category."""

    statistics: dict[str, list[float]] | None = None  # over all clients, once they are known

    def __init__(self, path: str, lines: list[tuple[int, list[str]]]):
        """lines: of each its number and its cells; the first has the columns' names. Raises DataError."""
        if len(lines) < 2:
            raise wrong(path, 1, "should have the columns' names, and rows below it; add what is missing")
        number, head = lines[0]
        for name in {TARGET, *CATEGORIES} - set(head):
            raise wrong(path, number, f"has no column {name!r}; add it, or edit TARGET or CATEGORIES in data.py")
        if "" in head or len(set(head)) < len(head):
            raise wrong(path, number, "has a column without a name, or two of one name; name each")
        self.columns = sorted(set(head) - {TARGET, *CATEGORIES, *LEFT_OUT})  # in the file they may be in any order
        values: list[list[float]] = []
        targets = []
        for number, cells in lines[1:]:
            if len(cells) != len(head):
                raise wrong(path, number, f"has {len(cells)} cells, and the first line {len(head)}; correct it")
            row = dict(zip(head, cells, strict=True))
            if row[TARGET].lower() in MISSING:
                raise wrong(path, number, f"has no {TARGET!r}; fill it in, or remove the line")
            targets.append(row[TARGET])
            values.append([])
            for name in [*self.columns, *sorted(CATEGORIES)]:
                try:
                    values[-1] += read_cell(name, row[name])
                except ValueError as error:
                    raise wrong(path, number, f"has {clean(row[name], 40)!r} as {name!r}; {error}") from None
        self.values, self.targets = np.array(values), np.array(targets)
        self.classes = np.unique(self.targets).tolist()
        if not 2 <= len(self.classes) <= max(2, len(targets) // 4):
            words = f"ends a table with {len(self.classes)} different {TARGET!r}"
            raise wrong(path, number, f"{words}; give two or more, each with several rows, or edit TARGET in data.py")

    def rows(self, split: str, seed: int) -> np.ndarray:
        """Of each class, shuffled, every fifth row is for testing."""
        rng = np.random.default_rng(seed)
        classes = [rng.permutation(np.flatnonzero(self.targets == name)) for name in np.unique(self.targets)]
        test = np.concatenate([rows[::5] for rows in classes])
        return np.sort(test) if split == "test" else np.setdiff1d(np.arange(len(self.targets)), test)


def read_cell(name: str, cell: str) -> list[float]:
    """A number, NaN where it is missing; or, of a category, 0 or 1 for each value. Raises ValueError with a remedy."""
    missing = cell.lower() in MISSING
    if name in CATEGORIES:
        if not missing and cell not in CATEGORIES[name]:
            raise ValueError("correct it, or add it to CATEGORIES in data.py, at all clients alike")
        return [float(cell == value) for value in CATEGORIES[name]]
    number = math.nan
    with contextlib.suppress(ValueError):
        number = float(cell)
    if not missing and not math.isfinite(number):
        raise ValueError("write a number such as 1.5, or name the column in CATEGORIES or LEFT_OUT in data.py")
    return [math.nan if missing else number]


def wrong(path: str, number: int, words: str) -> DataError:
    return DataError(f"{path}: line {number} {words}", f"line {number} of its table can't be used")


def read_csv(path: str) -> list[tuple[int, list[str]]]:
    """The lines that aren't empty. What stands between cells, a comma, semicolon or tab, is seen from the first."""
    try:
        text = unicodedata.normalize("NFC", read_text(Path(path).read_bytes()))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=text.partition("\n")[0].count))
        return [(reader.line_num, [" ".join(cell.split()) for cell in cells]) for cells in reader if any(cells)]
    except OSError as error:
        words = f"can't be read ({error.strerror}); --dataset must be {DATASET} or a CSV file"
    except (UnicodeDecodeError, csv.Error):
        words = "is no CSV file in UTF-8; save it as one"
    raise DataError(f"{path} {words}", "its table can't be read")


def breast_cancer() -> list[list[str]]:
    """569 biopsies, 30 measurements and the diagnosis of each; first the columns' names."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        words = "scikit-learn, which holds the breast cancer data, is missing"
        raise DataError(f"{words}; install it: pip install scikit-learn", words) from None
    data = load_breast_cancer()
    names = data.target_names[data.target]
    rows = [[*map(str, values), str(name)] for values, name in zip(data.data.tolist(), names, strict=True)]
    return [[*map(str, data.feature_names), "diagnosis"], *rows]


def open_dataset(source: str) -> Table:
    return Table(source, [*enumerate(breast_cancer(), 1)] if source == DATASET else read_csv(source))


def schema(dataset: Table) -> dict:
    return {"classes": dataset.classes, "columns": dataset.columns, "categories": CATEGORIES}


def labels(dataset: Table, split: str, seed: int) -> np.ndarray:
    targets = dataset.targets[dataset.rows(split, seed)]
    return np.array([dataset.classes.index(name) for name in targets], np.int64)


def adopt(dataset: Table, classes: list[str]) -> None:
    dataset.classes = classes


def columns(dataset: Table, rows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    numbers = dataset.values[dataset.rows("train", seed)[rows], : len(dataset.columns)]
    return dict(zip(dataset.columns, numbers.T, strict=True))


def scale(dataset: Table, statistics: dict[str, list[float]]) -> None:
    dataset.statistics = statistics


def load(dataset: Table, split: str, rows: np.ndarray, seed: int):  # -> tuple[torch.Tensor, torch.Tensor]
    """Scaled numbers and categories, (n, inputs) float32, and classes. A missing number becomes the mean, 0."""
    import torch

    values = dataset.values[dataset.rows(split, seed)[rows]]
    if dataset.statistics is not None:
        for i, name in enumerate(dataset.columns):  # a column with too few values at every client has no statistics
            _, mean, spread = dataset.statistics.get(name, (0, 0.0, math.inf))
            values[:, i] = (values[:, i] - mean) / (spread or 1)
    return torch.from_numpy(np.nan_to_num(values)).float(), torch.from_numpy(labels(dataset, split, seed)[rows])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail("give the folder for the three files: python examples/tabular/data.py FOLDER", 2)
    try:
        (head, *rows), folder = breast_cancer(), Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        cuts = [round(len(rows) * share) for share in np.cumsum([*FILES.values()])[:-1]]
        for name, part in zip(FILES, np.split(np.random.default_rng(0).permutation(len(rows)), cuts), strict=True):
            with open(folder / name, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([head, *(rows[i] for i in part)])
            say(f"wrote {folder / name}: {len(part)} rows")
    except DataError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{sys.argv[1]} can't be written ({error.strerror}); name another folder")

"""The final model of a run on the whole test set: accuracy by class, and the pictures of its predictions."""

import argparse
from typing import Any

from federation.client import model_file
from federation.client.options import add_data_flags
from federation.config import Recipe
from federation.console import Parser, fail, say
from federation.process import num_cores, write_whole
from federation.protocol import class_name
from federation.results import report
from federation.results.history import History
from federation.results.run_folder import RunFolder
from federation.results.tables import in_columns

import numpy as np
import torch
from tqdm import tqdm

import model
from data import INPUT_SHAPE, DataError, load, open_dataset

SHOWN = 25
CHUNK = 500  # images at a time
EXAMPLES = """\
examples:
  python evaluate.py --run runs/2026-11-22-140000 --dataset my-images
  python evaluate.py --run runs/2026-11-22-140000 --show-images      with 25 test images and their mistakes
"""


def predict_all(network: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    """Probabilities (n, classes) for images (n, 3, 32, 32) uint8."""
    chunks = tqdm(images.split(CHUNK), "predicting", unit=f" × {CHUNK}", delay=2, leave=False, disable=None)
    return np.concatenate([model.predict(network, chunk).numpy() for chunk in chunks])


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes, num_classes) int64: row, what it is; column, what it is taken for."""
    cells = np.bincount(truth * num_classes + prediction, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def by_class(confusion: np.ndarray, classes: list[str]) -> list[list[str]]:
    """Accuracy of each class and its commonest mistake, as cells; the first row is the head."""
    cells = [["class", "images", "right", "mostly mistaken for"]]
    for i, name in enumerate(classes):
        total, wrong = confusion[i].sum(), confusion[i].copy()
        wrong[i] = 0
        mistake = f"{classes[wrong.argmax()]} ({wrong.max() / total:.2f})" if wrong.any() else "–"
        cells.append([name, f"{total:,}", f"{confusion[i, i] / total:.4f}" if total else "–", mistake])
    return cells


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="RUN_DIR", help="the folder of a finished run")
    add_data_flags(parser)


def open_run(args: argparse.Namespace) -> tuple[RunFolder, History, Recipe, Any]:
    """The run, its recipe, and the data set it was about. Exits with one line where they can't be had, or don't fit."""
    folder, history = report.open_finished(args.run)
    try:
        recipe = Recipe.from_stored(history.config)
        dataset = open_dataset(args.dataset, args.data_dir, args.skip_damaged)
    except (DataError, ValueError) as error:
        fail(str(error))
    if [class_name(name) for name in dataset.classes] != history.config.get("classes"):
        theirs = ", ".join(history.config.get("classes", []))
        fail(f"--dataset {args.dataset} has other classes than the run [{theirs}]; give the data set of its clients", 2)
    return folder, history, recipe, dataset


def draw(folder: RunFolder, show_images: bool = False) -> None:
    for path in report.write(folder, show_images):
        say(f"drew {path}")


def main() -> None:
    parser = Parser(__doc__, usage="%(prog)s --run RUN_DIR [options]", epilog=EXAMPLES)
    add_run_flags(parser)
    parser.add_argument("--show-images", action="store_true", help="also draw test images, into the page too")
    args = parser.parse_args()
    folder, _, recipe, dataset = open_run(args)
    torch.set_num_threads(num_cores())
    try:
        network, classes = model_file.load(str(folder.path / "model.npz"), model, INPUT_SHAPE)
        truth = dataset.labels("test", recipe.seed)
        images, _ = load(dataset, "test", np.arange(len(truth)), recipe.seed)
    except (model_file.ModelFileError, DataError) as error:
        fail(str(error))
    probabilities = predict_all(network, images)
    prediction = probabilities.argmax(1)
    confusion = confusion_matrix(truth, prediction, len(classes))
    say(f"{folder.path / 'model.npz'}: {confusion.trace():,} of {len(truth):,} test images right")
    say(f"accuracy {confusion.trace() / len(truth):.4f}\n\n{in_columns(by_class(confusion, classes))}\n")
    chosen = np.random.default_rng(recipe.seed).permutation(len(truth))[:SHOWN]
    some = {"truth": truth[chosen], "prediction": prediction[chosen]}
    if args.show_images:  # else none gets into the folder, nor into a page that may be passed on
        some["images"] = images[torch.from_numpy(chosen)].numpy()
    try:
        write_whole(folder.path / "predictions.npz", lambda file: np.savez(file, confusion=confusion, **some))
        draw(folder, args.show_images)
    except OSError as error:
        fail(f"{folder.path} can't be written ({error.strerror})")


if __name__ == "__main__":
    main()

"""The final model of a run on the whole test set: its metrics, and, of classes, what it takes each for."""

import argparse
from pathlib import Path
from typing import Any

from federation.client.options import add_data_flags
from federation.config import Recipe
from federation.console import Parser, clean, fail, say
from federation.process import num_cores, write_whole
from federation.protocol import class_name
from federation.results import report
from federation.results.history import History, main_first
from federation.results.run_folder import RunFolder
from federation.results.tables import in_columns, score
from federation.task import saved_model
from federation.task.saved_model import SavedModel
from federation.task.task import DataError, Task, TaskError, open_task

import numpy as np
import torch
from tqdm import tqdm

SHOWN = 25
CHUNK = 500  # images at a time
EXAMPLES = """\
examples:
  python evaluate.py --run runs/2026-11-22-140000 --dataset my-images
  python evaluate.py --run runs/2026-11-22-140000 --show-images      with 25 test images and their mistakes
"""


def predict_all(task: Task, network: Any, dataset: Any, rows: np.ndarray, seed: int) -> np.ndarray:
    """Probabilities (n, classes) for these test examples."""
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    parts = [
        np.asarray(task.model.predict(network, task.load(dataset, "test", chunk, seed)))
        for chunk in tqdm(chunks, "predicting", unit=f" × {CHUNK}", delay=2, leave=False, disable=None)
    ]
    return np.concatenate(parts)


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes, num_classes) int64: row, what it is; column, what it is taken for."""
    cells = np.bincount(truth * num_classes + prediction, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def by_class(confusion: np.ndarray, classes: list[str]) -> list[list[str]]:
    """Accuracy of each class and its commonest mistake, as cells; the first row is the head."""
    cells = [["class", "examples", "right", "mostly mistaken for"]]
    for i, name in enumerate(classes):
        total, wrong = confusion[i].sum(), confusion[i].copy()
        wrong[i] = 0
        mistake = f"{classes[wrong.argmax()]} ({wrong.max() / total:.2f})" if wrong.any() else "–"
        cells.append([name, f"{total:,}", f"{confusion[i, i] / total:.4f}" if total else "–", mistake])
    return cells


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="RUN_DIR", help="the folder of a finished run")
    add_data_flags(parser)


def open_run(args: argparse.Namespace) -> tuple[RunFolder, History, Recipe, Task, Any]:
    """The run, its recipe and task, and the data set. Exits with one line where they can't be had, or don't fit."""
    folder, history = report.open_finished(args.run)
    try:
        task = open_task(args.task)
        theirs = history.config.get("task", {}).get("name", task.name)
        if theirs != task.name:
            words = f"is of the task {clean(theirs, 40)!r}, not of {task.name!r}; give its folder as --task"
            fail(f"--run {args.run} {words}", 2)
        recipe = task.complete(Recipe.from_stored(history.config))
        dataset = task.open_dataset(args.dataset or task.default_dataset, args.data_dir, args.skip_damaged)
        classes = task.schema(dataset).get("classes", [])
        if history.config.get("columns"):
            task.data.scale(dataset, history.config["columns"])
    except (DataError, TaskError, ValueError) as error:
        fail(str(error))
    if [class_name(name) for name in classes] != history.config.get("classes"):
        theirs = ", ".join(history.config.get("classes", []))
        given = args.dataset or task.default_dataset
        fail(f"--dataset {given} has other classes than the run [{theirs}]; give the data set of its clients", 2)
    return folder, history, recipe, task, dataset


def draw(folder: RunFolder, show_images: bool = False) -> None:
    for path in report.write(folder, show_images):
        say(f"drew {path}")


def model_path(folder: RunFolder) -> Path:
    """Of the final model; runs of 1.0.0 have a model.npz."""
    new, old = folder.path / "model.safetensors", folder.path / "model.npz"
    return old if old.exists() and not new.exists() else new


def score_classes(
    folder: RunFolder, task: Task, saved: SavedModel, dataset: Any, recipe: Recipe, show_images: bool
) -> None:
    """Say accuracy by class, and write predictions.npz, from which confusion matrix and pictures are drawn."""
    truth = task.labels(dataset, "test", recipe.seed)
    assert truth is not None
    rows = np.arange(len(truth))
    prediction = predict_all(task, saved.network, dataset, rows, recipe.seed).argmax(1)
    confusion = confusion_matrix(truth, prediction, len(saved.classes))
    say(f"{confusion.trace():,} of {len(truth):,} test examples right")
    say(f"accuracy {confusion.trace() / len(truth):.4f}\n\n{in_columns(by_class(confusion, saved.classes))}\n")
    chosen = np.random.default_rng(recipe.seed).permutation(len(truth))[:SHOWN]
    some = {"truth": truth[chosen], "prediction": prediction[chosen]}
    if show_images and task.has("pictures"):  # else none gets into the folder, nor into a page that may be passed on
        order = np.sort(chosen)
        images = task.model.pictures(task.load(dataset, "test", order, recipe.seed))
        some["images"] = images[np.searchsorted(order, chosen)]
    write_whole(folder.path / "predictions.npz", lambda file: np.savez(file, confusion=confusion, **some))


def main() -> None:
    parser = Parser(__doc__, usage="%(prog)s --run RUN_DIR [options]", epilog=EXAMPLES)
    add_run_flags(parser)
    parser.add_argument("--show-images", action="store_true", help="also draw test images, into the page too")
    args = parser.parse_args()
    folder, history, recipe, task, dataset = open_run(args)
    torch.set_num_threads(num_cores())
    try:
        saved = saved_model.load(str(model_path(folder)), task)
        say(f"{model_path(folder)}:")
        if saved.classes and task.has("predict") and task.has("labels"):
            score_classes(folder, task, saved, dataset, recipe, args.show_images)
        else:
            rows = np.arange(task.size(dataset, "test", recipe.seed))
            metrics = task.evaluate(saved.network, task.load(dataset, "test", rows, recipe.seed), recipe)
            for name in main_first(set(metrics), history.main.name):
                say(f"{name} {score(metrics[name], history.metric(name))} on all {len(rows):,} test examples")
        draw(folder, args.show_images)
    except (saved_model.ModelFileError, DataError, TaskError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{folder.path} can't be written ({error.strerror})")


if __name__ == "__main__":
    main()

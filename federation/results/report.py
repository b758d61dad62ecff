"""Make the pictures and the page of a run again, from the files in its folder alone."""

import contextlib
import zipfile
from pathlib import Path

from federation.console import Parser, command_line, fail, say
from federation.process import write_content
from federation.results import html, plots
from federation.results.comparison import Baseline
from federation.results.history import History
from federation.results.run_folder import RunFolder
from federation.results.theme import DARK, LIGHT

import numpy as np

EPILOG = """\
Draws accuracy.png and partitions.png from history.json, adds the curves of baseline.json where
baseline.py has been there, and confusion.png where evaluate.py has; report.html holds all of them,
the tables, and who joined, left or was turned away, in one file. Test images (predictions.png) are in
it only with --show-images, which evaluate.py must have been given too.

example:
  python -m federation.report runs/2026-11-22-140000
"""


def open_finished(path: str) -> tuple[RunFolder, History]:
    """A run's folder and history. Exits with 2 and one line where it holds no run, or one without a round."""
    folder = RunFolder(Path(path))
    try:
        history = folder.load_history()
    except (OSError, ValueError):
        fail(f"{path} holds no run (no readable history.json); name the folder that server.py calls results", 2)
    if not history.rounds:
        fail(f"{path} holds a run without a single round so far; wait for its first", 2)
    return folder, history


PAGE = "report.html"
Pictures = dict[str, tuple[bytes, bytes]]  # PNG by name, for a light and for a dark page


def write(folder: RunFolder, show_images: bool = False) -> list[Path]:
    """Every picture that the files in the folder allow, and report.html: returns what it wrote.

    Test images are drawn, and get into the page, only with show_images.

    Raises OSError where the folder can't be written.
    """
    history, baseline = folder.load_history(), _read_baseline(folder.path / "baseline.json")
    shown = pictures(folder, history, baseline, show_images)
    for name, (light, _) in shown.items():
        write_content(folder.path / f"{name}.png", light)
    write_page(folder, history, baseline, shown)
    return [folder.path / name for name in (*(f"{name}.png" for name in shown), PAGE)]


def pictures(
    folder: RunFolder, history: History, baseline: Baseline | None = None, show_images: bool = False
) -> Pictures:
    """Half a second's work for two of them."""
    found = _read_predictions(folder.path / "predictions.npz", history)
    drawings = {"accuracy": lambda theme: plots.metrics(history, baseline, theme)}
    if history.config.get("class_counts"):
        drawings["partitions"] = lambda theme: plots.partitions(history, theme)
    if found and show_images and "images" in found:
        drawings["predictions"] = lambda theme: plots.predictions(history, found, theme)
    if found:
        drawings["confusion"] = lambda theme: plots.confusion(history, found, theme)
    return {name: (draw(LIGHT), draw(DARK)) for name, draw in drawings.items()}


def write_page(
    folder: RunFolder, history: History, baseline: Baseline | None, shown: Pictures, reload: bool = False
) -> None:
    """report.html with these pictures; with reload, browsers read it again every few seconds. Raises OSError."""
    text = html.run_page(folder.path.resolve().name, history, baseline, shown, reload)
    write_content(folder.path / PAGE, text.encode())


def _read_baseline(path: Path) -> Baseline | None:
    try:
        return Baseline.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        say(f"{path} can't be read; make it again with baseline.py")
        return None


def _read_predictions(path: Path, history: History) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
            found["truth"], found["prediction"], found["confusion"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        say(f"{path} can't be read; make it again with evaluate.py")
        return None
    return found


def finish(folder: RunFolder) -> None:
    """Draw what there is to see. The clients have gone on by now, and a run that can't be drawn is still done."""
    try:
        write(folder)
        drawn = f", accuracy.png and {PAGE}"
    except Exception as error:  # matplotlib's installation or its cache, the disk: many kinds
        again = command_line("python", "-m", "federation.report", folder.path)
        say(f"no pictures ({type(error).__name__}: {error}); try again with: {again}")
        drawn = ""
        with contextlib.suppress(OSError):
            write_page(folder, folder.load_history(), None, {})  # else browsers would reload the last one for ever
    again = folder.load_history().repetition()
    if again:
        say(again)
    say(f"done: model.safetensors (final weights), history.json{drawn} are in {folder.path}")


def main() -> None:
    parser = Parser(__doc__, prog="python -m federation.report", usage="%(prog)s RUN_DIR", epilog=EPILOG)
    parser.add_argument("run", metavar="RUN_DIR", help="the folder of a run, such as runs/2026-11-22-140000")
    parser.add_argument("--show-images", action="store_true", help="also draw test images, into the page too")
    args = parser.parse_args()
    folder, _ = open_finished(args.run)
    try:
        for path in write(folder, args.show_images):
            say(str(path))
    except OSError as error:
        fail(f"{folder.path} can't be written ({error.strerror})")

"""A run's beginning and end, alike for the script and for Flower's engines."""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from federation import report
from federation.buffered import BufferedServer
from federation.rounds import FederatedServer
from federation.run_folder import Checkpoint, History, RunFolder
from federation.words import fail, say


def open_run(args: argparse.Namespace) -> tuple[RunFolder, History, Checkpoint | None]:
    """The run's folder, its history so far, and the checkpoint to go on after, if any."""
    if args.resume:
        folder = RunFolder(Path(args.resume))
        checkpoint = folder.load_checkpoint()
        since = f"after {loop_of(args).unit} {checkpoint.server_round}" if checkpoint else None
        say(f"resuming {folder.path} {since or 'from the start: it holds no checkpoint'}")
        return folder, checkpoint.history if checkpoint else History(args.config), checkpoint
    folder = RunFolder(Path(args.run_dir or time.strftime("runs/%Y-%m-%d-%H%M%S")))
    history = History({**dataclasses.asdict(args.recipe), **dataclasses.asdict(args.terms)})
    try:
        folder.create()
        folder.save_history(history)
    except FileExistsError:
        remedy = f"name another, or go on with --resume {folder.path}"
        fail(f"--run-dir {folder.path} already holds a run, or is a file; {remedy}", 2)
    except OSError as error:
        fail(f"--run-dir {folder.path} can't be written ({error.strerror}); name another")
    return folder, history, None


def loop_of(args: argparse.Namespace) -> type[FederatedServer]:
    return BufferedServer if args.terms.mode == "async" else FederatedServer


def task_of(args: argparse.Namespace) -> str:
    """What the run will do, in a few words."""
    recipe, terms = args.recipe, args.terms
    if terms.mode == "async":
        return f"fedbuff of {recipe.model}, {recipe.rounds * terms.clients} updates"
    return f"{terms.strategy} of {recipe.model}, {recipe.rounds} rounds"


def recorder(events: list[dict]) -> Callable[[str, int | None, str], None]:
    """A function that says who comes and goes, and writes it down."""

    def notify(event: str, partition: int | None, words: str) -> None:
        events.append({"time": round(time.time(), 3), "event": event, "partition": partition, "words": words})
        say(words)

    return notify


def finish(folder: RunFolder) -> None:
    """Draw what there is to see. The clients have gone on by now, and a run that can't be drawn is still done."""
    try:
        report.write(folder)
        pictures = ", accuracy.png and report.html"
    except Exception as error:  # matplotlib's installation or its cache, the disk: many kinds
        say(f"no pictures ({type(error).__name__}: {error}); try again with: python -m federation.report {folder.path}")
        pictures = ""
    say(f"done: model.npz (final weights), history.json{pictures} are in {folder.path}")

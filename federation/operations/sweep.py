"""Runs one after another over a grid of settings and seeds, with the same clients (client.py --stay).

The file has a list for each setting, by the name of its flag:

    learning-rate = [0.05, 0.1]
    seed = [0, 1, 2]
"""

import argparse
import io
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from federation.console import clean, command_line, fail, read_text, say
from federation.process import write_whole
from federation.results.history import History
from federation.results.run_folder import RunFolder
from federation.results.tables import in_columns, score
from federation.results.theme import LIGHT, canvas
from federation.server.options import parse_args

SEED = "seed"
Values = dict[str, object]  # of one run, by the name of the flag


class SweepError(ValueError):
    """The file can't be used; the text is one line."""


@dataclass(frozen=True)
class OneRun:
    """A run of the sweep, and its folder."""

    values: Values
    folder: Path

    @property
    def words(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.values.items())

    def done(self) -> bool:
        return (self.folder / "model.safetensors").exists()

    def flags(self) -> list[str]:
        where = "--resume" if (self.folder / "history.json").exists() else "--run-dir"
        return [*(f"--{name}={value}" for name, value in self.values.items()), where, str(self.folder)]


def sweep(args: argparse.Namespace, argv: Sequence[str] | None = None) -> NoReturn:
    """All runs of args.sweep; ends the program. Given again after a stop, it goes on where it was."""
    folder = Path(args.run_dir or Path("runs") / f"sweep-{Path(args.sweep).stem}")
    common = without(("--sweep", "--run-dir"), sys.argv[1:] if argv is None else argv)
    try:
        grid = read_grid(args.sweep)
    except OSError as error:
        fail(f"--sweep {args.sweep} can't be read ({error.strerror})", 2)
    except UnicodeDecodeError:
        fail(f"--sweep {args.sweep} is not text", 2)
    except ValueError as error:  # a SweepError, or TOML's own
        fail(f"--sweep {args.sweep}: {error}", 2)
    runs = [OneRun(values, folder / name_of(values)) for values in grid]
    for one in runs:
        parse_args(None, [*common, *one.flags()])  # wrong use shows before the first run
    if args.resume:
        fail(f"--sweep goes on by itself; leave out --resume {args.resume}", 2)
    for number, one in enumerate(runs, 1):
        if one.done():
            say(f"run {number} of {len(runs)} ({one.words}) is done already: {one.folder}")
            continue
        say(f"run {number} of {len(runs)}: {one.words}")
        code = run_server([*common, *one.flags()])
        if code:
            words = f"run {number} of {len(runs)} ({one.words}) ended with exit code {code}"
            fail(f"{words}; go on with: {command_line('python', *sys.argv)}", code)
    report(folder, runs)
    raise SystemExit(0)


def read_grid(path: str) -> list[Values]:
    """The values of each run. Raises OSError, UnicodeDecodeError, or ValueError with one line."""
    lists = tomllib.loads(read_text(Path(path).read_bytes()))
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise SweepError(f"{clean(name, 40)} must be a list of values, such as [0, 1, 2], got {values!r}")
        if not all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in values):
            raise SweepError(f"{clean(name, 40)} must hold numbers and words, got {values!r}")
        if len({*map(str, values)}) < len(values):
            raise SweepError(f"{clean(name, 40)} has a value twice: {values!r}")
    if not lists:
        raise SweepError("names no setting; write for instance seed = [0, 1, 2]")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def name_of(values: Values) -> str:
    """Of a run's folder: another value is another folder."""
    name = ",".join(f"{key}={value}" for key, value in values.items())
    return "".join(character if character.isalnum() or character in "=,.-_+" else "_" for character in name)


def without(flags: Sequence[str], argv: Sequence[str]) -> list[str]:
    """The command line but for these flags and their values."""
    left, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in flags:
            skip = True
        elif not word.startswith(tuple(f"{flag}=" for flag in flags)):
            left.append(word)
    return left


def run_server(flags: Sequence[str]) -> int:
    """python server.py with these flags; its exit code. Signals are for it to handle: it ends a run cleanly."""
    command = [sys.executable, "-u", str(Path(sys.argv[0]).resolve()), *flags]
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame: object) -> None:
        if process:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(command, start_new_session=True)  # else Ctrl-C would reach it twice
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


# What came of it


def report(folder: Path, runs: Sequence[OneRun]) -> None:
    """The table and the picture of all runs: the main metric of the final model, over the seeds."""
    histories = [(one, RunFolder(one.folder).load_history()) for one in runs]
    metric = histories[0][1].main
    groups: dict[str, list[tuple[OneRun, History]]] = {}
    for one, history in histories:
        rest = ", ".join(f"{name} {value}" for name, value in one.values.items() if name != SEED)
        groups.setdefault(rest or "all runs", []).append((one, history))
    cells, found = [["setting", "runs", metric.name, "lowest", "highest", "seconds"]], {}
    for words, members in groups.items():
        values = [history.scored()[-1].main() or 0.0 for _, history in members]
        seconds = statistics.mean(sum(record.seconds for record in history.rounds) for _, history in members)
        shown = [score(value, metric) for value in (statistics.mean(values), min(values), max(values))]
        cells.append([words, str(len(values)), *shown, f"{seconds:.1f}"])
        found[words] = values
    say(in_columns(cells))
    picture = draw(found, metric.name)
    rows = [
        {"settings": one.values, "folder": one.folder.name, metric.name: history.scored()[-1].main()}
        for one, history in histories
    ]
    try:
        write_whole(folder / "sweep.json", lambda file: file.write(json.dumps(rows, indent=1).encode()))
        write_whole(folder / "sweep.png", lambda file: file.write(picture))
    except OSError as error:
        fail(f"{folder} can't be written ({error.strerror})")
    say(f"done: sweep.json and sweep.png are in {folder}")


def draw(found: dict[str, list[float]], metric: str) -> bytes:
    """A line for each setting: every run a dot, and their mean."""
    png = io.BytesIO()
    with canvas(LIGHT, 1.2 + 0.4 * len(found), png) as figure:
        axes = figure.subplots()
        for place, values in enumerate(found.values()):
            axes.plot(values, [place] * len(values), "o", color=LIGHT.federated, alpha=0.5, markersize=5)
            axes.plot(statistics.mean(values), place, "|", color=LIGHT.ink, markersize=14)
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.set(xlabel=f"{metric} of the final model; | is the mean")
        axes.grid(axis="x")
    return png.getvalue()

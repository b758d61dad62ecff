"""Runs one after another over a grid of settings and seeds, with the same clients (client.py --stay).

The file has a list for each setting, by the name of its flag:

    learning-rate = [0.05, 0.1]
    seed = [0, 1, 2]
"""

import argparse
import difflib
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from federation.config import Recipe
from federation.console import clean, command_line, fail, leave_log, read_text, say
from federation.net import port_problem
from federation.operations import sweep_results
from federation.process import end_with_parent
from federation.results.report import finish
from federation.results.run_folder import RunFolder
from federation.server.options import parse_args
from federation.server.settings import ServerSettings
from federation.server.stored_run import same_value
from federation.setting import flag

NAMES = [flag(name).removeprefix("--") for name in (*Recipe.names(), *ServerSettings.names())]
LONGEST_NAME = 120  # of a folder; file systems take 255 bytes
PORT_SECONDS = 15.0  # for the run before to let go of the port
Values = dict[str, object]  # of one run, by the name of the flag


@dataclass(frozen=True)
class OneRun:
    """A run of the sweep, and its folder."""

    values: Values
    folder: RunFolder

    @property
    def words(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.values.items())

    @property
    def flags(self) -> list[str]:
        """Of its values; a switch is there or not."""
        flags = {f"--{name}": value for name, value in self.values.items()}
        return [name if value is True else f"{name}={value}" for name, value in flags.items() if value is not False]


def sweep(args: argparse.Namespace, argv: Sequence[str] | None = None) -> NoReturn:
    """All runs of args.sweep; ends the program. Given again after a stop, it goes on where it was."""
    common = [*(sys.argv[1:] if argv is None else argv), "--sweep="]  # of a flag that comes twice, the later one counts
    folder = Path(args.run_dir or Path("runs") / f"sweep-{Path(args.sweep).stem}")
    try:
        runs = read_runs(args, folder, common)
    except OSError as error:
        fail(f"--sweep {error.filename} can't be read ({error.strerror})", 2)
    except UnicodeDecodeError:
        fail(f"--sweep {args.sweep} is not text", 2)
    except ValueError as error:  # ours, or TOML's own, which names line and column
        fail(f"--sweep {args.sweep}: {error}", 2)
    failed, table = [], ""
    for number, one in enumerate(runs, 1):
        title = f"run {number} of {len(runs)} ({one.words})"
        if one.folder.is_done():
            say(f"{title} is done already: {one.folder.path}")
        else:
            say(f"{title}: {'going on' if one.folder.is_begun() else 'begins'}")
            code = run_server(args, one, common)
            if code:
                failed.append(title)
                _end_if_hopeless(one, title, code)
        if not (one.folder.path / "report.html").exists() and one.folder.is_done():
            finish(one.folder)
        table = sweep_results.write(folder, [(each.values, each.folder) for each in runs if each.folder.is_done()])
    say(f"{table}\nsweep.txt, sweep.png and sweep.json are in {folder}" if table else f"no run is done in {folder}")
    if failed:
        fail(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}; the same command tries them again")
    raise SystemExit(0)


def read_runs(args: argparse.Namespace, folder: Path, common: Sequence[str]) -> list[OneRun]:
    """The sweep's runs, checked. Raises OSError, UnicodeDecodeError, or ValueError with one line.

    Exits with 2 and the server's own line where a value is out of range.
    """
    grid = read_grid(args.sweep)
    for name in grid[0]:
        given = getattr(args, name.replace("-", "_"), None)
        if given is not None:
            raise ValueError(f"--{name} {given} is on the command line, too; leave one of them out")
    runs = [OneRun(values, RunFolder(folder / name_of(values))) for values in grid]
    for one in runs:
        config = parse_args(None, [*common, *one.flags, "--run-dir="]).config
        if one.folder.is_begun():
            _check_same(one, config)
    return runs


def read_grid(path: str) -> list[Values]:
    """The values of each run. Raises OSError, UnicodeDecodeError, or ValueError with one line."""
    lists = tomllib.loads(read_text(Path(path).read_bytes()))
    for name, values in lists.items():
        if name not in NAMES:
            close = difflib.get_close_matches(name.replace("_", "-"), NAMES, 1)
            remedy = f"did you mean {close[0]}?" if close else "python server.py --help lists them"
            raise ValueError(f"{clean(name, 40)} is no setting of a run; {remedy}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"{name} must be a list of values, such as [0, 1, 2], got {clean(values, 40)!r}")
        if not all(isinstance(value, str | int | float) for value in values):
            raise ValueError(f"{name} must hold numbers, words, or true and false, got {clean(values, 80)}")
        if len({*map(str, values)}) < len(values):
            raise ValueError(f"{name} has a value twice: {clean(values, 80)}")
    if not lists:
        raise ValueError("it names no setting; write for instance seed = [0, 1, 2]")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def name_of(values: Values) -> str:
    """Of a run's folder: another value is another folder."""
    name = ",".join(f"{key}={value}" for key, value in values.items())
    plain = "".join(character if character.isalnum() or character in "=,.-_+" else "_" for character in name)
    if plain == name and len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{plain[: LONGEST_NAME // 2]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _check_same(one: OneRun, config: dict) -> None:
    """Raises ValueError where its folder holds a run with other settings than this sweep has."""
    try:
        stored = one.folder.load_config()
        values = {**stored, **(stored.get("own") or {})}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{one.folder.path} holds no run (no readable history.json); name another --run-dir") from None
    wanted = {name: config[name] for name in (*Recipe.names(), *ServerSettings.names()) if name != "own"}
    for name, value in {**wanted, **(config["own"] or {})}.items():
        if value is not None and not same_value(value, values.get(name)):
            words = f"{one.folder.path} holds a run with {name} {values.get(name)}, and this sweep has {value}"
            raise ValueError(f"{words}; name another --run-dir")


def run_server(args: argparse.Namespace, one: OneRun, common: Sequence[str]) -> int:
    """python server.py for this run; its exit code. A signal is passed on, and ends the sweep once the server ended."""
    where = ["--run-dir=", "--resume", str(one.folder.path)]
    if not one.folder.is_begun():
        where = ["--run-dir", str(one.folder.path)]
        one.folder.clear()
    observed = ["--tensorboard", str(Path(args.tensorboard) / one.folder.path.name)] if args.tensorboard else []
    command = [sys.executable, "-u", str(Path(sys.argv[0]).resolve()), *common, *one.flags, *where, *observed]
    signals: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame: object) -> None:
        signals.append(number)
        if process:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        deadline = time.monotonic() + PORT_SECONDS
        while port_problem(args.address) and time.monotonic() < deadline and not signals:
            time.sleep(0.1)
        if not signals:
            process = start(command)
            if signals:  # it came in between
                process.send_signal(signals[-1])
            code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        fail(f"stopped by {signal.Signals(signals[0]).name}; go on with: {again()}", 128 + signals[0])
    return code if code >= 0 else 128 - code


def start(command: list[str]) -> subprocess.Popen:
    """In a session of its own, else Ctrl-C would reach it twice; it ends with us, however we end."""
    leave_log()
    before = end_with_parent if os.name == "posix" else None
    return subprocess.Popen(command, start_new_session=True, preexec_fn=before)


def _end_if_hopeless(one: OneRun, title: str, code: int) -> None:
    """End the sweep where a run failed before its first round: the next would fare no better."""
    try:
        rounds = one.folder.load_history().rounds
    except (OSError, ValueError):
        rounds = []
    if code == 2 or not rounds:
        fail(f"{title} ended before its first round; then go on with: {again()}", code)
    say(f"{title} failed; the sweep goes on with the next")


def again() -> str:
    return command_line("python", *sys.argv)

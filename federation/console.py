"""How the programs speak: plain lines at once, errors in one line, help that shows each default once.

Output is no lifeline: where it goes away, is full, or can't show a character, the program goes on.
"""

import argparse
import atexit
import codecs
import contextlib
import json
import logging
import logging.handlers
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn


class PublicError(ValueError):
    """A mistake in words of ours alone, which may be told to the other side: no path, name, or text from elsewhere."""

    @property
    def public(self) -> str:
        return str(self)


def say(text: str, level: int = logging.INFO) -> None:
    """level: of the line in the log file, where its first word is neither "warning" nor "error"."""
    _log(text, level)
    print(f"{_timed(text, sys.stdout)}\n", end="", flush=True)  # in one piece: other threads speak too


def fail(message: str, code: int = 1) -> NoReturn:
    """End the program with one line: code 2 for wrong use, 1 for what the machine or the other side refuses."""
    _log(f"error: {message}")
    line = f"{Path(sys.argv[0]).stem}: error: {message}"
    print(_timed(line, sys.stderr), file=sys.stderr, flush=True)
    raise SystemExit(code)


def show_fault(error: BaseException) -> None:
    """A fault of ours, or of the user's own code, with its traceback."""
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    _log(text, logging.ERROR)
    print(_timed(text, sys.stderr), file=sys.stderr, flush=True)


# Times, and a file of what is said

TIMES = "FEDERATION_TIMES"  # environment variable: "off" leaves out the time of day, for who reads the lines
LOG = logging.getLogger("federation")
LOG.propagate, LOG_BYTES, LOG_FILES = False, 10_000_000, 5
LEVELS = {"warning: ": logging.WARNING, "error: ": logging.ERROR}  # by how a line begins
_runs_for_long = False  # as server and client do; of the other programs, other programs read the lines


def _timed(text: str, stream: Any) -> str:
    """With the time of day before each line where it goes into a file or a pipe; a terminal's user has a clock."""
    if not _runs_for_long or os.environ.get(TIMES) == "off" or stream.isatty():
        return text
    return _before_each_line(time.strftime("%H:%M:%S "), text)


def _before_each_line(words: str, text: str) -> str:
    return "\n".join(words + line if line else line for line in text.split("\n"))


def _log(text: str, level: int = logging.INFO) -> None:
    if _log_files():
        LOG.log(next((LEVELS[words] for words in LEVELS if text.startswith(words)), level), text)


def _log_files() -> list[logging.Handler]:
    return [each for each in LOG.handlers if isinstance(each, logging.handlers.RotatingFileHandler)]


def add_log_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-file", metavar="FILE", help="also write what is said there, with date and level")
    parser.add_argument("--log-format", choices=list(FORMATS), default="text", help="of that file: a line, or JSON")


def start_log(path: str | None, kind: str = "text") -> None:
    """For server and client: lines get times, and go into this file, too; at 10 MB it becomes FILE.1, so on to FILE.5.

    Exits with 2 and one line where it can't be written. A disk that is full later is no reason to end.
    """
    global _runs_for_long
    if path is None and kind != "text":
        fail(f"--log-format {kind} is of --log-file; give both or none", 2)
    _runs_for_long = True
    if path is None or _log_files():
        return
    try:
        handler = logging.handlers.RotatingFileHandler(path, "a", LOG_BYTES, LOG_FILES, encoding="utf-8")
    except OSError as error:
        fail(f"--log-file {path} can't be written ({error.strerror}); name another", 2)
    handler.setFormatter(FORMATS[kind]())
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    LOG.setLevel(logging.INFO)
    LOG.addHandler(handler)


def leave_log() -> None:
    """To another process, which may rename the file; what we say next opens it again."""
    for handler in _log_files():
        handler.close()


class _TextLine(logging.Formatter):
    """2026-11-25T14:03:07.123Z INFO text, the same before each line of a table."""

    def format(self, record: logging.LogRecord) -> str:
        return _before_each_line(f"{_utc(record)} {record.levelname} ", record.getMessage())


class _JsonLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        words = {"time": _utc(record), "level": record.levelname, "text": record.getMessage()}
        return json.dumps(words, ensure_ascii=False)


FORMATS: dict[str, Callable[[], logging.Formatter]] = {"text": _TextLine, "json": _JsonLine}


def _utc(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clean(text: object, limit: int = 300) -> str:
    """Text from the other side made safe to print: one line, no control characters, of bounded length."""
    line = " ".join(str(text)[: 10 * limit].split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def read_text(content: bytes) -> str:
    """Text with or without a byte-order mark, as the editors of all systems write it. Raises UnicodeDecodeError."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def command_line(*words: object) -> str:
    """A command as it can be pasted into this system's shell, whatever characters a path holds."""
    texts = [str(word) for word in words]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def begin_program() -> None:
    """Make output harmless, and let Ctrl-C end the program at any time with exit code 130 and without a traceback.

    A closed terminal doesn't end it (as after nohup). Programs with something to tidy up set handlers of their own.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file or socket would become our output
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    sys.excepthook = lambda kind, error, _: show_fault(error)
    threading.excepthook = lambda broken: show_fault(broken.exc_value or broken.exc_type())
    atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush()))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the shell has it ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


class _Output:
    """A stream that never raises: what it can't write is lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (Python has None for a closed one)
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):  # closed
            return False

    def _lose(self, error: Exception) -> None:
        """Forget what is buffered, too: Python would try it again, and fail, at the program's end."""
        with contextlib.suppress(OSError, ValueError):
            number = self._stream.fileno()
            nowhere, kept = os.open(os.devnull, os.O_WRONLY), os.dup(number)
            os.dup2(nowhere, number)
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()
            if not isinstance(error, BrokenPipeError):  # a full disk may have room again
                os.dup2(kept, number)
            os.close(nowhere)
            os.close(kept)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Parser(argparse.ArgumentParser):
    """argparse's parser with --version, with each default shown once, and with errors of one line."""

    def __init__(self, description: str | None, *, usage: str = "%(prog)s [options]", epilog: str = "", **rest: object):
        super().__init__(description=description, usage=usage, epilog=epilog, formatter_class=_Help, **rest)  # type: ignore[arg-type]
        self.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")

    def error(self, message: str) -> NoReturn:
        fail(message, 2)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "(default" in text:
            return text
        return f"{text} (default: %(default)s)"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import tomllib  # both only here: most runs don't ask
        from importlib.metadata import version

        project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
        say(f"{project['name']} {project['version']} (flwr {version('flwr')}, Python {sys.version.split()[0]})")
        raise SystemExit(0)

"""How the programs speak: plain lines at once, errors in one line, help that shows each default once."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn


def say(text: str) -> None:
    print(f"{text}\n", end="", flush=True)  # in one piece: other threads speak too


def fail(message: str, code: int = 1) -> NoReturn:
    """End the program with one line: code 2 for wrong use, 1 for what the machine or the other side refuses."""
    print(f"{Path(sys.argv[0]).stem}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def clean(text: object, limit: int = 300) -> str:
    """Text from the other side made safe to print: one line, no control characters, of bounded length."""
    line = " ".join(str(text)[: 10 * limit].split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= limit else line[: limit - 1] + "…"


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

"""How the programs speak: plain lines at once, errors in one line, and nothing of a stranger's unwashed."""

import sys
from pathlib import Path
from typing import NoReturn


def say(text: str) -> None:
    print(text, flush=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """End the program with one line: code 2 for wrong use, 1 for what the machine or the other side refuses."""
    print(f"{Path(sys.argv[0]).stem}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def clean(text: object, limit: int = 300) -> str:
    """Words from the other side made safe to print: one line, no control characters, of bounded length."""
    line = " ".join(str(text)[: 10 * limit].split())
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= limit else line[: limit - 1] + "…"

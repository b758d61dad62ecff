"""What server and client say to each other inside Flower's get_properties messages, read with care.

hello   server: protocol, nonce        client: who it is, its class names, proof of the secret
place   server: partition, recipe,     client: how many examples it has, and of which class (or why it can't)
        classes, if not its own
told    server: why the stream ends    client: nothing

Anyone can connect and say anything: the readers raise ValueError, TypeError or KeyError on senseless answers.
"""

import hashlib
import hmac
import json
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from federation.config import Recipe
from federation.console import clean, command_line, fail, read_text, say

PROTOCOL = 1
RETRY_SECONDS = 3  # how soon a client on the waiting list asks again
MOST_CLASSES, LONGEST_NAME, LONGEST_LIST = 10_000, 100, 2_000_000  # the last in characters of JSON


@dataclass(frozen=True)
class Hello:
    """Who wants to join, and with what."""

    classes: list[str]
    instance: str  # names the client's process, so that it can take over its own broken connection
    host: str  # clients that share a machine say the same
    wanted: int  # partition that was asked for by the user, or -1
    held: int  # partition that the client held before, or -1


@dataclass(frozen=True)
class Assignment:
    """What the server gives a client that it admits."""

    partition: int
    num_partitions: int
    recipe: Recipe
    classes: tuple[str, ...] = ()  # of the federation, where they are others than the client's own


@dataclass(frozen=True)
class DataSummary:
    """What a client says of its data: numbers only."""

    train_examples: int
    test_examples: int
    buffer_positions: list[int]  # of the arrays that are measured, not trained (BatchNorm's)
    class_counts: list[int]  # training examples by class, where the client says so
    input_shape: list[int]  # of one example, where the client says so
    model_bytes: int  # of its weights, uncompressed; 0 where the client does not say it


@dataclass(frozen=True)
class CloseReason:
    """Why the server ended the stream; kind: finished, wait, refused, dropped, stopped or failed."""

    kind: str
    words: str
    code: int  # the client's exit code


def class_name(name: str) -> str:
    """As it is compared and shown: on one line, in Unicode's composed form."""
    return clean(unicodedata.normalize("NFC", name), LONGEST_NAME)


def presence(there: int, wanted: int) -> str:
    """How the server says who is there; demo.py reads it."""
    return f"({there} of {wanted} there)"


def read_hello(answer: dict) -> Hello:
    classes = [class_name(_text(name, 1, 10 * LONGEST_NAME)) for name in _list(answer["classes"])]
    if not 1 <= len(classes) <= MOST_CLASSES:
        raise ValueError(f"{len(classes)} classes")
    instance, host = _text(answer["instance"], 16, 64), _text(answer["host"], 0, 64)
    return Hello(classes, instance, host, _integer(answer["wanted"]), _integer(answer["held"]))


def read_summary(answer: dict) -> DataSummary:
    train, test = _integer(answer["train_examples"]), _integer(answer["test_examples"])
    positions, counts = (
        [_integer(item) for item in _list(answer.get(name, "[]"))] for name in ("statistics", "class_counts")
    )
    shape = [_integer(item) for item in _list(answer.get("input_shape", "[]"))]
    if counts and (min(counts) < 0 or sum(counts) != train):
        raise ValueError("examples by class are not those in all")
    return DataSummary(train, test, positions, counts, shape, _integer(answer.get("model_bytes", 0)))


def proof(secret: bytes, nonce: str) -> str:
    """HMAC-SHA256 (RFC 2104) of the server's nonce under the shared secret, as hex."""
    return hmac.new(secret, b"federation join " + nonce.encode(), hashlib.sha256).hexdigest()


def load_secret(path: str | None) -> bytes | None:
    """The shared secret from a file, or FEDERATION_SECRET, or None. Exits with 2 and one line if it is unusable."""
    if path is None:
        source, text = "FEDERATION_SECRET", os.environ.get("FEDERATION_SECRET")
        if text is None:
            return None
    else:
        source = path
        try:
            text = read_text(Path(path).read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--secret-file {path} can't be read ({getattr(error, 'strerror', None) or 'it is not text'})", 2)
        if os.name == "posix" and Path(path).stat().st_mode & 0o077:
            say(f"warning: others on this machine may read {path}; forbid it: {command_line('chmod', '600', path)}")
    if not text.strip():
        fail(f"the shared secret in {source} is empty; write one with `openssl rand -hex 32`", 2)
    return unicodedata.normalize("NFC", text).strip().encode()


def _text(value: object, least: int, most: int) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise ValueError(f"not a text of {least} to {most} characters")
    return value


def _list(value: object) -> list:
    """What a text says in JSON, if it is a list."""
    items = json.loads(_text(value, 2, LONGEST_LIST))
    if not isinstance(items, list):
        raise ValueError("not a list")
    return items


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("not an integer")
    return value

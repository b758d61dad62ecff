"""What a client says of itself when it joins, read with care: a stranger may say anything.

All readers raise ValueError, TypeError or KeyError on senseless answers.
"""

import json
from dataclasses import dataclass

from federation.words import clean

MOST_CLASSES, LONGEST_NAME, LONGEST_LIST = 10_000, 100, 2_000_000  # the last in characters of JSON


@dataclass(frozen=True)
class Claim:
    """Who wants to join, and with what."""

    classes: list[str]
    instance: str  # names the client's process, so that it can take over its own broken connection
    host: str  # clients that share a machine say the same
    wanted: int  # partition that was asked for by the user, or -1
    held: int  # partition that the client held before, or -1


@dataclass(frozen=True)
class Holdings:
    """What a client holds of its partition."""

    train_examples: int
    test_examples: int
    statistics: list[int]  # positions of the arrays that are measured, not trained (BatchNorm's)
    class_counts: list[int]  # training examples by class, where the client says so


def read_claim(hello: dict) -> Claim:
    classes = [clean(_text(name, 1, 10 * LONGEST_NAME), LONGEST_NAME) for name in _list(hello["classes"])]
    if not 1 <= len(classes) <= MOST_CLASSES:
        raise ValueError(f"{len(classes)} classes")
    instance, host = _text(hello["instance"], 16, 64), _text(hello["host"], 0, 64)
    return Claim(classes, instance, host, _integer(hello["wanted"]), _integer(hello["held"]))


def read_holdings(answer: dict) -> Holdings:
    train, test = _integer(answer["train_examples"]), _integer(answer["test_examples"])
    statistics, counts = ([_integer(item) for item in _list(answer.get(name, "[]"))] for name in LISTS)
    if counts and (min(counts) < 0 or sum(counts) != train):
        raise ValueError("images by class are not those in all")
    return Holdings(train, test, statistics, counts)


LISTS = ("statistics", "class_counts")


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

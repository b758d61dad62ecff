"""What server and client say to each other inside Flower's get_properties messages, read with care.

hello   server: protocol, nonce        client: who it is, its class names, proof of the secret
place   server: partition, recipe,     client: how many examples it has, and of which class (or why it can't)
        the run's id, classes, if not
        its own
columns server: first nothing, then    client: how many values each column has, and a sum over them
        means, then statistics
told    server: why the stream ends,   client: the head of its own record
        head of its record, the
        model's provenance

Anyone can connect and say anything: the readers raise ValueError, TypeError or KeyError on senseless answers.
"""

import dataclasses
import hashlib
import json
import math
import re
import unicodedata
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from federation.config import METRIC_NAME, OF_TASK, Metric, Recipe
from federation.console import PublicError, clean

PROTOCOL = 1
DP_EPSILON, DP_DELTA = "dp_epsilon", "dp_delta"  # beside a private client's scores: what it has spent so far
RETRY_SECONDS = 3  # how soon a client on the waiting list asks again
MOST_CLASSES, LONGEST_NAME, LONGEST_LIST = 10_000, 100, 2_000_000  # the last in characters of JSON
DEEPEST = 20  # brackets in brackets: more can't be compared and stored
RUN_ID = re.compile(r"[0-9a-f]{16}")
LARGEST = 1e300  # a number that can still be added to others like it
DTYPES = {"bool", *(f"float{n}" for n in (16, 32, 64)), *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))}


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
    statistics_json: str = ""  # of columns over all clients, where they are agreed on already
    run_id: str = ""  # 16 hex digits; "" from a server of 1.0.0, and on Flower's engines

    @property
    def statistics(self) -> dict[str, list[float]]:
        """By column, as participants/column_statistics.py has them; kept as text, as an assignment is hashed."""
        return json.loads(self.statistics_json or "{}")


@dataclass(frozen=True)
class TaskSummary:
    """What a client says of its task. All clients must have it alike, but for the hashes of code and start."""

    name: str
    arrays: list[list]  # name, shape and dtype of each array that travels, in order
    frozen_arrays: list[list]  # of those that don't
    frozen: str  # hash of the latter, with their names; "" where all travel
    start: str  # hash of the untrained weights
    code: str  # hash of the task's files
    metrics: list[Metric]  # the first is the main one
    recipe: dict  # model, batch_size, learning_rate and own settings, as the task completed them
    schema: dict  # of its data, such as the names of columns; the classes are told in hello
    columns: list[str]  # whose means and variances are agreed on before round 1

    def describe(self) -> str:
        """What is trained, and how, in a line."""
        told = {**self.recipe, **self.recipe["own"]}
        told = {name: clean(value, 40) for name, value in told.items() if name != "own"}
        return ", ".join([f"task {self.name}", *(f"{name.replace('_', ' ')} {value}" for name, value in told.items())])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TaskSummary":
        """Raises ValueError, TypeError or KeyError on senseless text."""
        told = _parse(text)
        arrays, frozen_arrays = (
            [_array(name, shape, dtype) for name, shape, dtype in told[key]] for key in ("arrays", "frozen_arrays")
        )
        if len({name for name, *_ in arrays + frozen_arrays}) < len(arrays + frozen_arrays):
            raise ValueError("two arrays of one name")
        metrics = [_metric(each) for each in told["metrics"]]
        hashes = {key: _text(told[key], 0, 64) for key in ("frozen", "start", "code")}
        names = (*OF_TASK, *(name for name in ("local_epochs",) if name in told["recipe"]))
        of_recipe = {key: told["recipe"][key] for key in names}
        dataclasses.replace(Recipe(), **of_recipe)  # checks them
        if not metrics or not all(isinstance(told[key], dict) for key in ("recipe", "schema")):
            raise ValueError("a task without metrics or recipe")
        columns = [_text(name, 1, LONGEST_NAME) for name in told["columns"]]
        name, schema = clean(_text(told["name"], 1, LONGEST_NAME)), told["schema"]
        return cls(
            name, arrays, frozen_arrays, metrics=metrics, recipe=of_recipe, schema=schema, columns=columns, **hashes
        )


@dataclass(frozen=True)
class DataSummary:
    """What a client says of its data: numbers, and what its task is."""

    train_examples: int
    test_examples: int
    buffer_positions: list[int]  # of the arrays that are measured, not trained (BatchNorm's)
    class_counts: list[int]  # training examples by class, where the client says so
    input_shape: list[int]  # of one example, where the client says so
    model_bytes: int  # of the weights that travel, uncompressed; 0 where the client does not say it
    data_sizes: list[int] = field(default_factory=list)  # training and test examples, before they were partitioned
    task: TaskSummary | None = None  # clients of 1.0.0 don't say it
    # Positions of the running mean and variance of each BatchNorm layer, by turns, where the client measures them.
    batchnorm: list[int] = field(default_factory=list)

    @cached_property
    def common(self) -> str:
        """A hash of all that clients must have alike: those of the same need no comparing (agreement.conflict)."""
        said = repr((self.task, self.buffer_positions, self.input_shape, self.batchnorm))
        return hashlib.sha256(said.encode()).hexdigest()


def as_stored(summary: DataSummary) -> dict:
    """What all clients have alike, as history.json keeps it for --resume; the words are those of 1.0.0."""
    task = summary.task
    own = {**task.recipe, "task": asdict(task)} if task else {}
    own |= {"batchnorm_positions": summary.batchnorm} if summary.batchnorm else {}
    return {"statistics": summary.buffer_positions, "input_shape": summary.input_shape, **own}


def from_stored(config: dict) -> DataSummary:
    """Inverse of as_stored. Raises KeyError, TypeError or ValueError where it is not what we wrote."""
    task = TaskSummary.from_json(json.dumps(config["task"])) if "task" in config else None
    batchnorm = config.get("batchnorm_positions", [])
    return DataSummary(0, 0, config["statistics"], [], config.get("input_shape", []), 0, task=task, batchnorm=batchnorm)


@dataclass(frozen=True)
class CloseReason:
    """Why the server ended the stream; kind: finished, wait, refused, dropped, stopped or failed."""

    kind: str
    words: str
    code: int  # the client's exit code


def class_name(name: str) -> str:
    """As it is compared and shown: on one line, in Unicode's composed form."""
    return clean(unicodedata.normalize("NFC", name), LONGEST_NAME)


BEGINS = "the run begins"  # how the server says that all are there, and fit together; demo.py reads it


def presence(there: int, wanted: int) -> str:
    """How the server says who is there."""
    return f"({there} of {wanted} there)"


def read_run_id(value: object) -> str:
    """Names files at the client, so it must be nothing else. Raises PublicError."""
    if value != "" and not (isinstance(value, str) and RUN_ID.fullmatch(value)):
        raise PublicError(f"the run's id must be 16 hex digits, got {clean(value, 40)!r}")
    return str(value)


def read_provenance(value: object) -> dict:
    """Of the final model; it goes into the metadata of the client's file. Raises ValueError."""
    told = _parse(value)
    if not isinstance(told, dict):
        raise ValueError("no provenance")
    return told


def read_hello(answer: dict) -> Hello:
    classes = [class_name(_text(name, 1, 10 * LONGEST_NAME)) for name in _list(answer["classes"])]
    if len(classes) > MOST_CLASSES:
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
    sizes = [_integer(item) for item in _list(answer.get("data_sizes", "[]"))]
    task = TaskSummary.from_json(answer["task"]) if "task" in answer else None
    model_bytes = _integer(answer.get("model_bytes", 0))
    batchnorm = [_integer(item) for item in _list(answer.get("batchnorm", "[]"))]
    _check_batchnorm(batchnorm, positions, task.arrays if task else [])
    return DataSummary(train, test, positions, counts, shape, model_bytes, sizes, task, batchnorm)


def _check_batchnorm(batchnorm: list[int], buffers: list[int], arrays: list[list]) -> None:
    """Raises ValueError unless they are pairs of buffers of one shape, in floating-point numbers."""
    if len(set(batchnorm)) < len(batchnorm) or not set(batchnorm) <= set(buffers) & set(range(len(arrays))):
        raise ValueError("no buffers of its own")
    for mean, variance in zip(batchnorm[::2], batchnorm[1::2], strict=True):
        if arrays[mean][1:] != arrays[variance][1:] or not arrays[mean][2].startswith("float"):
            raise ValueError("no means and variances")


def _text(value: object, least: int, most: int) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise ValueError(f"not a text of {least} to {most} characters")
    return value


def _list(value: object) -> list:
    """What a text says in JSON, if it is a list."""
    items = _parse(value)
    if not isinstance(items, list):
        raise ValueError("not a list")
    return items


def _parse(value: object) -> Any:
    """JSON of finite numbers, not too deep. Raises ValueError."""
    try:
        parsed = json.loads(_text(value, 2, LONGEST_LIST), parse_constant=_finite, parse_float=_finite)
        if _depth(parsed) <= DEEPEST:
            return parsed
    except RecursionError:
        pass
    raise ValueError("brackets in brackets")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=-1)


def _array(name: object, shape: list, dtype: object) -> list:
    """Of a client's arrays: its name can be written into a file, its shape and dtype are such as arrays have."""
    shape = [_integer(size) for size in shape]
    if not _text(name, 0, 300).isprintable() or min(shape, default=0) < 0 or dtype not in DTYPES:
        raise ValueError("no array of ours")
    return [name, shape, dtype]


def _metric(value: dict) -> Metric:
    """A metric's numbers are finite or None, so that they can be compared and drawn."""
    metric = Metric(**value)
    numbers = (metric.lowest, metric.highest, metric.chance)
    if not METRIC_NAME.fullmatch(_text(metric.name, 1, 40)) or not 0 <= _integer(metric.digits) <= 10:
        raise ValueError("no metric of ours")
    if not all(each is None or (isinstance(each, int | float) and abs(each) <= LARGEST) for each in numbers):
        raise ValueError("no metric of ours")
    if not isinstance(metric.higher_is_better, bool) or not isinstance(metric.additive, bool):
        raise ValueError("no metric of ours")
    return metric


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("not an integer")
    return value

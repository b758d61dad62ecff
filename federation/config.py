"""The settings of a run: each is one field, and parser, checks, run config and --resume are made from it.

Recipe holds what every client must do alike; what only the server needs is in server/settings.py.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from federation.compression import COMPRESS
from federation.console import PublicError, clean
from federation.partition import OLD_NAMES, PARTITIONERS

import numpy as np

RUN, RECIPE = "the run", "the recipe, which every client gets"  # titles in --help
MOST_OWN_SETTINGS = 100
FEWEST_VALUES = 10  # of a column: of one with fewer, a client tells nothing
METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
OWN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
OF_TASK = ("model", "batch_size", "learning_rate", "own")  # settings whose defaults are the task's


@dataclass(frozen=True)
class Metric:
    """How a metric of model.py's evaluate() is read and shown. A task's first one is its main metric."""

    name: str
    higher_is_better: bool = True
    lowest: float | None = None  # the ends of its range, where it has them
    highest: float | None = None
    chance: float | None = None  # what guessing reaches
    digits: int = 4  # after the point
    # Whether the mean over the clients, weighted with their test examples, is its value on all of them together.
    additive: bool = True


ACCURACY = Metric("accuracy", lowest=0, highest=1)
LOSS = Metric("loss", higher_is_better=False, digits=3)


@dataclass(frozen=True)
class Part:
    """The part of the run that one local training is: one round's, or one of an asynchronous client's."""

    seed: int  # of all its randomness
    start: float  # of the training and its end, as fractions of the whole run, for the learning rate's schedule
    end: float
    title: str = ""  # of its progress bar


def setting(
    default: object,
    help: str,
    *,
    group: str,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Iterable[str] = (),
    old_names: Mapping[str, str] | None = None,
    only: Mapping[str, tuple[str, ...]] | None = None,
    metavar: str = "N",
    shown: str | None = None,
    hash: bool | None = None,
    old_flag: str | None = None,
) -> Any:
    """A setting with its default, its help and its range.

    A default of None is worked out from other settings or means "off": `shown` says it in words. `old_names` maps
    former choices to today's. `only` names settings and values with one of which alone this setting may be given.
    `hash` as for dataclasses.field. `old_flag`: a former name of its flag, which stays.
    """
    metadata = {key: value for key, value in locals().items() if key not in ("default", "hash")}
    return field(default=default, hash=hash, metadata={**metadata, "choices": tuple(choices)})


def flag(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--set" if name == "own" else "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Settings:
    """Checks itself. Raises ValueError, one line with the value and the remedy, when a value is out of range."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                object.__setattr__(self, each.name, _checked(each, value))

    def _derive(self, name: str, value: object) -> None:
        """Set a setting that was left out."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(each.name for each in fields(cls))

    @classmethod
    def from_stored(cls, config: Mapping[str, Any]) -> Self:
        """From a history.json, which may be of an earlier version: a setting that it lacks was at its default."""
        old = {each.metadata["old_flag"]: each.name for each in fields(cls) if each.metadata["old_flag"]}
        renamed = {old.get(flag(name), name): value for name, value in config.items()}
        return cls(**{name: renamed[name] for name in cls.names() if name in renamed})

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Self:
        """From the run config of Flower's engines, where "" leaves a setting at its default."""
        values = {key.replace("-", "_"): value for key, value in run_config.items() if value != ""}
        values["own"] = values.pop("set", {})
        return cls(**{name: values[name] for name in cls.names() if name in values})


@dataclass(frozen=True)
class Recipe(Settings):
    """What every client must do alike; letters as in McMahan et al. 2017 (arXiv:1602.05629)."""

    model: str = setting(None, "network of the task", group=RECIPE, metavar="NAME", shown="the task's first")
    rounds: int = setting(3, "server rounds", group=RUN, least=1)
    local_epochs: int = setting(1, "passes over its examples", group=RECIPE, least=1)  # E
    batch_size: int = setting(None, "examples in a step", group=RECIPE, least=1, shown="the task's")  # B
    learning_rate: float = setting(  # eta
        None, "peak of its schedule", group=RECIPE, above=0, metavar="R", shown="the task's"
    )
    proximal_mu: float = setting(
        0.0, "FedProx: keep local training near the global model; 0 is off", group=RECIPE, least=0, metavar="M"
    )
    partitioner: str = setting(
        "iid",
        "who holds what; local: all of one's own",
        group=RECIPE,
        choices=PARTITIONERS,
        old_names=OLD_NAMES,
    )
    alpha: float = setting(0.5, "of dirichlet; smaller is more skewed", group=RECIPE, above=0, metavar="A")
    seed: int = setting(0, "same seed, same bits", group=RECIPE, least=0, most=2**32 - 1)
    compress: str = setting("none", "how weights travel; fp16: in half the bytes", group=RECIPE, choices=COMPRESS)
    own: dict = setting(  # noqa: RUF009 (a field, as the others)
        None, "a setting of the task's own", group=RECIPE, metavar="NAME=VALUE", shown="the task's", hash=False
    )

    def complete(self, models: Mapping[str, Mapping[str, Any]]) -> "Recipe":
        """With what was left open as the task has it: by network, its own settings beside the recipe's.

        Raises PublicError, one line, where the task has not what was asked for.
        """
        name = self.model or next(iter(models))
        if name not in models:
            raise PublicError(f"--model must be one of the task's ({', '.join(models)}), got {clean(name, 40)!r}")
        defaults = {"batch_size": 32, "learning_rate": 0.05, **models[name]}
        of_recipe = {key: defaults.pop(key) for key in ("batch_size", "learning_rate")}
        values = {key: value for key, value in of_recipe.items() if getattr(self, key) is None}
        own = dict(defaults)
        for key, value in (self.own or {}).items():
            if key not in defaults:
                known = ", ".join(sorted(defaults)) or "none"
                raise PublicError(f"--set {key}: the task has no such setting for {name}; it has {known}")
            own[key] = _of_kind(key, value, defaults[key])
        return dataclasses.replace(self, model=name, own=own, **values)

    def part(self, partition: int, number: int, title: str = "", span: tuple[float, float] | None = None) -> Part:
        """Of a client's training in the round of this number, or, where span says so, at other times of the run."""
        start, end = span or ((number - 1) / self.rounds, number / self.rounds)
        return Part(self.round_seed(partition, number), start, end, title)

    def round_seed(self, partition: int, server_round: int) -> int:
        """Randomness as a function of these, so that a client that died and came back trains the same."""
        sequence = np.random.SeedSequence([self.seed, partition, server_round])
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)

    def to_json(self) -> str:
        """As it travels: by the names that clients of earlier versions know, and without what they don't."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, {})}
        if not self.proximal_mu:
            del values["proximal_mu"]
        earlier = {new: old for old, new in OLD_NAMES.items()}
        return json.dumps({**values, "partitioner": earlier.get(self.partitioner, self.partitioner)})

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Inverse of to_json. Raises ValueError on anything else, as a server of another version may send."""
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise PublicError(f"the server's recipe is of another version: {error}") from None


def add_flags(parser: argparse.ArgumentParser, kinds: Iterable[type[Settings]]) -> None:
    """A flag for every setting, in groups. One that is not given is None: the settings know their defaults."""
    groups = {group.title: group for group in parser._action_groups}
    for each in (each for kind in kinds for each in fields(kind)):
        options = each.metadata
        title = options["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        shown = options["shown"] or (f"{each.default:g}" if isinstance(each.default, float) else each.default)
        metavar = "|".join(options["choices"]) or options["metavar"]
        text = f"{options['help']} (default: {shown})".replace("%", "%%")
        several = {"action": "append", "dest": each.name} if _kind(each) is dict else {"type": _kind(each)}
        flags = [flag(each.name), *([options["old_flag"]] if options["old_flag"] else [])]
        groups[title].add_argument(*flags, metavar=metavar, help=text, **several)


def _kind(each: dataclasses.Field) -> type:
    """int, float or str, of an annotation that may add None."""
    if isinstance(each.type, types.UnionType):
        return next(kind for kind in typing.get_args(each.type) if kind is not types.NoneType)
    return typing.cast(type, each.type)


def _checked(each: dataclasses.Field, value: Any) -> Any:
    """The value in its type and today's spelling. Raises ValueError."""
    kind, options, name = _kind(each), each.metadata, flag(each.name)
    if kind is dict:
        return _own_settings(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if not isinstance(value, kind) or isinstance(value, bool):
        word = {int: "a whole number", float: "a number", str: "a word"}[kind]
        raise PublicError(f"{name} must be {word}, got {value!r}")
    if options["choices"]:
        value = (options["old_names"] or {}).get(value, value)
        if value not in options["choices"]:
            raise PublicError(f"{name} must be one of {', '.join(options['choices'])}, got {value!r}")
        return value
    bounds = {name: options[name] for name in ("least", "most", "above", "below")}
    if kind is not str and not _within(value, **bounds):
        raise PublicError(f"{name} must be {_range(**bounds)}, got {value}")
    return value


def _own_settings(value: Any) -> dict[str, Any]:
    """From a dict, or from NAME=VALUE, several in a list or one text. Raises PublicError."""
    pairs = value.split() if isinstance(value, str) else value
    if isinstance(pairs, list):
        for pair in pairs:
            if not isinstance(pair, str) or "=" not in pair:
                raise PublicError(f"--set needs NAME=VALUE, got {clean(pair, 40)!r}")
        pairs = dict(pair.split("=", 1) for pair in pairs)
    if not isinstance(pairs, dict) or len(pairs) > MOST_OWN_SETTINGS:
        raise PublicError(f"--set needs NAME=VALUE, at most {MOST_OWN_SETTINGS} times, got {clean(value, 40)!r}")
    for name, each in pairs.items():
        if not isinstance(name, str) or not OWN_NAME.fullmatch(name):
            raise PublicError(f"--set {clean(name, 40)!r} is no name of a setting; use letters, digits and _")
        if not isinstance(each, str | int | float | bool):
            raise PublicError(f"--set {name} must be a number, a word, or true or false, got {clean(each, 40)!r}")
    return pairs


def _of_kind(name: str, value: Any, default: Any) -> Any:
    """A setting of the task's own in the type of its default. Raises PublicError."""
    kind = type(default)
    if isinstance(value, str) and kind in (int, float):
        with contextlib.suppress(ValueError):
            value = kind(value)
    if kind is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower(), value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        word = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[kind]
        raise PublicError(f"--set {name} must be {word}, got {clean(value, 40)!r}")
    return value


def _within(value: Any, least: float | None, most: float | None, above: float | None, below: float | None) -> bool:
    low = (least is None or value >= least) and (above is None or value > above)
    return low and value < math.inf and (most is None or value <= most) and (below is None or value < below)


def _range(least: float | None, most: float | None, above: float | None, below: float | None) -> str:
    if least is None and most is None and above is None and below is None:
        return "a finite number"
    if least is not None and most is not None:
        return f"between {least} and {most}"
    low = f"above {above}" if above is not None else f"at least {least}"
    high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    return f"{low} and {high}" if high else low

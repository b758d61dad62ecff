"""The settings of a run: each is one field, and parser, checks, run config and --resume are made from it.

Recipe holds what every client must do alike; what only the server needs is in server/settings.py.
"""

import argparse
import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from federation.compression import COMPRESS
from federation.console import PublicError
from federation.partition import OLD_NAMES, PARTITIONERS

import numpy as np

# The networks of model.py by name, with the batch size and peak learning rate that suit each. The
# names stand here because the server offers them and must not import model.py, and torch with it.
MODELS = {"cnn": (64, 0.15), "lenet": (32, 0.02)}
MAIN_METRIC = "accuracy"  # the one that --target-accuracy, the page's headline and the comparison are about
RUN, RECIPE = "the run", "the recipe, which every client gets"  # titles in --help


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
) -> Any:
    """A setting with its default, its help and its range.

    A default of None is worked out from other settings or means "off": `shown` says it in words. `old_names` maps
    former choices to today's. `only` names settings and values with one of which alone this setting may be given.
    """
    metadata = {key: value for key, value in locals().items() if key != "default"}
    return field(default=default, metadata={**metadata, "choices": tuple(choices)})


def flag(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


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
        return cls(**{name: config[name] for name in cls.names() if name in config})

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Self:
        """From the run config of Flower's engines, where "" leaves a setting at its default."""
        values = {key.replace("-", "_"): value for key, value in run_config.items() if value != ""}
        return cls(**{name: values[name] for name in cls.names() if name in values})


@dataclass(frozen=True)
class Recipe(Settings):
    """What every client must do alike; letters as in McMahan et al. 2017 (arXiv:1602.05629)."""

    model: str = setting("cnn", "network of model.py", group=RECIPE, choices=MODELS)
    rounds: int = setting(3, "server rounds", group=RUN, least=1)
    local_epochs: int = setting(1, "passes over its images", group=RECIPE, least=1)  # E
    batch_size: int = setting(  # B
        None, "images in a step", group=RECIPE, least=1,
        shown=", ".join(f"{size} for {name}" for name, (size, _) in MODELS.items()),
    )  # fmt: skip
    learning_rate: float = setting(  # eta
        None, "peak of its schedule", group=RECIPE, above=0, metavar="R",
        shown=", ".join(f"{rate} for {name}" for name, (_, rate) in MODELS.items()),
    )  # fmt: skip
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

    def __post_init__(self) -> None:
        super().__post_init__()
        batch_size, learning_rate = MODELS[self.model]
        self._derive("batch_size", batch_size)
        self._derive("learning_rate", learning_rate)

    def round_seed(self, partition: int, server_round: int) -> int:
        """Randomness as a function of these, so that a client that died and came back trains the same."""
        sequence = np.random.SeedSequence([self.seed, partition, server_round])
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)

    def to_json(self) -> str:
        """As it travels: by the names that clients of earlier versions know, and without what they don't."""
        values = dataclasses.asdict(self)
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
        groups[title].add_argument(flag(each.name), type=_kind(each), metavar=metavar, help=text)


def _kind(each: dataclasses.Field) -> type:
    """int, float or str, of an annotation that may add None."""
    if isinstance(each.type, types.UnionType):
        return next(kind for kind in typing.get_args(each.type) if kind is not types.NoneType)
    return typing.cast(type, each.type)


def _checked(each: dataclasses.Field, value: Any) -> Any:
    """The value in its type and today's spelling. Raises ValueError."""
    kind, options, name = _kind(each), each.metadata, flag(each.name)
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


def _within(value: Any, least: float | None, most: float | None, above: float | None, below: float | None) -> bool:
    low = (least is None or value >= least) and (above is None or value > above)
    return low and value < math.inf and (most is None or value <= most) and (below is None or value < below)


def _range(least: float | None, most: float | None, above: float | None, below: float | None) -> str:
    if least is not None and most is not None:
        return f"between {least} and {most}"
    low = f"above {above}" if above is not None else f"at least {least}"
    high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    return f"{low} and {high}" if high else low

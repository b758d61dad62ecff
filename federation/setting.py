"""How a setting is written: one field of a dataclass, from which flag, checks, run config and --resume follow."""

import argparse
import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from federation.console import PublicError, clean

MOST_OWN_SETTINGS = 100
OWN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")


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
    def among(cls, values: Mapping[str, Any]) -> Self:
        """Of these values those that are its settings, all others being at their defaults."""
        return cls(**{name: values[name] for name in cls.names() if name in values})

    @classmethod
    def from_stored(cls, config: Mapping[str, Any]) -> Self:
        """From a history.json, which may be of an earlier version: a setting that it lacks was at its default."""
        old = {each.metadata["old_flag"]: each.name for each in fields(cls) if each.metadata["old_flag"]}
        return cls.among({old.get(flag(name), name): value for name, value in config.items()})

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> Self:
        """From the run config of Flower's engines, where "" leaves a setting at its default."""
        values = {key.replace("-", "_"): value for key, value in run_config.items() if value != ""}
        values["own"] = values.pop("set", {})
        return cls.among(values)


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
        several: dict[str, Any] = {"type": _kind(each), "metavar": metavar}
        if _kind(each) is dict:
            several = {"action": "append", "dest": each.name, "metavar": metavar}
        elif _kind(each) is bool:  # --flag, or --flag=false, as a run config says it
            several, text = {"type": _truth, "nargs": "?", "const": True, "metavar": ""}, options["help"]
        flags = [flag(each.name), *([options["old_flag"]] if options["old_flag"] else [])]
        groups[title].add_argument(*flags, help=text, **several)


def _truth(text: str) -> bool | str:
    """For argparse; what is neither is left to the setting's own check."""
    return {"true": True, "false": False}.get(text.lower(), text)


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
    if kind is bool:
        if not isinstance(value, bool):
            raise PublicError(f"{name} must be true or false, got {clean(value, 40)!r}")
        return value
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


def of_kind(name: str, value: Any, default: Any) -> Any:
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

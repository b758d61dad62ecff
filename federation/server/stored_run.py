"""The settings of a run that its folder holds: of one that goes on (--resume), or is done again (--again)."""

import argparse
import dataclasses
from pathlib import Path

from federation.config import Recipe
from federation.results.run_folder import INITIAL, RunFolder
from federation.server.settings import ServerSettings
from federation.setting import flag


def resumed(args: argparse.Namespace, given: dict) -> tuple[Recipe, ServerSettings, dict]:
    """The settings that the run began with, and those of the server's that are given now. Raises ValueError."""
    if args.again:
        raise ValueError(f"--again {args.again} begins a new run; leave out --resume, or go on with that run later")
    if args.run_dir:
        raise ValueError(f"--resume {args.resume} names the run folder; leave out --run-dir {args.run_dir}")
    try:
        config = RunFolder(Path(args.resume)).load_config()
        recipe, stored = Recipe.from_stored(config), ServerSettings.from_stored(config)
        config["rounds"], config["clients"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no such file, no JSON, or not what we wrote
        raise ValueError(f"--resume {args.resume} holds no run (no readable history.json)") from None
    now = Recipe.among({**dataclasses.asdict(recipe), **given})
    for name in Recipe.names():
        if name != "own" and getattr(now, name) != getattr(recipe, name):
            theirs = f"{flag(name)} {given[name]}"
            raise ValueError(
                f"--resume keeps the run's own recipe ({name} is {getattr(recipe, name)}); leave out {theirs}"
            )
    for name, value in (now.own or {}).items():
        ours = (recipe.own or {}).get(name)
        if "own" in given and not same_value(value, ours):
            raise ValueError(
                f"--resume keeps the run's own settings ({name} is {ours}); leave out --set {name}={value}"
            )
    fewer = args.members and recipe.partitioner == "local"  # where some are members no more, the others go on
    for name, what in (("clients", f"{stored.clients} clients"), ("mode", f"mode, {stored.mode}")):
        if name == "clients" and fewer:
            continue
        if given.get(name, getattr(stored, name)) != getattr(stored, name):
            raise ValueError(f"--resume keeps the run's own {what}; leave out {flag(name)} {given[name]}")
    usual = dataclasses.asdict(stored)
    if given.get("clients", stored.clients) < stored.clients:
        usual["min_clients"] = None  # as for a new run of so many
    return recipe, ServerSettings.among({**usual, **given}), config


def repeated(args: argparse.Namespace, given: dict) -> tuple[Recipe, ServerSettings, dict]:
    """The settings of the run that is done again; classes and initial weights are set in args. Raises ValueError."""
    folder = RunFolder(Path(args.again))
    try:
        history = folder.load_history()
        recipe, settings = Recipe.from_stored(history.config), ServerSettings.from_stored(history.config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--again {args.again} holds no run (no readable history.json)") from None
    for name in (*Recipe.names(), *ServerSettings.names(), "initial_weights", "classes"):
        if name in given:
            raise ValueError(f"--again {args.again} repeats the run as it was; leave out {flag(name)}")
    args.classes = history.config.get("classes") or None
    if (folder.path / INITIAL).exists():
        args.initial_weights = str(folder.path / INITIAL)
    config = {**dataclasses.asdict(recipe), **dataclasses.asdict(settings), "again": history.to_repeat()}
    return recipe, settings, config


def same_value(given: object, ours: object) -> bool:
    """Whether a text of --set says what a run has in the task's own kind."""
    try:
        return str(given).lower() == str(ours).lower() or float(str(given)) == float(str(ours))
    except ValueError:
        return False

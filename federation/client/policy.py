"""What a hospital takes part in: a TOML file of its own, which no server can loosen."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import datetime, time
from pathlib import Path
from typing import Any, Self

from federation.console import PublicError, clean, fail, read_text
from federation.protocol import Assignment

Window = tuple[time, time]  # from, until; over midnight where the first is the later one
HOURS = re.compile(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d")


class AgainstPolicy(PublicError):
    """What a server asks for is against the policy, in words that it is told, too."""


class OutsideHours(AgainstPolicy):
    """It may be asked for again at another time of the day."""


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise ValueError
    return tuple(value)


def _number(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value


def _switch(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _windows(value: Any) -> tuple[Window, ...]:
    windows = []
    for each in _names(value):
        if not HOURS.fullmatch(each):
            raise ValueError
        start, end = map(time.fromisoformat, each.split("-"))
        if start == end:
            raise ValueError
        windows.append((start, end))
    return tuple(windows)


MUST_BE = {
    _names: 'a list of names, such as ["lenet"]',
    _number: "a whole number of at least 1",
    _switch: "true or false",
    _windows: 'a list of hours of the day, such as ["20:00-06:00"], from one to another',
}


def rule(default: Any, read: Callable[[Any], Any], help: str) -> Any:
    """A key of the file. The default is what holds without it; read makes the rule of its value, or raises ValueError.

    help: what deploy/policy.toml says of it, too.
    """
    return field(default=default, metadata={"read": read, "help": help})


@dataclass(frozen=True)
class Policy:
    """One field for each key; without a file everything is allowed."""

    tasks: tuple[str, ...] = rule((), _names, "tasks that it takes part in, by the NAME in their model.py")
    models: tuple[str, ...] = rule((), _names, "networks that it trains")
    max_rounds: int | None = rule(
        None, _number, "rounds of a run; also the most models of a run that it trains, and the most that it measures"
    )
    max_local_epochs: int | None = rule(
        None, _number, "passes over its examples in a round (model.py may take rare ones twice in each)"
    )
    min_participants: int | None = rule(
        None, _number, "clients that a run has, and that train in a round, as the server says"
    )
    require_secure_aggregation: bool = rule(
        False, _switch, "whether it takes part only where the server sees no single client's update"
    )
    require_private_training: bool = rule(
        False, _switch, "whether it takes part only where its training is differentially private"
    )
    send_class_counts: bool = rule(
        True, _switch, "whether the server is told how many training examples it has of each class"
    )
    hours: tuple[Window, ...] = rule((), _windows, "when it works, by this machine's clock; at other times it refuses")

    @classmethod
    def load(cls, path: str | None) -> Self:
        """Of --policy. Exits with 2 and one line where the file can't be used."""
        if path is None:
            return cls()
        try:
            return cls.from_dict(tomllib.loads(read_text(Path(path).read_bytes())))
        except OSError as error:
            fail(f"--policy {path} can't be read ({error.strerror})", 2)
        except UnicodeDecodeError:
            fail(f"--policy {path} is not text", 2)
        except ValueError as error:  # ours, or TOML's, which names line and column
            fail(f"--policy {path}: {clean(error)}", 2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError, one line with the key, the value and the remedy."""
        rules = {each.name: each.metadata["read"] for each in fields(cls)}
        found = {}
        for key, value in values.items():
            if key not in rules:
                raise ValueError(f"{clean(key, 40)} is no key of a policy; its keys are {', '.join(rules)}")
            try:
                found[key] = rules[key](value)
            except ValueError:
                raise ValueError(f"{key} must be {MUST_BE[rules[key]]}, got {clean(repr(value), 80)}") from None
        return cls(**found)

    # Each check raises AgainstPolicy.

    def check_run(self, assignment: Assignment) -> None:
        """Whether it takes part in a run, as far as that can be said before its data is opened for it."""
        recipe = assignment.recipe
        self.check_hours()
        self._at_most("max_rounds", recipe.rounds, "rounds")
        self._at_most("max_local_epochs", recipe.local_epochs or 1, "local epochs")
        self._check_participants(assignment.num_partitions, "this run")
        for name in ("secure_aggregation", "private_training"):
            if getattr(self, f"require_{name}") and not getattr(recipe, name, False):
                words = name.replace("_", " ")
                raise AgainstPolicy(f"its policy asks for {words}, and this run has none (require_{name})")

    def check_task(self, client: Any) -> None:
        """Whether it trains this task and network, as the client says that it has been given them."""
        task = getattr(client, "task_summary", None)
        if task and "local_epochs" in task.recipe:  # which the task may choose for private training
            self._at_most("max_local_epochs", task.recipe["local_epochs"], "local epochs")
        for key, one in (("tasks", task and task.name), ("models", task and task.recipe["model"])):
            allowed = getattr(self, key)
            if allowed and one not in allowed:
                words = f"the {key} {clean(', '.join(allowed), 200)}" if allowed[1:] else f"{allowed[0]} alone"
                raise AgainstPolicy(f"its policy allows {words}, and this run has {clean(one, 40)} ({key})")

    def check_work(self, config: dict, models: int) -> None:
        """Whether it does what the server asks for now; models: how many it was given for that in this run."""
        self.check_hours()
        self._at_most("max_rounds", config["server_round"], "rounds")
        self._at_most("max_rounds", models, "models to work on")
        self._check_participants(config.get("participants"), "this round")

    def check_hours(self) -> None:
        if not self.is_open():
            raise OutsideHours(f"it works at {self.words_for_hours()} only, and now it is {_now():%H:%M} (hours)")

    def is_open(self) -> bool:
        """Whether it is an hour of the day at which it works."""
        now = _now()
        inside = [start <= now < end if start < end else start <= now or now < end for start, end in self.hours]
        return not inside or any(inside)

    def words_for_hours(self) -> str:
        return ", ".join(f"{start:%H:%M}-{end:%H:%M}" for start, end in self.hours)

    def _at_most(self, key: str, value: int, what: str) -> None:
        most = getattr(self, key)
        if most is not None and value > most:
            raise AgainstPolicy(f"its policy allows at most {most} {what}, and this run has {value} ({key})")

    def _check_participants(self, number: int | None, what: str) -> None:
        least = self.min_participants
        if least is not None and number is not None and number < least:
            raise AgainstPolicy(
                f"its policy asks for at least {least} participants, and {what} has {number} (min_participants)"
            )


def _now() -> time:
    return datetime.now().time()

"""What a hospital takes part in: a file of its own, which no server can loosen."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime, time
from pathlib import Path
from typing import Any

from federation.console import PublicError, clean, fail, read_text
from federation.protocol import Assignment

HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


class PolicyError(ValueError):
    """The file can't be used; the text is one line."""


@dataclass(frozen=True)
class Policy:
    """The keys of the file; what it does not name is left to the server."""

    tasks: list[str] | None = None  # by the NAME in model.py
    models: list[str] | None = None
    max_rounds: int | None = None
    max_local_epochs: int | None = None
    min_participants: int | None = None  # places in the run, as the server says
    require_secure_aggregation: bool = False
    require_private_training: bool = False
    send_class_counts: bool = True
    hours: str | None = None  # "20:00-06:00", of this machine's clock; nothing is trained at other times

    def __post_init__(self) -> None:
        for name in ("tasks", "models"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
                raise PolicyError(f'{name} must be a list of names, such as ["cnn"], got {value!r}')
        for name in ("max_rounds", "max_local_epochs", "min_participants"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise PolicyError(f"{name} must be a whole number from 1 on, got {value!r}")
        for name in ("require_secure_aggregation", "require_private_training", "send_class_counts"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.hours is not None and not (isinstance(self.hours, str) and HOURS.fullmatch(self.hours)):
            raise PolicyError(f'hours must be like "20:00-06:00", got {self.hours!r}')

    @classmethod
    def load(cls, path: str | None) -> "Policy":
        """Of --policy; everything is allowed where there is none. Exits with 2 and one line where it can't be used."""
        if path is None:
            return cls()
        try:
            values = tomllib.loads(read_text(Path(path).read_bytes()))
            known = [each.name for each in fields(cls)]
            for name in values:
                if name not in known:
                    raise PolicyError(f"{clean(name, 40)} is no key of a policy; there are {', '.join(known)}")
            return cls(**values)
        except OSError as error:
            fail(f"--policy {path} can't be read ({error.strerror})", 2)
        except UnicodeDecodeError:
            fail(f"--policy {path} is not text", 2)
        except ValueError as error:  # a PolicyError, or TOML's own
            fail(f"--policy {path}: {error}", 2)

    def check(self, assignment: Assignment) -> None:
        """Whether it takes part in such a run. Raises PublicError."""
        recipe = assignment.recipe
        self._at_most("rounds", recipe.rounds, self.max_rounds)
        self._at_most("local epochs", recipe.local_epochs, self.max_local_epochs)
        if self.min_participants and assignment.num_partitions < self.min_participants:
            _refuse(f"at least {self.min_participants} participants", str(assignment.num_partitions))
        for name in ("secure_aggregation", "private_training"):
            if getattr(self, f"require_{name}") and not getattr(recipe, name, False):
                _refuse(f"{name.replace('_', ' ')}", "none")

    @property
    def names_tasks(self) -> bool:
        """Whether it matters which task and network a client has."""
        return self.tasks is not None or self.models is not None

    def check_task(self, task: str, model: str) -> None:
        """Whether it takes part with this task and network. Raises PublicError."""
        for what, one, allowed in (("task", task, self.tasks), ("model", model, self.models)):
            if allowed is not None and one not in allowed:
                _refuse(f"{what} {' or '.join(allowed)}", one)

    def check_round(self, number: int, now: Callable[[], datetime] = datetime.now) -> None:
        """Whether it does what is asked for in this round, at this time of the day. Raises PublicError."""
        self._at_most("rounds", number, self.max_rounds)
        if self.hours:
            start, end = (time.fromisoformat(each) for each in self.hours.split("-"))
            at = now().time()
            if not (start <= at < end if start <= end else at >= start or at < end):
                _refuse(f"work at {self.hours} only", f"{at:%H:%M}")

    def _at_most(self, what: str, value: int, most: int | None) -> None:
        if most is not None and value > most:
            _refuse(f"at most {most} {what}", str(value))


def _refuse(wanted: str, got: Any) -> None:
    raise PublicError(f"its policy asks for {clean(wanted, 200)}, and this is {clean(got, 40)}")

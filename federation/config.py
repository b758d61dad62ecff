"""What every client must do alike: the recipe of a run, and how its metrics are read.

The settings that only the server needs are in server/settings.py; how a setting is written is in setting.py.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from federation.compression import COMPRESS
from federation.console import PublicError, clean
from federation.partition import OLD_NAMES, PARTITIONERS
from federation.setting import Settings, of_kind, setting

import numpy as np

RUN, RECIPE = "the run", "the recipe, which every client gets"  # titles in --help
MEASURED = 1_000  # training examples of each client on which BatchNorm's statistics are measured anew
FEWEST_VALUES = 10  # of a column: of one with fewer, a client tells nothing
METRIC_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
PRIVATE = "private"  # of a network's defaults in MODELS: what is otherwise with private training
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


@dataclass(frozen=True)
class Recipe(Settings):
    """What every client must do alike; letters as in McMahan et al. 2017 (arXiv:1602.05629)."""

    model: str = setting(None, "network of the task", group=RECIPE, metavar="NAME", shown="the task's first")
    rounds: int = setting(3, "server rounds", group=RUN, least=1)
    local_epochs: int = setting(  # E
        None, "passes over its examples", group=RECIPE, least=1, shown="1, privately the task's"
    )
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
    secure_aggregation: bool = setting(
        False, "the server learns the sum of the updates, and no single one", group=RECIPE
    )
    private_training: bool = setting(
        False, "clients train with differential privacy, each to its own epsilon: docs/privacy.md", group=RECIPE
    )
    own: dict = setting(  # noqa: RUF009 (a field, as the others)
        None, "a setting of the task's own", group=RECIPE, metavar="NAME=VALUE", shown="the task's", hash=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.private_training:
            self._derive("local_epochs", 1)

    def complete(self, models: Mapping[str, Mapping[str, Any]]) -> "Recipe":
        """With what was left open as the task has it: by network, its own settings beside the recipe's.

        Raises PublicError, one line, where the task has not what was asked for.
        """
        fit = [name for name in models if self.private_training and PRIVATE in models[name]]
        name = self.model or next(iter(fit or models))
        if name not in models:
            raise PublicError(f"--model must be one of the task's ({', '.join(models)}), got {clean(name, 40)!r}")
        defaults = {"batch_size": 32, "learning_rate": 0.05, "local_epochs": 1, **models[name]}
        private = defaults.pop(PRIVATE, {})
        if self.private_training:
            defaults |= private
        of_recipe = {key: defaults.pop(key) for key in ("batch_size", "learning_rate", "local_epochs")}
        values = {key: value for key, value in of_recipe.items() if getattr(self, key) is None}
        own = dict(defaults)
        for key, value in (self.own or {}).items():
            if key not in defaults:
                known = ", ".join(sorted(defaults)) or "none"
                raise PublicError(f"--set {key}: the task has no such setting for {name}; it has {known}")
            own[key] = of_kind(key, value, defaults[key])
            if self.private_training and key in private and own[key] != private[key]:
                raise PublicError(
                    f"--set {key}={clean(value, 40)}: private training needs {private[key]}; leave it out"
                )
        return dataclasses.replace(self, model=name, own=own, **values)

    def of_task(self) -> dict[str, Any]:
        """What the task completed, as clients tell it; only those of today train privately, or tell local epochs."""
        names = (*OF_TASK, "local_epochs") if self.private_training else OF_TASK
        return {name: getattr(self, name) for name in names}

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
        for name in ("proximal_mu", "secure_aggregation", "private_training"):
            if not values[name]:
                del values[name]
        earlier = {new: old for old, new in OLD_NAMES.items()}
        return json.dumps({**values, "partitioner": earlier.get(self.partitioner, self.partitioner)})

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Inverse of to_json. Raises ValueError on anything else, as a server of another version may send."""
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise PublicError(f"the server's recipe is of another version: {error}") from None

"""The recipe of a run, which the server gives to every client, and the terms, which it keeps to itself."""

import json
import math
from dataclasses import asdict, dataclass, fields

from federation.wire import COMPRESS

# The networks of model.py by name, with the batch size and peak learning rate that suit each. The
# names stand here because the server offers them and must not import model.py, and torch with it.
MODELS = {"cnn": (64, 0.15), "lenet": (32, 0.02)}


@dataclass(frozen=True)
class Recipe:
    """The recipe of a run; letters as in McMahan et al. 2017 (arXiv:1602.05629).

    Raises ValueError, one line with the value and the remedy, when a value is out of range.
    """

    model: str = "cnn"
    rounds: int = 3
    local_epochs: int = 1  # E
    batch_size: int = MODELS["cnn"][0]  # B
    learning_rate: float = MODELS["cnn"][1]  # eta, peak of the schedule over all rounds
    partitioner: str = "iid"
    alpha: float = 0.5  # of the Dirichlet partitioner
    seed: int = 0
    compress: str = "none"  # how weights travel

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"--model must be one of {', '.join(MODELS)}, got {self.model!r}")
        for name in ("rounds", "local_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{flag(name)} must be above 0, got {getattr(self, name)}")
        if self.compress not in COMPRESS:
            raise ValueError(f"--compress must be one of {', '.join(COMPRESS)}, got {self.compress!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be between 0 and {2**32 - 1}, got {self.seed}")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Inverse of to_json. Raises ValueError on anything else, as a server of another version may send."""
        try:
            return cls(**json.loads(text))
        except TypeError as error:
            raise ValueError(f"the server's recipe is of another version: {error}") from None


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Terms:
    """What a run of rounds needs beside the recipe; times in seconds."""

    clients: int = 3
    min_clients: int = 2
    fraction_fit: float = 1.0
    strategy: str = "fedavg"
    max_update_norm: float | None = None
    target_accuracy: float | None = None
    join_timeout: float = 3600.0  # for the first clients to come
    rejoin_wait: float = 30.0  # for a lost client's place to be taken again
    round_timeout: float = 600.0  # for a client to answer
    mode: str = "sync"
    buffer_size: int = 2  # K; this and the next three are of the asynchronous mode
    server_learning_rate: float = 1.0  # eta
    max_staleness: int = 10
    patience: float = 0.25  # of the time that the fastest client trains


RECIPE_FIELDS = tuple(field.name for field in fields(Recipe))
EARLIER = {"compress": "none"}  # what runs did whose folders are from before a field
TERMS_FIELDS = tuple(field.name for field in fields(Terms))

"""What is known of a run, round by round; history.json holds the same as plain JSON."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from federation.config import MAIN_METRIC

BY_CLIENT = "_by_client"
STEP_SIZE, COSINE = "step_size", "cosine"  # of each update, in by_client
NESTED = ("metrics", "train_metrics", "by_client", "rounds_worth")  # of a record, and not of its row


def main_first(names: set[str]) -> list[str]:
    """Names of metrics as they are shown: the main one, the loss, the others by name."""
    return sorted(names, key=lambda name: (name != MAIN_METRIC, name != "loss", name))


@dataclass
class RoundRecord:
    """A round, or with number 0 the untrained model. Metrics are whatever finite numbers the clients send."""

    unit: ClassVar[str] = "round"

    round: int
    metrics: dict[str, float]  # of the round's model on all test examples, "loss" among them
    train_metrics: dict[str, float] = field(default_factory=dict)  # of local training; names begin with train_
    clients: int = 0  # whose updates counted
    seconds: float = 0.0
    bytes_received: int = 0
    by_client: dict[str, dict[str, float]] = field(default_factory=dict)  # what, then partition

    @property
    def position(self) -> float:
        """On the axis of rounds."""
        return self.round

    def main(self) -> float | None:
        return self.metrics.get(MAIN_METRIC)

    def to_json(self) -> dict:
        """One flat row; null where a metric is not known."""
        own = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name not in NESTED}
        metrics = {MAIN_METRIC: None, "loss": None, **self.metrics, "train_loss": None, **self.train_metrics}
        by_client = {name + BY_CLIENT: values for name, values in self.by_client.items()}
        return {"round": self.round, **metrics, **own, **by_client}


@dataclass
class VersionRecord(RoundRecord):
    """A version of the asynchronous mode; its metrics come after it, and may never come."""

    unit: ClassVar[str] = "version"

    updates: list[dict] = field(default_factory=list)  # that made it, in their order of arrival
    time: float = 0.0  # seconds since the run began, when it was made...
    evaluated: float | None = None  # ...and when it was last evaluated
    rounds_worth: float = 0.0  # of updates since the run began; worked out, not stored

    @property
    def position(self) -> float:
        return self.rounds_worth


def read_record(row: Mapping[str, Any]) -> RoundRecord:
    """Inverse of to_json. Raises KeyError or TypeError where it is no round's row."""
    kind = VersionRecord if "updates" in row else RoundRecord
    own = {each.name for each in dataclasses.fields(kind)} - {*NESTED}
    values: dict[str, Any] = {"metrics": {}, "train_metrics": {}, "by_client": {}}
    for name, value in row.items():
        if name in own:
            values[name] = value
        elif name.endswith(BY_CLIENT) and isinstance(value, dict):
            values["by_client"][name.removesuffix(BY_CLIENT)] = value
        elif value is not None:
            values["train_metrics" if name.startswith("train_") else "metrics"][name] = value
    return kind(**values)


@dataclass
class History:
    """What history.json holds."""

    config: dict
    rounds: list[RoundRecord] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)  # round, partition, reason
    events: list[dict] = field(default_factory=list)  # joins, leaves, refusals

    def to_json(self) -> str:
        return json.dumps({**vars(self), "rounds": [record.to_json() for record in self.rounds]}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "History":
        """Raises ValueError where the text is no run's history."""
        try:
            stored = json.loads(text)
            records = [read_record(row) for row in stored["rounds"]]
            history = cls(**{**stored, "config": {**stored["config"]}, "rounds": records})
            updates = 0
            for record in records:
                if isinstance(record, VersionRecord):
                    updates += len(record.updates)
                    record.rounds_worth = updates / history.config["clients"]
        except (AttributeError, KeyError, TypeError, ZeroDivisionError):
            raise ValueError("not a run's history") from None
        return history

    def metric_names(self) -> list[str]:
        return main_first({name for record in self.rounds for name in record.metrics})

    def scored(self) -> list[RoundRecord]:
        """Those whose main metric is known."""
        return [record for record in self.rounds if record.main() is not None]

    def by_round(self) -> list[RoundRecord]:
        """A record for each round, or for each round's worth of updates the newest version that had no more."""
        records = self.scored()
        if not records or not isinstance(records[0], VersionRecord):
            return records
        chosen: list[RoundRecord] = []
        seconds = 0.0
        for number in range(int(records[-1].position) + 1):
            newest = [record for record in records if record.position <= number][-1]
            assert isinstance(newest, VersionRecord)
            chosen.append(dataclasses.replace(newest, round=number, seconds=newest.time - seconds))
            seconds = newest.time
        return chosen

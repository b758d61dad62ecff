"""What is known of a run, round by round; history.json holds the same as plain JSON."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from federation.config import ACCURACY, LOSS, Metric

BY_CLIENT = "_by_client"
MEMBERS = "members"  # of the config: name and key by partition
STEP_SIZE, COSINE = "step_size", "cosine"  # of each update, in by_client
EPSILON, DELTA = "epsilon", "delta"  # of each client that trains privately, as it says, in by_client
WEIGHT = "weight"  # in the mean, of each update that counts, in by_client; all together 1
NESTED = ("metrics", "train_metrics", "by_client", "rounds_worth", "main_metric")  # of a record, and not of its row


def main_first(names: set[str], main: str = ACCURACY.name) -> list[str]:
    """Names of metrics as they are shown: the main one, the loss, the others by name."""
    return sorted(names, key=lambda name: (name != main, name != LOSS.name, name))


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
    main_metric: str = ACCURACY.name  # of the run's task; not stored with each record
    utc: str = ""  # when its model was made, RFC 3339; not known of runs before 1.1
    weights_sha256: str = ""  # pieces.hash_arrays of its model, as it travels

    @property
    def position(self) -> float:
        """On the axis of rounds."""
        return self.round

    def main(self) -> float | None:
        return self.metrics.get(self.main_metric)

    def to_json(self) -> dict:
        """One flat row; null where a metric is not known."""
        own = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name not in NESTED}
        metrics = {self.main_metric: None, LOSS.name: None, **self.metrics, "train_loss": None, **self.train_metrics}
        by_client = {name + BY_CLIENT: values for name, values in self.by_client.items()}
        own = {name: value for name, value in own.items() if value != "" or name not in ("utc", "weights_sha256")}
        return {"round": self.round, **metrics, **own, **by_client}


@dataclass
class VersionRecord(RoundRecord):
    """A version of the asynchronous mode; its metrics come after it, and may never come."""

    unit: ClassVar[str] = "version"

    updates: list[dict] = field(default_factory=list)  # that made it, in their order of arrival
    time: float = 0.0  # seconds since the run began, when it was made...
    evaluated: float | None = None  # ...and when it was last evaluated
    taken_back: bool = False  # as most clients can't evaluate it, or one made since the newest that they can
    made_from: int | None = None  # the version that these updates changed, where that is not the one before
    rounds_worth: float = 0.0  # of updates since the run began; worked out, not stored

    def take_back(self) -> None:
        """Nothing builds on it any more: its updates don't count, and its scores are those of few clients."""
        self.taken_back, self.clients, self.metrics = True, 0, {}
        self.by_client = {name: self.by_client[name] for name in (STEP_SIZE, COSINE) if name in self.by_client}

    def to_json(self) -> dict:
        """Without `taken_back` and `made_from` in the row of a version that has neither."""
        usual = {"taken_back": False, "made_from": None}
        return {name: v for name, v in super().to_json().items() if name not in usual or v is not usual[name]}

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
                record.main_metric = history.main.name
                if isinstance(record, VersionRecord):
                    updates += 0 if record.taken_back else len(record.updates)
                    record.rounds_worth = updates / history.config["clients"]
        except (AttributeError, KeyError, TypeError, ZeroDivisionError):
            raise ValueError("not a run's history") from None
        return history

    # A run that repeats another (--again)

    def to_repeat(self) -> dict:
        """What a repetition is compared with, as it keeps it in its own config."""
        rounds = [[each.round, each.weights_sha256, each.by_client.get(WEIGHT, {})] for each in self.rounds]
        return {"run_id": self.config.get("run_id", ""), "software": self.config.get("software"), "rounds": rounds}

    def repetition(self) -> str:
        """Whether this run, which repeats another, has the same bits; "" where it repeats none."""
        other = self.config.get("again")
        if not other:
            return ""
        name, ours = f"run {other['run_id']}", self.to_repeat()
        if not all(sha256 for _, sha256, _ in other["rounds"]):
            return f"whether these are the bits of {name} can't be told: it is of an earlier version, without hashes"
        pairs = zip(ours["rounds"], other["rounds"], strict=False)
        first = next((one for one, two in pairs if one[1] != two[1]), None)
        if first is None and len(ours["rounds"]) == len(other["rounds"]):
            return f"the same bits as {name}: its model after each of {len(ours['rounds'])} rounds, round 0 among them"
        if first is None:
            return f"the same bits as {name}, but {len(ours['rounds'])} rounds instead of {len(other['rounds'])}"
        members = next((two[2] != first[2] for two in other["rounds"] if two[0] == first[0]), False)
        why = (
            "other clients took part, or with other data" if members else "the clients' software or hardware is another"
        )
        if ours["software"] != other["software"] and not members:
            why = "the software is another"
        if any(isinstance(record, VersionRecord) for record in self.rounds):
            why = "the asynchronous mode depends on who is faster"
        if self.config.get("private_training"):
            why = "private training draws other noise each time"
        return f"other bits than {name}, from {self.rounds[0].unit} {first[0]} on: {why}"

    @property
    def declared(self) -> list[Metric]:
        """The metrics that the run's task declares; the first is the main one."""
        return [Metric(**each) for each in self.config.get("task", {}).get("metrics", [])] or [ACCURACY]

    def name_of(self, partition: int | str) -> str:
        """What a client is called: its name as a member, or the number of its partition; -1 is the sum of all."""
        if str(partition) == "-1":
            return "the sum"
        return self.config.get(MEMBERS, {}).get(str(partition), {}).get("name") or str(partition)

    def title_of(self, partition: int | str) -> str:
        """The same where it is not said that it is a client."""
        name = self.name_of(partition)
        return f"client {name}" if name == str(partition) else name

    @property
    def main(self) -> Metric:
        return self.declared[0]

    def metric(self, name: str) -> Metric:
        """As the task declares it; of any other name, one that nothing is known of."""
        return next((each for each in [*self.declared, LOSS] if each.name == name), Metric(name))

    def metric_names(self) -> list[str]:
        return main_first({name for record in self.rounds for name in record.metrics}, self.main.name)

    def averaged(self) -> list[str]:
        """Those of its metrics whose mean over the clients is not their value on all examples together."""
        return [name for name in self.metric_names() if not self.metric(name).additive]

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

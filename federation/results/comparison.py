"""The same training without federation, as baseline.py leaves it, and how the federation compares with it."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from federation.config import Metric
from federation.results.history import History, RoundRecord
from federation.results.tables import score

LISTED_CLIENTS = 6  # a comparison of more gives the worst and the best of them


@dataclass
class Training:
    """One model's training on so many images, scored on the whole test set after each round."""

    images: float
    rounds: list[RoundRecord]  # with number, metrics and seconds
    partition: int | None = None  # whose images, where it was one client's

    def to_json(self) -> dict:
        rows = [{"round": each.round, **each.metrics, "seconds": each.seconds} for each in self.rounds]
        own = {} if self.partition is None else {"partition": self.partition}
        return {**own, "images": self.images, "rounds": rows}

    @classmethod
    def from_json(cls, stored: dict) -> "Training":
        records = []
        for row in stored["rounds"]:
            metrics = {name: value for name, value in row.items() if name not in ("round", "seconds")}
            records.append(RoundRecord(row["round"], metrics, seconds=row["seconds"]))
        return cls(stored["images"], records, stored.get("partition"))


@dataclass
class Baseline:
    """What baseline.json holds."""

    test_images: int
    threads: int
    device: str
    centralised: Training
    alone: list[Training]

    def to_json(self) -> str:
        trainings = {"centralised": self.centralised.to_json(), "alone": [one.to_json() for one in self.alone]}
        return json.dumps({**vars(self), **trainings}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Baseline":
        """Raises ValueError where the text is no baseline."""
        try:
            stored = json.loads(text)
            central, alone = Training.from_json(stored["centralised"]), map(Training.from_json, stored["alone"])
            return cls(**{**stored, "centralised": central, "alone": [*alone]})
        except (KeyError, TypeError):
            raise ValueError("not a baseline") from None

    def mean_alone(self) -> Training:
        """The plain mean over the clients that trained alone."""
        records = []
        for rows in zip(*(one.rounds for one in self.alone), strict=True):
            names = set.intersection(*(set(row.metrics) for row in rows))
            metrics = {name: _mean(rows, lambda row, name=name: row.metrics[name]) for name in sorted(names)}
            records.append(RoundRecord(rows[0].round, metrics, seconds=_mean(rows, lambda row: row.seconds)))
        return Training(_mean(self.alone, lambda one: one.images), records)

    def about_times(self) -> str:
        return (
            "Seconds: federated, the rounds with exchange and evaluation, its clients side by side; "
            f"the others, training alone, one after another, each on {self.threads} CPU threads."
        )


def comparison(history: History, baseline: Baseline, name: str | None = None) -> list[list[str]]:
    """A metric by round of the federation and of what baseline.py trained, as cells; the first row is the head.

    name: of the metric; the main one where it is not given.
    """
    metric = history.metric(name or history.main.name)
    name = metric.name
    central, alone = baseline.centralised, baseline.alone
    columns = {
        "federated": Training(central.images, history.by_round()),
        "centralised": central,
        "alone, mean": baseline.mean_alone(),
    }
    if len(alone) <= LISTED_CLIENTS:
        columns |= {history.title_of(one.partition or 0): one for one in alone}
    else:
        by_end = sorted(
            alone, key=lambda one: one.rounds[-1].metrics.get(name, 0.0), reverse=not metric.higher_is_better
        )
        columns |= {
            f"{word}: {history.name_of(one.partition or 0)}": one
            for word, one in (("worst", by_end[0]), ("best", by_end[-1]))
        }
    cells = [["round", *columns]]
    for i in range(max(len(column.rounds) for column in columns.values())):
        rows = [column.rounds[i] if i < len(column.rounds) else None for column in columns.values()]
        cells.append([str(i), *(score(row.metrics.get(name) if row else None, metric) for row in rows)])
    cells.append(["examples", *(f"{column.images:,.0f}" for column in columns.values())])
    seconds = [sum(row.seconds for row in column.rounds[1:]) for column in columns.values()]
    cells.append(["seconds", *(f"{value:.1f}" for value in seconds)])
    return cells


def verdict(history: History, baseline: Baseline) -> str:
    """What the comparison comes to."""
    federated, central = history.by_round()[-1], baseline.centralised.rounds[-1]
    alone = baseline.mean_alone().rounds[-1]
    metric = history.main
    values = [record.metrics[metric.name] for record in (federated, central, alone)]
    better = "" if metric.higher_is_better else " (lower is better)"
    how = "" if metric.additive else ", and the federated one is the mean over the clients"
    apart = [_apart(values[0] - other, metric) for other in values[1:]]
    return (
        f"Federated {metric.name} is {score(values[0], metric)}{better}: {apart[1]} the mean of the clients alone, "
        f"{apart[0]} centralised training; all on the same {baseline.test_images:,} test examples{how}."
    )


def _mean(items: list | tuple, value: Callable) -> float:
    return sum(map(value, items)) / len(items)


def _apart(difference: float, metric: Metric) -> str:
    side = "above" if difference >= 0 else "below"
    return f"{abs(difference):.{metric.digits}f} {side}"

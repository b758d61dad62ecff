"""The tables of a run: what is said of each round, the same in the terminal and on the page."""

from federation.config import LOSS, Metric
from federation.results.history import History, RoundRecord, VersionRecord, main_first
from federation.results.privacy import epsilon_of

WIDTHS = {  # of a metric, eight
    "round": {"round": 5, "clients": 7, "loss": 6, "seconds": 7, "received": 9},
    "version": {"version": 7, "clients": 9, "staleness": 9, "loss": 6, "at second": 9, "received": 9},
}


class Table:
    """Lines of text for one round after another, under a head that is repeated when a metric is new."""

    def __init__(self, history: History, names: list[str] | None = None) -> None:
        self._history = history
        self._names = names or []
        self._head = False

    def lines(self, record: RoundRecord) -> list[str]:
        names = _names({*self._names, *record.metrics}, self._history)
        row = cells(record, names, self._history)
        widths = {title: max(WIDTHS[record.unit].get(title, 8), len(title)) for title in row}
        lines = ["  ".join(cell.rjust(widths[title]) for title, cell in row.items())]
        if names != self._names or not self._head:
            lines.insert(0, "  ".join(title.rjust(width) for title, width in widths.items()))
            self._names, self._head = names, True
        return lines


def table(history: History) -> str:
    """All rounds, and below them what to know of metrics that are no plain means."""
    text = Table(history, names_of(history))
    lines = [line for record in history.rounds for line in text.lines(record)]
    return "\n".join([*lines, *remarks(history)])


def remarks(history: History) -> list[str]:
    names = history.averaged()
    return [f"{', '.join(names)}: the mean over the clients, not the value on all test examples together"] * bool(names)


def cells(record: RoundRecord, names: list[str], history: History) -> dict[str, str]:
    """What a table says of a round with these metrics, by column."""
    scores = {name: score(record.metrics.get(name), history.metric(name)) for name in names}
    received = {"received": size(record.bytes_received)}
    if isinstance(record, VersionRecord):
        clients = listed([history.name_of(update["partition"]) for update in record.updates])
        staleness = listed([update["staleness"] for update in record.updates])
        made = {"version": str(record.round), "clients": clients, "staleness": staleness}
        return {**made, **scores, "at second": f"{record.time:.1f}", **received}
    done = {"round": str(record.round), "clients": str(record.clients)}
    private = {"epsilon": epsilon_of(record, history)} if history.config.get("private_training") else {}
    return {**done, **scores, "seconds": f"{record.seconds:.1f}", **received, **private}


def all_cells(history: History) -> list[list[str]]:
    """The same table as cells; the first row is the head."""
    rows = [cells(record, names_of(history), history) for record in history.rounds]
    return [[*rows[0]], *([*row.values()] for row in rows)]


def names_of(history: History) -> list[str]:
    return _names(set(history.metric_names()), history)


def _names(known: set[str], history: History) -> list[str]:
    return main_first(known or {history.main.name, LOSS.name}, history.main.name)


def score(value: float | None, metric: Metric) -> str:
    """Not known where versions come faster than clients evaluate."""
    return "–" if value is None else f"{value:.{metric.digits}f}"


def listed(values: list) -> str:
    """A few one by one; of many numbers the range, of many names how many."""
    if len(values) <= 3:
        return ", ".join(map(str, values))
    numbers = [int(value) for value in values if str(value).isdecimal()]
    return f"{min(numbers)} to {max(numbers)}" if len(numbers) == len(values) else f"{len(set(values))} of them"


def size(num_bytes: float) -> str:
    """Bytes in words, in powers of 1,000."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def in_columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)

"""The tables of a run: what is said of each round, the same in the terminal and on the page."""

from federation.config import MAIN_METRIC
from federation.results.history import RoundRecord, VersionRecord, main_first

DIGITS = {"loss": 3}  # after the point; of other metrics, four
WIDTHS = {  # of a metric, eight
    "round": {"round": 5, "clients": 7, "loss": 6, "seconds": 7, "received": 9},
    "version": {"version": 7, "clients": 9, "staleness": 9, "loss": 6, "at second": 9, "received": 9},
}


class Table:
    """Lines of text for one round after another, under a head that is repeated when a metric is new."""

    def __init__(self, names: list[str] | None = None) -> None:
        self._names = names or []
        self._head = False

    def lines(self, record: RoundRecord) -> list[str]:
        names = main_first({*self._names, *record.metrics} or {MAIN_METRIC, "loss"})
        row = cells(record, names)
        widths = {title: max(WIDTHS[record.unit].get(title, 8), len(title)) for title in row}
        lines = ["  ".join(cell.rjust(widths[title]) for title, cell in row.items())]
        if names != self._names or not self._head:
            lines.insert(0, "  ".join(title.rjust(width) for title, width in widths.items()))
            self._names, self._head = names, True
        return lines


def table(records: list[RoundRecord]) -> str:
    text = Table(names_of(records))
    return "\n".join(line for record in records for line in text.lines(record))


def cells(record: RoundRecord, names: list[str]) -> dict[str, str]:
    """What a table says of a round with these metrics, by column."""
    scores = {name: score(record.metrics.get(name), name) for name in names}
    received = {"received": size(record.bytes_received)}
    if isinstance(record, VersionRecord):
        clients = listed([update["partition"] for update in record.updates])
        staleness = listed([update["staleness"] for update in record.updates])
        made = {"version": str(record.round), "clients": clients, "staleness": staleness}
        return {**made, **scores, "at second": f"{record.time:.1f}", **received}
    done = {"round": str(record.round), "clients": str(record.clients)}
    return {**done, **scores, "seconds": f"{record.seconds:.1f}", **received}


def all_cells(records: list[RoundRecord]) -> list[list[str]]:
    """The same table as cells; the first row is the head."""
    rows = [cells(record, names_of(records)) for record in records]
    return [[*rows[0]], *([*row.values()] for row in rows)]


def names_of(records: list[RoundRecord]) -> list[str]:
    return main_first({name for record in records for name in record.metrics} or {MAIN_METRIC, "loss"})


def score(value: float | None, name: str) -> str:
    """Not known where versions come faster than clients evaluate."""
    return "–" if value is None else f"{value:.{DIGITS.get(name, 4)}f}"


def listed(numbers: list[int]) -> str:
    """A few numbers one by one, many by their range."""
    return ", ".join(map(str, numbers)) if len(numbers) <= 3 else f"{min(numbers)} to {max(numbers)}"


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

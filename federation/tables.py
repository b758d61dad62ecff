"""The tables of a run, and of its comparison with training without federation."""

from federation.run_folder import History

VERSION_HEAD = (  # of the asynchronous mode: a row is a version, and names the clients whose updates made it
    f"{'version':>7}  {'clients':>9}  {'staleness':>9}  {'accuracy':>8}  {'loss':>6}  {'at second':>9}  {'received':>9}"
)
TABLE_HEAD = f"{'round':>5}  {'clients':>7}  {'accuracy':>8}  {'loss':>6}  {'seconds':>7}  {'received':>9}"
LISTED_CLIENTS = 6  # a comparison of more gives the worst and the best of them
TIMES = (
    "Seconds: federated, the rounds with exchange and evaluation, its clients side by side; "
    "the others, training alone, one after another, each on {threads} CPU threads."
)


def table_row(row: dict) -> str:
    if "updates" in row:
        return version_row(row)
    return (
        f"{row['round']:>5}  {row['clients']:>7}  {row['accuracy']:>8.4f}  {row['loss']:>6.3f}"
        f"  {row['seconds']:>7.1f}  {size(row['bytes_received']):>9}"
    )


def version_row(row: dict) -> str:
    clients = listed([update["partition"] for update in row["updates"]])
    staleness = listed([update["staleness"] for update in row["updates"]])
    return (
        f"{row['round']:>7}  {clients:>9}  {staleness:>9}  {score(row['accuracy'], 4):>8}  {score(row['loss'], 3):>6}"
        f"  {row['time']:>9.1f}  {size(row['bytes_received']):>9}"
    )


def score(value: float | None, digits: int) -> str:
    """Not known where versions come faster than clients evaluate."""
    return "–" if value is None else f"{value:.{digits}f}"


def listed(numbers: list[int]) -> str:
    """A few numbers one by one, many by their range."""
    return ", ".join(map(str, numbers)) if len(numbers) <= 3 else f"{min(numbers)} to {max(numbers)}"


def table(rows: list[dict]) -> str:
    head = VERSION_HEAD if rows and "updates" in rows[0] else TABLE_HEAD
    return "\n".join([head, *map(table_row, rows)])


def size(num_bytes: float) -> str:
    """Bytes in words, in powers of 1,000."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def comparison(history: History, baseline: dict) -> list[list[str]]:
    """Accuracy by round of the federation and of what baseline.py trained, as cells; the first row is the head."""
    central, alone = baseline["centralised"], baseline["alone"]
    columns = {
        "federated": {"rounds": history.by_round(), "images": central["images"]},
        "centralised": central,
        "alone, mean": mean(alone),
    }
    if len(alone) <= LISTED_CLIENTS:
        columns |= {f"client {one['partition']}": one for one in alone}
    else:
        by_end = sorted(alone, key=lambda one: one["rounds"][-1]["accuracy"])
        columns |= {f"{word}: {one['partition']}": one for word, one in (("worst", by_end[0]), ("best", by_end[-1]))}
    cells = [["round", *columns]]
    for i in range(max(len(column["rounds"]) for column in columns.values())):
        rows = [column["rounds"][i] if i < len(column["rounds"]) else None for column in columns.values()]
        cells.append([str(i), *(f"{row['accuracy']:.4f}" if row else "–" for row in rows)])
    cells.append(["images", *(f"{column['images']:,.0f}" for column in columns.values())])
    seconds = [sum(row["seconds"] for row in column["rounds"][1:]) for column in columns.values()]
    cells.append(["seconds", *(f"{value:.1f}" for value in seconds)])
    return cells


def verdict(history: History, baseline: dict) -> str:
    """What the comparison comes to."""
    federated, central = history.by_round()[-1]["accuracy"], baseline["centralised"]["rounds"][-1]["accuracy"]
    alone = mean(baseline["alone"])["rounds"][-1]["accuracy"]
    return (
        f"Federated accuracy is {federated:.4f}: {_apart(federated - alone)} the mean of the clients alone, "
        f"{_apart(federated - central)} centralised training; all on the same {baseline['test_images']:,} test images."
    )


def mean(alone: list[dict]) -> dict:
    """The plain mean over the clients that trained alone, in the form of one of them."""
    rounds = [
        {"round": rows[0]["round"]}
        | {key: sum(row[key] for row in rows) / len(rows) for key in ("accuracy", "loss", "seconds")}
        for rows in zip(*(one["rounds"] for one in alone), strict=True)
    ]
    return {"images": sum(one["images"] for one in alone) / len(alone), "rounds": rounds}


def in_columns(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells)


def _apart(difference: float) -> str:
    return f"{abs(difference):.4f} {'above' if difference >= 0 else 'below'}"

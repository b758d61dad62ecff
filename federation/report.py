"""What people see of a run: the table by round, and accuracy.png."""

from pathlib import Path

from federation.run_folder import History

VERSION_HEAD = (  # of the asynchronous mode: a row is a version, and names the clients whose updates made it
    f"{'version':>7}  {'clients':>9}  {'staleness':>9}  {'accuracy':>8}  {'loss':>6}  {'at second':>9}  {'received':>9}"
)
TABLE_HEAD = f"{'round':>5}  {'clients':>7}  {'accuracy':>8}  {'loss':>6}  {'seconds':>7}  {'received':>9}"


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
    known = row["accuracy"] is not None  # not where versions come faster than clients evaluate
    scores = f"{row['accuracy']:>8.4f}  {row['loss']:>6.3f}" if known else f"{'–':>8}  {'–':>6}"
    return (
        f"{row['round']:>7}  {clients:>9}  {staleness:>9}  {scores}  {row['time']:>9.1f}"
        f"  {size(row['bytes_received']):>9}"
    )


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


def plot(history: History, path: Path) -> None:
    """Accuracy and loss by round, as a PNG."""
    import matplotlib  # only here: it costs half a second and 37 MB, and the server must listen at once

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    evaluated = [row for row in history.rounds if row["accuracy"] is not None]
    unit = "version of the global model" if "updates" in history.rounds[0] else "server round"
    rounds = [row["round"] for row in evaluated]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(rounds, [row["accuracy"] for row in evaluated], "o-", color="#0072B2", label="global model")
    classes = history.config.get("classes") or []
    if classes:
        left.axhline(1 / len(classes), color="grey", linestyle=":", label="chance")
    left.set(xlabel=unit, ylabel="accuracy on all test images", ylim=(0, 1))
    left.legend(loc="lower right")
    right.plot(rounds, [row["loss"] for row in evaluated], "o-", color="#D55E00", label="test")
    trained = [row for row in history.rounds if row["train_loss"] is not None]
    right.plot(
        [row["round"] for row in trained],
        [row["train_loss"] for row in trained],
        "s--",
        color="#009E73",
        label="training",
    )
    right.set(xlabel=unit, ylabel="mean loss per image", ylim=(0, None))
    right.legend(loc="lower left")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""What people see of a run: the table by round, and accuracy.png."""

from pathlib import Path

from federation.run_folder import History

TABLE_HEAD = f"{'round':>5}  {'clients':>7}  {'accuracy':>8}  {'loss':>6}  {'seconds':>7}  {'received':>9}"


def table_row(row: dict) -> str:
    return (
        f"{row['round']:>5}  {row['clients']:>7}  {row['accuracy']:>8.4f}  {row['loss']:>6.3f}"
        f"  {row['seconds']:>7.1f}  {size(row['bytes_received']):>9}"
    )


def table(rows: list[dict]) -> str:
    return "\n".join([TABLE_HEAD, *map(table_row, rows)])


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

    rounds = [row["round"] for row in history.rounds]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(rounds, [row["accuracy"] for row in history.rounds], "o-", color="#0072B2", label="global model")
    classes = history.config.get("classes") or []
    if classes:
        left.axhline(1 / len(classes), color="grey", linestyle=":", label="chance")
    left.set(xlabel="server round", ylabel="accuracy on all test images", ylim=(0, 1))
    left.legend(loc="lower right")
    right.plot(rounds, [row["loss"] for row in history.rounds], "o-", color="#D55E00", label="test")
    trained = [row for row in history.rounds if row["train_loss"] is not None]
    right.plot(
        [row["round"] for row in trained],
        [row["train_loss"] for row in trained],
        "s--",
        color="#009E73",
        label="training",
    )
    right.set(xlabel="server round", ylabel="mean loss per image", ylim=(0, None))
    right.legend(loc="lower left")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""What came of a sweep: the main metric of each setting's final models, over the seeds, as a table and a picture."""

import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from federation.config import Metric
from federation.console import fail
from federation.process import write_content
from federation.results.history import History
from federation.results.run_folder import RunFolder
from federation.results.tables import in_columns, score
from federation.results.theme import LIGHT, canvas

SEED = "seed"
Finished = Sequence[tuple[dict[str, object], RunFolder]]  # values by the name of the flag


def write(folder: Path, runs: Finished) -> str:
    """sweep.txt, sweep.png and sweep.json, of the runs that are done; returns the table. Exits with 1 if it can't."""
    if not runs:
        return ""
    histories = [(values, path, path.load_history()) for values, path in runs]
    metric = histories[0][2].main
    table = in_columns(rows([(values, history) for values, _, history in histories], metric))
    picture = draw(by_setting([(values, history) for values, _, history in histories]), metric)
    listed = [
        {"settings": values, "folder": path.path.name, metric.name: final(history)}
        for values, path, history in histories
    ]
    contents = {"sweep.txt": f"{table}\n".encode(), "sweep.png": picture}
    contents["sweep.json"] = json.dumps(listed, indent=1).encode()
    try:
        for name, content in contents.items():
            write_content(folder / name, content)
    except OSError as error:
        fail(f"{folder} can't be written ({error.strerror}); free or change the disk")
    return table


def final(history: History) -> float | None:
    """The main metric of the last model that was scored."""
    scored = history.scored()
    return scored[-1].main() if scored else None


def by_setting(runs: Sequence[tuple[dict[str, object], History]]) -> dict[tuple, list[History]]:
    """The runs that differ in their seed alone, by the values of what else differs."""
    names = [name for name in runs[0][0] if name != SEED]
    varying = [name for name in names if len({str(values[name]) for values, _ in runs}) > 1]
    groups: dict[tuple, list[History]] = {}
    for values, history in runs:
        groups.setdefault(tuple((name, values[name]) for name in varying), []).append(history)
    return groups


def rows(runs: Sequence[tuple[dict[str, object], History]], metric: Metric) -> list[list[str]]:
    """The table's: what differs, how many runs, and the mean, the least and the greatest of their final metric."""
    groups = by_setting(runs)
    names = [name for name, _ in next(iter(groups))]
    cells = [[*names, "runs", f"mean {metric.name}", "lowest", "highest", "seconds"]]
    for key, histories in groups.items():
        values = [value for value in map(final, histories) if value is not None]
        shown = (statistics.mean(values), min(values), max(values)) if values else (None, None, None)
        seconds = statistics.mean(sum(record.seconds for record in history.rounds) for history in histories)
        words = [*(str(value) for _, value in key), str(len(histories))]
        cells.append([*words, *(score(value, metric) for value in shown), f"{seconds:.1f}"])
    return cells


def draw(groups: dict[tuple, list[History]], metric: Metric) -> bytes:
    """A line for each setting: every run a dot, and their mean."""
    png = io.BytesIO()
    with canvas(LIGHT, 1.2 + 0.45 * len(groups), png) as figure:
        axes = figure.subplots()
        for place, histories in enumerate(groups.values()):
            values = [value for value in map(final, histories) if value is not None]
            axes.plot(values, [place] * len(values), "o", color=LIGHT.federated, alpha=0.5, markersize=5)
            if values:
                axes.plot(statistics.mean(values), place, "|", color=LIGHT.ink, markersize=14)
        labels = ["\n".join(f"{name} {value}" for name, value in key) or "all runs" for key in groups]
        axes.set_yticks(range(len(groups)), labels, fontsize=9)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set(xlabel=f"final {metric.name}; | is the mean")
        axes.grid(axis="x")
    return png.getvalue()

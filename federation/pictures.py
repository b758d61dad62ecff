"""The pictures of a run as PNG bytes, each for a light and a dark page; Okabe and Ito's colour-blind safe colours."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from federation.run_folder import History

import numpy as np

WIDTH = 5.2  # inches: the type is then still readable where a phone shrinks the picture to its own width
MARKED_ROUNDS = 25  # with more, markers run into each other
MARKED_CLIENTS = 8
MARKED_CLASSES = 12  # with more, numbers no longer fit into their cells
NAMED_CLASSES = 40  # with more, names no longer fit beside each other


@dataclass(frozen=True)
class Theme:
    paper: str
    ink: str
    faint: str
    empty: str  # a cell of nothing
    federated: str
    centralised: str
    alone: str


LIGHT = Theme("#ffffff", "#1c1c1e", "#b4b4ba", "#f1f5f8", federated="#0072B2", centralised="#C24A00", alone="#00805E")
DARK = Theme("#15171b", "#ececee", "#5a5d64", "#20242a", federated="#56B4E9", centralised="#E69F00", alone="#3CC8A0")


@contextmanager
def canvas(theme: Theme, height: float, png: io.BytesIO) -> Iterator:
    """A figure in the theme's colours, which is saved into png at the end."""
    import matplotlib  # only here: it costs half a second and 37 MB, and the server must listen at once
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {
        name: theme.ink
        for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    }
    ours = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "grid.color": theme.faint,
        "grid.alpha": 0.5,
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,  # a class may be called $5
    }
    with matplotlib.rc_context({**colours, **ours}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script the font lacks
        figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
        yield figure
        FigureCanvasAgg(figure).print_png(png)  # savefig would draw everything twice


def accuracy(history: History, baseline: dict | None, theme: Theme) -> bytes:
    """Accuracy and loss by round: the federation, its clients, and, where there is one, the baseline."""
    from matplotlib.ticker import MaxNLocator

    png = io.BytesIO()
    with canvas(theme, 6.2, png) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        rows = history.scored()
        rounds = [row["round"] for row in rows]
        marker = {"markersize": 6 if len(rounds) <= MARKED_ROUNDS else 0, "linewidth": 2}
        thin = {"linewidth": 0.9, "alpha": 0.75}
        for number, partition in enumerate(_partitions(history)):
            values = [row["accuracy_by_client"].get(partition, np.nan) for row in rows]
            label = None if number else "federated, on each client's share"
            upper.plot(rounds, values, color=theme.federated, label=label, **thin)
        for axes, value in ((upper, "accuracy"), (lower, "loss")):
            if baseline:
                for number, one in enumerate(baseline["alone"]):
                    label = None if number else "each client alone"
                    axes.plot(*_curve(one["rounds"], value), color=theme.alone, label=label, **thin)
                alone = [_curve(one["rounds"], value)[1] for one in baseline["alone"]]
                x = _curve(baseline["alone"][0]["rounds"], value)[0]
                axes.plot(x, np.mean(alone, 0), "^:", color=theme.alone, label="clients alone, mean", **marker)
                curve = _curve(baseline["centralised"]["rounds"], value)
                axes.plot(*curve, "s--", color=theme.centralised, label="centralised", **marker)
            axes.plot(*_curve(rows, value), "o-", color=theme.federated, label="federated", **marker)
            axes.grid(axis="y")
            axes.margins(x=0.03)
        classes = history.config.get("classes") or []
        if classes:
            upper.axhline(1 / len(classes), color=theme.ink, linestyle=(0, (1, 3)), linewidth=1.2, label="chance")
        upper.set(ylabel="accuracy, all test images", ylim=(0, 1))
        upper.set_yticks(np.arange(0, 1.01, 0.2), minor=False)
        lower.set(xlabel="server round", ylabel="loss, all test images")
        lower.set_ylim(0, None)
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = upper.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i] != "federated")
        figure.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="outside upper left",
            ncols=2,
            frameon=False,
            fontsize=9.5,
            columnspacing=1.2,
        )
    return png.getvalue()


def partitions(history: History, theme: Theme) -> bytes:
    """How many training images of which class each client holds."""
    counts = history.config["class_counts"]
    clients = sorted(counts, key=int)
    table = np.array([counts[client] for client in clients]).T  # (classes, clients)
    png = io.BytesIO()
    with canvas(theme, _height(len(table), 1.1), png) as figure:
        axes = figure.subplots()
        few = len(clients) <= MARKED_CLIENTS
        _heat(axes, table, table, theme, numbers=few and len(table) <= NAMED_CLASSES)
        _name(axes.set_yticks, history.config["classes"])
        if few:
            words = [f"{client}\n{sum(counts[client]):,}" for client in clients]
            axes.set_xticks(range(len(clients)), words, fontsize=11 if len(clients) <= 5 else 9)
        axes.set_xlabel("client, and its training images in all" if few else "client")
    return png.getvalue()


def predictions(history: History, found: dict[str, np.ndarray], theme: Theme) -> bytes:
    """Some test images with what the final model takes them for; wrong ones are framed and say the truth."""
    classes, images = history.config["classes"], found["images"]
    columns = 5
    lines = -(-len(images) // columns)
    png = io.BytesIO()
    with canvas(theme, 0.1 + 1.38 * lines, png) as figure:
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in grid[len(images) :]:
            axes.set_axis_off()
        for axes, image, truth, guess in zip(grid, images, found["truth"], found["prediction"], strict=False):
            right = truth == guess
            axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(visible=not right, color=theme.centralised, linewidth=4)
            # Two lines for every image, so that rows are of one height.
            taken, truly = _short(classes[guess], 12), _short(classes[truth], 12)
            words = f"✓ {taken}\n" if right else f"✗ {taken}\nis {truly}"
            colour, weight = (theme.ink, "normal") if right else (theme.centralised, "bold")
            axes.set_xlabel(words, color=colour, weight=weight, fontsize=9, labelpad=4)
    return png.getvalue()


def confusion(history: History, found: dict[str, np.ndarray], theme: Theme) -> bytes:
    """The confusion matrix of the final model; a row's shades are parts of that class."""
    counts = found["confusion"]
    png = io.BytesIO()
    with canvas(theme, _height(len(counts), 1.5), png) as figure:
        axes = figure.subplots()
        parts = counts / np.maximum(1, counts.sum(1, keepdims=True))
        _heat(axes, parts, counts, theme, numbers=len(counts) <= MARKED_CLASSES)
        _name(axes.set_xticks, history.config["classes"], rotation=45, ha="right", rotation_mode="anchor")
        _name(axes.set_yticks, history.config["classes"])
        axes.set(xlabel="prediction", ylabel="truth")
    return png.getvalue()


def _heat(axes, shades: np.ndarray, numbers_in: np.ndarray, theme: Theme, *, numbers: bool) -> None:
    """A table of shades from paper to the federation's colour, with its numbers in the cells."""
    from matplotlib.colors import LinearSegmentedColormap

    deepen = LinearSegmentedColormap.from_list("deepen", [theme.empty, theme.federated])
    colours = deepen(shades / max(1.15 * shades.max(), 1e-9))[..., :3]  # never so deep that its number is hard to read
    axes.imshow(colours, aspect="auto")
    axes.hlines(np.arange(0.5, len(shades) - 1), -0.5, shades.shape[1] - 0.5, color=theme.paper, linewidth=1.5)
    axes.vlines(np.arange(0.5, shades.shape[1] - 1), -0.5, len(shades) - 0.5, color=theme.paper, linewidth=1.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    if not numbers:
        return
    for (i, j), number in np.ndenumerate(numbers_in):
        ink = "black" if _luminance(colours[i, j]) > 0.18 else "white"
        axes.text(j, i, f"{number:,}", ha="center", va="center", fontsize=9, color=ink)


def _luminance(colour: np.ndarray) -> float:
    """Relative luminance as in WCAG 2: above 0.18, black is easier to read than white."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _name(set_ticks, classes: list[str], **style: object) -> None:
    if len(classes) <= NAMED_CLASSES:
        set_ticks(range(len(classes)), [_short(name) for name in classes], **style)


def _short(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _height(lines: int, rest: float) -> float:
    return rest + min(8.0, max(2.0, 0.4 * lines))


def _curve(rows: list[dict], value: str) -> tuple[list[int], list[float]]:
    return [row["round"] for row in rows], [row[value] for row in rows]


def _partitions(history: History) -> list[str]:
    """Every client that ever evaluated, by number."""
    return sorted({p for row in history.rounds for p in row["accuracy_by_client"]}, key=int)

"""The pictures of a run as PNG bytes, each for a light and a dark page; Okabe and Ito's colour-blind safe colours."""

import io

from federation.config import ACCURACY, LOSS
from federation.results.comparison import Baseline
from federation.results.history import History, RoundRecord
from federation.results.theme import Theme, canvas

import numpy as np

DRAWN_METRICS = 6  # beside the main one and the loss; a client may send any number
MARKED_ROUNDS = 25  # with more, markers run into each other
MARKED_CLIENTS = 8
MARKED_CLASSES = 12  # with more, numbers no longer fit into their cells
NAMED_CLASSES = 40  # with more, names no longer fit beside each other


def metrics(history: History, baseline: Baseline | None, theme: Theme) -> bytes:
    """Every metric by round: the federation, its clients, and, where there is one, the baseline."""
    from matplotlib.ticker import MaxNLocator

    png = io.BytesIO()
    metric = history.main
    others = sorted(set(history.metric_names()) - {metric.name, LOSS.name})
    names = [metric.name, *others[:DRAWN_METRICS], *([LOSS.name] if metric.name != LOSS.name else [])]
    with canvas(theme, 2.6 + 1.8 * len(names), png) as figure:
        axes = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=[3, *[2] * (len(names) - 1)])[
            :, 0
        ]
        records = history.scored()
        marker = {"markersize": 6 if len(records) <= MARKED_ROUNDS else 0, "linewidth": 2}
        main = axes[0]
        curves = [
            [(record.position, record.by_client.get(metric.name, {}).get(partition, np.nan)) for record in records]
            for partition in _partitions(history)
        ]
        _draw_clients(main, curves, theme.federated, "federated, on each client's share")
        for each, name in zip(axes, names, strict=True):
            if baseline:
                curves = [list(zip(*_curve(one.rounds, name), strict=True)) for one in baseline.alone]
                _draw_clients(each, curves, theme.alone, "each client alone")
                mean = _curve(baseline.mean_alone().rounds, name)
                each.plot(*mean, "^:", color=theme.alone, label="clients alone, mean", **marker)
                curve = _curve(baseline.centralised.rounds, name)
                each.plot(*curve, "s--", color=theme.centralised, label="centralised", **marker)
            each.plot(*_curve(records, name), "o-", color=theme.federated, label="federated", **marker)
            each.grid(axis="y")
            each.margins(x=0.03)
            how = "all test examples" if history.metric(name).additive else "mean over the clients"
            each.set(ylabel=f"{name}, {how}")
        classes = history.config.get("classes") or []
        chance = 1 / len(classes) if metric.chance is None and metric == ACCURACY and classes else metric.chance
        if chance is not None:
            main.axhline(chance, color=theme.ink, linestyle=(0, (1, 3)), linewidth=1.2, label="chance")
        scores = [record.main() or 0 for record in records]
        low, high = metric.lowest, metric.highest
        if low is not None and high is not None and all(low <= value <= high for value in scores):
            main.set(ylim=(low, high))
            main.set_yticks(np.linspace(low, high, 6), minor=False)
        axes[-1].set(xlabel="server round")
        if all(record.metrics.get(LOSS.name, 0) >= 0 for record in records):
            axes[names.index(LOSS.name)].set_ylim(0, None)
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = main.get_legend_handles_labels()
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
            words = [f"{history.name_of(client)}\n{sum(counts[client]):,}" for client in clients]
            axes.set_xticks(range(len(clients)), words, fontsize=11 if len(clients) <= 5 else 9)
        axes.set_xlabel("client, and its training examples in all" if few else "client")
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
    rows, columns = (np.arange(size + 1) - 0.5 for size in shades.shape)
    between = 1.2 if numbers else 0  # of a thousand columns, lines would leave nothing
    axes.pcolormesh(columns, rows, colours, edgecolors=theme.paper, linewidth=between)  # imshow takes 34 MB to draw it
    axes.invert_yaxis()
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


def _curve(records: list[RoundRecord], name: str) -> tuple[list[float], list[float]]:
    return [record.position for record in records], [record.metrics.get(name, np.nan) for record in records]


def _draw_clients(axes, curves: list[list[tuple[float, float]]], colour: str, label: str) -> None:
    """A thin line for each, drawn as one: a thousand of their own take a second, and 16 MB."""
    from matplotlib.collections import LineCollection

    if curves:
        axes.add_collection(LineCollection(curves, colors=colour, label=label, linewidth=0.9, alpha=0.75))


def _partitions(history: History) -> list[str]:
    """Every client that ever evaluated, by number."""
    return sorted({p for record in history.rounds for p in record.by_client.get(history.main.name, {})}, key=int)

"""The look of the pictures, for a light and for a dark page; Okabe and Ito's colour-blind safe colours."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIDTH = 5.2  # inches: the type is then still readable where a phone shrinks the picture to its own width


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
    style: Any = {**colours, **ours}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script the font lacks
        figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
        yield figure
        FigureCanvasAgg(figure).print_png(png)  # savefig would draw everything twice

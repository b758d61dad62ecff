"""A run as one self-contained web page: style and pictures inside, no script, for phones and for the dark."""

import base64
import time
from collections.abc import Iterable, Sequence
from html import escape

from federation.results.comparison import Baseline, comparison, verdict
from federation.results.history import COSINE, MEMBERS, STEP_SIZE, History, RoundRecord
from federation.results.privacy import EPSILON_MEANS, spent_in_words, who_learns_what
from federation.results.tables import all_cells, remarks, score

# The policy holds the page to its word: whatever text came in from a client, nothing is run or fetched.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>TITLE</title>
<style>
:root { --paper: #ffffff; --ink: #1c1c1e; --soft: #5c5f66; --line: #dcdce0; --stripe: #f5f6f8; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --ink: #ececee; --soft: #a4a7ae; --line: #34373d; --stripe: #1c1f24; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 3rem; max-width: 44rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .5rem 0; }
b { color: var(--mark); }
figure { margin: .5rem 0; }
img { display: block; width: 100%; max-width: 36rem; height: auto; }
figcaption, .note { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .4rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
tbody tr:nth-child(even) { background: var(--stripe); }
@media (max-width: 30rem) { table { font-size: .78rem; } th, td { padding: .3rem .25rem; } }
.number { text-align: right; }
td.number { white-space: nowrap; }
</style>
</head>
<body>
"""
CAPTIONS = {
    "accuracy": "The global model's metrics by server round.",
    "partitions": "Training examples by client and class; the stronger the colour, the more.",
    "predictions": "Test images, as was asked for, with what the model takes them for; a cross marks its mistakes.",
    "confusion": "The final model on all test examples: rows are what they are, columns what it takes them for.",
}
TITLES = {"partitions": "Who holds what", "predictions": "Predictions", "confusion": "What it confuses"}
LISTED_CLIENTS = 12  # of more, the table of steps names the extremes
STEPS = (
    "The L2 norm of what each client's update changed and, in brackets, its cosine to the mean of the others' changes: "
    "a client far from the others has other data, or another intention."
)
NO_SETTINGS = (
    "provenance",
    "software",
    "again",
    "statistics",
    "classes",
    "class_counts",
    "input_shape",
    "task",
    "own",
    "columns",
    MEMBERS,
)
RELOAD_SECONDS = 3
SECURE_STEPS = (
    "With secure aggregation nobody but the client itself knows how far its update moved the model, and in which "
    "direction. "
    "What is checked is the sum: most clients must be able to evaluate the model that it makes."
)
LISTED_EVENTS = 200  # a server that ran for months lists its newest


def run_page(
    name: str,
    history: History,
    baseline: Baseline | None,
    shown: dict[str, tuple[bytes, bytes]],
    reload: bool = False,
) -> str:
    """The report on a run; `shown` holds its pictures by name, each for a light and for a dark page.

    reload: whether the run goes on, so that the page shall be read again every few seconds.
    """
    config, last, main = history.config, (history.scored() or history.rounds)[-1], history.main
    drawn = {key: picture(*pair, CAPTIONS[key]) for key, pair in shown.items()}
    body = [
        f"<h1>Federated run {escape(name)}</h1>",
        f"<p>{escape(main.name.capitalize())} <b>{score(last.main(), main)}</b> on all test examples after round "
        f"{last.position:g} of {config['rounds']}, "
        f"by {config['clients']} clients.</p>",
        drawn.get("accuracy", ""),
    ]
    if baseline:
        body += ["<h2>With and without federation</h2>", f"<p>{escape(verdict(history, baseline))}</p>"]
        body += [table(comparison(history, baseline)), f'<p class="note">{escape(baseline.about_times())}</p>']
    body += [f"<h2>{last.unit.capitalize()}s</h2>", table(all_cells(history))]
    body += [f'<p class="note">{escape(line)}</p>' for line in remarks(history)]
    for key, title in TITLES.items():
        if key in drawn:
            body += [f"<h2>{title}</h2>", drawn[key]]
    if config.get("secure_aggregation"):
        body += ["<h2>Steps</h2>", f"<p>{SECURE_STEPS}</p>"]
    elif any(record.by_client.get(STEP_SIZE) for record in history.rounds):
        body += ["<h2>Steps</h2>", f"<p>{STEPS}</p>", table(_steps(history))]
    body += ["<h2>Who learns what</h2>", table(who_learns_what(config), words=(0, 1, 2, 3))]
    if config.get("private_training"):
        body += [f"<p>{escape(spent_in_words(history))}</p>", f'<p class="note">{escape(EPSILON_MEANS)}</p>']
    body += ["<h2>Rejected updates</h2>", _rejected(history), "<h2>Joins and leaves</h2>", _events(history)]
    settings = {key.replace("_", " "): value for key, value in config.items() if key not in NO_SETTINGS}
    settings |= {f"set {key}": value for key, value in (config.get("own") or {}).items()}
    cells = [[key, "off" if value is None else str(value)] for key, value in settings.items()]
    classes = ", ".join(config.get("classes", []))
    body += ["<h2>Configuration</h2>", table([["setting", "value"], *cells, ["classes", classes]], words=(0, 1))]
    return page(f"Federated run {name}", body, reload)


def _steps(history: History) -> list[list[str]]:
    """The size of each client's step by round, and its cosine; of many clients and rounds the newest and the widest."""
    records = [record for record in history.rounds if record.by_client.get(STEP_SIZE)][-LISTED_EVENTS:]
    clients = sorted({p for record in records for p in record.by_client[STEP_SIZE]}, key=int)
    if len(clients) > LISTED_CLIENTS:
        rows = []
        for record in records:
            sizes, cosines = record.by_client[STEP_SIZE], record.by_client.get(COSINE, {})
            widest = max(sizes, key=lambda p: sizes[p])
            apart = min(cosines, key=lambda p: cosines[p], default=None)
            odd = "–" if apart is None else f"{cosines[apart]:.2f} ({history.title_of(apart)})"
            rows.append([str(record.round), f"{sizes[widest]:.3g} ({history.title_of(widest)})", odd])
        return [["round", "largest step", "lowest cosine"], *rows]
    rows = [[str(record.round), *(_step(record, p) for p in clients)] for record in records]
    return [["round", *map(history.title_of, clients)], *rows]


def _step(record: RoundRecord, partition: str) -> str:
    size, cosine = (record.by_client.get(name, {}).get(partition) for name in (STEP_SIZE, COSINE))
    return "–" if size is None else f"{size:.3g}" + (f" ({cosine:.2f})" if cosine is not None else "")


def _rejected(history: History) -> str:
    if not history.rejected:
        return "<p>None: every update that came in was fit to count.</p>"
    rows = [
        [str(one["round"]), history.name_of(one["partition"]), one["reason"]]
        for one in history.rejected[-LISTED_EVENTS:]
    ]
    return table([["round", "client", "reason"], *rows], words=(2,))


def _events(history: History) -> str:
    if not history.events:
        return "<p>None.</p>"
    newest = history.events[-LISTED_EVENTS:]
    first = time.gmtime(newest[0]["time"])
    rows = [[time.strftime("%H:%M:%S", time.gmtime(event["time"])), event["words"]] for event in newest]
    return table([["UTC", f"from {time.strftime('%Y-%m-%d', first)} on"], *rows], words=(0, 1))


def page(title: str, body: Iterable[str], reload: bool = False) -> str:
    again = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">\n' if reload else ""
    return (
        HEAD.replace("TITLE", escape(title)).replace("<title>", f"{again}<title>")
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def picture(light: bytes, dark: bytes, caption: str) -> str:
    """A PNG in two versions; the browser takes the one that fits the reader's colour scheme."""
    source, img = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (dark, light))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{source}">'
        f'<img src="{img}" alt="{escape(caption)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


def table(cells: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """Cells of text, the first row being the head; the columns at the positions in `words` are no numbers."""
    kinds = ["" if column in words else ' class="number"' for column in range(len(cells[0]))]
    head = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for cell, kind in zip(cells[0], kinds, strict=True))
    rows = (
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in cells[1:]
    )
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'

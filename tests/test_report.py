"""Tables, pictures and the page: numbers add up, nothing is fetched, and a real browser shows it all."""

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

from federation.config import ACCURACY, LOSS, Metric
from federation.results import html as html_page
from federation.results import plots, report, tables
from federation.results.comparison import Baseline, Training, comparison, verdict
from federation.results.history import History, RoundRecord, VersionRecord
from federation.results.observers import Observers
from federation.results.run_folder import RunFolder
from federation.results.tables import Table, in_columns, size, table
from federation.results.tensorboard import TensorBoard
from federation.results.theme import DARK, LIGHT
from federation.server.admission import Admission

import numpy as np
import pytest
from helpers.example_runs import CLASSES, RECIPE, call, make_baseline, make_history
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</p><script>document.title = 'evil'</script><img src=https://evil.example/x.png>"


def found(number: int = 25) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    answers = {"truth": rng.integers(0, 3, number), "prediction": rng.integers(0, 3, number)}
    images = rng.integers(0, 256, (number, 3, 32, 32), np.uint8)
    return {"images": images, "confusion": rng.integers(0, 9, (3, 3)), **answers}


@pytest.fixture
def folder(tmp_path):
    """A run folder with all that the report can draw, and words from a hostile client."""
    history = make_history()
    history.config["class_counts"] = {"0": [24, 0, 1], "1": [0, 24, 23]}
    history.rejected.append({"round": 1, "partition": 1, "reason": EVIL})
    history.events.append({"time": 1e9 + 1, "event": "refuse", "partition": None, "words": EVIL})
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.save_history(history)
    (folder.path / "baseline.json").write_text(make_baseline(history).to_json())
    np.savez(folder.path / "predictions.npz", **found())
    return folder


# Tables


def test_the_comparison_has_a_row_a_round_and_a_column_for_everybody():
    history = make_history()
    assert comparison(history, make_baseline(history)) == [
        ["round", "federated", "centralised", "alone, mean", "client 0", "client 1"],
        ["0", "0.5000", "0.9000", "0.5500", "0.5000", "0.6000"],
        ["1", "0.7500", "0.9000", "0.5500", "0.5000", "0.6000"],
        ["2", "1.0000", "0.9000", "0.5500", "0.5000", "0.6000"],
        ["examples", "48", "48", "24", "24", "24"],
        ["seconds", "3.0", "2.0", "1.0", "1.0", "1.0"],  # round 0 only evaluates
    ]


def test_a_comparison_of_many_clients_names_the_worst_and_the_best():
    history = make_history(clients=9)
    cells = comparison(history, make_baseline(history))
    assert cells[0] == ["round", "federated", "centralised", "alone, mean", "worst: 0", "best: 8"]
    assert cells[3][3:] == ["0.9000", "0.5000", "1.3000"]


def test_a_run_that_went_on_after_its_comparison_leaves_gaps():
    history = make_history()
    baseline = make_baseline(history)
    history.rounds.append(dataclasses.replace(history.rounds[-1], round=3))
    assert comparison(history, baseline)[4] == ["3", "1.0000", "–", "–", "–", "–"]


def test_the_mean_alone_counts_clients_not_examples():
    alone = [
        Training(examples, [RoundRecord(0, {"accuracy": accuracy, "loss": 1.0}, seconds=2.0)])
        for examples, accuracy in ((1, 0.0), (3, 1.0))
    ]
    mean = Baseline(1, 1, "cpu", alone[0], alone).mean_alone()
    assert mean == Training(2.0, [RoundRecord(0, {"accuracy": 0.5, "loss": 1.0}, seconds=2.0)])


def test_the_verdict_says_above_and_below():
    history = make_history()
    words = verdict(history, make_baseline(history))
    assert "1.0000: 0.4500 above the mean of the clients alone, 0.1000 above centralised" in words
    history.rounds[-1].metrics["accuracy"] = 0.5
    assert "0.0500 below the mean of the clients alone, 0.4000 below centralised" in verdict(
        history, make_baseline(make_history())
    )


def test_columns_are_as_wide_as_their_widest_cell():
    assert in_columns([["a", "bcd"], ["12", "3"]]) == " a  bcd\n12    3"


def test_sizes_are_in_powers_of_1000():
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 5e9)] == ["0 B", "999 B", "1.0 kB", "1.2 MB", "5.0 GB"]


def test_a_table_has_a_column_for_every_metric_and_says_its_head_again_when_one_is_new():
    rows = [RoundRecord(0, {"loss": 2.5, "accuracy": 0.25}), RoundRecord(1, {"f1": 7.0, "accuracy": 0.5, "loss": 1.0})]
    history = History({}, rows)
    assert table(history).splitlines() == [
        "round  clients  accuracy    loss        f1  seconds   received",
        "    0        0    0.2500   2.500         –      0.0        0 B",
        "    1        0    0.5000   1.000    7.0000      0.0        0 B",
    ]
    lines = Table(history)
    assert lines.lines(rows[0]) == [
        "round  clients  accuracy    loss  seconds   received",
        "    0        0    0.2500   2.500      0.0        0 B",
    ]
    assert lines.lines(rows[1]) == [table(history).splitlines()[0], table(history).splitlines()[2]]


def test_a_version_names_the_clients_whose_updates_made_it():
    updates = [{"partition": 2, "staleness": 0}, {"partition": 0, "staleness": 3}]
    assert table(History({}, [VersionRecord(1, {}, updates=updates, time=2.5)])).splitlines() == [
        "version    clients  staleness  accuracy    loss  at second   received",
        "      1       2, 0       0, 3         –       –        2.5        0 B",
    ]


def with_f1(history):
    for record in history.rounds:
        record.metrics["f1"] = -2.5 - record.round
    return history


@pytest.mark.slow
def test_another_metric_reaches_comparison_page_and_pictures():
    history = with_f1(make_history())
    baseline = make_baseline(history)
    assert comparison(history, baseline, "f1")[3] == ["2", "-4.5000", *["-4.5000"] * 4]
    drawn = plots.metrics(history, baseline, LIGHT)
    assert shape(drawn)[1] > shape(plots.metrics(make_history(), None, LIGHT))[1]
    page = html_page.run_page("r", history, baseline, {"accuracy": (b"", b"")})
    assert '<th scope="col" class="number">f1</th>' in page
    assert '<td class="number">-4.5000</td>' in page


@pytest.mark.slow
def test_a_metric_that_the_baseline_does_not_have_yet_is_drawn_and_compared_without_it():
    for clients in (2, 9):
        history = make_history(clients=clients)
        baseline = make_baseline(history)
        with_f1(history)
        assert comparison(history, baseline, "f1")[3][:4] == ["2", "-4.5000", "–", "–"]
        shape(plots.metrics(history, baseline, LIGHT))


def test_another_metric_of_the_asynchronous_mode_is_drawn_where_it_is_known():
    history, updates = make_history(), [{"partition": 0, "staleness": 0}]
    versions = [VersionRecord(i, {"accuracy": 0.5, "loss": 1.0, "f1": 7.0}, updates=updates, time=i) for i in range(3)]
    versions[1].metrics = {}
    history.rounds = versions
    history = History.from_json(history.to_json())
    assert table(history).splitlines()[1:] == [
        "      0          0          0    0.5000   1.000    7.0000        0.0        0 B",
        "      1          0          0         –       –         –        1.0        0 B",
        "      2          0          0    0.5000   1.000    7.0000        2.0        0 B",
    ]
    shape(plots.metrics(history, None, LIGHT))
    assert "7.0000" in html_page.run_page("r", history, None, {"accuracy": (b"", b"")})


def test_the_page_shows_every_clients_step_and_its_cosine():
    history = make_history()
    history.rounds[1].by_client |= {"step_size": {"0": 1.25, "1": 40.0}, "cosine": {"0": 0.5}}
    page = html_page.run_page("r", history, None, {"accuracy": (b"", b"")})
    assert "<h2>Steps</h2>" in page
    assert '<td class="number">1.25 (0.50)</td><td class="number">40</td>' in page
    many = {str(p): float(p) for p in range(20)}
    history.rounds[1].by_client |= {"step_size": many, "cosine": {"3": -0.5, "4": 0.9}}
    page = html_page.run_page("r", history, None, {"accuracy": (b"", b"")})
    assert '<td class="number">19 (client 19)</td><td class="number">-0.50 (client 3)</td>' in page


# Another main metric

MAE = Metric("mae", higher_is_better=False, lowest=0, digits=1)
R2 = Metric("r2", highest=1, digits=3, additive=False)


def of_regression(clients: int = 2, declared: tuple[Metric, ...] = (MAE, R2)) -> History:
    """Mean absolute errors of 40, 20 and 10; no classes."""
    history = make_history(clients=clients)
    history.config |= {"task": {"metrics": [dataclasses.asdict(metric) for metric in declared]}, "classes": []}
    for record in history.rounds:
        error = 40 / 2**record.round
        record.metrics = {"mae": error, "r2": -0.5 + record.round / 2, "loss": error / 10}
        record.by_client = {"mae": {str(p): error + p for p in range(clients)}}
    return History.from_json(history.to_json())


def baseline_of(history: History) -> Baseline:
    """Errors of 5 centralised, and of 30 + p of client p alone."""
    baseline = make_baseline(history)
    for one in (baseline.centralised, *baseline.alone):
        for record in one.rounds:
            del record.metrics["accuracy"]
            record.metrics["mae"] = 5.0 if one.partition is None else 30.0 + one.partition
    return baseline


def test_without_a_word_from_the_task_accuracy_is_the_main_metric_and_of_others_nothing_is_known():
    history = with_f1(make_history())
    assert history.declared == [history.main] == [ACCURACY]
    assert history.metric("f1") == Metric("f1")
    assert history.metric("loss") == LOSS
    assert history.averaged() == []
    assert [record.main() for record in history.rounds] == [0.5, 0.75, 1.0]


def test_the_tasks_first_metric_is_the_main_one_after_the_file_too():
    history = of_regression()
    assert history.main == MAE
    assert history.declared == [MAE, R2]
    assert history.metric("r2") == R2
    assert history.metric_names() == ["mae", "loss", "r2"]
    assert history.averaged() == ["r2"]
    assert [record.main() for record in history.rounds] == [40, 20, 10]
    assert list(history.rounds[0].to_json())[:4] == ["round", "mae", "loss", "r2"]
    assert "accuracy" not in history.to_json()


def test_a_task_may_say_more_of_its_loss_or_have_it_for_its_main_metric():
    loss = Metric("loss", higher_is_better=False, digits=1)
    history = of_regression(declared=(MAE, loss))
    assert history.metric("loss") == loss
    history = of_regression(declared=(loss,))
    assert [record.main() for record in history.rounds] == [4, 2, 1]
    assert history.metric_names() == ["loss", "mae", "r2"]
    shape(plots.metrics(history, None, LIGHT))


def test_a_table_has_a_metrics_own_digits_and_says_below_what_is_no_plain_mean():
    assert table(of_regression()).splitlines() == [
        "round  clients       mae    loss        r2  seconds   received",
        "    0        2      40.0   4.000    -0.500      0.0        0 B",
        "    1        2      20.0   2.000     0.000      1.0     1.0 kB",
        "    2        2      10.0   1.000     0.500      2.0     2.0 kB",
        "r2: the mean over the clients, not the value on all test examples together",
    ]


def test_a_remark_names_every_metric_that_is_no_plain_mean_and_only_those_that_came():
    auc = Metric("auc", additive=False)
    assert tables.remarks(of_regression(declared=(MAE, auc))) == []
    history = of_regression(declared=(MAE, R2, auc))
    history.rounds[-1].metrics["auc"] = 0.5
    words = "auc, r2: the mean over the clients, not the value on all test examples together"
    assert tables.remarks(history) == [words]
    assert table(history).splitlines()[-1] == words
    assert words in html_page.run_page("r", history, None, {"accuracy": (b"", b"")})


def test_where_less_is_better_the_worst_client_has_the_most():
    history = of_regression(clients=9)
    cells = comparison(history, baseline_of(history))
    assert cells[0] == ["round", "federated", "centralised", "alone, mean", "worst: 8", "best: 0"]
    assert cells[3] == ["2", "10.0", "5.0", "34.0", "38.0", "30.0"]


def test_the_verdict_is_about_the_main_metric():
    history = of_regression()
    words = "Federated mae is 10.0 (lower is better): 20.5 below the mean of the clients alone, 5.0 above centralised"
    assert verdict(history, baseline_of(history)).startswith(words)


@pytest.fixture
def figures(monkeypatch):
    """Those that are drawn."""
    drawn, real = [], plots.canvas

    @contextlib.contextmanager
    def canvas(*about):
        with real(*about) as figure:
            yield figure
            drawn.append(figure)

    monkeypatch.setattr(plots, "canvas", canvas)
    return drawn


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_picture_of_another_main_metric_begins_with_it_and_its_clients(figures):
    history = of_regression()
    shape(plots.metrics(history, baseline_of(history), LIGHT))
    (figure,) = figures
    assert [axes.get_ylabel().partition(",")[0] for axes in figure.axes] == ["mae", "r2", "loss"]
    assert "federated, on each client's share" in legend(figure)
    curves = {
        each.get_label(): [curve[:, 1].tolist() for curve in each.get_segments()] for each in figure.axes[0].collections
    }
    assert curves == {
        "federated, on each client's share": [[40, 20, 10], [41, 21, 11]],
        "each client alone": [[30, 30, 30], [31, 31, 31]],
    }
    assert "chance" not in legend(figure), "nobody says what guessing reaches"


def test_the_ends_of_a_metrics_range_and_what_chance_reaches_are_drawn(figures):
    auc = Metric("auc", lowest=0, highest=1, chance=0.5)
    history = of_regression(declared=(auc,))
    for record in history.rounds:
        record.metrics["auc"] = 0.9
    shape(plots.metrics(history, None, LIGHT))
    main = figures[0].axes[0]
    assert main.get_ylim() == (0, 1)
    (chance,) = [line for line in main.lines if line.get_label() == "chance"]
    assert list(chance.get_ydata()) == [0.5, 0.5]


@pytest.mark.slow
def test_chance_is_worked_out_for_accuracy_alone_and_only_where_there_are_classes(figures):
    for classes, heights in ((["a", "b", "c", "d"], [0.25]), ([], [])):
        history = make_history()
        history.config["classes"] = classes
        shape(plots.metrics(history, None, LIGHT))
        drawn = [line.get_ydata()[0] for line in figures[-1].axes[0].lines if line.get_label() == "chance"]
        assert drawn == heights


@pytest.mark.slow
def test_a_curve_below_0_is_seen_whole_and_only_the_losses_axis_begins_at_0(figures):
    loss = Metric("loss", higher_is_better=False, digits=1)
    for declared in ((MAE, R2), (loss, R2)):
        shape(plots.metrics(of_regression(declared=declared), None, LIGHT))
        axes = {each.get_ylabel().partition(",")[0]: each for each in figures[-1].axes}
        assert axes["r2"].get_ylim()[0] < -0.5
        assert axes["loss"].get_ylim()[0] == 0


@pytest.mark.slow
def test_a_run_without_classes_has_a_page_and_no_picture_of_who_holds_what(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    history = of_regression()
    history.config["class_counts"] = {}
    folder.save_history(history)
    assert [path.name for path in report.write(folder, show_images=True)] == ["accuracy.png", "report.html"]
    page = (folder.path / "report.html").read_text()
    assert '<td class="number">10.0</td>' in page
    assert "accuracy" not in re.sub(r'"data:image/png;base64,[^"]*"', '"png"', page).lower()


# Observers


class Recorder:
    def __init__(self, raises: str = ""):
        self.raises, self.told = raises, []

    def _tell(self, what: str, value: object) -> None:
        self.told.append((what, value))
        if what == self.raises:
            raise RuntimeError("no tracking\nserver")

    def begin(self, history):
        self._tell("begin", history.config["clients"])

    def round(self, record):
        self._tell("round", record.round)

    def end(self, exit_code):
        self._tell("end", exit_code)


def test_every_observer_is_told_and_one_that_raises_is_left_out_from_then_on(capsys):
    good, bad, worst = Recorder(), Recorder(raises="round"), Recorder(raises="begin")
    observers, history = Observers([bad, worst, good]), make_history()
    observers.begin(history)
    for record in history.rounds:
        observers.round(record)
    observers.end(0)
    assert good.told == [("begin", 2), ("round", 0), ("round", 1), ("round", 2), ("end", 0)]
    assert bad.told == [("begin", 2), ("round", 0)]
    assert worst.told == [("begin", 2)]
    words = "Recorder failed (RuntimeError: no tracking server); the run goes on without it\n"
    assert capsys.readouterr().out == 2 * words


def test_an_observer_that_is_tensorboard_writes_every_metric(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    board = TensorBoard(str(tmp_path))
    written = []
    board._writer = SimpleNamespace(
        add_scalar=lambda *values: written.append(values), flush=lambda: None, close=lambda: None
    )
    board.round(with_f1(make_history()).rounds[1])
    assert ("f1", -3.5, 1) in written
    assert ("accuracy_by_client/1", 0.75, 1) in written


# Pictures


def shape(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        image.verify()
        return image.size


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.slow
def test_every_picture_fits_a_phone_and_a_page(theme):
    history = make_history()
    history.config["class_counts"] = {"0": [24, 0, 1], "1": [0, 24, 23]}
    drawn = [
        plots.metrics(history, make_baseline(history), theme),
        plots.metrics(history, None, theme),
        plots.partitions(history, theme),
        plots.predictions(history, found(), theme),
        plots.confusion(history, found(), theme),
    ]
    for png in drawn:
        width, height = shape(png)
        assert width == 780
        assert 300 <= height <= 1400


@pytest.mark.slow
def test_pictures_hold_many_clients_many_classes_and_any_name():
    names = ["$x^", "{}", "猫", "a" * 90, *map(str, range(100))]
    history = make_history(clients=40, classes=names)
    history.config["class_counts"] = {str(p): list(range(104)) for p in range(40)}
    many = {"images": np.zeros((1, 3, 32, 32), np.uint8), "truth": np.array([0]), "prediction": np.array([3])}
    shape(plots.metrics(history, make_baseline(history), LIGHT))
    shape(plots.partitions(history, LIGHT))
    shape(plots.predictions(history, many, LIGHT))
    shape(plots.confusion(history, {"confusion": np.eye(104, dtype=int)}, LIGHT))


def test_the_shares_of_a_thousand_clients_are_seen_and_not_lines_between_them():
    history = make_history(clients=1000)
    history.config["class_counts"] = {str(p): [3, 3, 3] for p in range(1000)}
    with Image.open(io.BytesIO(plots.partitions(history, LIGHT))) as image:
        colours = image.convert("RGB").getcolors(2**16)
    assert max(colours)[1] != (255, 255, 255)


def test_a_client_that_came_late_has_a_gap_in_its_curve():
    history = make_history()
    del history.rounds[1].by_client["accuracy"]["1"]
    shape(plots.metrics(history, None, LIGHT))


# The page


@pytest.mark.slow
def test_the_page_holds_all_that_happened_and_fetches_nothing(folder):
    names = [path.name for path in report.write(folder, show_images=True)]
    assert names == ["accuracy.png", "partitions.png", "predictions.png", "confusion.png", "report.html"]
    page = (folder.path / "report.html").read_text()
    text = re.sub(r'"data:image/png;base64,[^"]*"', '"png"', page)
    assert text.count('"png"') == 8  # four pictures, for light and for dark
    assert "<script" not in text
    assert re.findall(r"(?:src|srcset|href)=([^ >]*)", text.replace("&lt;img src=", "")) == ['"png"'] * 8
    assert "&lt;script&gt;" in text  # shown as it came, and harmless
    for words in ("0.7500", "fedavg", "client 0 joined", "0.4500 above the mean of the clients alone", *CLASSES):
        assert words in text
    light = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]*)"', page).group(1))
    assert light == (folder.path / "accuracy.png").read_bytes()


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(folder):
    report.write(folder)
    first = (folder.path / "report.html").read_bytes()
    report.write(folder)
    assert (folder.path / "report.html").read_bytes() == first


@pytest.mark.slow
def test_a_damaged_file_is_named_and_left_out(folder, capsys):
    (folder.path / "baseline.json").write_text("{")
    (folder.path / "predictions.npz").write_bytes(b"PK")
    assert call(report.main, folder.path) == 0
    out = capsys.readouterr().out
    assert "baseline.json can't be read; make it again with baseline.py" in out
    assert "predictions.npz can't be read; make it again with evaluate.py" in out
    assert "confusion.png" not in out


def test_a_folder_without_a_run_is_wrong_use(tmp_path, capsys):
    assert call(report.main, tmp_path) == 2
    assert "holds no run" in capsys.readouterr().err
    folder = RunFolder(tmp_path)
    folder.save_history(make_history())
    (tmp_path / "history.json").write_text((tmp_path / "history.json").read_text().replace('"rounds": [', '"rows": ['))
    assert call(report.main, tmp_path) == 2
    assert "holds no run" in capsys.readouterr().err
    empty = make_history()
    empty.rounds.clear()
    folder.save_history(empty)
    assert call(report.main, tmp_path) == 2
    assert "without a single round" in capsys.readouterr().err


PROBE = """addEventListener("load", () => parent.postMessage(JSON.stringify({
  pictures: [...document.images].map(image => image.naturalWidth),
  sources: new Set([...document.images].map(image => image.currentSrc)).size,
  overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
  paper: getComputedStyle(document.body).backgroundColor, title: document.title}), "*"))"""
PHONE = """<!doctype html><meta name="color-scheme" content="light dark">
<script>onmessage = event => { document.title = event.data }</script>
<iframe width="390" height="844" src="probed.html">"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 23, 27)")])
def test_a_browser_shows_the_page_whole_on_a_phone_in_light_and_dark(folder, tmp_path, scheme, paper):
    report.write(folder, show_images=True)
    html = (folder.path / "report.html").read_text()
    # The same page with a script that measures it; the page's own policy lets this one in, and nothing else.
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    html = html.replace("default-src 'none';", f"default-src 'none'; script-src 'sha256-{digest}';")
    (tmp_path / "probed.html").write_text(html.replace("</body>", f"<script>{PROBE}</script></body>"))
    (tmp_path / "phone.html").write_text(PHONE)  # a frame, as a window can't be so narrow
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'}"
    flags += f" --blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    command = [CHROMIUM, *flags.split(), "--virtual-time-budget=9000", "--dump-dom", f"file://{tmp_path}/phone.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    seen = json.loads(re.search("<title>(.*?)</title>", shown).group(1))
    assert seen["title"] == "Federated run run"
    assert seen["pictures"] == [780] * 4
    assert seen["sources"] == 4
    assert seen["width"] == 390
    assert seen["overflow"] <= 0
    assert seen["paper"] == paper


# TensorBoard


def test_tensorboard_gets_every_round(federation, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    server = federation.server("--rounds", 2, "--clients", 2, "--tensorboard", tmp_path / "tb")
    for process in [server, federation.tiny(), federation.tiny()]:
        process.ends(0)
    code = (
        "import sys; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E\n"
        "e = E(sys.argv[1]); e.Reload()\n"
        "print([(t, [s.step for s in e.Tensors(t)]) for t in sorted(e.Tags()['tensors'])])"
    )
    read = subprocess.run([sys.executable, "-c", code, tmp_path / "tb"], capture_output=True, text=True, check=True)
    steps = dict(eval(read.stdout))
    assert steps["accuracy"] == steps["accuracy_by_client/1"] == [0, 1, 2]
    assert steps["train_loss"] == [1, 2]


def test_tensorboard_that_is_not_installed_is_one_line_before_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(SystemExit) as end:
        TensorBoard(str(tmp_path / "tb"))
    assert end.value.code == 1
    assert "pip install tensorboard" in capsys.readouterr().err


# Who holds what


@pytest.mark.parametrize(
    ("counts", "event"),
    [([60, 40], "join"), (None, "join"), ([60, 41], "refuse"), ([100], "refuse"), ([101, -1], "refuse")],
)
def test_class_counts_must_add_up_to_the_declared_examples(counts, event):
    heard, happened = [], threading.Event()

    def notify(kind, partition, words):
        heard.append((kind, words))
        happened.set()

    def answer(ins, timeout, group_id):
        hello = {"protocol": 1, "proof": "", "classes": '["cat", "dog"]', "instance": "1" * 32, "host": "h"}
        if ins.config["ask"] == "hello":
            return SimpleNamespace(properties={**hello, "wanted": -1, "held": -1})
        told = {"class_counts": json.dumps(counts)} if counts else {}
        return SimpleNamespace(properties={"train_examples": 100, "test_examples": 9, "statistics": "[]", **told})

    ended = SimpleNamespace(close=lambda: None)
    client = SimpleNamespace(cid="c", get_properties=answer, reconnect=lambda *a, **k: None, bridge=ended)
    admission = Admission(1, RECIPE, notify)
    admission.register(client)
    assert happened.wait(10)
    assert heard[0][0] == event, heard
    if event == "join":
        assert admission.ready()[0].class_counts == (counts or [])


@pytest.mark.slow
def test_of_a_flood_of_metrics_the_first_few_are_drawn():
    history = make_history()
    for i in range(200):
        history.rounds[1].metrics[f"m{i}"] = 1.0
    _, height = shape(plots.metrics(history, None, LIGHT))
    assert height <= 2700

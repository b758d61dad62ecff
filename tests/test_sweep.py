"""Runs one after another over a grid: which, in which folders, and what is said of them at the end."""

import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from federation.operations import sweep
from federation.operations.sweep import SweepError, name_of, read_grid, without
from federation.results.run_folder import RunFolder

import pytest
from helpers.example_runs import make_history


def written(folder: Path, text: str) -> str:
    (folder / "grid.toml").write_text(text)
    return str(folder / "grid.toml")


def test_the_grid_is_every_value_with_every_other_the_last_changing_first(tmp_path):
    path = written(tmp_path, 'strategy = ["fedavg", "fedadam"]\nseed = [0, 1]')
    assert read_grid(path) == [
        {"strategy": "fedavg", "seed": 0},
        {"strategy": "fedavg", "seed": 1},
        {"strategy": "fedadam", "seed": 0},
        {"strategy": "fedadam", "seed": 1},
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no setting; write for instance seed = [0, 1, 2]"),
        ("seed = 1", "seed must be a list of values, such as [0, 1, 2], got 1"),
        ("seed = []", "seed must be a list of values, such as [0, 1, 2], got []"),
        ("seed = [[1]]", "seed must hold numbers and words, got [[1]]"),
        ("seed = [1, 1]", "seed has a value twice: [1, 1]"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(text, words, tmp_path):
    with pytest.raises(SweepError) as error:
        read_grid(written(tmp_path, text))
    assert str(error.value) == words


def test_a_run_has_its_values_in_its_folders_name_and_nothing_that_a_path_could_not_hold():
    assert name_of({"learning-rate": 0.1, "set": "a/b=c d"}) == "learning-rate=0.1,set=a_b=c_d"


def test_the_common_flags_are_those_of_the_command_line_but_the_sweeps_own():
    argv = ["--sweep", "s.toml", "--rounds", "3", "--run-dir=x", "--insecure"]
    assert without(("--sweep", "--run-dir"), argv) == ["--rounds", "3", "--insecure"]


# All of it, with servers that end as they are told


def args(folder: Path, text: str, **more: object) -> SimpleNamespace:
    return SimpleNamespace(sweep=written(folder, text), run_dir=str(folder / "runs"), resume=None, **more)


def run(
    monkeypatch, given: SimpleNamespace, *codes: int, argv: tuple = ("--rounds", "2")
) -> tuple[int, list[list[str]]]:
    """The sweep's exit code, and the flags of the servers, which end with these codes."""
    asked: list[list[str]] = []
    left = iter(codes)

    def run_server(flags: list[str]) -> int:
        asked.append(list(flags))
        folder = RunFolder(Path(flags[-1]))
        folder.path.mkdir(parents=True, exist_ok=True)
        history = make_history()
        history.config["seed"] = int(re.findall(r"--seed=(\d+)", " ".join(flags))[0])
        folder.save_history(history)
        code = next(left)
        if not code:
            (folder.path / "model.safetensors").write_bytes(b"")
        return code

    monkeypatch.setattr(sweep, "run_server", run_server)
    with pytest.raises(SystemExit) as end:
        sweep.sweep(given, argv)
    return end.value.code, asked


def test_every_run_has_a_folder_of_its_own_and_a_table_and_a_picture_come_at_the_end(tmp_path, monkeypatch, capsys):
    given = args(tmp_path, "learning-rate = [0.1, 0.2]\nseed = [0, 1]")
    code, asked = run(monkeypatch, given, 0, 0, 0, 0, argv=("--rounds", "2"))
    assert code == 0
    folder = tmp_path / "runs/learning-rate=0.1,seed=0"
    assert asked[0] == ["--rounds", "2", "--learning-rate=0.1", "--seed=0", "--run-dir", str(folder)]
    assert len({flags[-1] for flags in asked}) == 4
    said = capsys.readouterr().out
    assert "run 1 of 4: learning-rate 0.1, seed 0\n" in said
    last = f"{make_history().rounds[-1].metrics['accuracy']:.4f}"
    assert re.search(rf"learning-rate 0.1 +2 +{last} +{last} +{last}", said)
    assert [row["settings"]["seed"] for row in json.loads((tmp_path / "runs/sweep.json").read_text())] == [0, 1, 0, 1]
    assert (tmp_path / "runs/sweep.png").read_bytes()[1:4] == b"PNG"


def test_a_sweep_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    given = args(tmp_path, "seed = [0, 1, 2]")
    code, asked = run(monkeypatch, given, 0, 130)
    assert (code, len(asked)) == (130, 2)
    assert "run 2 of 3 (seed 1) ended with exit code 130; go on with: " in capsys.readouterr().err
    code, asked = run(monkeypatch, given, 0, 0)
    assert code == 0
    assert [flags[-2:] for flags in asked] == [
        ["--resume", f"{tmp_path}/runs/seed=1"],
        ["--run-dir", f"{tmp_path}/runs/seed=2"],
    ]
    assert "run 1 of 3 (seed 0) is done already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = [0, -1]", "--seed must be between 0 and 4294967295, got -1"),
        ('strategy = ["fedbest"]', "--strategy must be one of"),
        ("nonsense = [1]", "unrecognized arguments: --nonsense=1"),
        ("seed = 0", "seed must be a list of values"),
    ],
)
def test_wrong_use_shows_before_the_first_run(text, words, tmp_path, monkeypatch, capsys):
    code, asked = run(monkeypatch, args(tmp_path, text))
    assert (code, asked) == (2, [])
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1


def test_a_server_gets_the_signals_that_the_sweep_gets_and_its_end_is_the_sweeps(tmp_path, monkeypatch):
    script = tmp_path / "server.py"
    script.write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: os._exit(130))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script)])
    before = signal.getsignal(signal.SIGINT)
    assert sweep.run_server([]) == 130
    assert signal.getsignal(signal.SIGINT) is before

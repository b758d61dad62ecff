"""Runs one after another over a grid: which, in which folders, and what is said of them at the end."""

import json
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from federation.config import Recipe
from federation.operations import sweep, sweep_results
from federation.operations.sweep import name_of, read_grid
from federation.results.run_folder import RunFolder
from federation.server.options import parse_args

import pytest
from helpers.example_runs import make_history
from helpers.processes import Federation


def written(folder: Path, text: str) -> str:
    (folder / "grid.toml").write_text(text)
    return str(folder / "grid.toml")


# The file


def test_the_grid_is_every_value_with_every_other_the_last_changing_first(tmp_path):
    path = written(tmp_path, 'strategy = ["fedavg", "fedadam"]\nseed = [0, 1]')
    assert read_grid(path) == [
        {"strategy": "fedavg", "seed": 0},
        {"strategy": "fedavg", "seed": 1},
        {"strategy": "fedadam", "seed": 0},
        {"strategy": "fedadam", "seed": 1},
    ]


def test_a_run_has_its_values_in_its_folders_name():
    assert name_of({"learning-rate": 0.1, "seed": 2}) == "learning-rate=0.1,seed=2"


def test_values_that_no_path_can_hold_are_folders_of_their_own_all_the_same():
    names = [name_of({"set": each}) for each in ("a=b/c", "a=b_c", "a=b c", "a=" + 300 * "x", "a=" + 301 * "x")]
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"set=a=[\w.-]+", name) and len(name) < 100 for name in names)


def args(folder: Path, text: str, *more: str) -> tuple[SimpleNamespace, list[str]]:
    """As server.py has them, and its command line."""
    argv = ["--sweep", written(folder, text), "--run-dir", str(folder / "runs"), *more]
    return parse_args(None, argv), argv


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it names no setting; write for instance seed = [0, 1, 2]"),
        ("seed = 1", "seed must be a list of values, such as [0, 1, 2], got '1'"),
        ("seed = []", "seed must be a list of values, such as [0, 1, 2], got '[]'"),
        ("seed = [[1]]", "seed must hold numbers, words, or true and false, got [[1]]"),
        ("seed = [1, 1]", "seed has a value twice: [1, 1]"),
        ("learning_rate = [1]", "learning_rate is no setting of a run; did you mean learning-rate?"),
        ("insecure = [true]", "insecure is no setting of a run; python server.py --help lists them"),
        ("seed = [1", "(at end of document)"),
        ("rounds = [1, 2]", "--rounds 3 is on the command line, too; leave one of them out"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_with_its_name(text, words, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *args(tmp_path, text, "--rounds", "3")) == (2, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: --sweep {tmp_path}/grid.toml: " in line
    assert line.endswith(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = [0, -1]", "--seed must be between 0 and 4294967295, got -1"),
        ('strategy = ["fedbest"]', "--strategy must be one of"),
        ('learning-rate = ["fast"]', "argument --learning-rate: invalid float value: 'fast'"),
        ("server-momentum = [0.5]", "--server-momentum is for --strategy fedavgm; give both or none"),
    ],
)
def test_a_value_that_no_run_can_have_shows_before_the_first_run(text, words, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *args(tmp_path, text)) == (2, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_file_that_is_not_there_is_wrong_use(tmp_path, monkeypatch, capsys):
    given, argv = args(tmp_path, "seed = [0]")
    Path(given.sweep).unlink()
    assert run(monkeypatch, given, argv) == (2, [])
    assert capsys.readouterr().err.endswith(f"--sweep {given.sweep} can't be read (No such file or directory)\n")


@pytest.mark.parametrize("flag", ["--resume", "--again"])
def test_a_sweep_goes_on_by_itself(tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as end:
        args(tmp_path, "seed = [0]", flag, "runs/1")
    assert end.value.code == 2
    assert f"--sweep goes on by itself; leave out {flag} runs/1" in capsys.readouterr().err


# All of it, with servers that end as they are told


def run(
    monkeypatch, given: SimpleNamespace, argv: list[str], *codes: int, rounds: int = 3, drawn: bool = False
) -> tuple[int, list]:
    """The sweep's exit code, and the settings of the servers, which end with these codes, and where they work."""
    asked: list[tuple[dict, str]] = []
    left = iter(codes)

    def serve(command: list[str]) -> SimpleNamespace:
        asked_for = parse_args(None, command[3:])
        folder = RunFolder(Path(asked_for.resume or asked_for.run_dir))
        asked.append((asked_for.config, "resume" if asked_for.resume else "new"))
        folder.path.mkdir(parents=True, exist_ok=True)
        history = make_history()
        history.config.update(asked_for.config)
        del history.rounds[rounds:]
        folder.save_history(history)
        code = next(left)
        if not code:
            (folder.path / "model.safetensors").write_bytes(b"")
        return SimpleNamespace(wait=lambda: code, send_signal=lambda number: None)

    monkeypatch.setattr(sweep, "start", serve)
    monkeypatch.setattr(sweep, "port_problem", lambda address: "")
    if not drawn:  # which takes a third of a second
        monkeypatch.setattr(sweep_results, "draw", lambda *_: b"a picture")
    monkeypatch.setattr(sweep, "finish", lambda folder: None)
    monkeypatch.setattr(sys, "argv", ["server.py", *argv])
    with pytest.raises(SystemExit) as end:
        sweep.sweep(given, argv)
    return end.value.code, asked


@pytest.mark.slow
def test_every_run_has_a_folder_of_its_own_and_a_table_and_a_picture_come_at_the_end(tmp_path, monkeypatch, capsys):
    code, asked = run(
        monkeypatch,
        *args(tmp_path, "learning-rate = [0.1, 0.2]\nseed = [0, 1]", "--rounds", "2"),
        0,
        0,
        0,
        0,
        drawn=True,
    )
    assert code == 0
    assert [(c["learning_rate"], c["seed"], c["rounds"], how) for c, how in asked] == [
        (rate, seed, 2, "new") for rate in (0.1, 0.2) for seed in (0, 1)
    ]
    assert (tmp_path / "runs/learning-rate=0.1,seed=0/history.json").exists()
    said = capsys.readouterr().out
    assert "run 1 of 4 (learning-rate 0.1, seed 0): begins\n" in said
    last = f"{make_history().rounds[2].metrics['accuracy']:.4f}"
    assert re.search(rf"0.1 +2 +{last} +{last} +{last}", said)
    assert (tmp_path / "runs/sweep.txt").read_text() in said
    assert [row["settings"]["seed"] for row in json.loads((tmp_path / "runs/sweep.json").read_text())] == [0, 1, 0, 1]
    assert (tmp_path / "runs/sweep.png").read_bytes()[1:4] == b"PNG"


def test_without_a_folders_name_it_is_named_by_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--sweep", written(tmp_path, "seed = [7]")]
    assert run(monkeypatch, parse_args(None, argv), argv, 0)[0] == 0
    assert (tmp_path / "runs/sweep-grid/seed=7/history.json").exists()


def test_a_sweep_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    given = args(tmp_path, "seed = [0, 1, 2]")
    run(monkeypatch, *given, 0, 1, 0)
    (tmp_path / "runs/seed=2/model.safetensors").unlink()  # as if it had been killed within that run
    code, asked = run(monkeypatch, *given, 0, 0)
    assert code == 0
    assert [(config["seed"], how) for config, how in asked] == [(1, "resume"), (2, "resume")]
    assert "run 1 of 3 (seed 0) is done already" in capsys.readouterr().out


def test_a_run_that_was_killed_before_its_first_word_begins_anew(tmp_path, monkeypatch):
    given = args(tmp_path, "seed = [0]")
    (tmp_path / "runs/seed=0").mkdir(parents=True)
    (tmp_path / "runs/seed=0/history.json").touch()
    assert [how for _, how in run(monkeypatch, *given, 0)[1]] == ["new"]


def test_a_failed_run_does_not_keep_the_others_and_is_tried_again_by_the_same_command(tmp_path, monkeypatch, capsys):
    given = args(tmp_path, "seed = [0, 1, 2]")
    code, asked = run(monkeypatch, *given, 0, 1, 0)
    assert (code, len(asked)) == (1, 3)
    said = capsys.readouterr()
    assert "run 2 of 3 (seed 1) failed; the sweep goes on with the next\n" in said.out
    assert "1 of 3 runs failed: run 2 of 3 (seed 1); the same command tries them again" in said.err
    assert run(monkeypatch, *given, 0)[0] == 0


@pytest.mark.parametrize(("code", "rounds"), [(1, 0), (2, 3)])
def test_where_the_next_run_would_fare_no_better_the_sweep_ends(tmp_path, monkeypatch, capsys, code, rounds):
    given = args(tmp_path, "seed = [0, 1, 2]")
    ended, asked = run(monkeypatch, *given, code, rounds=rounds)
    assert (ended, len(asked)) == (code, 1)
    assert "run 1 of 3 (seed 0) ended before its first round; then go on with: python server.py --sweep" in (
        capsys.readouterr().err
    )


def test_another_sweep_in_the_same_folder_is_refused_before_it_mixes_with_the_first(tmp_path, monkeypatch, capsys):
    run(monkeypatch, *args(tmp_path, "seed = [0, 1]", "--rounds", "2"), 0, 0)
    assert run(monkeypatch, *args(tmp_path, "seed = [0, 1, 2]", "--rounds", "4"))[0] == 2
    words = f"{tmp_path}/runs/seed=0 holds a run with rounds 2, and this sweep has 4; name another --run-dir"
    assert words in capsys.readouterr().err
    _, asked = run(monkeypatch, *args(tmp_path, "seed = [0, 1, 2]", "--rounds", "2"), 0)
    assert [config["seed"] for config, _ in asked] == [2], "more values are the same sweep"


def test_a_setting_of_the_tasks_own_is_compared_in_its_own_kind(tmp_path, monkeypatch):
    given = args(tmp_path, 'set = ["hidden=8", "hidden=16"]')
    run(monkeypatch, *given, 0, 0)
    folder = RunFolder(next((tmp_path / "runs").glob("set=hidden=8*")))
    history = folder.load_history()
    history.config["own"] = {"hidden": 8, "depth": 2}  # as the clients' task completed it
    folder.save_history(history)
    assert run(monkeypatch, *given)[0] == 0
    history.config["own"] = {"hidden": 9}
    folder.save_history(history)
    assert run(monkeypatch, *given)[0] == 2


# What came of it


def scored(*values: float | None) -> list:
    histories = []
    for value in values:
        history = make_history()
        history.rounds[-1].metrics = {} if value is None else {"accuracy": value}
        histories.append(history)
    return histories


def test_the_table_has_what_differs_and_mean_and_range_over_the_seeds():
    settings = [{"rounds": 3, "mode": mode, "seed": seed} for mode in ("sync", "async") for seed in (0, 1)]
    runs = list(zip(settings, scored(0.5, 0.75, 0.25, 0.25), strict=True))
    rows = sweep_results.rows(runs, runs[0][1].main)
    assert [row[:5] for row in rows] == [
        ["mode", "runs", "mean accuracy", "lowest", "highest"],
        ["sync", "2", "0.6250", "0.5000", "0.7500"],
        ["async", "2", "0.2500", "0.2500", "0.2500"],
    ]


def test_a_run_without_any_score_is_no_zero():
    one, other = scored(0.5, None)
    other.rounds = other.rounds[-1:]
    rows = sweep_results.rows([({"seed": 0}, one), ({"seed": 1}, other)], one.main)
    assert rows[1][:4] == ["2", "0.5000", "0.5000", "0.5000"]
    rows = sweep_results.rows([({"seed": 1}, other)], one.main)
    assert rows[1][:4] == ["1", "–", "–", "–"]


def test_every_setting_of_a_run_can_be_swept():
    assert set(Recipe.names()) - {"own"} <= {name.replace("-", "_") for name in sweep.NAMES}
    assert "set" in sweep.NAMES


# Processes


def test_a_sweep_that_is_killed_takes_its_server_along_and_goes_on_with_the_same_bits(tmp_path):
    grid = written(tmp_path, "seed = [0, 1]")
    flags = ("--sweep", grid, "--clients", 2, "--rounds", 3)
    with Federation(tmp_path) as federation:
        clients = [federation.tiny("--stay", "--seconds", 0.3) for _ in range(2)]
        first = federation.server(*flags)
        clients[0].says("fit 2")
        first.end()  # SIGKILL
        second = federation.server(*flags)
        said = second.ends(0)
        assert "run 1 of 2 (seed 0): going on" in said
        assert "resuming" in said
        models = [(federation.run_dir / f"seed={seed}/model.safetensors").read_bytes() for seed in (0, 1)]
        third = federation.server(*flags)
        assert "run 2 of 2 (seed 1) is done already" in third.ends(0)
        federation.run_dir = tmp_path / "undisturbed"
        federation.server("--seed", 0, *flags[2:]).ends(0)
        assert read_arrays(federation.model()) == read_arrays(models[0])
        assert read_arrays(models[0]) != read_arrays(models[1])


def read_arrays(model: bytes) -> bytes:
    """Of a safetensors file, without what it says of its run."""
    header = int.from_bytes(model[:8], "little")
    return model[8 + header :]


def test_a_server_gets_the_signals_that_the_sweep_gets_and_both_end_with_its_code(tmp_path):
    with Federation(tmp_path) as federation:
        sweeping = federation.server("--sweep", written(tmp_path, "seed = [0, 1]"))
        sweeping.says("waiting for 3 clients")
        sweeping.send(signal.SIGINT)
        said = sweeping.ends(130)
    assert "stopped by SIGINT after round 0" in said
    assert "run 2 of 2" not in said
    assert re.search(r"error: stopped by SIGINT; go on with: python .*server.py --address .* --sweep .*grid.toml", said)

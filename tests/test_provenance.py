"""Where a model comes from: what its file and history.json say of it, and whether a run can be repeated to the bit."""

import json
import subprocess
from pathlib import Path

from federation import model_file
from federation.client.session import Session
from federation.operations import verify
from federation.participants import provenance
from federation.participants.provenance import in_spans, software
from federation.pieces import hash_arrays
from federation.results.history import History, RoundRecord, VersionRecord
from federation.results.run_folder import RunFolder, load_initial, open_run
from federation.security.audit_check import read_record
from federation.server.options import parse_args

import numpy as np
import pytest
from helpers.example_runs import call
from helpers.in_process import START, Learner, federation, no_disk  # noqa: F401 (a fixture)
from helpers.processes import ROOT


def finished(path: Path, learners: list[Learner] | None = None, **values: object) -> RunFolder:
    """A run of two rounds in this process, its clients with 10 and with 30 examples."""
    path.mkdir(exist_ok=True)
    server = federation(path, learners or [Learner(examples=10), Learner(examples=30)], **{"rounds": 2, **values})
    server.federate()
    assert server.exit_code == 0
    return server.folder


# What is written down


def test_history_and_model_say_where_the_model_comes_from(tmp_path):
    """Both clients add 1 to the first array, halve the second and count in the third, in each of two rounds."""
    folder = finished(tmp_path)
    arrays, about = model_file.read(folder.path / "model.safetensors")
    history, origin = folder.load_history(), about["provenance"]
    assert history.config["provenance"] == origin
    assert origin["run_id"] == history.config["run_id"]
    assert origin["initial_weights"] == hash_arrays(START)
    assert origin["arrays"] == model_file.hash_sorted(arrays)
    assert origin["took_part"] == [{"first": 1, "last": 2, "weights": {"0": 0.25, "1": 0.75}}]
    assert (origin["recipe"]["rounds"], origin["recipe"]["seed"], origin["strategy"]) == (2, 0, "fedavg")
    assert origin["software"] == [software()]
    assert origin["audit_head"] in read_record(folder.path / "audit.jsonl").hashes
    last = [START[0] + np.float32(2), START[1] * np.float32(0.25), START[2] + 2]
    assert [record.weights_sha256 for record in history.rounds][::2] == [hash_arrays(START), hash_arrays(last)]


def test_each_round_has_its_time_and_the_weights_of_those_who_took_part(tmp_path):
    rows = json.loads((finished(tmp_path).path / "history.json").read_text())["rounds"]
    assert [row.get("weight_by_client") for row in rows] == [None, {"0": 0.25, "1": 0.75}, {"0": 0.25, "1": 0.75}]
    times = [row["utc"] for row in rows]
    assert times == sorted(times)
    assert all(len(time) == len("2026-11-25T12:00:00.000Z") and time.endswith("Z") for time in times)


def test_an_asynchronous_run_says_it_of_its_versions(tmp_path):
    folder = finished(tmp_path, mode="async", buffer_size=1)
    history = folder.load_history()
    assert all(record.utc and record.weights_sha256 for record in history.rounds)
    spans = history.config["provenance"]["took_part"]
    assert sum(span["last"] - span["first"] + 1 for span in spans) == len(history.rounds) - 1
    assert all(sum(span["weights"].values()) == pytest.approx(1.0) for span in spans)


def test_rounds_with_the_same_clients_and_weights_are_told_once():
    two, other = {"0": 1 / 3, "1": 2 / 3}, {"1": 1.0}
    assert in_spans([(1, two), (2, two), (3, other), (4, {}), (5, other), (6, two)]) == [
        {"first": 1, "last": 2, "weights": {"0": 0.333333, "1": 0.666667}},
        {"first": 3, "last": 3, "weights": {"1": 1.0}},
        {"first": 5, "last": 5, "weights": {"1": 1.0}},
        {"first": 6, "last": 6, "weights": {"0": 0.333333, "1": 0.666667}},
    ]


def test_the_client_gets_the_provenance_with_the_end_of_the_run_and_keeps_it_for_its_file():
    session, told = (
        Session(lambda assignment: None, ["cat"]),
        {"ask": "told", "kind": "finished", "words": "", "code": 0},
    )
    session.get_properties({**told, "provenance": '{"run_id": "0123456789abcdef"}'})
    assert session.provenance == {"provenance": {"run_id": "0123456789abcdef"}}
    session.get_properties(told)  # a server of an earlier version
    assert (session.provenance, session.failure) == ({}, None)


def test_a_provenance_that_makes_no_sense_is_refused():
    session = Session(lambda assignment: None, ["cat"])
    session.get_properties({"ask": "told", "kind": "finished", "words": "", "code": 0, "provenance": "[" * 1000})
    assert session.failure


def test_a_models_hash_is_the_same_in_whatever_order_its_arrays_lie(tmp_path):
    arrays = {"b": np.ones(3, np.float16), "a": np.zeros((2, 2)), "c": np.array(7)}
    model_file.write(tmp_path / "m", arrays, {})
    read, _ = model_file.read(tmp_path / "m")
    assert list(read) != list(arrays)
    assert model_file.hash_sorted(read) == model_file.hash_sorted(arrays)


@pytest.fixture
def anew():
    """The software is looked at anew, and again afterwards."""
    software.cache_clear()
    yield
    software.cache_clear()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not in a git repository")
def test_the_commit_is_that_of_the_projects_folder(anew):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert software()["commit"] == head.strip()
    assert isinstance(software()["dirty"], bool)


def test_without_git_there_is_no_commit_and_the_versions_are_still_told(tmp_path, anew, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "9.9"\n')
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    told = software()
    assert (told["federation"], told["commit"], told["dirty"]) == ("9.9", None, None)
    assert told["numpy"] == np.__version__


# Verify


def saved_with(path: Path, folder: RunFolder, change=lambda arrays, about: None) -> Path:
    """A copy of the run's model, as a client may have it, or changed."""
    arrays, about = model_file.read(folder.path / "model.safetensors")
    change(arrays, about)
    model_file.write(path, arrays, about)
    return path


def test_a_clients_copy_is_known_as_the_model_of_its_run(tmp_path, capsys):
    folder = finished(tmp_path)
    copy = saved_with(tmp_path / "copy.safetensors", folder)
    assert call(verify.main, copy, folder.path) == 0
    said = capsys.readouterr().out
    run_id = folder.load_history().config["run_id"]
    assert said.endswith(f"it is the final model of run {run_id}, the same at server and client\n")
    assert "  rounds 1 to 2: client 0 0.2500, client 1 0.7500\n" in said
    assert call(verify.main, copy) == 0
    assert "give RUN_DIR, too" in capsys.readouterr().out


def one_bit(arrays: dict, about: dict) -> None:
    arrays["w00000"][0] = np.nextafter(arrays["w00000"][0], np.float32(9))


def other_words(arrays: dict, about: dict) -> None:
    about["provenance"]["took_part"] = []


def no_words(arrays: dict, about: dict) -> None:
    about.clear()


@pytest.mark.parametrize(
    ("change", "alone", "in_run"),
    [(one_bit, 1, 1), (other_words, 0, 1), (no_words, 1, 0)],
    ids=["one bit", "other words", "no words"],
)
def test_a_changed_model_is_not_taken_for_the_runs(change, alone, in_run, tmp_path, capsys):
    """One without words may still be the run's: its arrays tell."""
    folder = finished(tmp_path)
    changed = saved_with(tmp_path / "changed.safetensors", folder, change)
    assert (call(verify.main, changed), call(verify.main, changed, folder.path)) == (alone, in_run)


def test_a_model_of_another_run_is_not_taken_for_this_ones(tmp_path, capsys):
    one, other = finished(tmp_path / "one"), finished(tmp_path / "other", seed=1)
    assert call(verify.main, one.path / "model.safetensors", other.path) == 1
    assert "WRONG: it says that it is of run" in capsys.readouterr().out


def test_a_run_whose_record_was_changed_can_not_vouch_for_its_model(tmp_path, capsys):
    folder = finished(tmp_path)
    path = folder.path / "audit.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))
    assert call(verify.main, folder.path / "model.safetensors", folder.path) == 1
    assert "does not follow line 3" in capsys.readouterr().out


@pytest.mark.parametrize("files", [["nothing"], ["run/history.json"], ["run/model.safetensors", "nowhere"]])
def test_wrong_use_is_one_line_and_exit_code_2(files, tmp_path, capsys):
    finished(tmp_path)
    capsys.readouterr()
    assert call(verify.main, *(tmp_path / name for name in files)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_senseless_words_in_a_model_are_one_line(tmp_path, capsys):
    path = saved_with(
        tmp_path / "odd.safetensors",
        finished(tmp_path),
        lambda arrays, about: about.update(provenance={"took_part": 7}),
    )
    assert call(verify.main, path) == 1
    assert capsys.readouterr().err.count("\n") == 1


# Again


def again(folder: RunFolder, *flags: str):
    return parse_args(None, ["--again", str(folder.path), *flags])


def test_a_run_is_repeated_with_its_own_recipe_settings_and_classes(tmp_path):
    folder = finished(tmp_path, seed=7, strategy="fedmedian", round_timeout=9.0)
    history = folder.load_history()
    history.config["classes"] = ["cat", "dog"]
    folder.save_history(history)
    args = again(folder, "--run-dir", str(tmp_path / "new"))
    assert (args.recipe.seed, args.recipe.rounds, args.settings.strategy) == (7, 2, "fedmedian")
    assert (args.settings.clients, args.settings.round_timeout, args.classes) == (2, 9.0, ["cat", "dog"])
    run = open_run(args)
    assert run.id != history.config["run_id"]
    assert run.history.config["again"]["run_id"] == history.config["run_id"]


@pytest.mark.parametrize(
    "flag", ["--seed 1", "--rounds 2", "--clients 2", "--initial-weights x", "--classes a b", "--resume x", "--sweep x"]
)
def test_a_repetition_takes_nothing_else_from_the_command_line(flag, tmp_path, capsys):
    folder = finished(tmp_path)
    with pytest.raises(SystemExit) as end:
        again(folder, *flag.split())
    assert end.value.code == 2
    assert "leave out" in capsys.readouterr().err.splitlines()[-1]


def test_the_initial_weights_are_kept_for_it(tmp_path):
    given = tmp_path / "given.safetensors"
    model_file.write(given, {"a": np.ones(3, np.float32)}, {})
    args = parse_args(None, ["--initial-weights", str(given), "--run-dir", str(tmp_path / "run"), "--clients", "2"])
    folder = open_run(args).folder
    given.unlink()
    assert load_initial(again(folder).initial_weights)["a"].tolist() == [1, 1, 1]


def repetition(first: RunFolder, second: RunFolder) -> str:
    history = second.load_history()
    history.config["again"] = first.load_history().to_repeat()
    return history.repetition()


def test_a_repetition_says_whether_its_bits_are_the_same(tmp_path):
    first = finished(tmp_path / "first")
    name = f"run {first.load_history().config['run_id']}"
    same = repetition(first, finished(tmp_path / "second"))
    assert same == f"the same bits as {name}: its model after each of 3 rounds, round 0 among them"
    later = Learner(examples=30, fit=lambda number, new, n, told: ([new[0] + number // 2, *new[1:]], n, told))
    other = repetition(first, finished(tmp_path / "third", [Learner(examples=10), later]))
    assert other == f"other bits than {name}, from round 2 on: the clients' software or hardware is another"
    fewer = repetition(first, finished(tmp_path / "fourth", [Learner(2.0, examples=10), Learner(2.0, examples=20)]))
    assert fewer == f"other bits than {name}, from round 1 on: other clients took part, or with other data"


def test_a_run_without_hashes_can_not_be_compared_and_most_runs_repeat_none():
    assert History({"clients": 1}, [RoundRecord(0, {})]).repetition() == ""
    old = History({"clients": 1, "run_id": "old"}, [RoundRecord(0, {})]).to_repeat()
    assert "can't be told" in History({"clients": 1, "again": old}, [RoundRecord(0, {})]).repetition()


def test_an_asynchronous_repetition_says_why_its_bits_are_others():
    records = [VersionRecord(0, {}, weights_sha256=sha256) for sha256 in ("a", "b")]
    old = History({"clients": 1, "run_id": "old"}, records[:1]).to_repeat()
    words = History({"clients": 1, "again": old}, records[1:]).repetition()
    assert words == "other bits than run old, from version 0 on: the asynchronous mode depends on who is faster"


def test_a_run_over_grpc_is_repeated_to_the_bit_and_the_records_of_all_fit(federation):
    first = federation.server("--rounds", 2)
    for partition in range(3):
        federation.tiny("--partition-id", partition, "--audit", federation.folder / "audit")
    first.ends(0)
    run_id = federation.history()["config"]["run_id"]
    again = federation.start(
        "again", ROOT / "server.py", "--address", federation.address, "--again", federation.run_dir,
        "--run-dir", federation.folder / "again",
    )  # fmt: skip
    for partition in range(3):
        federation.tiny("--partition-id", partition)
    assert f"the same bits as run {run_id}: its model after each of 3 rounds" in again.ends(0)
    assert call(verify.main, federation.folder / "again/model.safetensors", federation.folder / "again") == 0

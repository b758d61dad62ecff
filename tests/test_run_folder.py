"""A run's folder after a crash, a full disk, a damaged file: there is always something whole to go on with."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from federation import model_file
from federation.process import write_whole
from federation.results.history import History, RoundRecord, VersionRecord, read_record
from federation.results.run_folder import Checkpoint, RunFolder, load_initial, new_run_dir, open_run

import numpy as np
import pytest

WEIGHTS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(3)]
MODEL = dict(zip(["head.weight", "norm.count"], WEIGHTS, strict=True))
ABOUT = model_file.about("cifar10", {"model": "cnn"}, {"classes": ["cat", "dog"]}, {})
STATE = [np.array(2), np.ones(3, np.float64)]


def checkpoint(server_round: int) -> Checkpoint:
    history = History(
        {"seed": 0}, rounds=[RoundRecord(number, {"accuracy": 0.5}) for number in range(server_round + 1)]
    )
    return Checkpoint(server_round, [WEIGHTS[0] + server_round, WEIGHTS[1] + server_round], STATE, history)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """With checkpoints of rounds 1 and 2."""
    folder = RunFolder(tmp_path)
    for server_round in (1, 2):
        folder.save_checkpoint(checkpoint(server_round))
    return folder


def assert_same(one: Checkpoint, two: Checkpoint) -> None:
    assert (one.server_round, one.history) == (two.server_round, two.history)
    for a, b in zip(one.weights + one.strategy_state, two.weights + two.strategy_state, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


# Files


def test_a_file_is_written_whole_and_leaves_no_part_behind(tmp_path):
    write_whole(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_when_writing_fails_the_old_file_stays(tmp_path):
    def fill_the_disk(file) -> None:
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", fill_the_disk)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_checkpoints_that_there_are(folder, monkeypatch):
    def fill_the_disk(file, **arrays) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        folder.save_checkpoint(checkpoint(3))
    assert names(folder.path) == ["checkpoint-000001.npz", "checkpoint-000002.npz", "history.json"]
    assert_same(folder.load_checkpoint(), checkpoint(2))


# The run


def opened(path: Path, resume: bool = False) -> str:
    """The id of a run that begins or goes on there."""
    where = {"resume": str(path), "run_dir": None} if resume else {"resume": None, "run_dir": str(path)}
    config = RunFolder(path).load_config() if resume else {"seed": 0}
    return open_run(SimpleNamespace(**where, initial_weights=None, config=config)).id


def test_every_run_folder_has_an_id_of_its_own_that_a_resume_keeps(tmp_path):
    ids = [opened(tmp_path / name) for name in ("one", "two")]
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in ids)
    assert ids[0] != ids[1]
    assert [opened(tmp_path / name, resume=True) for name in ("one", "two")] == ids


def test_a_folder_of_an_earlier_version_gets_an_id_at_its_first_resume_and_keeps_it(folder):
    drawn = opened(folder.path, resume=True)
    assert re.fullmatch("[0-9a-f]{16}", drawn)
    assert opened(folder.path, resume=True) == drawn  # though the checkpoints know none


def test_a_folder_that_holds_a_run_is_not_made_again(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.path.mkdir(parents=True)
    folder.create()  # in an empty folder
    with pytest.raises(FileExistsError):
        folder.create()


def test_a_folder_that_holds_only_a_checkpoint_holds_a_run(folder):
    (folder.path / "history.json").unlink()
    with pytest.raises(FileExistsError, match="already holds a run"):
        folder.create()


def test_the_configuration_that_a_run_began_with_is_read_again(folder):
    assert folder.load_config() == {"seed": 0}


def test_history_is_plain_json(folder):
    history = json.loads((folder.path / "history.json").read_text())
    assert list(history) == ["config", "rounds", "rejected", "events"]
    assert [row["round"] for row in history["rounds"]] == [0, 1, 2]
    assert history["rounds"][1] == {
        "round": 1,
        "accuracy": 0.5,
        "loss": None,
        "train_loss": None,
        "clients": 0,
        "seconds": 0.0,
        "bytes_received": 0,
    }


def test_a_record_comes_back_from_its_row():
    scores = {"accuracy": {"0": 0.5}, "cosine": {"0": -0.25}}
    record = RoundRecord(2, {"accuracy": 0.5, "loss": 1.0, "f1": 7.0}, {"train_loss": 2.0}, 3, 1.5, 99, scores)
    assert read_record(json.loads(json.dumps(record.to_json()))) == record
    version = VersionRecord(4, {}, updates=[{"partition": 1}], time=2.5)
    assert read_record(json.loads(json.dumps(version.to_json()))) == version


def test_a_row_of_an_earlier_version_is_read():
    row = {"round": 1, "accuracy": None, "loss": None, "train_loss": 0.5, "clients": 2, "seconds": 1.0}
    row |= {"bytes_received": 7, "accuracy_by_client": {}, "updates": [], "time": 1.0, "evaluated": None}
    record = read_record(row)
    assert isinstance(record, VersionRecord)
    assert (record.main(), record.metrics, record.train_metrics) == (None, {}, {"train_loss": 0.5})


def test_a_history_of_an_earlier_version_is_read_whole():
    first = {"round": 0, "accuracy": 0.25, "loss": 2.5, "train_loss": None, "clients": 0, "seconds": 0.0}
    second = {"round": 1, "accuracy": 0.5, "loss": 2.0, "train_loss": 1.5, "clients": 2, "seconds": 3.0}
    rows = [{**row, "bytes_received": 7, "accuracy_by_client": {"0": 0.5, "2": 0.75}} for row in (first, second)]
    history = History.from_json(json.dumps({"config": {"seed": 0}, "rounds": rows, "rejected": [], "events": []}))
    assert [(record.main(), record.train_metrics) for record in history.rounds] == [
        (0.25, {}),
        (0.5, {"train_loss": 1.5}),
    ]
    assert history.rounds[1].by_client == {"accuracy": {"0": 0.5, "2": 0.75}}
    assert [record.to_json() for record in history.rounds] == rows
    assert [list(record.to_json()) for record in history.rounds] == [list(row) for row in rows]


def test_a_metric_of_any_name_that_a_client_may_send_comes_back_as_a_metric():
    odd = (
        "metrics",
        "train_metrics",
        "by_client",
        "rounds_worth",
        "unit",
        "position",
        "x_by_client",
        "train_by_client",
    )
    fit = {name: 0.5 for name in odd if name.startswith("train_")}
    metrics = {"accuracy": 0.5, "loss": 1.0, **{name: 0.5 for name in odd if name not in fit}}
    for record in (RoundRecord(1, metrics, fit), VersionRecord(1, metrics, fit, updates=[{"partition": 0}])):
        assert read_record(json.loads(json.dumps(record.to_json()))) == record


NO_HISTORIES = [
    "{",
    "{}",
    "[]",
    "null",
    '{"config": {}, "rounds": 3}',
    '{"config": 3, "rounds": []}',
    '{"config": {}, "rounds": ["x"]}',
    '{"config": {}, "rounds": [{"rows": 1}]}',
    '{"config": {}, "rounds": [{"round": 1, "updates": []}]}',
    '{"config": {"clients": 0}, "rounds": [{"round": 1, "updates": []}]}',
    '{"config": {"clients": 3}, "rounds": [{"round": 1, "updates": null}]}',
]


@pytest.mark.parametrize("text", NO_HISTORIES)
def test_what_is_no_history_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        History.from_json(text)


def test_runs_that_begin_in_the_same_second_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda text: "runs/now")
    assert [str(new_run_dir()) for _ in range(3)] == ["runs/now", "runs/now-2", "runs/now-3"]


def test_of_many_that_want_one_folder_one_gets_it(tmp_path):
    def take(_: int) -> bool:
        try:
            RunFolder(tmp_path / "run").create()
            return True
        except FileExistsError:
            return False

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(take, range(64))) == 1


# Checkpoints


def test_a_checkpoint_comes_back_bit_for_bit(folder):
    assert_same(folder.load_checkpoint(), checkpoint(2))


def test_the_last_two_checkpoints_are_kept_across_the_ten_and_the_thousand(tmp_path):
    folder = RunFolder(tmp_path)
    for server_round in (8, 9, 10, 999, 1000):
        folder.save_checkpoint(checkpoint(server_round))
    assert names(tmp_path) == ["checkpoint-000999.npz", "checkpoint-001000.npz", "history.json"]
    assert_same(folder.load_checkpoint(), checkpoint(1000))


def test_no_checkpoint_is_none(tmp_path):
    assert RunFolder(tmp_path).load_checkpoint() is None


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


DAMAGE = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "last byte missing": lambda data: data[:-1],
    "garbage": lambda data: b"garbage" * 500,
    "zeros": lambda data: bytes(len(data)),
    "pickle": lambda data: b"\x80\x04]\x94.",
    "a byte of an array": lambda data: flip(data, data.index((WEIGHTS[0] + 2).tobytes()) + 5),
    "a byte of an array's shape": lambda data: data.replace(b"'shape': (2, 3)", b"'shape': (9, 3)"),
    "an array lost from the zip's directory": lambda data: flip(data, data.rindex(b"a00002.npy")),
    "a zip that claims to be encrypted": lambda data: flip(data, data.rindex(b"PK\x01\x02") + 8),
    "a byte of the history": lambda data: flip(data, data.index(b'"rounds"') + 3),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, damage, capsys):
    newest = folder.path / "checkpoint-000002.npz"
    whole = newest.read_bytes()
    newest.write_bytes(damage(whole))
    assert newest.read_bytes() != whole
    assert_same(folder.load_checkpoint(), checkpoint(1))
    said = capsys.readouterr().out
    assert said.startswith(f"{newest} is damaged (")
    assert said.count("\n") == 1


def test_a_flipped_byte_anywhere_is_found_or_does_no_harm(folder, capsys):
    newest = folder.path / "checkpoint-000002.npz"
    whole = newest.read_bytes()
    for position in range(0, len(whole), 37):  # a prime: every field of a zip gets its turn
        newest.write_bytes(flip(whole, position))
        found = folder.load_checkpoint()
        assert_same(found, checkpoint(2 if capsys.readouterr().out == "" else 1))


def test_when_all_checkpoints_are_damaged_there_is_none(folder, capsys):
    for path in folder.checkpoints():
        path.write_bytes(b"")
    assert folder.load_checkpoint() is None
    assert capsys.readouterr().out.count("is damaged") == 2


# The final model


def test_the_same_weights_give_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save_model(MODEL, ABOUT)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    folder.save_model({name: array.copy() for name, array in MODEL.items()}, dict(reversed(ABOUT.items())))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_model_holds_weights_by_name_the_network_and_the_class_names(tmp_path):
    RunFolder(tmp_path).save_model(MODEL, ABOUT)
    arrays, told = model_file.read(tmp_path / "model.safetensors")
    assert told == ABOUT
    assert (told["recipe"]["model"], told["schema"]["classes"]) == ("cnn", ["cat", "dog"])
    assert sorted(arrays) == ["head.weight", "norm.count"]
    assert np.array_equal(arrays["head.weight"], WEIGHTS[0])
    assert (arrays["norm.count"].dtype, int(arrays["norm.count"])) == (np.int64, 3)


def test_an_array_in_any_order_of_its_memory_is_stored_as_it_is_read(tmp_path):
    turned = np.asfortranarray(WEIGHTS[0])
    RunFolder(tmp_path).save_model({"w": turned, "half": turned[:, ::2]}, ABOUT)
    arrays, _ = model_file.read(tmp_path / "model.safetensors")
    assert arrays["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["half"].tolist() == [[0, 2], [3, 5]]


def test_a_model_that_cant_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save_model(MODEL, ABOUT)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fill_the_disk(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        folder.save_model({"other": WEIGHTS[0]}, ABOUT)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert names(tmp_path) == ["model.safetensors"]


def test_frozen_weights_are_kept_apart_and_come_back_by_name(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save_frozen(MODEL)
    found = folder.load_frozen()
    assert {name: array.tobytes() for name, array in found.items()} == {k: v.tobytes() for k, v in MODEL.items()}
    assert model_file.hash_of(dict(sorted(found.items()))) == model_file.hash_of(MODEL)


@pytest.mark.parametrize("content", [b"", b"{}", b"garbage" * 100, b"\xff" * 8, b"PK\x03\x04" + bytes(100)])
def test_what_is_no_model_is_refused_in_words(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=r"^no safetensors file \("):
        model_file.read(tmp_path / "x")


def test_initial_weights_that_cant_be_read_are_one_line(tmp_path, capsys):
    (tmp_path / "x").write_bytes(b"garbage")
    for name, words in (("x", "no safetensors file"), ("y", "No such file")):
        with pytest.raises(SystemExit) as end:
            load_initial(str(tmp_path / name))
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--initial-weights {tmp_path / name} can't be read ({words}" in line
    assert load_initial(None) == {}

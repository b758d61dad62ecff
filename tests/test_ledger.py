"""The ledger: what is written before an update may leave, and every way in which it can't be used."""

import json
import os
from dataclasses import replace
from pathlib import Path

from federation.pieces import hash_arrays
from federation.privacy import ledger as module
from federation.privacy.accounting import Steps
from federation.privacy.ledger import Ledger, LedgerError, Training

import numpy as np
import pytest

SHA256, EXAMPLES = "ab" * 32, 100
UPDATE = [np.float32([1, -0.0, 2**-149]), np.array(3)]
OTHER_UPDATE = [np.float32([4, 5, 6]), np.array(3)]


def opened(path: Path, sha256: str = SHA256, examples: int = EXAMPLES) -> Ledger:
    return Ledger.open(path, sha256, examples)


def training(number: int = 1, update: list = UPDATE, **values: object) -> Training:
    plain = Training("run", number, "start", hash_arrays(update), 0.1, 1.5, 10, 1.0, False, "2026-11-25T00:00:00Z")
    return replace(plain, **values)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "privacy" / "ledger.json"


@pytest.fixture
def ledger(path):
    ledger = opened(path)
    yield ledger
    ledger.close()


def again(ledger: Ledger) -> Ledger:
    """As the next process finds it."""
    ledger.close()
    return opened(ledger.path, ledger.sha256, ledger.examples)


def power_cut(monkeypatch, ledger: Ledger, at: str) -> None:
    """The disk takes nothing more from when a file of this name is to be written."""

    def write_whole(path, write, whole=module.write_whole):
        if path.name == at:
            raise OSError(28, os.strerror(28))
        whole(path, write)

    monkeypatch.setattr(module, "write_whole", write_whole)


def test_a_training_is_on_disk_when_charge_returns(ledger, monkeypatch):
    done = []
    for name, real in (("fsync", os.fsync), ("replace", os.replace)):
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append(name), real(*args))[1])
    ledger.charge(training(), UPDATE)
    assert done == ["fsync", "replace", "fsync"] * 2  # a file's content, its name, the folder: of update and ledger
    monkeypatch.undo()
    found = again(ledger)
    assert found.trainings == [training()]
    assert found.steps_of() == [Steps(0.1, 1.5, 10)]
    found.close()


def test_all_that_is_written_comes_back_as_it_was(ledger):
    ledger.begin("run", 2)
    trainings = [training(), training(2, rate=1 / 3, noise=0.8736059663897753), training(3, seeded=True)]
    for each in trainings:
        ledger.charge(each, UPDATE)
    found = again(ledger)
    assert (found.runs, found.trainings, found.void) == ({"run": 2}, trainings, True)
    found.close()


def test_the_same_update_is_given_again_for_the_same_run_round_and_model_alone(ledger):
    assert ledger.kept("run", 1, "start") is None
    ledger.charge(training(), UPDATE)
    for each in (ledger, again(ledger)):
        assert hash_arrays(each.kept("run", 1, "start")) == hash_arrays(UPDATE)
        for other in (("other", 1, "start"), ("run", 2, "start"), ("run", 1, "other")):
            assert each.kept(*other) is None
    each.charge(training(2, OTHER_UPDATE), OTHER_UPDATE)
    assert each.kept("run", 1, "start") is None  # only the newest is kept
    each.close()


def test_after_a_power_cut_before_the_update_all_is_as_before(ledger, monkeypatch):
    ledger.charge(training(), UPDATE)
    power_cut(monkeypatch, ledger, "ledger.json.update.npz")
    with pytest.raises(LedgerError, match="no training"):
        ledger.charge(training(2, OTHER_UPDATE), OTHER_UPDATE)
    for each in (ledger, again(ledger)):
        assert each.trainings == [training()]
        assert each.kept("run", 2, "start") is None
        assert each.kept("run", 1, "start") is not None
    each.close()


def test_after_a_power_cut_between_update_and_ledger_nothing_can_leave_uncharged(ledger, monkeypatch):
    """Not even from the process that goes on: what it gives away must be on disk."""
    ledger.charge(training(), UPDATE)
    power_cut(monkeypatch, ledger, "ledger.json")
    with pytest.raises(LedgerError, match="no training"):
        ledger.charge(training(2, OTHER_UPDATE), OTHER_UPDATE)
    assert ledger.kept("run", 2, "start") is None
    monkeypatch.undo()
    found = again(ledger)
    assert found.kept("run", 2, "start") is None
    assert found.kept("run", 1, "start") is None  # its file is the other's: it would be trained, and charged, again
    found.charge(training(), UPDATE)
    assert len(found.trainings) == 2
    found.close()


def test_a_run_whose_beginning_was_not_written_has_not_begun(ledger, monkeypatch):
    power_cut(monkeypatch, ledger, "ledger.json")
    with pytest.raises(LedgerError):
        ledger.begin("run", 0)
    assert ledger.runs == {}


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 no archive", b"\x93NUMPY"])
def test_a_lost_or_hostile_update_file_is_none(ledger, content):
    ledger.charge(training(), UPDATE)
    ledger._update_path.unlink()
    if content is not None:
        ledger._update_path.write_bytes(content)
    assert ledger.kept("run", 1, "start") is None


def test_an_update_file_with_other_numbers_or_pickles_is_none(ledger):
    ledger.charge(training(), UPDATE)
    for arrays in ({"00000": OTHER_UPDATE[0], "00001": UPDATE[1]}, {"a": UPDATE[0]}, {"00000": np.array([print])}):
        np.savez(ledger._update_path, **arrays)
        assert ledger.kept("run", 1, "start") is None
    ledger._update_path.unlink()
    ledger._update_path.mkdir()
    assert ledger.kept("run", 1, "start") is None


def refusal(path: Path, sha256: str = SHA256, examples: int = EXAMPLES) -> str:
    """In public words, after checks that hold for every refusal."""
    with pytest.raises(LedgerError) as caught:
        opened(path, sha256, examples)
    assert str(path) in str(caught.value)
    assert str(path.parent) not in caught.value.public
    assert "\n" not in str(caught.value)
    return caught.value.public


def edited(path: Path, change) -> None:
    ledger = opened(path)
    ledger.begin("run", 0)
    ledger.charge(training(), UPDATE)
    ledger.close()
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


BAD_NUMBERS = [
    ("rate", 0), ("rate", 1.1), ("rate", float("nan")), ("rate", -0.1), ("rate", "0.1"), ("rate", None),
    ("noise", 0), ("noise", 0.01), ("noise", float("nan")), ("noise", float("inf")), ("noise", -1.5),
    ("steps", -1), ("steps", 1.5), ("steps", True), ("steps", 10**30), ("clip", 0), ("clip", float("inf")),
    ("round", -1), ("run", 5), ("seeded", 0), ("utc", None), ("update", []), ("more", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
def test_a_training_with_a_wrong_value_is_damage(path, name, value):
    edited(path, lambda told: told["trainings"][0].update({name: value}))
    assert "is damaged; " in refusal(path)
    assert refusal(path).endswith("bring it back from a backup of after its last training")  # and the lock is free


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told["trainings"][0].pop("noise"),
        lambda told: told.update(trainings={"a": 1}),
        lambda told: told.update(runs=["run"]),
        lambda told: told.update(runs={"run": "0"}),
        lambda told: told.update(runs={"run": -1}),
        lambda told: told.update(data=None),
        lambda told: told["data"].update(examples="100"),
        lambda told: told["data"].update(examples=-100),
        lambda told: told["data"].update(sha256=7),
        lambda told: told.pop("format"),
        lambda told: told.update(format="1"),
    ],
)
def test_other_wrong_types_are_damage_too(path, change):
    edited(path, change)
    assert "is damaged; " in refusal(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 200_000, b'{"format": 1}'])
def test_what_is_no_ledger_is_damage_and_stays_as_it_is(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    assert "is damaged; " in refusal(path)
    assert path.read_bytes() == content


def test_a_truncated_ledger_is_damage_wherever_it_ends(path):
    edited(path, lambda told: None)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        assert "is damaged; " in refusal(path)


def test_a_ledger_of_another_version_is_not_called_damaged(path):
    edited(path, lambda told: told.update(format=2))
    assert refusal(path) == "its ledger is of another version of this program; use that one"


def test_a_ledger_of_other_examples_is_refused(path):
    opened(path).close()
    assert "is of 100 training examples, and this client has 1,000; for examples" in refusal(path, examples=1000)
    assert "is of other training examples than this client has; " in refusal(path, sha256="cd" * 32)
    assert refusal(path, sha256="cd" * 32).endswith("begin a new one with --ledger")


def test_two_clients_can_t_share_a_ledger_by_whatever_name(ledger, tmp_path):
    assert refusal(ledger.path) == "its ledger is in use by another client; give each client its own with --ledger"
    link = tmp_path / "link.json"
    link.symlink_to(ledger.path)
    with pytest.raises(LedgerError, match="in use by another client"):
        opened(link)


def test_what_is_spent_through_a_link_is_spent_in_the_file_behind_it(path, tmp_path):
    link = tmp_path / "link.json"
    opened(path).close()
    link.symlink_to(path)
    through = opened(link)
    through.charge(training(), UPDATE)
    through.close()
    assert link.is_symlink()
    found = opened(path)
    assert found.trainings == [training()]
    found.close()


def test_ledgers_beside_each_other_have_updates_of_their_own(tmp_path):
    one, other = opened(tmp_path / "ledger.2025"), opened(tmp_path / "ledger.2026")
    one.charge(training(), UPDATE)
    other.charge(training(1, OTHER_UPDATE), OTHER_UPDATE)
    assert one.kept("run", 1, "start") is not None
    one.close()
    other.close()


def test_a_folder_in_its_place_and_a_file_in_its_folder_s_place_are_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    assert refusal(tmp_path / "folder").endswith("give this user the right to, or name a file with --ledger")
    (tmp_path / "file").write_text("")
    assert "can't be written (" in refusal(tmp_path / "file" / "ledger.json")


@pytest.mark.parametrize("code", [13, 28, 30], ids=["no right to", "full", "read-only"])
def test_where_it_can_t_be_written_there_is_no_training(path, monkeypatch, code):
    def write_whole(*_: object):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "write_whole", write_whole)
    words = f"can't be written ({os.strerror(code)}), so there must be no training; free the disk, "
    assert words in refusal(path)


def test_where_it_can_t_be_read_there_is_no_training(path, monkeypatch):
    opened(path).close()

    def read_bytes(_: Path):
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert "can't be read (Permission denied); give this user the right to" in refusal(path)


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX's")
def test_others_on_the_machine_can_t_read_it(ledger):
    ledger.charge(training(), UPDATE)
    rights = [os.stat(each).st_mode & 0o777 for each in (ledger.path, ledger._update_path, ledger.path.parent)]
    assert [oct(each) for each in rights] == ["0o600", "0o600", "0o700"]

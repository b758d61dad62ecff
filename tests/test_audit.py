"""audit.jsonl: each line follows the one before, both sides' files fit each other, whatever is changed is found."""

import dataclasses
import errno
import hashlib
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

from federation.client.session import Session
from federation.config import Recipe
from federation.pieces import PIECE, Store, cut, hash_arrays
from federation.security import audit, audit_check
from federation.security.audit import KEYS, AuditLog, Unwritable, audit_folder, privacy_of
from federation.security.audit_check import compare, read_record
from federation.security.identity import Identity

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.common import Code, EvaluateRes, FitRes, GetParametersRes, Status
from flwr.common import ndarrays_to_parameters as packed
from flwr.common import parameters_to_ndarrays as unpacked
from helpers.example_runs import call
from helpers.fake_clients import FakeAdmission
from helpers.in_process import START, Learner, federation, lost, no_disk  # noqa: F401 (a fixture)

RUN = "0123456789abcdef"
OK = Status(Code.OK, "")


# One line after the other


def test_a_file_of_two_lines_is_as_worked_out_by_hand(tmp_path, monkeypatch):
    times = iter(["2026-11-25T12:00:00.000+00:00", "2026-11-25T12:00:01.000+00:00"])
    clock = SimpleNamespace(now=lambda zone: SimpleNamespace(isoformat=lambda timespec: next(times)))
    monkeypatch.setattr(audit, "datetime", clock)
    log = AuditLog(tmp_path / "a", RUN)
    log.write("update", 1, sender="client 0", session="aa", sha256=hash_arrays([np.array([1, 2], np.int8)]), bytes=2)
    first = (
        b'{"from":"server","kind":"begin","previous":"' + b"0" * 64 + b'","privacy":{},"round":null,'
        b'"run":"0123456789abcdef","time":"2026-11-25T12:00:00.000Z"}'
    )
    arrays = hashlib.sha256(b"|i1 (2,)\n\x01\x02").hexdigest().encode()
    second = (
        b'{"bytes":2,"from":"client 0","kind":"update","previous":"' + hashlib.sha256(first).hexdigest().encode()
        + b'","privacy":{},"round":1,"run":"0123456789abcdef","session":"aa","sha256":"' + arrays
        + b'","time":"2026-11-25T12:00:01.000Z"}'
    )  # fmt: skip
    assert (tmp_path / "a").read_bytes() == first + b"\n" + second + b"\n"
    assert log.sync() == log.head == hashlib.sha256(second).hexdigest()


def test_a_run_that_goes_on_adds_to_the_chain(tmp_path):
    AuditLog(tmp_path / "a", RUN).close()
    log = AuditLog(tmp_path / "a", RUN)
    log.write("end", outcome="finished")
    record = read_record(tmp_path / "a")
    assert [line["kind"] for line in record.lines] == ["begin", "resume", "end"]
    assert (record.problems, record.notes, record.ended) == ([], [], True)


def test_a_line_that_a_crash_cut_stays_and_the_chain_goes_on_after_it(tmp_path):
    make_file(tmp_path / "a").close()
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:-30])
    assert len(read_record(tmp_path / "a").problems) == 1
    AuditLog(tmp_path / "a", RUN)
    record = read_record(tmp_path / "a")
    assert (record.problems, record.notes) == ([], ["line 5 was cut by a crash; the run was resumed after it"])


def test_two_processes_never_write_one_file(tmp_path):
    log = AuditLog(tmp_path / "a", RUN)
    with pytest.raises(Unwritable, match="another process writes it"):
        AuditLog(tmp_path / "a", RUN).write("end")
    log.write("end", outcome="finished")
    assert read_record(tmp_path / "a").problems == []


def test_without_a_file_nothing_is_written_and_no_head_told():
    log = AuditLog()
    log.write("begin")
    assert log.told(1) == {}


# Tampering


def make_file(path: Path) -> AuditLog:
    """Five lines: it begins, goes out, comes in, goes out, ends."""
    log = AuditLog(path, RUN)
    for kind, number in (("model-to-train", 1), ("update", 1), ("model-to-evaluate", 1)):
        log.write(kind, number, session="aa", sha256="0" * 64, bytes=4)
    log.write("end", outcome="finished")
    return log


def swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


TAMPERINGS = {
    "changed": lambda lines: [*lines[:2], lines[2].replace(b'"bytes":4', b'"bytes":5'), *lines[3:]],
    "time changed": lambda lines: [lines[0].replace(b'"time":"2', b'"time":"1'), *lines[1:]],
    "dropped": lambda lines: [*lines[:2], *lines[3:]],
    "first dropped": lambda lines: lines[1:],
    "reordered": swapped,
    "doubled": lambda lines: [*lines[:2], *lines[1:]],
    "cut in the middle": lambda lines: [*lines[:2], lines[2][:40], *lines[3:]],
    "last cut": lambda lines: [*lines[:4], lines[4][:40]],
    "emptied": lambda lines: [*lines[:2], b"", *lines[3:]],
    "no JSON": lambda lines: [*lines[:2], b"garbage", *lines[3:]],
    "more in it": lambda lines: [*lines[:4], lines[4].replace(b'{"from"', b'{"class_counts":[3,4],"from"')],
    "spaces": lambda lines: [*lines[:4], lines[4].replace(b":", b": ")],
    "of another run": lambda lines: [*lines[:4], lines[4].replace(b"0123456789abcdef", b"fedcba9876543210")],
}


@pytest.mark.parametrize("how", TAMPERINGS)
def test_whatever_is_changed_in_a_file_is_found(how, tmp_path):
    make_file(tmp_path / "a")
    lines = (tmp_path / "a").read_bytes().splitlines()
    assert read_record(tmp_path / "a").problems == []
    end = b"" if how == "last cut" else b"\n"
    (tmp_path / "a").write_bytes(b"\n".join(TAMPERINGS[how](lines)) + end)
    assert read_record(tmp_path / "a").problems


def test_an_empty_file_is_no_record(tmp_path):
    (tmp_path / "a").touch()
    assert read_record(tmp_path / "a").problems == ["it is empty"]


# Both sides


class Remote:
    """A session as the server reaches it."""

    def __init__(self, session: Session):
        self.session = session
        self.cid = session.instance
        self.bridge = SimpleNamespace(close=lambda: None)

    def get_properties(self, ins, timeout, group_id):
        return SimpleNamespace(properties=self.session.get_properties(ins.config))

    def get_parameters(self, ins, timeout, group_id):
        return GetParametersRes(OK, packed(self.session.get_parameters(ins.config)))

    def fit(self, ins, timeout, group_id):
        arrays, examples, metrics = self.session.fit(unpacked(ins.parameters), ins.config)
        return FitRes(OK, packed(arrays), examples, metrics)

    def evaluate(self, ins, timeout, group_id):
        loss, examples, metrics = self.session.evaluate(unpacked(ins.parameters), ins.config)
        return EvaluateRes(OK, loss, examples, metrics)

    def reconnect(self, ins, timeout, group_id):
        pass


class Client(Learner):
    num_train, num_test, buffer_positions = 10, 10, (1, 2)

    def get_parameters(self, config):
        return START


def run_with_records(folder: Path, identities=(None, None), **values: object) -> tuple[Path, list[Path]]:
    """A whole run of two clients in this process, with the records of all three."""
    server = federation(folder, [Learner(), Learner()], rounds=2, **values)
    admission = FakeAdmission(2, server.recipe).admission
    admission.audit, admission.run_id = server.audit, server.clients.run_id
    files = [folder / f"client-{number}.jsonl" for number in range(2)]

    def open_audit(assignment):
        number = assignment.partition
        return AuditLog(files[number], assignment.run_id, f"client {number}", identity=identities[number])

    sessions = [Session(lambda assignment: Client(), ["cat", "dog"], open_audit=open_audit) for _ in range(2)]
    for session in sessions:
        assert admission.register(Remote(session))
        while session.client is None or len(admission.ready()) < len(admission.participants):
            pass
    server.clients = server.dispatcher.clients = server.acceptance.clients = admission
    server.federate()
    assert server.exit_code == 0
    return server.folder.path / "audit.jsonl", files


def test_the_files_of_a_run_verify_and_fit_each_other(tmp_path, capsys):
    server, clients = run_with_records(tmp_path)
    for client in clients:
        assert call(audit_check.main, server, client) == 0
        assert capsys.readouterr().out.endswith("the two files fit each other\n")
    kinds = [line["kind"] for line in read_record(clients[0]).lines]
    assert kinds == [
        "begin", "assignment", "data-summary",
        *(["untrained-model"] if "untrained-model" in kinds else []),
        "model-to-evaluate", "head", "scores",
        *["model-to-train", "update", "model-to-evaluate", "head", "scores"] * 2,
        "head", "end",
    ]  # fmt: skip


def test_what_both_sides_hash_are_the_arrays_that_travelled(tmp_path):
    """Learner adds 1 to the first array, halves the second, counts in the third."""
    server, clients = run_with_records(tmp_path)
    new = [START[0] + np.float32(1), START[1] * np.float32(0.5), START[2] + 1]
    for path in (server, *clients):
        (line, *others) = [e for e in read_record(path).lines if (e["kind"], e["round"]) == ("update", 1)]
        assert (line["sha256"], line["bytes"]) == (hash_arrays(new), 8 + 4 + 8)
        assert all(other["sha256"] == line["sha256"] for other in others)


def test_compressed_arrays_are_hashed_as_they_travel(tmp_path):
    server, clients = run_with_records(tmp_path, compress="fp16")
    assert compare(read_record(server), read_record(clients[1])) == []
    (line,) = [e for e in read_record(server).lines if (e["kind"], e["round"]) == ("model", 0)]
    halves = [array.astype(np.float16) if array.dtype.kind == "f" else array for array in START]
    assert (line["sha256"], line["bytes"]) == (hash_arrays(halves), 4 + 2 + 8)


def rewritten(path: Path, change) -> None:
    """The lines changed, and the chain worked out anew, so that the file by itself is in order."""
    lines, previous = [], audit.FIRST
    for line in change([json.loads(text) for text in path.read_bytes().splitlines()]):
        text = audit.line_of({**line, "previous": previous})
        previous = hashlib.sha256(text).hexdigest()
        lines.append(text + b"\n")
    path.write_bytes(b"".join(lines))


def without(kind: str):
    return lambda lines: [line for line in lines if line["kind"] != kind]


def changed(kind: str, **values: object):
    return lambda lines: [{**line, **values} if line["kind"] == kind else line for line in lines]


FORGERIES = {
    "an update never came": without("update"),
    "another update": changed("update", sha256="f" * 64),
    "another model": changed("model-to-train", sha256="f" * 64),
    "the times": changed("scores", time="2020-01-01T00:00:00.000Z"),
    "no heads": without("head"),
    "the last round": lambda lines: [line for line in lines if line["round"] != 2],
}


@pytest.mark.parametrize("how", FORGERIES)
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_file_that_was_written_anew_as_a_whole_is_found_by_the_other_partys(side, how, tmp_path, capsys):
    server, (client, _) = run_with_records(tmp_path)
    forged = server if side == "server" else client
    rewritten(forged, FORGERIES[how])
    assert read_record(forged).problems == []
    assert call(audit_check.main, server, client) == 1
    assert capsys.readouterr().out.endswith("the two files don't fit each other\n")


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_tail_that_was_cut_off_is_found_by_the_other_partys_file(side, tmp_path, capsys):
    server, (client, _) = run_with_records(tmp_path)
    cut_off = server if side == "server" else client
    lines = cut_off.read_bytes().splitlines(keepends=True)
    cut_off.write_bytes(b"".join(lines[:-6]))
    assert call(audit_check.main, cut_off) == 0
    assert "none closes it: the run goes on, or was killed, or the end was cut off" in capsys.readouterr().out
    assert call(audit_check.main, server, client) == 1
    assert "it was cut off there, or written anew" in capsys.readouterr().out


def test_files_of_two_runs_are_not_taken_for_one(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (server, _), (_, clients) = run_with_records(tmp_path), run_with_records(tmp_path / "other")
    assert call(audit_check.main, server, clients[0]) == 1
    assert "is of run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "files", [["client", "client"], ["no such file"], ["server", "client", "client"], ["server", "."]]
)
def test_wrong_use_is_one_line_and_exit_code_2(files, tmp_path, capsys):
    server, (client, _) = run_with_records(tmp_path)
    paths = {"server": server, "client": client}
    capsys.readouterr()
    assert call(audit_check.main, *(paths.get(name, tmp_path / name) for name in files)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# What must not be in it


def test_no_line_holds_a_path_a_count_of_classes_or_anything_of_a_patient(tmp_path):
    """All keys are listed here, and what each may hold; texts are hashes, names of parties, words of ours."""
    assert set(KEYS) == {
        "previous", "time", "run", "round", "kind", "from", "to", "session", "bytes", "sha256", "privacy", "head",
        "key", "signature", "outcome",
    }  # fmt: skip
    server, clients = run_with_records(tmp_path)
    for path in (server, *clients):
        for line in read_record(path).lines:
            assert set(line) <= set(KEYS)
            assert {line["from"], line.get("to", "server")} <= {"server", "client 0", "client 1"}
            assert all(len(line[name]) == 64 for name in ("previous", "sha256", "head") if name in line)
            assert (len(line["run"]), line["privacy"]) == (16, {})
            assert line.get("outcome", "finished") == "finished"
        assert str(tmp_path) not in path.read_text()


def test_the_privacy_settings_in_use_are_those_of_the_recipe():
    assert privacy_of(Recipe()) == {}
    kinds = [("secure_aggregation", bool), ("dp_noise", float), ("dp_clip", float), ("rounds", int)]
    recipe = dataclasses.make_dataclass("Later", kinds)(True, 1.5, None, 3)
    assert privacy_of(recipe) == {"secure_aggregation": True, "dp_noise": 1.5}


# A disk that does not take it


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_client_whose_disk_is_full_does_not_train_and_says_so_in_words(tmp_path, monkeypatch, capsys):
    session = Session(
        lambda assignment: Client(), ["cat"], open_audit=lambda assignment: AuditLog(tmp_path / "a", RUN, "client 0")
    )
    place = {"ask": "place", "partition": 0, "num_partitions": 1, "recipe": Recipe().to_json(), "run": RUN}
    assert "error" not in session.get_properties(place)
    monkeypatch.setattr(audit.os, "write", full)
    arrays, examples, told = session.fit(START, {"server_round": 1, "clients_on_host": 1})
    assert (arrays, examples) == ([], 0)
    assert told == {"error": "its audit file can't be written (No space left on device)"}
    assert session.failure == (
        f"the audit file {tmp_path / 'a'} can't be written (No space left on device); free or change the disk"
    )
    assert session.client.fitted == []
    assert "Traceback" not in capsys.readouterr().err


def test_a_client_whose_folder_can_not_be_written_says_so_before_it_opens_its_data(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        audit_folder(str(tmp_path / "file/audit"))
    assert end.value.code == 1
    assert "Not a directory), and without a record there is no training; name another folder" in capsys.readouterr().err


def test_clients_that_begin_at_once_can_share_a_folder_that_is_new(tmp_path, monkeypatch):
    folder, try_to_write = tmp_path / "new/audit", audit.tempfile.TemporaryFile

    def while_another_begins(**where):
        file = try_to_write(**where)
        folder.mkdir(parents=True)
        (folder / "another").touch()
        return file

    monkeypatch.setattr(audit.tempfile, "TemporaryFile", while_another_begins)
    assert audit_folder(str(folder)) == folder
    assert (folder / "another").exists()


def test_a_client_that_never_joins_leaves_no_folder_for_its_record_behind(tmp_path):
    audit_folder(str(tmp_path / "new/audit"))
    assert not list(tmp_path.iterdir())


def test_a_server_whose_disk_is_full_stops_the_run_so_that_it_can_go_on(tmp_path, monkeypatch, capsys):
    learner = Learner()
    server = federation(tmp_path, [learner, Learner()])

    def then_full(number, *answer):
        if number == 2:
            monkeypatch.setattr(audit.os, "write", full)
        return answer

    learner.bad_fit = then_full
    server.federate()
    assert server.exit_code == 1
    said = capsys.readouterr().out
    assert "can't be written (No space left on device); free or change the disk; then go on with:" in said
    monkeypatch.undo()
    monkeypatch.setattr("os.fsync", lambda number: None)
    again = federation(tmp_path, [Learner(), Learner()], resume=True)
    again.federate()
    assert again.exit_code == 0
    assert read_record(again.folder.path / "audit.jsonl").problems == []


def test_a_client_that_is_lost_in_a_round_leaves_a_record_that_verifies(tmp_path):
    server = federation(tmp_path, [Learner(), Learner(fit=lost)], back=True)
    server.federate()
    assert read_record(server.folder.path / "audit.jsonl").problems == []


# Keys


def signed_run(folder: Path) -> tuple[Path, Path]:
    server, (_, client) = run_with_records(folder, identities=(None, Identity.new()))
    return server, client


def test_heads_are_signed_where_a_party_has_a_key(tmp_path):
    server, client = signed_run(tmp_path)
    assert compare(read_record(server), read_record(client)) == []
    (key,) = read_record(client).keys("client 1")
    heads = [line for line in read_record(server).lines if line["kind"] == "head" and line["from"] == "client 1"]
    assert len(heads) == 4  # rounds 0 to 2, and its last words
    text = f"federation audit\n{heads[1]['run']}\n1\n{heads[1]['head']}".encode()
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(heads[1]["signature"]), text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("head", signature="0" * 128), "the signature is not by the key of"),
        (lambda lines: [{k: v for k, v in e.items() if k != "signature"} for e in lines], "did not sign its head"),
    ],
)
def test_a_head_that_its_party_did_not_sign_is_found(change, words, tmp_path):
    server, client = signed_run(tmp_path)
    rewritten(server, change)
    assert any(words in problem for problem in compare(read_record(server), read_record(client)))


def test_a_party_that_shows_another_key_than_the_server_knew_it_by_is_found(tmp_path):
    server, client = signed_run(tmp_path)
    rewritten(server, changed("data-summary", key="a" * 64))
    assert any("by another key" in problem for problem in compare(read_record(server), read_record(client)))


def both_signed(folder: Path, known: Identity | None) -> tuple[Path, Path]:
    """A server and a client with keys, after one round; the client knows the server's as that of `known`."""
    ours, theirs = Identity.new(), Identity.new()
    server = AuditLog(folder / "server", RUN, identity=ours)
    client = AuditLog(folder / "client", RUN, "client 0", identity=theirs)
    client.write("assignment", sender="server", session="aa", key=(known or ours).public)
    server.write("data-summary", sender="hospital-a", session="aa", key=theirs.public)
    client.take(server.told(1), 1, "server")
    server.take(client.told(1), 1, "hospital-a", session="aa")
    return folder / "server", folder / "client"


def test_a_server_signs_too_and_the_client_may_know_its_key(tmp_path):
    server, client = both_signed(tmp_path, None)
    assert compare(read_record(server), read_record(client)) == []
    (tmp_path / "other").mkdir()
    server, client = both_signed(tmp_path / "other", Identity.new())
    (problem,) = compare(read_record(server), read_record(client))
    assert problem == f"{client} knows its party by another key than {server} has"


# Pieces


def test_what_comes_in_pieces_is_hashed_on_its_way_to_the_disk_as_if_it_came_at_once():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(300, 7)).astype(np.float32), np.zeros((0, 3)), np.array(4), np.arange(5, dtype=np.int8)]
    for piece in (1, 7, 1000, PIECE):
        store = Store(None, [(array.shape, array.dtype, array.dtype) for array in arrays])
        for start in range(0, store.size, piece):
            store.add(cut(arrays, start, min(start + piece, store.size)))
        assert store.sha256() == hash_arrays(arrays)
        store.file.close()


# Real processes


def test_the_records_of_all_verify_though_the_server_was_killed_and_a_client_too(federation):
    """The client's successor has its place, and goes on with its file."""
    flags = ("--audit", federation.folder / "audit")
    server = federation.server("--rounds", 4)
    clients = [federation.tiny("--partition-id", partition, "--seconds", 0.3, *flags) for partition in range(3)]
    clients[2].says("fit 2")
    clients[2].send(signal.SIGKILL)
    successor = federation.tiny("--partition-id", 2, "--seconds", 0.3, *flags)
    successor.says("fit")
    server.send(signal.SIGKILL)
    server.ends(-9)
    federation.server("--resume", federation.run_dir).ends(0)
    for client in (*clients[:2], successor):
        client.ends(0)
    server_file = read_record(federation.run_dir / "audit.jsonl")
    files = [read_record(path) for path in sorted((federation.folder / "audit").iterdir())]
    assert [record.problems for record in (server_file, *files)] == [[], [], [], []]
    assert [compare(server_file, record) for record in files] == [[], [], []]
    assert sum(line.get("kind") == "resume" for line in files[2].lines) == 1
    assert server_file.ended

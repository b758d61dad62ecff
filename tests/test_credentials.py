"""Members with keys: who is admitted as whom, on which place, until when; and a server that is pinned."""

import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from federation.client.session import Session
from federation.config import Recipe
from federation.security import certificates
from federation.security.credentials import ClientCredentials, NotAdmitted, Reminder, ServerCredentials, signed_text
from federation.security.identity import Identity, public_line
from federation.security.members import Members

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from helpers.fake_clients import FakeAdmission, FakeClient
from helpers.processes import wait_for

KEYS = {name: Identity(Ed25519PrivateKey.from_private_bytes(bytes([i] * 32))) for i, name in enumerate("abcd", 1)}
HERE = "127.0.0.1:8080"


class Signing(FakeClient):
    """A client that signs the server's question, as ours does; whatever else it says is given."""

    def __init__(self, key: str, *, address: str = HERE, changed: dict | None = None, **hello: object):
        super().__init__(**hello)
        self.credentials = ClientCredentials(identity=KEYS[key], address=address)
        self.changed = changed or {}

    def get_properties(self, ins, timeout, group_id):
        if ins.config["ask"] == "hello":
            self.hello |= {**self.credentials.answer(ins.config), **self.changed}
        return super().get_properties(ins, timeout, group_id)


class Federation(FakeAdmission):
    """Of these members: names of KEYS, with options in front of the line."""

    def __init__(self, folder, lines: dict[str, str], *, places: int = 3, **credentials: object):
        self.path, self.changes = folder / "members", 0
        self.write(lines)
        credentials = ServerCredentials(members=Members.load(str(self.path)), **credentials)
        super().__init__(places, Recipe(partitioner="local"), credentials=credentials)
        self.admission.run_id = "0123456789abcdef"

    def write(self, lines: dict[str, str]) -> None:
        self.path.write_text("".join(f"{options} {public_line(KEYS[k].public)} {k}\n" for k, options in lines.items()))
        self.changes += 1
        os.utime(self.path, ns=(self.changes, self.changes))  # however coarse the file system's clock is

    def place(self, client: FakeClient) -> int:
        return self.admission.of_client(client).partition


def test_a_member_is_admitted_by_its_key_and_called_by_its_name(tmp_path):
    fake = Federation(tmp_path, {"a": "", "b": ""})
    client = fake.joins(Signing("a"))
    assert fake.admission.of_client(client).title == "a"
    assert fake.said == ["a joined, 100 training examples (1 of 3 there)"]
    assert fake.admission.known_members() == {"0": {"name": "a", "key": KEYS["a"].public}}


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (lambda: FakeClient(), "this server admits members only; start the client with --identity"),
        (lambda: Signing("c"), "its key is no member's, or has expired; give the server the line of the .pub file"),
        (
            lambda: Signing("a", address="fl.example.org:1"),
            "a calls this server fl.example.org:1, which is none of its",
        ),
        (lambda: Signing("a", changed={"signature": KEYS["b"].sign(b"")}), "the signature of a is wrong"),
        (lambda: Signing("a", changed={"challenge": "another"}), "the signature of a is wrong"),
        (lambda: Signing("a", changed={"identity": KEYS["b"].public}), "the signature of b is wrong"),
        (lambda: Signing("a", changed={"address": "localhost:8080"}), "the signature of a is wrong"),
        (lambda: Signing("a", changed={"identity": "x" * 10**6}), "its key is no member's, or has expired"),
        (lambda: Signing("a", changed={"signature": 7}), "the signature of a is wrong"),
    ],
    ids=["none", "no member", "other server", "other key", "challenge", "identity", "address", "long", "number"],
)
def test_nobody_else_is(client, words, tmp_path):
    fake = Federation(tmp_path, {"a": "", "b": ""})
    one = fake.joins(client())
    assert one.told["kind"] == "refused"
    assert one.told["words"].startswith(words)
    assert not fake.admission.participants


def test_a_signature_is_good_for_one_question_of_one_run(tmp_path):
    text = signed_text("join", "0123456789abcdef", HERE, "nonce", "challenge")
    assert text == b'["federation join 1", "0123456789abcdef", "127.0.0.1:8080", "nonce", "challenge"]'
    server = ServerCredentials(members=Federation(tmp_path, {"a": ""}).admission.credentials.members)
    told = ClientCredentials(identity=KEYS["a"], address=HERE).answer({"nonce": "n", "run": "r"})
    assert server.check(told, "r", "n").name == "a"
    for run, nonce in (("r", "m"), ("s", "n")):
        with pytest.raises(NotAdmitted, match="signature of a is wrong"):
            server.check(told, run, nonce)


def test_a_hostile_server_cannot_pass_a_signature_on_by_line_breaks_in_what_it_asks(tmp_path):
    """It puts the good server's run, address and nonce into its own questions; the signature must fit no other text."""
    good = ServerCredentials(members=Federation(tmp_path, {"a": ""}).admission.credentials.members, identity=KEYS["b"])
    run, nonce = "0123456789abcdef", "00" * 32
    client = ClientCredentials(identity=KEYS["a"], server_key=KEYS["b"].public, address="evil.org:8080")
    for gap in ("\n", '", "', "\\n"):
        told = client.answer({"run": f"{run}{gap}{HERE}{gap}{nonce}{gap}x", "nonce": "m"})
        challenge = f"x{gap}evil.org:8080{gap}m{gap}{told['challenge']}"
        passed_on = {**told, "address": HERE, "challenge": challenge}
        with pytest.raises(NotAdmitted, match="signature of a is wrong"):
            good.check(passed_on, run, nonce)
        assert good.prove(passed_on, run, nonce) == ""


def test_a_fixed_place_that_is_not_there_or_taken_is_no_reason_for_another(tmp_path):
    fake = Federation(tmp_path, {"a": "partition=7", "b": "", "c": ""})
    told = fake.joins(Signing("a")).told
    assert (told["words"], told["code"]) == ("a has partition 7; this run has partitions 0 to 2", 2)
    fake.joins(Signing("b"))
    fake.write({"c": "partition=0", "b": ""})
    assert fake.joins(Signing("c")).told["words"] == "partition 0, the only one that c may have, is taken"


def test_a_changed_line_of_a_member_makes_it_nobody_else(tmp_path):
    fake = Federation(tmp_path, {"a": "", "b": ""})
    first = fake.joins(Signing("a"))
    fake.write({"a": "expiry-time=20991231Z", "b": ""})
    assert fake.joins(Signing("a")).told["words"] == "a takes part already; end its other client first"
    assert fake.admission.of_client(first).member.expires == datetime(2099, 12, 31, tzinfo=UTC)
    assert fake.place(fake.joins(Signing("a", instance=first.hello["instance"]))) == 0


def test_a_member_keeps_its_place_and_gets_it_back(tmp_path):
    fake = Federation(tmp_path, {"a": "", "b": "", "c": ""}, places=2)
    first = fake.joins(Signing("a"))
    fake.joins(Signing("b"))
    fake.admission.lose(first)
    assert fake.said[-1] == "a left; its place is kept for it"
    assert fake.joins(Signing("c")).told["kind"] == "wait"
    assert fake.place(fake.joins(Signing("a"))) == 0


def test_a_fixed_place_is_its_members_alone(tmp_path):
    fake = Federation(tmp_path, {"a": "partition=2", "b": "", "c": ""})
    assert [fake.place(fake.joins(Signing(key))) for key in "bc"] == [0, 1]
    words = fake.joins(Signing("a", wanted=1)).told
    assert (words["words"], words["code"]) == ("--partition-id 1: a has partition 2", 2)
    assert fake.place(fake.joins(Signing("a"))) == 2


def test_of_two_clients_with_one_key_the_later_is_refused(tmp_path):
    fake = Federation(tmp_path, {"a": "", "b": ""})
    first = fake.joins(Signing("a"))
    assert fake.joins(Signing("a")).told["words"] == "a takes part already; end its other client first"
    again = fake.joins(Signing("a", instance=first.hello["instance"]))  # its own stream, broken and not noticed
    assert fake.place(again) == 0
    assert fake.joins(Signing("b", instance=first.hello["instance"])).partition == 1


def test_a_removed_member_is_told_and_its_place_is_for_who_waits(tmp_path):
    fake = Federation(tmp_path, {"a": "", "b": "", "c": ""}, places=2)
    first, second = fake.joins(Signing("a")), fake.joins(Signing("b"))
    waiting = Signing("c")
    fake.joins(waiting)
    fake.write({"b": "", "c": ""})
    fake.admission.check_members()
    wait_for(lambda: first.told, "a is told", 10)
    assert first.told["words"] == "it is no member of this federation any more"
    assert fake.said[-1] == "a is no member any more; its place is free"
    assert fake.admission.participants.keys() == {1}
    assert fake.place(fake.joins(Signing("c", instance=waiting.hello["instance"]))) == 0
    assert fake.place(second) == 1
    assert fake.admission.title(0) == "c"


def test_a_member_that_expires_is_dropped_as_one_that_is_removed(tmp_path):
    fake = Federation(tmp_path, {"a": "", "b": ""})
    client = fake.joins(Signing("a"))
    fake.write({"a": "expiry-time=20200101", "b": ""})
    fake.admission.check_members()
    wait_for(lambda: client.told, "a is told", 10)
    assert fake.joins(Signing("a")).told["words"].startswith("its key is no member's, or has expired")


def test_a_changed_secret_is_asked_of_newcomers_only(tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("old")
    secret.chmod(0o600)
    fake = FakeAdmission(credentials=ServerCredentials(b"old", str(secret)))
    inside = fake.joins(Signed(b"old"))
    secret.write_text("newer")
    assert fake.joins(Signed(b"old")).told["words"].startswith("wrong shared secret")
    assert fake.admitted(fake.joins(Signed(b"newer")))
    assert fake.admitted(inside)
    secret.write_text("   ")
    assert fake.admitted(fake.joins(Signed(b"newer")))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"--secret-file {secret} has changed; who joins from now on needs the new secret"
    assert said[1].startswith(f"warning: the shared secret in {secret} is empty")
    assert said[1].endswith("; the secret stays as it was")


def test_a_client_that_stays_reads_a_changed_secret_again_and_keeps_it_where_the_new_one_can_not_be_used(
    tmp_path, capsys
):
    secret = tmp_path / "secret"
    secret.write_text("old")
    secret.chmod(0o600)
    credentials = ClientCredentials(b"old", secret_file=str(secret))
    for text, expected in (("newer", b"newer"), ("   ", b"newer"), ("newest one", b"newest one")):
        secret.write_text(text)
        credentials.refresh()
        assert credentials.secret == expected
    secret.unlink()
    credentials.refresh()
    assert credentials.secret == b"newest one"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2, "the empty one, and the one that is gone"
    assert all(line.endswith("; the secret stays as it was") for line in said)
    credentials.refresh()
    assert capsys.readouterr().out == "", "said once"


class Signed(FakeClient):
    """A client with a shared secret."""

    def __init__(self, secret: bytes):
        super().__init__()
        self.secret = secret

    def get_properties(self, ins, timeout, group_id):
        if ins.config["ask"] == "hello":
            self.hello |= ClientCredentials(self.secret).answer(ins.config)
        return super().get_properties(ins, timeout, group_id)


# The server's names, and its key


def pem(*hosts: str, days: int = 100) -> tuple[bytes, bytes, bytes]:
    authority = certificates.make_authority()
    names = [x509.IPAddress(ip_address(h)) if h[0].isdigit() else x509.DNSName(h) for h in hosts]
    pair = certificates.issue(authority, names, timedelta(days=days))
    return (*(each.certificate.public_bytes(Encoding.PEM) for each in (authority, pair)), b"")


def test_with_a_certificate_the_servers_names_are_those_in_it():
    server = ServerCredentials(certificates=pem("fl.example.org", "192.0.2.7"))
    assert [server.is_own(each) for each in ("FL.example.org:8080", "192.0.2.7:1", "other.org:8080", HERE, "")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_without_one_it_is_this_machine_or_with_insecure_anything():
    assert [ServerCredentials().is_own(each) for each in (HERE, "localhost:1", "fl.org:1")] == [True, True, False]
    assert ServerCredentials(insecure=True).is_own("fl.org:1")


def session(pinned: str, identity: Identity | None = None) -> Session:
    credentials = ClientCredentials(identity=identity, server_key=KEYS[pinned].public, address=HERE)
    return Session(lambda assignment: None, ["cat"], credentials=credentials)


def answer_of(one: Session, server: ServerCredentials) -> str:
    """What the client says to an assignment from this server; "" where it goes on to open its data."""
    hello = one.get_properties({"ask": "hello", "nonce": "n", "run": "r", "protocol": 1})
    question = {"ask": "place", "recipe": "no recipe", "signature": server.prove(hello, "r", "n")}
    words = one.get_properties(question)["error"]
    return words if "--server-key" in words else ""


def test_a_client_takes_no_assignment_from_another_server_than_the_pinned_one(capsys):
    assert answer_of(session("a"), ServerCredentials(identity=KEYS["a"])) == ""
    other = answer_of(session("a"), ServerCredentials(identity=KEYS["b"]))
    assert other == "the server is not the one of this client's --server-key: it gave a wrong signature"
    none = answer_of(session("a"), ServerCredentials())
    assert none == "the server is not the one of this client's --server-key: it has no --identity, or not by this name"


def test_a_server_signs_for_no_client_that_calls_it_by_another_servers_name():
    hello = session("a").get_properties({"ask": "hello", "nonce": "n", "run": "r"}) | {"address": "fl.org:1"}
    assert ServerCredentials(identity=KEYS["a"]).prove(hello, "r", "n") == ""


def test_a_certificate_that_ends_within_thirty_days_is_said_once_a_day(capsys, monkeypatch):
    now = datetime.now(UTC)
    reminder = Reminder({"--certificate": pem("a.org", days=29)[1], "--ca-certificate": pem("a.org", days=31)[1]})
    reminder.remind()
    reminder.remind()
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.startswith("warning: --certificate ends on 20")
    assert line.endswith("python -m federation.certificates --host NAME --renew makes a new one\n")

    class Tomorrow(datetime):
        @classmethod
        def now(cls, zone=None):
            return now + timedelta(days=1)

    monkeypatch.setattr("federation.security.credentials.datetime", Tomorrow)
    reminder.remind()
    assert capsys.readouterr().out.count("\n") == 1


def test_at_the_start_both_sides_say_which_certificate_ends_soon(capsys):
    authority, certificate, _ = pem("a.org", days=5)
    ServerCredentials(reminder=Reminder({"--certificate": certificate}))
    ClientCredentials(reminder=Reminder({"--ca-certificate": certificate, "--certificate": authority}))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ends on ")[0] for line in said] == ["warning: --certificate", "warning: --ca-certificate"]


# A whole run


def test_a_run_of_members_goes_on_without_one_that_is_removed_and_with_one_that_comes(federation):
    """And is resumed with those that are left."""
    folder, names = federation.folder, ("a", "b", "c")
    for name in names:
        KEYS[name].write(folder / name, name)
    members = folder / "members"
    lines = {name: (folder / f"{name}.pub").read_text() for name in names}
    members.write_text(lines["a"] + lines["b"])
    flags = ["--members", members, "--partitioner", "local", "--rejoin-wait", 100, "--clients", 2, "--rounds", 3]
    server = federation.server(*flags)
    go = folder / "go"
    first = federation.tiny("--identity", folder / "a", "--in-round", 2, "--until", go)
    server.says("a joined")
    second = federation.tiny("--identity", folder / "b")
    first.says("fit 2")
    members.write_text(lines["a"] + lines["c"])
    go.touch()
    assert "dropped: it is no member of this federation any more" in second.ends(1)
    third = federation.tiny("--identity", folder / "c")
    server.ends(0)
    for process in (first, third):
        process.ends(0)
    history = federation.history()
    assert [row["clients"] for row in history["rounds"]] == [2, 2, 2, 2]
    assert {place: each["name"] for place, each in history["config"]["members"].items()} == {"0": "a", "1": "c"}
    assert "c joined" in server.output
    members.write_text(lines["a"])
    server = federation.server("--resume", federation.run_dir, "--members", members, "--clients", 1)
    last = federation.tiny("--identity", folder / "a")
    server.ends(0)
    last.ends(0)

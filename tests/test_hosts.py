"""A server and clients on different hosts: TLS and a secret over real addresses, and a cut of one host's link."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from federation.security.identity import Identity

import pytest
from helpers.example_runs import make_images
from helpers.hosts import Host, Hosts, NoHosts
from helpers.processes import CLEAN, ROOT, Federation, Process, quick_python, wait_for

CUT_SECONDS = 20


class FarFederation(Federation):
    """A federation whose server and clients run on the hosts, the server on the first; with TLS and a secret."""

    def __init__(self, folder: Path, hosts: list[Host], keys: Path, port: int = 8080):
        super().__init__(folder)
        self.hosts = hosts
        self.keys = keys
        self.port = port
        self.address = f"{hosts[0].address}:{port}"
        self.shared = ["--ca-certificate", keys / "ca.pem", "--secret-file", keys / "secret.txt"]

    def far_server(self, *flags: object) -> Process:
        certificate = ["--certificate", self.keys / "server.pem", "--private-key", self.keys / "server.key"]
        listen = ["--address", f"0.0.0.0:{self.port}", *certificate, *self.shared]
        return self.server(*listen, *flags, prefix=self.hosts[0].prefix)

    def far_client(self, partition: int, *flags: object) -> Process:
        return self.client("--partition-id", partition, *self.shared, *flags, prefix=self.hosts[1 + partition].prefix)

    def far_tiny(self, partition: int, *flags: object) -> Process:
        return self.tiny("--partition-id", partition, *self.shared, *flags, prefix=self.hosts[1 + partition].prefix)

    def clients_by_round(self) -> list[int]:
        return [row["clients"] for row in self.history()["rounds"]]

    def comings_and_goings(self) -> list[tuple[str, int]]:
        """After the first three joins."""
        return [(event["event"], event["partition"]) for event in self.history()["events"]][3:]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """The server's host and three clients'."""
    with ExitStack() as stack:
        try:
            machines = stack.enter_context(Hosts(4))
        except NoHosts as reason:
            pytest.skip(str(reason))
        yield machines


@pytest.fixture(scope="module")
def keys(hosts, tmp_path_factory) -> Path:
    """The docs' certificates, for the server's address, and a secret."""
    folder = tmp_path_factory.mktemp("keys")
    made = [quick_python(), "-m", "federation.certificates", "--host", hosts[0].address, "--out", folder]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    (folder / "secret.txt").write_text("for certain\n")
    return folder


def test_a_server_and_three_clients_on_four_hosts(hosts, keys, tmp_path):
    images = make_images(tmp_path / "images")
    with FarFederation(tmp_path, hosts, keys) as federation:
        server = federation.far_server("--rounds", 1, "--model", "lenet")
        clients = [federation.far_client(i, "--dataset", images, "--threads", 1) for i in range(3)]
        for process in [server, *clients]:
            process.ends(0, seconds=200)  # four Pythons and three PyTorches to start
        assert "server on 0.0.0.0:8080 with TLS" in server.output
        assert federation.clients_by_round() == [3, 3]


@pytest.fixture(scope="module")
def cut(hosts, keys, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Three runs over the same hosts, all hit in round 2 by the same cut of client 2's link, and all ended with 0.

    training   client 2 trains when the link is cut, and is done before it is restored
    waiting    client 2 is done with its training, and waits; the others are done before the link is restored
    closed     as training, with a --round-timeout that ends before the link is restored
    """
    go = tmp_path_factory.mktemp("go") / "go"
    hold = ["--in-round", 2, "--until", go]
    with ExitStack() as stack:
        runs = {}
        for port, name in enumerate(("training", "waiting", "closed"), start=8080):
            federation = FarFederation(tmp_path_factory.mktemp(name), hosts, keys, port)
            runs[name] = stack.enter_context(federation)
        training, waiting, closed = runs.values()
        training.far_server(), waiting.far_server()
        closing = closed.far_server("--round-timeout", 8, "--rejoin-wait", 60)
        for i in range(3):
            training.far_tiny(i, *(hold if i == 2 else []))
            waiting.far_tiny(i, *(hold if i != 2 else []))
        for i in range(2):
            closed.far_tiny(i)
        for process in [*training.processes[1:], *waiting.processes[1:]]:
            process.says("fit 2")
        # Its rounds wait for client 2, so the clock of its --round-timeout begins to run only now.
        closed.far_tiny(2, *hold).says("fit 2")
        hosts[3].cut()
        restored = time.monotonic() + CUT_SECONDS
        closing.says("client 2 did not answer within 8 s")
        go.touch()
        assert time.monotonic() < restored
        wait_for(lambda: time.monotonic() >= restored, "the end of the cut", CUT_SECONDS + 1)
        hosts[3].restore()
        for federation in runs.values():
            for process in federation.processes:
                process.ends(0)
        yield SimpleNamespace(**runs)


def test_an_update_sent_during_a_cut_counts_once_the_link_is_restored(cut):
    assert cut.training.clients_by_round() == [3, 3, 3, 3]
    assert cut.training.comings_and_goings() == []
    assert cut.training.history()["rounds"][2]["seconds"] > CUT_SECONDS


def test_a_client_that_waits_during_a_cut_keeps_its_place(cut):
    assert cut.waiting.clients_by_round() == [3, 3, 3, 3]
    assert cut.waiting.comings_and_goings() == []
    assert cut.waiting.history()["rounds"][2]["seconds"] > CUT_SECONDS


def test_a_round_that_closes_during_a_cut_counts_without_the_client_and_it_rejoins(cut):
    assert cut.closed.clients_by_round() == [3, 3, 2, 3]
    assert cut.closed.comings_and_goings() == [("leave", 2), ("join", 2)]
    assert "back in place 2" in cut.closed.processes[-1].output


def test_of_three_members_one_is_expelled_one_joins_the_server_is_killed_and_all_records_verify(hosts, keys, tmp_path):
    for name in ("a", "b", "c", "d", "server"):
        Identity.new().write(tmp_path / name, name)
    lines = {name: (tmp_path / f"{name}.pub").read_text() for name in "abcd"}
    members, go, audit = tmp_path / "members", tmp_path / "go", tmp_path / "audit"
    members.write_text(lines["a"] + lines["b"] + lines["c"])
    with FarFederation(tmp_path, hosts, keys) as federation:
        federation.shared = ["--ca-certificate", keys / "ca.pem"]
        flags = [
            "--members",
            members,
            "--identity",
            tmp_path / "server",
            "--partitioner",
            "local",
            "--rejoin-wait",
            100,
        ]
        server = federation.far_server(*flags, "--rounds", 4)

        def start(name: str, host: int, *more: object) -> Process:
            mine = ["--identity", tmp_path / name, "--server-key", tmp_path / "server.pub", "--audit", audit / name]
            return federation.tiny(*federation.shared, *mine, *more, prefix=hosts[host].prefix)

        clients = {"a": start("a", 1, "--in-round", 2, "--until", go)}
        server.says("a joined")
        clients["b"] = start("b", 2)
        server.says("b joined")
        clients["c"] = start("c", 3)
        clients["a"].says("fit 2")
        members.write_text(lines["a"] + lines["b"] + lines["d"])
        go.touch()
        assert "dropped: it is no member of this federation any more" in clients["c"].ends(1)
        clients["d"] = start("d", 3)
        server.says(r"\n +3 +3 ")
        server.send(signal.SIGKILL)
        server.ends(-9)
        server = federation.far_server("--resume", federation.run_dir, *flags)
        server.ends(0)
        for name in "abd":
            clients[name].ends(0)
    history = federation.history()
    assert federation.clients_by_round() == [3] * 5
    assert {place: one["name"] for place, one in history["config"]["members"].items()} == {"0": "a", "1": "b", "2": "d"}
    for name in "abcd":
        (record,) = (audit / name).iterdir()
        done = subprocess.run(
            [quick_python(), "-m", "federation.audit", federation.run_dir / "audit.jsonl", record],
            cwd=ROOT, env=CLEAN, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_hosts_leave_nothing_behind():
    def namespaces() -> str:
        return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout

    try:
        with Hosts(1) as (host,):
            assert host.namespace in namespaces()
    except NoHosts as reason:
        pytest.skip(str(reason))
    assert host.namespace.removesuffix("1") not in namespaces()

"""Clients and server that fail: the run goes on, or ends in words, and never hangs."""

import signal
from pathlib import Path

import pytest
from processes import Federation


@pytest.fixture
def federation(tmp_path: Path):
    with Federation(tmp_path) as federation:
        yield federation


def test_a_run_of_three_tiny_clients_ends_with_exit_0_everywhere(federation):
    server = federation.server("--rounds", 2)
    clients = [federation.tiny() for _ in range(3)]
    for process in [server, *clients]:
        process.ends(0)


def test_a_killed_client_is_left_out_and_its_place_is_taken_again(federation):
    server = federation.server("--rounds", 4, "--rejoin-wait", 20)
    clients = [federation.tiny("--partition-id", i, "--seconds", 0.5) for i in range(3)]
    clients[1].says("fit 2")
    clients[1].send(signal.SIGKILL)
    server.says("client 1 left")
    again = federation.tiny()
    for process in [server, again, clients[0], clients[2]]:
        process.ends(0)
    assert [row["clients"] for row in federation.history()["rounds"]] == [3, 3, 2, 3, 3]

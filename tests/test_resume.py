"""Servers that fail: nothing is lost, and a resumed run ends with the same bits."""

import os
import random
import resource
import signal
import subprocess

import pytest
from helpers.processes import Federation, Process, wait_for

ROUNDS = 12


def start_clients(federation, *flags) -> list[Process]:
    return [federation.tiny("--partition-id", i, *flags) for i in range(3)]


@pytest.fixture(scope="module")
def quiet_model(tmp_path_factory) -> bytes:
    """model.safetensors of the run that nothing happened to."""
    with Federation(tmp_path_factory.mktemp("quiet")) as federation:
        server = federation.server("--rounds", ROUNDS, "--strategy", "fedadam")
        start_clients(federation)
        server.ends(0)
        return federation.model()


def test_killed_at_ten_moments_and_resumed_a_run_ends_with_the_same_bits(federation, quiet_model):
    """Under fedadam, whose server-side moments must survive too; clients come back by themselves."""
    moments = random.Random(0)
    server = federation.server("--rounds", ROUNDS, "--strategy", "fedadam")
    clients = start_clients(federation, "--seconds", 0.15)
    for kill in range(10):
        wait_for(lambda least=kill: newest(federation) >= least, f"checkpoint {kill}")
        with pytest.raises(subprocess.TimeoutExpired):  # somewhere in the next round: before, in, or after its training
            server.popen.wait(moments.uniform(0, 0.25))
        server.send(signal.SIGKILL)
        server.ends(-9)
        server = federation.server("--resume", federation.run_dir)
    server.ends(0)
    for client in clients:
        client.ends(0)
    assert federation.model() == quiet_model
    assert [row["round"] for row in federation.history()["rounds"]] == list(range(ROUNDS + 1))


def newest(federation) -> int:
    return max((int(path.stem[-6:]) for path in federation.run_dir.glob("checkpoint-*.npz")), default=-1)


def test_killed_before_the_first_checkpoint_a_run_resumes_from_the_start(federation):
    server = federation.server("--rounds", 2)
    server.says("waiting for 3 clients")
    server.send(signal.SIGKILL)
    server.ends(-9)
    server = federation.server("--resume", federation.run_dir)
    server.says("from the start")
    clients = start_clients(federation)
    for process in [server, *clients]:
        process.ends(0)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(federation, quiet_model):
    server = federation.server("--rounds", ROUNDS, "--strategy", "fedadam")
    start_clients(federation)
    server.ends(0)
    newest = federation.run_dir / f"checkpoint-{ROUNDS:06d}.npz"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    newest.write_bytes(damaged)
    (federation.run_dir / "model.safetensors").unlink()
    server = federation.server("--resume", federation.run_dir)
    start_clients(federation)
    output = server.ends(0)
    assert f"{newest} is damaged" in output
    assert f"after round {ROUNDS - 1}" in output
    assert federation.model() == quiet_model


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_server_tells_its_clients_and_ends_within_5_seconds(federation, number, code):
    server = federation.server("--rounds", 50)
    clients = start_clients(federation, "--seconds", 0.3, "--wait", 20)
    clients[0].says("fit 2")
    server.send(number)
    output = server.ends(code, seconds=5)
    assert f"stopped by {number.name} after round" in output
    assert f"--resume {federation.run_dir}" in output
    for client in clients:
        client.says("the server was stopped by|ended the connection|no server at")
    assert newest(federation) >= 1
    server = federation.server("--resume", federation.run_dir, "--target", 0.1)
    server.ends(0)
    for client in clients:
        client.ends(0)


def test_a_server_interrupted_while_it_waits_for_clients_ends_at_once(federation):
    server = federation.server()
    server.says("waiting for 3 clients")
    server.send(signal.SIGINT)
    server.ends(130, seconds=5)


def test_clients_give_up_on_a_server_that_vanished_after_wait_seconds(federation):
    server = federation.server("--rounds", 50)
    clients = start_clients(federation, "--seconds", 0.3, "--wait", 2)
    clients[0].says("fit 2")
    server.send(signal.SIGKILL)
    for client in clients:
        assert "after 2 s; start `python server.py`" in client.ends(1)


@pytest.mark.skipif(os.name != "posix", reason="the limit on a file's size that stands for a full disk is POSIX's")
def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_the_last_checkpoint_whole(federation):
    def fill_up() -> None:  # files of more than these bytes can't be written: history.json grows beyond it
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    server = federation.server("--rounds", 50, preexec_fn=fill_up)
    clients = start_clients(federation)
    output = server.ends(1)
    assert "Traceback" not in output
    assert "can't be written (File too large)" in output
    for client in clients:
        assert "failed" in client.ends(1)
    server = federation.server("--resume", federation.run_dir, "--target", 0.1)
    start_clients(federation)
    assert "damaged" not in server.ends(0)


def test_a_full_disk_is_noticed_before_the_first_round(federation):
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    output = federation.server(preexec_fn=full).ends(1)
    assert "can't be written" in output
    assert output.count("\n") == 1


def test_the_real_clients_end_with_the_same_bits_too(tmp_path):
    """Seeds of local training are a function of partition and round, not of what ran before."""
    models = []
    for name, kill in (("quiet", False), ("killed", True)):
        (tmp_path / name).mkdir()
        with Federation(tmp_path / name) as federation:
            server = federation.server("--rounds", 2, "--model", "lenet")
            clients = [federation.client("--threads", 1) for _ in range(3)]
            if kill:
                clients[0].says("round 1: trained")
                server.send(signal.SIGKILL)
                server.ends(-9)
                server = federation.server("--resume", federation.run_dir)
            for process in [server, *clients]:
                process.ends(0)
            models.append(federation.model())
    assert models[0] == models[1]

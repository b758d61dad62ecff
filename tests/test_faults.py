"""Clients that fail: the run goes on with the others, or ends in words, and never hangs."""

import inspect
import signal

import pytest
from flwr.server.superlink.fleet.grpc_bidi.grpc_server import start_grpc_server
from helpers.processes import NetworkLink


def clients_by_round(federation) -> list[int]:
    return [row["clients"] for row in federation.history()["rounds"]]


BAD_UPDATES = {
    "nan": "array 0 holds NaN or infinite values",
    "shape": "array 0 has shape (4,) instead of (2, 2)",
    "dtype": "array 1 has dtype float64 instead of float32",
    "fewer": "2 arrays instead of 3",
    "claim": "it claims 1152921504606846976 examples, having declared ",
    "none": "it claims 0 examples, having declared ",
    "train-loss": "its training loss is inf",
}


def test_every_bad_update_is_left_out_and_named_and_the_run_goes_on(federation):
    server = federation.server("--rounds", 3, "--clients", 2 + len(BAD_UPDATES))
    clients = [federation.tiny("--partition-id", i) for i in range(2)]
    for partition, behave in enumerate(BAD_UPDATES, start=2):
        clients.append(federation.tiny("--partition-id", partition, "--behave", behave, "--in-round", 2))
    for process in [server, *clients]:
        process.ends(0)
    assert clients_by_round(federation) == [9, 9, 2, 9]
    rejected = federation.history()["rejected"]
    for partition, reason in enumerate(BAD_UPDATES.values(), start=2):
        (row,) = [row for row in rejected if row["partition"] == partition]
        assert row["round"] == 2
        assert row["reason"].startswith(reason)
        assert f"round 2: client {partition} left out: {row['reason']}" in server.output


def test_three_bad_updates_in_a_row_cost_the_place(federation):
    server = federation.server("--rounds", 4, "--rejoin-wait", 0)
    good = [federation.tiny("--partition-id", i) for i in (0, 2)]
    bad = federation.tiny("--partition-id", 1, "--behave", "nan")
    assert "dropped: 3 bad updates in a row" in bad.ends(1)
    for process in [server, *good]:
        process.ends(0)
    assert clients_by_round(federation) == [3, 2, 2, 2, 2]


@pytest.mark.parametrize("behave", ["loss", "accuracy"])
def test_a_senseless_evaluation_does_not_count(federation, behave):
    server = federation.server("--rounds", 1)
    good = [federation.tiny("--partition-id", i) for i in (0, 2)]
    federation.tiny("--partition-id", 1, "--behave", behave)
    server.says(f"client 1 left out: its {behave} is")
    for process in [server, *good]:
        process.ends(0)
    assert [row["accuracy"] for row in federation.history()["rounds"]] == [0.5, 0.5]


@pytest.mark.parametrize("strategy", ["fedadam", "krum"])  # the others in test_strategy.py
def test_a_strategy_survives_a_nan_update(federation, strategy):
    server = federation.server("--rounds", 2, "--strategy", strategy)
    clients = [federation.tiny("--partition-id", i) for i in (0, 2)]
    clients.append(federation.tiny("--partition-id", 1, "--behave", "nan", "--in-round", 1))
    for process in [server, *clients]:
        process.ends(0)
    assert clients_by_round(federation) == [3, 2, 3]


def test_a_clipped_update_cannot_pull_the_model_away(federation):
    server = federation.server("--rounds", 1, "--max-update-norm", 0.5)
    clients = [federation.tiny(), federation.tiny(), federation.tiny("--behave", "far")]
    for process in [server, *clients]:
        process.ends(0)
    weights = federation.weights()
    assert sum(float((array**2).sum()) for array in weights[:2]) <= 0.5**2 * 1.001


def test_a_killed_client_started_again_gets_its_partition_back(federation):
    server = federation.server("--rounds", 4)
    clients = [federation.tiny("--partition-id", i, "--seconds", 0.5) for i in range(3)]
    clients[1].says("fit 2")
    clients[1].send(signal.SIGKILL)
    server.says("client 1 left")
    again = federation.tiny()
    for process in [server, again, clients[0], clients[2]]:
        process.ends(0)
    assert clients_by_round(federation) == [3, 3, 2, 3, 3]


def test_the_run_goes_on_without_a_killed_client_while_min_clients_are_there(federation):
    server = federation.server("--rounds", 3, "--rejoin-wait", 1)
    clients = [federation.tiny("--partition-id", i, "--seconds", 0.3) for i in range(3)]
    clients[2].says("fit 1")
    clients[2].send(signal.SIGKILL)
    for process in [server, *clients[:2]]:
        process.ends(0)
    assert clients_by_round(federation) == [3, 2, 2, 2]


def test_with_fewer_than_min_clients_the_checkpoint_stays_and_all_end_with_1(federation):
    server = federation.server("--rounds", 3, "--rejoin-wait", 1)
    clients = [federation.tiny("--partition-id", i, "--seconds", 0.3) for i in range(3)]
    clients[0].says("fit 2")
    for client in clients[1:]:
        client.send(signal.SIGKILL)
    output = server.ends(1)
    assert "1 of 3 clients left after round 2, and --min-clients is 2" in output
    assert f"--resume {federation.run_dir}" in output
    assert "failed: 1 of 3 clients left" in clients[0].ends(1)
    assert (federation.run_dir / "checkpoint-000002.npz").exists()


def test_a_stopped_client_costs_its_round_only_until_round_timeout(federation):
    server = federation.server("--rounds", 3, "--round-timeout", 3, "--rejoin-wait", 20)
    clients = [federation.tiny("--partition-id", i, "--seconds", 0.3) for i in range(3)]
    clients[1].says("fit 2")
    clients[1].send(signal.SIGSTOP)
    server.says(r"client 1 did not answer within 3 s \(--round-timeout\)")
    clients[1].send(signal.SIGCONT)
    for process in [server, *clients]:
        process.ends(0)
    assert clients_by_round(federation) == [3, 3, 2, 3]


def test_a_client_that_is_cut_off_costs_its_round_and_rejoins_once_the_link_is_restored(federation):
    server = federation.server("--rounds", 4, "--round-timeout", 3, "--rejoin-wait", 30)
    clients = [federation.tiny("--partition-id", i, "--seconds", 0.3) for i in range(2)]
    link = NetworkLink(federation.address)
    far = federation.tiny("--partition-id", 2, "--seconds", 0.3, "--server", link.address)
    far.says("fit 2")
    link.cut()
    server.says("client 2 did not answer within 3 s")
    link.restore()
    for process in [server, *clients, far]:
        process.ends(0)
    link.close()
    assert clients_by_round(federation) == [3, 3, 2, 3, 3]


def test_a_client_stopped_for_good_does_not_keep_the_server_at_exit(federation):
    server = federation.server("--rounds", 1, "--round-timeout", 2)
    clients = [federation.tiny("--partition-id", i, "--seconds", 0.3) for i in range(3)]
    clients[1].says("fit 1")
    clients[1].send(signal.SIGSTOP)
    server.ends(0, seconds=20)


def test_a_client_that_raises_shows_where_and_tells_the_server_the_kind_alone(federation):
    server = federation.server("--rounds", 2, "--rejoin-wait", 0)
    good = [federation.tiny("--partition-id", i) for i in (0, 2)]
    bad = federation.tiny("--partition-id", 1, "--behave", "raise", "--in-round", 2)
    output = bad.ends(1)
    assert output.endswith("error: RuntimeError: the disk of this hospital is on fire\n")
    assert "tiny_client.py" in output, "it shows no file and line"
    told = server.ends(0)
    assert "client 1 left out: it says: its own code failed (RuntimeError)" in told
    assert "hospital" not in told + (federation.run_dir / "history.json").read_text()
    for client in good:
        client.ends(0)


def test_nobody_comes_and_the_server_ends_after_join_timeout(federation):
    assert "0 of 3 clients came within 1 s" in federation.server("--join-timeout", 1).ends(1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_client_that_is_interrupted_leaves_and_the_run_goes_on(federation, number, code):
    server = federation.server("--rounds", 2, "--model", "lenet", "--rejoin-wait", 0)
    clients = [federation.client("--partition-id", i, "--threads", 1) for i in range(3)]
    clients[2].says("round 1: trained")
    clients[2].send(number)
    assert "Traceback" not in clients[2].ends(code)
    for process in [server, *clients[:2]]:
        process.ends(0)


def test_the_run_ends_early_when_the_target_is_reached(federation):
    server = federation.server("--rounds", 5, "--target", 0.5)
    clients = [federation.tiny() for _ in range(3)]
    assert "accuracy 0.5 reached after round 1" in server.ends(0)
    for client in clients:
        client.ends(0)
    assert clients_by_round(federation) == [3, 3]


def test_flower_pings_a_quiet_connection_before_a_cloud_cuts_it():
    """Local training may take longer than the four minutes after which some clouds cut an idle connection."""
    keepalive = inspect.signature(start_grpc_server).parameters["keepalive_time_ms"].default
    assert keepalive < 240_000

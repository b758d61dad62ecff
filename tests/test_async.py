"""The asynchronous mode with real processes: nobody is waited for, and what fails does so as in rounds."""

import signal

from federation.config import Recipe
from federation.protocol import Assignment
from federation.server.options import parse_args
from federation.task.task import open_task

import numpy as np
import pytest
from helpers.processes import wait_for
from helpers.replays import model_bytes, replayed, replayed_tiny


def start_tiny(federation, *seconds) -> list:
    return [federation.tiny("--partition-id", i, "--seconds", s) for i, s in enumerate(seconds)]


def updates(federation) -> list[dict]:
    """Every update that counted, in the order of arrival."""
    return [update for row in federation.history()["rounds"] for update in row["updates"]]


def newest(federation) -> int:
    return max((int(path.stem[-6:]) for path in federation.run_dir.glob("checkpoint-*.npz")), default=-1)


def test_fast_clients_do_the_work_that_a_slow_one_does_not_and_a_replay_gives_the_same_bits(federation):
    server = federation.server("--mode", "async", "--rounds", 6, "--patience", 0)
    clients = start_tiny(federation, 0.1, 0.12, 1.0)
    output = server.ends(0)
    for client in clients:
        client.ends(0)
    done = updates(federation)
    by_client = [sum(update["partition"] == i for update in done) for i in range(3)]
    assert sum(by_client) == 6 * 3
    assert by_client[0] + by_client[1] > 12 > 6 > by_client[2]
    rows = federation.history()["rounds"]
    assert [row["round"] for row in rows] == list(range(10))
    assert all(row["accuracy"] == 0.5 for row in rows)
    assert sorted(rows[-1]["accuracy_by_client"]) == ["0", "1", "2"]
    assert "version    clients  staleness  accuracy" in output
    assert replayed_tiny(federation) == model_bytes(federation)


def test_clients_of_equal_speed_share_their_versions_without_staleness(federation):
    server = federation.server("--mode", "async", "--rounds", 4, "--buffer-size", 2, "--patience", 1)
    clients = start_tiny(federation, 0.6, 0.6, 0.6)
    for process in [server, *clients]:
        process.ends(0)
    rows = federation.history()["rounds"]
    assert [row["clients"] for row in rows] == [0, 3, 3, 3, 3]
    assert {update["staleness"] for update in updates(federation)} == {0}


def test_killed_and_resumed_it_ends_with_all_updates_and_a_replay_gives_the_same_bits(federation):
    server = federation.server("--mode", "async", "--rounds", 6)
    clients = start_tiny(federation, 0.2, 0.25, 0.9)
    for version in (1, 3):
        wait_for(lambda least=version: newest(federation) >= least, f"version {version}")
        server.send(signal.SIGKILL)
        server.ends(-9)
        server = federation.server("--resume", federation.run_dir)
        server.says(r"after version \d")
    for process in [server, *clients]:
        process.ends(0)
    assert len(updates(federation)) == 6 * 3
    assert all(row["accuracy"] == 0.5 for row in federation.history()["rounds"][-1:])
    assert replayed_tiny(federation) == model_bytes(federation)


def test_the_real_clients_replayed_in_another_process_give_the_same_bits_too(federation):
    import torch

    import client

    torch.set_num_threads(1)  # as the clients below: other numbers round otherwise
    server = federation.server("--mode", "async", "--rounds", 2, "--model", "lenet")
    slow = federation.client("--threads", 1, "--partition-id", 2, "--slowdown", 3)
    fast = [federation.client("--threads", 1, "--partition-id", i) for i in range(2)]
    for process in [server, slow, *fast]:
        process.ends(0)
    assert "training 1, from version 0: trained on" in slow.output
    recipe = Recipe(**{key: federation.history()["config"][key] for key in vars(Recipe())})
    task = open_task()
    dataset = task.open_dataset("synthetic")
    clients = [client.TaskClient(task, dataset, Assignment(i, 3, recipe)) for i in range(3)]
    untrained = clients[0].get_parameters({})
    again = replayed(federation, clients, untrained, clients[0].buffer_positions)
    assert sorted(again) == sorted(model_bytes(federation))  # the file has the arrays in another order


def test_the_run_goes_on_at_once_without_a_killed_straggler(federation):
    server = federation.server("--mode", "async", "--rounds", 4, "--rejoin-wait", 60, "--round-timeout", 60)
    clients = start_tiny(federation, 0.1, 0.1, 60)
    clients[2].says("fit 1")
    clients[2].send(signal.SIGKILL)
    server.says("client 2 left")
    for process in [server, *clients[:2]]:
        process.ends(0, seconds=30)
    assert {update["partition"] for update in updates(federation)} == {0, 1}
    assert len(updates(federation)) == 4 * 3


def test_a_client_that_takes_a_free_place_in_the_middle_trains_at_once(federation):
    server = federation.server("--mode", "async", "--rounds", 12)
    clients = start_tiny(federation, 0.2, 0.2, 0.2)
    clients[1].says("fit 2")
    clients[1].send(signal.SIGKILL)
    server.says("client 1 left")
    again = federation.tiny("--seconds", 0.2)
    for process in [server, again, clients[0], clients[2]]:
        process.ends(0)
    numbers = [update["number"] for update in updates(federation) if update["partition"] == 1]
    assert numbers == list(range(1, len(numbers) + 1))
    assert f"fit {numbers[-1]}" in again.output
    assert replayed_tiny(federation) == model_bytes(federation)


def test_a_silent_straggler_costs_nothing_but_its_own_updates(federation):
    server = federation.server("--mode", "async", "--rounds", 4, "--round-timeout", 3)
    clients = start_tiny(federation, 0.1, 0.1, 0.1)
    clients[2].says("fit 2")
    clients[2].send(signal.SIGSTOP)
    server.says(r"client 2 did not answer within 3 s \(--round-timeout\)")
    for process in [server, *clients[:2]]:
        process.ends(0)
    assert len(updates(federation)) == 4 * 3


def test_a_nan_update_is_left_out_and_the_next_training_counts_again(federation):
    server = federation.server("--mode", "async", "--rounds", 3)
    good = start_tiny(federation, 0.1, 0.1)
    bad = federation.tiny("--partition-id", 2, "--seconds", 0.1, "--behave", "nan", "--in-round", 1)
    for process in [server, bad, *good]:
        process.ends(0)
    assert "client 2 left out: array 0 holds NaN or infinite values" in server.output
    (rejected,) = federation.history()["rejected"]
    assert rejected["partition"] == 2
    assert all(np.isfinite(array).all() for array in federation.weights())
    numbers = [update["number"] for update in updates(federation) if update["partition"] == 2]
    assert numbers[:1] in ([], [2])
    assert len(updates(federation)) == 3 * 3


def test_three_bad_updates_in_a_row_cost_the_place(federation):
    server = federation.server("--mode", "async", "--rounds", 6)
    good = start_tiny(federation, 0.2, 0.2)
    bad = federation.tiny("--partition-id", 2, "--behave", "nan")
    assert "dropped: 3 bad updates in a row" in bad.ends(1)
    for process in [server, *good]:
        process.ends(0)


def test_an_update_that_is_too_stale_is_dropped_and_counted(federation):
    flags = ("--buffer-size", 1, "--max-staleness", 1, "--patience", 0)
    server = federation.server("--mode", "async", "--rounds", 6, *flags)
    clients = start_tiny(federation, 0.1, 0.1, 0.5)
    for process in [server, *clients]:
        process.ends(0)
    reasons = [row["reason"] for row in federation.history()["rejected"]]
    assert reasons
    assert all("is above --max-staleness 1" in reason for reason in reasons)
    assert max(update["staleness"] for update in updates(federation)) <= 1
    assert len(updates(federation)) == 6 * 3
    assert "dropped: " not in clients[2].output


def test_with_fewer_than_min_clients_the_checkpoint_stays_and_all_end_with_1(federation):
    server = federation.server("--mode", "async", "--rounds", 20, "--rejoin-wait", 1)
    clients = start_tiny(federation, 0.2, 0.2, 0.2)
    clients[0].says("fit 3")
    for client in clients[1:]:
        client.send(signal.SIGKILL)
    output = server.ends(1)
    assert "waiting up to 1 s for more" in output
    assert "1 of 3 clients left after version" in output
    assert f"--resume {federation.run_dir}" in output
    assert "failed: 1 of 3 clients left" in clients[0].ends(1)


def test_an_interrupted_server_ends_within_5_seconds_though_all_are_training(federation):
    server = federation.server("--mode", "async", "--rounds", 20)
    clients = start_tiny(federation, 0.2, 0.2, 60)
    clients[2].says("fit 1")
    server.says(r"\n +1 ")
    server.send(signal.SIGTERM)
    assert "stopped by SIGTERM after version" in server.ends(143, seconds=5)


def test_the_run_ends_early_when_a_version_reaches_the_target_accuracy(federation):
    server = federation.server("--mode", "async", "--rounds", 20, "--target-accuracy", 0.5)
    clients = start_tiny(federation, 0.1, 0.1, 0.1)
    assert "accuracy 0.5 reached with version 1" in server.ends(0)
    for client in clients:
        client.ends(0)
    assert len(updates(federation)) < 60


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--buffer-size", "2"], "--buffer-size is for --mode async"),
        (["--mode", "asink"], "--mode must be one of sync, async, got 'asink'"),
        (["--mode", "async", "--strategy", "krum"], "leave out --strategy krum"),
        (["--mode", "async", "--fraction-fit", "0.5"], "leave out --fraction-fit"),
        (["--mode", "async", "--buffer-size", "10"], "between 1 and the run's 9 updates (rounds x clients), got 10"),
        (["--mode", "async", "--patience", "2"], "--patience must be between 0 and 1, got 2.0"),
        (["--mode", "async", "--max-staleness", "-1"], "--max-staleness must be at least 0, got -1"),
        (["--mode", "async", "--server-learning-rate", "0"], "--server-learning-rate must be above 0, got 0.0"),
    ],
)
def test_wrong_use_is_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args("", flags)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("clients", "size"), [(1, 1), (2, 2), (3, 2), (10, 7)])
def test_the_buffer_holds_two_thirds_of_the_clients_unless_told_otherwise(clients, size):
    assert parse_args("", ["--mode", "async", "--clients", str(clients)]).settings.buffer_size == size

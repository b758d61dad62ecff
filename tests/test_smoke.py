"""The whole thing as a user meets it: four programs in any order, one command, real training on generated images."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

from federation.results.history import History
from federation.results.tables import table
from federation.task.task import DataError, open_task

import numpy as np
import pytest
from helpers.processes import CLEAN, ROOT, Federation, free_port, wait_for

import demo

SEED = ("--seed", 1)  # of both runs below, which must agree bit for bit; else all is as it comes
on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which only Linux has")


# One command


@pytest.fixture(scope="module")
def one_command(tmp_path_factory):
    """demo.py, once, for all the tests that look at what it leaves."""
    with Federation(tmp_path_factory.mktemp("demo")) as federation:
        where = ("--dataset", "synthetic", "--run-dir", federation.run_dir)
        federation.start("demo", ROOT / "demo.py", *where, "--", *SEED, fresh=True).ends(0, 200)
        yield federation


def spoken(federation: Federation) -> tuple[list[str], str]:
    """The demo's lines up to its closing table, and the rest."""
    lines, _, closing = federation.processes[0].output.partition("\n\n")
    return lines.splitlines(), closing


def test_every_line_of_the_demo_says_who_speaks(one_command):
    lines, _ = spoken(one_command)
    assert all(re.match(r"(server  |client [012]) \| ?", line) for line in lines), lines
    assert {line.partition(" |")[0].rstrip() for line in lines} == {"server", "client 0", "client 1", "client 2"}


def test_speakers_of_the_demo_never_share_a_line(tmp_path):
    program = ["import demo", "cast = demo.Processes()"]
    for name in ("server", "client 0", "client 1"):
        program.append(f"cast.start({name!r}, ['-c', 'for i in range(3000): print(i)'])")
    with Federation(tmp_path) as federation:
        said = federation.start("cast", "-c", "\n".join([*program, "cast.wait()"])).ends(0).splitlines()
    for name in ("server  ", "client 0", "client 1"):
        assert [line for line in said if line.startswith(name)] == [f"{name} | {i}" for i in range(3000)]


def test_the_demo_closes_with_the_table_of_history_the_picture_and_the_time(one_command):
    _, closing = spoken(one_command)
    rows = one_command.history()["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    said_table = table(History.from_json(json.dumps(one_command.history())))
    assert closing.startswith(said_table + "\n\n")
    assert f"\npicture: {one_command.run_dir / 'accuracy.png'}\n" in closing
    assert re.search(r"\ntotal time: \d+\.\d s\n$", closing)
    assert "These are generated images: their accuracy means nothing for CIFAR-10." in closing
    lines, _ = spoken(one_command)
    said = [line.removeprefix("server   | ") for line in lines if re.match(r"server   \| +\d+  ", line)]
    assert said == said_table.splitlines()[1:]


def test_the_picture_is_one(one_command):
    assert (one_command.run_dir / "accuracy.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_nothing_warns(one_command):
    output = one_command.processes[0].output
    assert not re.search(r"warn|deprecat|traceback|fit_metrics_aggregation_fn", output, re.IGNORECASE), output


def test_history_holds_every_round_and_the_untrained_model_as_round_0(one_command):
    history = one_command.history()
    rows, config = history["rounds"], history["config"]
    assert (config["model"], config["seed"], config["clients"], len(config["classes"])) == ("cnn", 1, 3, 10)
    assert rows[0]["train_loss"] is None
    assert rows[0]["bytes_received"] == 0
    assert all(row["train_loss"] > 0 for row in rows[1:])
    arrays, measured = one_command.weights(), config["batchnorm_positions"]
    sent = sum(array.nbytes for array in arrays) + sum(arrays[i].nbytes for i in measured)  # BatchNorm's anew, too
    assert len(measured) == 2 * 4
    assert all(row["bytes_received"] == 3 * sent for row in rows[1:])
    assert all(row["clients"] == 3 for row in rows)
    for row in rows:  # 1,500 test images, split evenly
        assert row["accuracy"] == pytest.approx(np.mean(list(row["accuracy_by_client"].values())), abs=1e-9)
        assert row["accuracy"] * 1500 == pytest.approx(round(row["accuracy"] * 1500), abs=1e-6)


def test_generated_images_can_be_learned_in_three_rounds_and_not_in_one(one_command):
    untrained, first, _, third = [row["accuracy"] for row in one_command.history()["rounds"]]
    assert untrained < 0.2  # ten classes: chance is 0.1
    assert first < 0.9 < third


def test_every_client_shows_its_classes_its_accuracy_and_ten_images_by_name(one_command):
    lines, _ = spoken(one_command)
    last = one_command.history()["rounds"][-1]
    for number in range(3):
        own = "\n".join(line.partition(" | ")[2] for line in lines if line.startswith(f"client {number} |"))
        assert "2,000 training and 500 test examples" in own
        table_of_classes = re.findall(r"^  (?:\w+ \d+ *){5}$", own, re.MULTILINE)
        assert len(table_of_classes) == 2
        assert sum(map(int, re.findall(r"\d+", "".join(table_of_classes)))) == 2000
        accuracy = last["accuracy_by_client"][str(number)]
        assert f"accuracy of the final global model on this client's 500 test examples: {accuracy:.4f}" in own
        guesses = re.findall(r"^  ([✓✗]) (\w+) → (\w+)$", own, re.MULTILINE)
        assert len(guesses) == 10
        assert all((mark == "✓") == (truth == guess) for mark, truth, guess in guesses)


def test_a_demo_whose_server_fails_ends_all_and_fails_too(one_command, tmp_path):
    where = ("--dataset", "synthetic", "--run-dir", one_command.run_dir)  # which holds a run already
    with Federation(tmp_path) as federation:
        output = federation.start("demo", ROOT / "demo.py", *where).ends(2)
    assert f"server: error: --run-dir {one_command.run_dir} already holds a run" in output
    ended, reason = output.splitlines()[-2:]
    assert "demo: server ended with exit code 2" in ended
    assert reason.startswith(f"demo: server said first: --run-dir {one_command.run_dir} already holds a run")


# Four terminals


@pytest.fixture(scope="module")
def four_terminals(tmp_path_factory):
    """Three clients, then, when they wait, the server; behind a proxy that is dead."""
    folder = tmp_path_factory.mktemp("by hand")
    dead = {name: f"http://127.0.0.1:{free_port()}" for name in ("http_proxy", "https_proxy", "grpc_proxy")}
    with Federation(folder) as federation:
        for number in range(3):
            federation.client("--save", folder / f"{number}.safetensors", env={**CLEAN, **dead}, cwd=folder)
        for client in federation.processes:
            client.says(f"no server at {federation.address}; asking again for 300 s")
        server = federation.server(*SEED, cwd=folder, fresh=True)
        federation.peak_kb = 0
        while server.popen.poll() is None:
            federation.peak_kb = max(federation.peak_kb, server.memory().get("VmHWM", 0))
            time.sleep(0.02)
        for process in federation.processes:
            process.ends(0)
        yield federation


def test_clients_may_start_before_the_server_and_get_all_the_partitions(four_terminals):
    clients, server = four_terminals.processes[:3], four_terminals.processes[3]
    given = [re.search(r"joined with partition (\d) of 3", client.output)[1] for client in clients]
    assert sorted(given) == ["0", "1", "2"]
    assert re.findall(r"\((\d) of 3 there\)", server.output) == ["0", "1", "2", "3"]


def test_the_same_seed_gives_the_same_bits_in_whatever_order_clients_connect(one_command, four_terminals):
    assert one_command.model() == four_terminals.model()
    one, two = one_command.history()["rounds"], four_terminals.history()["rounds"]
    for row in (*one, *two):
        del row["seconds"], row["utc"]
    assert one == two


def test_what_a_client_saved_is_the_final_global_model(four_terminals):
    for number in range(3):
        assert (four_terminals.folder / f"{number}.safetensors").read_bytes() == four_terminals.model_file()


@on_linux
def test_the_servers_peak_memory_is_below_200_mb(four_terminals):
    assert 30_000 < four_terminals.peak_kb < 200_000


# The server alone


def test_the_server_never_imports_torch():
    code = "import server, sys; print([name for name in sys.modules if name.startswith('torch')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@on_linux
def test_the_server_listens_within_two_seconds(federation):
    server = federation.server(fresh=True)
    host, port = federation.address.split(":")

    def listening() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    wait_for(listening, "the server's port")
    ticks = Path(f"/proc/{server.popen.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    # Its own seconds on the processor: beside other programs the clock on the wall says little.
    assert sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") < 2


def test_a_partition_that_is_taken_or_not_there_is_refused_in_words(federation):
    server = federation.server()
    federation.tiny("--partition-id", 1)
    server.says("client 1 joined")
    taken, beyond = federation.tiny("--partition-id", 1), federation.tiny("--partition-id", 3)
    assert "refused: --partition-id 1 is taken; choose another, or leave it out" in taken.ends(2)
    assert "refused: --partition-id 3 is not there: this run has partitions 0 to 2" in beyond.ends(2)


def test_fedadam_takes_a_first_step_of_the_servers_learning_rate(federation):
    """Reddi et al. 2021, algorithm 2: betas 0.9 and 0.99, tau 0.001; Flower corrects the bias as for step 2."""
    server = federation.server("--rounds", 1, "--strategy", "fedadam", "--server-learning-rate", 0.1)
    for partition in range(3):
        federation.tiny("--partition-id", partition)
    server.ends(0)
    draws = [np.random.default_rng([0, partition, 1]) for partition in range(3)]  # as the tiny clients draw
    for array in federation.weights()[:2]:
        delta = sum((i + 1) * draws[i].normal(size=array.shape) for i in range(3)) / 6  # 100, 200, 300 examples
        bias = np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
        assert np.allclose(array, 0.1 * bias * 0.1 * delta / (0.1 * abs(delta) + 0.001), rtol=1e-4)


# The client alone


def test_a_client_without_a_server_gives_up_in_one_line(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    words = [ROOT / "client.py", "--dataset", "synthetic", "--server", address, "--wait", "1"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=CLEAN, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    remedy = "start `python server.py`, or name it with --server"
    assert done.stderr == f"client: error: no server at {address} after 1 s; {remedy}\n"
    assert done.stdout == f"no server at {address}; asking again for 1 s\n"


# The demo, interrupted


def family(mark: str) -> list[str]:
    """Command lines of all living processes that carry the mark in their environment, as children inherit it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass  # another user's, or gone meanwhile
    return [line for line in found if line]  # a zombie has none


@on_linux
@pytest.mark.parametrize(("number", "code", "moment"), [
    (signal.SIGTERM, 143, "server   | waiting for 3 clients"),
    (signal.SIGINT, 130, "client 0 | round 1: trained"),
])  # fmt: skip
def test_an_interrupted_demo_takes_its_processes_along(tmp_path, number, code, moment):
    mark = uuid.uuid4().hex
    with Federation(tmp_path) as federation:
        where = ("--dataset", "synthetic", "--run-dir", federation.run_dir, "--rounds", 50)
        demo = federation.start(
            "demo", ROOT / "demo.py", *where, "--", "--model", "lenet", env={**CLEAN, "TEST_MARK": mark}
        )
        demo.says(re.escape(moment))
        wait_for(lambda: len(family(mark)) == 5, "the demo, a server and three clients")
        demo.send(number)
        output = demo.ends(code)
        assert family(mark) == []
    assert "Traceback" not in output


# The demo's choice of data


def test_without_cifar10_the_demo_says_loudly_why_and_runs_on_generated_images(monkeypatch, capsys):
    def open_dataset(name: str, data_dir: str, skip_damaged: bool) -> None:
        raise DataError("CIFAR-10 can't be had in data (no route)")

    task, args = open_task(), SimpleNamespace(data_dir="data", skip_damaged=False)
    monkeypatch.setattr(task.data, "open_dataset", open_dataset)
    assert demo.choose_dataset(task, None, args) == "synthetic"
    said = capsys.readouterr().out
    assert "CIFAR-10 can't be had in data (no route)." in said
    assert "GENERATED examples (--dataset synthetic). Their accuracy means nothing for CIFAR-10." in said
    assert "*" * 78 in said
    with pytest.raises(SystemExit) as caught:  # but asked for by name, nothing else will do
        demo.choose_dataset(task, "cifar10", args)
    assert caught.value.code == 1
    assert "CIFAR-10 can't be had in data (no route)" in capsys.readouterr().err


def test_a_task_that_has_no_other_data_ends_the_demo_in_one_line(monkeypatch, capsys):
    def open_dataset(name: str, data_dir: str, skip_damaged: bool) -> None:
        raise DataError("the register is closed")

    task, args = open_task(), SimpleNamespace(data_dir="data", skip_damaged=False)
    monkeypatch.setattr(task.data, "open_dataset", open_dataset)
    monkeypatch.delattr(task.data, "FALLBACK")
    with pytest.raises(SystemExit) as caught:
        demo.choose_dataset(task, None, args)
    assert caught.value.code == 1
    assert capsys.readouterr().err.endswith("error: the register is closed\n")

"""One server and 3 to 1,000 clients on one machine over gRPC: time of a round, and the server's memory, as they grow.

Every client is the project's own, on 20 generated images, with the default network: what grows is the server's
work. Each process plays a few dozen clients, each with a connection of its own; as many are at work at a time as there
are cores.
"""

import argparse
import contextlib
import fcntl
import functools
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from federation import net
from federation.client.connection import connect
from federation.client.session import Session
from federation.process import end_with_parent, keep_memory, num_cores

import grpc._channel  # private names, as only a benchmark may use them
import numpy as np
from common import Client, machine, plot, save
from helpers.processes import Federation

from data import Synthetic

NUMBERS = [3, 10, 30, 100, 300, 1000]
ROUNDS = 3
TOGETHER = 50  # clients, at most, that share a process: of more, each would cost more than one of few does
IMAGES = {"train": 20, "test": 5}  # a client
GOAL = 1.05  # exponent, at most, of the growth from GROWS_FROM clients on
GROWS_FROM = 100
GOAL_MB = 900  # the server's memory with 1,000 clients...
GOAL_GROWTH_MB = 300  # ...and how much of it comes with their number


class Few(Synthetic):
    """IMAGES for each of so many clients; drawn once, as all that share a process need them."""

    def __init__(self, clients: int) -> None:
        super().__init__()
        self.sizes = {split: number * clients for split, number in IMAGES.items()}
        self._drawn = {split: super(Few, self).images(split, np.arange(n), 0) for split, n in self.sizes.items()}

    def images(self, split: str, indices: np.ndarray, seed: int) -> np.ndarray:
        return self._drawn[split][indices]


class OneAtATime(Session):
    """A client that shares its process, and PyTorch's global random numbers, with others, and its core with more."""

    in_process = threading.Lock()
    core = ""  # a file that whoever works on the core holds a lock of

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        with self.in_process, open(self.core or os.devnull) as file:
            if self.core:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _work(self, task: Callable, failed: object) -> object:
        with self.at_work():
            return super()._work(task, failed)

    def _take_assignment(self, config: dict) -> dict:
        with self.at_work():
            return super()._take_assignment(config)


def play_all(address: str, clients: int) -> None:
    """All clients, in processes forked off this one. Exits with 1 where one doesn't stay to the end."""
    dataset = Few(clients)
    players = max(num_cores(), math.ceil(clients / TOGETHER))
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for player in range(players):
            core = Path(folder, f"core {player % num_cores()}")
            core.touch()
            pid = os.fork()
            if pid == 0:
                end_with_parent()
                os._exit(play(address, len(range(player, clients, players)), dataset, str(core)))
            started.append(pid)
        failed = [os.waitpid(pid, 0)[1] for pid in started]
    sys.exit(any(failed))


def play(address: str, here: int, dataset: Few, core: str = "") -> bool:
    """So many clients, in threads of this process; whether one of them did not stay to the end."""
    OneAtATime.core = core
    # Channels of one process would share a connection, which clients on different machines don't.
    net.CLIENT.append(("grpc.use_local_subchannel_pool", 1))
    # A waiting client wakes up fifteen times a second, for signals and to look at its connection: nothing on a machine
    # of its own, and more than a core for a thousand that share one.
    grpc._common.MAXIMUM_WAIT_TIMEOUT = 5
    grpc._channel.Channel.subscribe = lambda *_, **__: None
    keep_memory()  # as client.py does
    sessions = [OneAtATime(lambda assignment: Client(dataset, assignment), dataset.classes) for _ in range(here)]
    threads = [threading.Thread(target=connect, args=(each, address), kwargs={"wait": 600}) for each in sessions]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return any(each.failure or not each.close_reason or each.close_reason.kind != "finished" for each in sessions)


def measure(clients: int, flags: list[str]) -> dict:
    """Seconds of a round, of the server's processor and of a client's in it, until all had joined; the server's memory.

    server_seconds, client_seconds, mean_seconds: over all rounds, of which round 0 is an evaluation.
    """
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        server = federation.server("--clients", clients, "--rounds", ROUNDS, *flags)
        server.says("waiting for")
        players = federation.start("players", __file__, "--play", federation.address, clients)
        began, peak_kb, used = time.monotonic(), 0, np.zeros(2)
        joined, used_before = None, np.zeros(2)
        while server.popen.poll() is None:
            peak_kb = max(peak_kb, server.memory().get("VmHWM", 0))
            used = np.maximum(used, [used_by(each.popen.pid) for each in (server, players)])
            if joined is None and f"({clients} of {clients} there)" in server.output:
                joined, used_before = time.monotonic() - began, used
            assert not players.popen.poll(), players.output
            time.sleep(0.05)
        for process in federation.processes:
            process.ends(0)
        rows = federation.history()["rounds"]
    assert [row["clients"] for row in rows] == [clients] * (ROUNDS + 1), rows
    server_used, clients_used = (used - used_before).tolist()
    return {
        "clients": clients,
        "round_seconds": statistics.median(row["seconds"] for row in rows[1:]),
        "mean_seconds": statistics.mean(row["seconds"] for row in rows),
        "server_seconds": server_used / len(rows),
        "client_seconds": clients_used / len(rows) / clients,
        "join_seconds": joined,
        "server_mb": peak_kb * 1024 / 1e6,
        "mb_a_round": sum(row["bytes_received"] for row in rows[1:]) / ROUNDS / 1e6,
    }


def used_by(pid: int) -> float:
    """Of a process and those that it has forked, so far; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        forks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(used_by(int(fork)) for fork in forks)


def without_packing(results: list[dict]) -> list[dict]:
    """With the mean seconds of a round, but for what a client takes of a core more than where it takes the least.

    It does the same work among few and among many: what is more is what so many on one machine take from each other.
    """
    least = min(each["client_seconds"] for each in results)
    return [
        {**each, "seconds": each["mean_seconds"] - (each["client_seconds"] - least) * each["clients"] / num_cores()}
        for each in results
    ]


def growth(results: list[dict], what: str) -> float:
    """The exponent with which `what` grows with the clients, 1 being linear, by least squares."""
    x, y = ([math.log(result[name]) for result in results] for name in ("clients", what))
    return float(np.polyfit(x, y, 1)[0])


def draw(results: list[dict]) -> None:
    def panel(axes, theme, what: str, label: str) -> None:
        numbers, values = [r["clients"] for r in results], [r[what] for r in results]
        linear = [values[-1] * n / numbers[-1] for n in numbers]
        axes.plot(numbers, linear, color=theme.faint, linestyle=":", label="linear")
        axes.plot(numbers, values, color=theme.federated, marker="o", markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="clients", ylabel=label)
        axes.set_xticks(numbers, map(str, numbers))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False)

    seconds = functools.partial(panel, what="round_seconds", label="seconds a round")
    memory = functools.partial(panel, what="server_mb", label="server's memory, MB")
    plot("scale", seconds, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=NUMBERS, metavar="N", help=f"({NUMBERS})")
    parser.add_argument("--play", nargs=2, help=argparse.SUPPRESS)  # how this script calls itself
    parser.add_argument("flags", nargs="*", help="more flags for server.py, after --")
    args = parser.parse_args()
    if args.play:
        play_all(args.play[0], int(args.play[1]))
    where, results = machine(), []
    for clients in args.clients:
        results.append(measure(clients, args.flags))
        print(
            "{clients:>4} clients: {round_seconds:6.2f} s a round, {server_seconds:5.2f} s of the server's "
            "processor and {client_seconds:.3f} s of a client's, {server_mb:4.0f} MB at the server, all joined after "
            "{join_seconds:.1f} s".format(**results[-1]),
            flush=True,
        )
    many = [result for result in results if result["clients"] >= GROWS_FROM]
    kinds = ("round_seconds", "server_seconds", "server_mb")
    grows = {what: growth(many, what) for what in kinds} if many[1:] else {}
    if grows:
        grows["seconds but for the packing"] = growth(without_packing(many), "seconds")
    for what, exponent in grows.items():
        words = f"from {GROWS_FROM} clients on, {what} grows with the {exponent:.2f}th power of their number"
        print(f"{words} (goal: {GOAL} at most)")
    first, last = results[0], results[-1]
    added = last["server_mb"] - first["server_mb"]
    print(
        f"server's memory with {last['clients']} clients: {last['server_mb']:.0f} MB (goal: {GOAL_MB}), "
        f"{added:.0f} MB more than with {first['clients']} (goal: {GOAL_GROWTH_MB})"
    )
    goals = {"exponent": GOAL, "mb": GOAL_MB, "mb_more": GOAL_GROWTH_MB}
    result = {"machine": where, "rounds": ROUNDS, "images": IMAGES, "runs": results, "growth": grows}
    save("scale", {**result, "goal": goals})
    draw(results)


if __name__ == "__main__":
    main()

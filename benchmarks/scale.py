"""One server and 3 to 300 clients on one machine over gRPC: time of a round, and the server's memory, as they grow.

Every client is the project's own, on 20 generated images, with the default network: what grows is the server's
work. A process plays up to CLIENTS_A_PROCESS of them, each with a connection of its own.
"""

import argparse
import contextlib
import itertools
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from federation import keepalive
from federation.connection import stay_connected
from federation.member import Member

import numpy as np
from common import machine, plot, save
from processes import Federation

from client import CifarClient
from data import Synthetic

NUMBERS = [3, 10, 30, 100, 300]
ROUNDS = 3
CLIENTS_A_PROCESS = 50
IMAGES = {"train": 20, "test": 5}  # a client
GOAL_MB = 600  # the server's memory with 300 clients


class Few(Synthetic):
    """IMAGES for each of so many clients; drawn once, as all that share a process need them."""

    def __init__(self, clients: int) -> None:
        super().__init__()
        self.sizes = {split: number * clients for split, number in IMAGES.items()}
        self._drawn = {split: super(Few, self).images(split, np.arange(n), 0) for split, n in self.sizes.items()}

    def images(self, split: str, indices: np.ndarray, seed: int) -> np.ndarray:
        return self._drawn[split][indices]


def play(address: str, here: int, clients: int) -> None:
    """`here` clients of so many, in threads of this process. Exits with 1 where one doesn't stay to the end."""
    # Channels of one process would share a connection, which clients on different machines don't.
    keepalive.CLIENT.append(("grpc.use_local_subchannel_pool", 1))
    dataset = Few(clients)
    members = [Member(lambda seat: CifarClient(dataset, seat), dataset.classes) for _ in range(here)]
    threads = [threading.Thread(target=stay_connected, args=(each, address), kwargs={"wait": 60}) for each in members]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sys.exit(any(each.failure or not each.farewell or each.farewell.kind != "finished" for each in members))


def peak_mb(pid: int) -> float:
    """The most memory that a process has had resident, in MB; 0 once it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def measure(clients: int, flags: list[str]) -> dict:
    """Seconds of a round (median), until all had joined, and the peak of the server's memory."""
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        server = federation.server("--clients", clients, "--rounds", ROUNDS, *flags)
        server.says("waiting for")
        for first in range(0, clients, CLIENTS_A_PROCESS):
            here = min(CLIENTS_A_PROCESS, clients - first)
            federation.start(f"clients from {first}", __file__, "--play", federation.address, here, clients)
        began, peak = time.monotonic(), 0.0
        joined = None
        while server.popen.poll() is None:
            peak = max(peak, peak_mb(server.popen.pid))
            if joined is None and f"({clients} of {clients} there)" in server.output:
                joined = time.monotonic() - began
            time.sleep(0.05)
        for process in federation.processes:
            process.ends(0)
        rows = federation.history()["rounds"]
    assert [row["clients"] for row in rows] == [clients] * (ROUNDS + 1), rows
    return {
        "clients": clients,
        "round_seconds": statistics.median(row["seconds"] for row in rows[1:]),
        "join_seconds": joined,
        "server_mb": peak,
        "mb_a_round": sum(row["bytes_received"] for row in rows[1:]) / ROUNDS / 1e6,
    }


def steepest(results: list[dict], what: str) -> float:
    """The exponent with which `what` grows with the clients, where it grows fastest; 1 is linear."""
    pairs = itertools.pairwise(results)
    return max(math.log(b[what] / a[what]) / math.log(b["clients"] / a["clients"]) for a, b in pairs)


def draw(results: list[dict]) -> None:
    def panel(axes, theme, what: str, label: str) -> None:
        numbers, values = [r["clients"] for r in results], [r[what] for r in results]
        linear = [values[-1] * n / numbers[-1] for n in numbers]
        axes.plot(numbers, linear, color=theme.faint, linestyle=":", label="linear")
        axes.plot(numbers, values, color=theme.federated, marker="o", markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="clients", ylabel=label)
        axes.set_xticks(numbers, map(str, numbers))
        axes.legend(frameon=False)

    seconds = lambda axes, theme: panel(axes, theme, "round_seconds", "seconds a round")  # noqa: E731
    memory = lambda axes, theme: panel(axes, theme, "server_mb", "server's memory, MB")  # noqa: E731
    plot("scale", {"seconds": seconds, "memory": memory})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=NUMBERS, metavar="N", help=f"({NUMBERS})")
    parser.add_argument("--play", nargs=3, help=argparse.SUPPRESS)  # how this script calls itself
    parser.add_argument("flags", nargs="*", help="more flags for server.py, after --")
    args = parser.parse_args()
    if args.play:
        play(args.play[0], int(args.play[1]), int(args.play[2]))
    where, results = machine(), []
    for clients in args.clients:
        results.append(measure(clients, args.flags))
        print(
            "{clients:>4} clients: {round_seconds:6.2f} s a round, {server_mb:4.0f} MB at the server, "
            "all joined after {join_seconds:.1f} s".format(**results[-1]),
            flush=True,
        )
    growth = {what: steepest(results, what) for what in ("round_seconds", "server_mb")} if len(results) > 1 else {}
    for what, exponent in growth.items():
        print(f"{what} grows with the {exponent:.2f}th power of the clients where it grows fastest (goal: 1 at most)")
    print(f"server's memory with {results[-1]['clients']} clients: {results[-1]['server_mb']:.0f} MB (goal: {GOAL_MB})")
    result = {"machine": where, "rounds": ROUNDS, "images": IMAGES, "runs": results, "growth": growth}
    save("scale", {**result, "goal_mb": GOAL_MB})
    draw(results)


if __name__ == "__main__":
    main()

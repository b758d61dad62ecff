"""The memory that server and clients take at most, for models of 45 to 500 MB and 3 or 10 clients, over gRPC."""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from common import machine, save
from helpers.processes import Federation, Process

TASK = Path(__file__).parent / "large_task"
SIZES = [45, 100, 500]  # MB
CLIENTS = [3, 10]
ROUNDS = 2
GOALS = {"server": 5, "client": 4}  # models, beside what the programs take without a model
ALLOWED_MB = 150  # beside them, at the server


class Peak:
    """The most memory that a process took so far, in MB: VmHWM of Linux, looked at until the process ends."""

    def __init__(self, process: Process) -> None:
        self.process, self.megabytes = process, 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        status = Path(f"/proc/{self.process.popen.pid}/status")
        while self.process.popen.poll() is None:
            try:
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
                self.megabytes = max(self.megabytes, int(lines["VmHWM"].split()[0]) / 1000)
            except (OSError, KeyError):
                return
            time.sleep(0.05)


def measure(megabytes: float, clients: int, *flags: object) -> dict:
    """A run of so many clients with a model of this size; flags: more of the server's."""
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        settings = [
            "--clients",
            clients,
            "--rounds",
            ROUNDS,
            "--set",
            f"megabytes={megabytes}",
            "--round-timeout",
            3000,
            *flags,
        ]
        server = federation.server(*settings)
        started = [federation.client("--task", TASK, "--dataset", "noise", "--wait", 900) for _ in range(clients)]
        peaks = [Peak(process) for process in (server, *started)]
        server.ends(0, 3000)
        seconds = [row["seconds"] for row in federation.history()["rounds"]]
        for process in started:
            process.ends(0, 100)
    return {
        "model_mb": megabytes,
        "clients": clients,
        "server_mb": peaks[0].megabytes,
        "client_mb": max(peak.megabytes for peak in peaks[1:]),
        "round_seconds": max(seconds[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, metavar="MB", help="of the model")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N")
    args = parser.parse_args()
    where = machine()
    print(f"{where}\n")
    tiny = measure(0.1, min(args.clients))  # what programs and libraries take
    print(f"without a model to speak of: server {tiny['server_mb']:.0f} MB, a client {tiny['client_mb']:.0f} MB")
    runs = []
    for size in args.sizes:
        for clients in args.clients:
            run = measure(size, clients)
            run["server_models"] = (run["server_mb"] - ALLOWED_MB) / size
            run["client_models"] = (run["client_mb"] - tiny["client_mb"]) / size
            runs.append(run)
            print(
                f"{size:g} MB, {clients} clients: server {run['server_mb']:.0f} MB ({run['server_models']:.1f} models "
                f"and {ALLOWED_MB} MB; goal: {GOALS['server']}), a client {run['client_mb']:.0f} MB "
                f"({run['client_models']:.1f} models; goal: {GOALS['client']}), a round {run['round_seconds']:.1f} s",
                flush=True,
            )
    if (args.sizes, args.clients) == (SIZES, CLIENTS):
        save("memory", {"machine": where, "tiny": tiny, "runs": runs})


if __name__ == "__main__":
    main()

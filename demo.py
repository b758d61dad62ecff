"""The whole federation on this machine: one server and its clients, from one command."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from federation.client.options import add_data_flags
from federation.console import TIMES, Parser, command_line, fail, say
from federation.protocol import BEGINS
from federation.results.history import History
from federation.results.run_folder import new_run_dir
from federation.results.tables import table
from federation.task.task import DataError, Task, TaskError, open_task

EXAMPLES = """\
examples:
  python demo.py                                              CIFAR-10, or generated images where it can't be had
  python demo.py --dataset my-images --clients 5
  python demo.py --dp-epsilon 3                               with differential privacy
  python demo.py --compare -- --partitioner dirichlet --alpha 0.1
"""
LEARNED_NOTHING = "accuracy means nothing for CIFAR-10"
FIRST, BY_HAND = "give it before the --", "start server.py and client.py yourself"
ELSEWHERE = {"--clients": FIRST, "--run-dir": FIRST, "--address": BY_HAND, "--sweep": BY_HAND}  # where to give what
COLOURS = [36, 32, 33, 35, 34, 31]  # ANSI: the server's, then the clients'


class Processes:
    """The processes of a demo; they end with it, whatever happens."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen] = {}
        self.complete = False  # all clients were there, so that the run could begin
        self.reasons: dict[str, str] = {}  # what went wrong, and who said it first
        self._readers: list[threading.Thread] = []

    def start(self, name: str, command: list[str]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-u", *command],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", TIMES: "off"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends the others in order
        )
        self.processes[name] = process
        reader = threading.Thread(target=self._pass_on, args=(name, len(self.processes), process), daemon=True)
        reader.start()
        self._readers.append(reader)

    def wait(self) -> dict[str, int]:
        """Exit codes by name, once all have ended. When the run can't begin or go on, all are ended."""
        server = self.processes["server"]
        while any(process.poll() is None for process in self.processes.values()):
            lost = [name for name, process in self.processes.items() if process.poll() not in (None, 0)]
            clients = [process for name, process in self.processes.items() if name != "server"]
            if server.poll() is None and lost and not self.complete:
                say(f"demo: the run can't begin without {', '.join(lost)}; ending the others")
                self.end()
            elif server.poll() not in (None, 0):
                self.end()
            elif server.poll() is None and lost and all(process.poll() is not None for process in clients):
                self._end_one(server)  # nobody is left who could come back; clients that are done leave it to finish
            time.sleep(0.02)
        for reader in self._readers:
            reader.join(5)
        return {name: process.returncode for name, process in self.processes.items()}

    def end(self) -> None:
        for process in reversed(self.processes.values()):
            self._end_one(process)

    def kill(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()

    def _end_one(self, process: subprocess.Popen) -> None:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(6)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _pass_on(self, name: str, number: int, process: subprocess.Popen) -> None:
        label = f"{name:<8} |"
        if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            label = f"\033[{COLOURS[(number - 1) % len(COLOURS)]}m{label}\033[0m"
        for line in process.stdout or ():
            self.complete = self.complete or (name == "server" and line.startswith(BEGINS))
            if ": error: " in line:
                self.reasons.setdefault(line.partition(": error: ")[2].strip(), name)
            say(f"{label} {line.rstrip()}")


def choose_dataset(task: Task, name: str | None, args: argparse.Namespace) -> str:
    """The data set to run on: the one asked for, or the task's, or, loudly, its FALLBACK where that can't be had."""
    wanted, fallback = name or task.default_dataset, getattr(task.data, "FALLBACK", None)
    try:
        task.open_dataset(wanted, args.data_dir, args.skip_damaged)
        return wanted
    except DataError as error:
        if name or fallback is None:
            fail(str(error))
        stars = "*" * 78
        print(
            f"{stars}\n{error}.\n\nGoing on with GENERATED examples (--dataset {fallback}). "
            f"Their {LEARNED_NOTHING}.\n{stars}",
            flush=True,
        )
        return fallback


def _whole(dataset: str) -> str:
    """A name as it is, a path whole."""
    return str(Path(dataset).resolve()) if Path(dataset).exists() else dataset


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(__doc__, usage="%(prog)s [options] [-- options of server.py]", epilog=EXAMPLES)
    parser.add_argument("--clients", type=int, metavar="N", help="how many (default: 3, or one for each data set)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="server rounds")
    add_data_flags(parser, several=True)
    parser.add_argument("--dp-epsilon", metavar="E", help="private training, each client to this epsilon")
    parser.add_argument("--compare", action="store_true", help="then train without federation too, and compare")
    parser.add_argument("--run-dir", metavar="DIR", help="where results go (default: runs/<date-time>)")
    own, server = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    given = [option.partition("=")[0] for option in server]
    for flag, remedy in ELSEWHERE.items():
        if any(len(name) > len("--") and flag.startswith(name) for name in given):  # argparse takes --run for --run-dir
            parser.error(f"{flag} behind the -- would reach the server alone; {remedy}")
    if len(args.dataset or []) > 1:
        if args.clients not in (None, len(args.dataset)):
            parser.error(f"--clients {args.clients} with {len(args.dataset)} data sets; leave it out, or give one set")
        args.clients = len(args.dataset)
    args.clients = 3 if args.clients is None else args.clients
    for flag in ("clients", "rounds"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    return args, server


def interrupt(processes: Processes, number: int) -> NoReturn:
    """End everything in order; asked once more, end it at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: processes.kill())
    raise SystemExit(128 + number)


def main() -> int:
    args, server_options = parse_args(sys.argv[1:])
    began = time.monotonic()
    try:
        task = open_task(args.task, only_data=True)
    except TaskError as error:
        fail(str(error))
    # The processes run in the project's folder, so that paths must be whole.
    datasets = [_whole(choose_dataset(task, name, args)) for name in args.dataset or [None]]
    if len(datasets) > 1:
        server_options = ["--partitioner", "local", *server_options]
    server_options = ["--private-training", *server_options] if args.dp_epsilon else server_options
    address = f"127.0.0.1:{free_port()}"
    run_dir = (Path(args.run_dir) if args.run_dir else new_run_dir()).resolve()
    own = ["--task", str(task.folder)] if args.task else []
    data_dir = [*own, "--data-dir", str(Path(args.data_dir).resolve())]
    data_dir += ["--skip-damaged"] if args.skip_damaged else []
    processes = Processes()
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, lambda number, _: interrupt(processes, number))
    try:
        counts = ["--rounds", str(args.rounds), "--clients", str(args.clients)]
        processes.start(
            "server", ["server.py", "--address", address, "--run-dir", str(run_dir), *counts, *server_options]
        )
        for number in range(args.clients):
            where = ["--server", address, "--dataset", datasets[number % len(datasets)], *data_dir]
            # Clients get partitions by themselves; asked for, the numbers on the screen agree.
            where += ["--partition-id", str(number), "--wait", "60", "--audit", str(run_dir / "audit")]
            if args.dp_epsilon:
                where += ["--dp-epsilon", args.dp_epsilon, "--ledger", str(run_dir / f"ledger-client-{number}.json")]
            processes.start(f"client {number}", ["client.py", *where])
        codes = processes.wait()
    finally:
        processes.end()
    failed = {name: code for name, code in codes.items() if code}
    if failed:
        ended = ", ".join(f"{name} ended with exit code {code}" for name, code in failed.items())
        print(f"demo: {ended}", file=sys.stderr)
        for reason, name in list(processes.reasons.items())[:1]:  # the others' follow from it, or say the same
            print(f"demo: {name} said first: {reason}", file=sys.stderr)
        return 2 if codes["server"] == 2 else 1
    history = History.from_json((run_dir / "history.json").read_text())
    print(f"\n{table(history)}\n")
    if not args.task and datasets == ["synthetic"]:
        print(f"These are generated images: their {LEARNED_NOTHING}.")
    print(f"picture: {run_dir / 'accuracy.png'}\npage: {run_dir / 'report.html'}")
    about = ["--run", str(run_dir), "--dataset", datasets[0], *data_dir]
    follow = [["evaluate.py", *about], ["baseline.py", *about]] if len(datasets) == 1 else []
    if follow and not args.compare:
        print("next, its predictions, and what it would have been without federation:")
        print("\n".join("  " + command_line("python", *command) for command in follow))
    for command in follow if args.compare else []:
        say(f"\n$ {command_line('python', *command)}")
        code = subprocess.run([sys.executable, *command], cwd=Path(__file__).parent, check=False).returncode
        if code:
            return code
    print(f"total time: {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

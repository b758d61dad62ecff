"""Real processes for tests: a server and clients on a free port, polled, and ended with the test."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from helpers.fork_server import SUPPORTED, Fork, ForkServer

ROOT = Path(__file__).parent.parent.parent
# Tests must not depend on the proxy, the secret or the log level of the machine that they run on.
OTHERS = "proxy|FEDERATION_|FLWR_|PYTHONDONTWRITEBYTECODE"  # the last would have each program compile all of ours
CLEAN = {name: value for name, value in os.environ.items() if not re.search(OTHERS, name, re.I)}
CLEAN["FEDERATION_TIMES"] = "off"  # lines are compared as they are on a terminal


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 100) -> object:
    """Poll until condition() is true and return its value; fail with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds:g} s")


@functools.cache
def fork_server() -> ForkServer:
    """The one of this test process, from when it is first needed."""
    return ForkServer(CLEAN)


def quick_python() -> str:
    """For commands that run programs of ours: a Python for which all is imported already, where there can be one."""
    return str(fork_server().python) if SUPPORTED else sys.executable


class Process:
    """A program of ours whose output is collected while it runs.

    fresh: it shall be started as users start it, as what is tested is its start, memory, speed or imports
    prefix: the command that starts it elsewhere
    forks: of which it shall be one, instead of the usual
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        fresh: bool = False,
        prefix: Sequence[str] = (),
        forks: ForkServer | None = None,
        **options: object,
    ):
        self.name = name
        words, options = [str(word) for word in command], {"cwd": ROOT, "env": CLEAN, **options}
        usual = SUPPORTED and not fresh and not prefix and options.keys() == {"cwd", "env"}
        self.popen: Fork | subprocess.Popen | None = usual and (forks or fork_server()).start(words, **options)
        self.popen = self.popen or subprocess.Popen(
            [*prefix, sys.executable, "-u", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            **options,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(ValueError):  # closed by stop(), where a grandchild holds the other end
            self._lines.extend(self.popen.stdout)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def says(self, pattern: str, seconds: float = 100) -> str:
        """Wait until the output matches; the whole output is shown where it never does."""
        try:
            return wait_for(lambda: re.search(pattern, self.output), pattern, seconds).group()
        except AssertionError as error:
            raise AssertionError(f"{self.name} never said {error}; it said:\n{self.output}") from None

    def ends(self, code: int, seconds: float = 100) -> str:
        """Wait for the end and check the exit code; returns the whole output."""
        try:
            wait_for(lambda: self.popen.poll() is not None, f"end of {self.name}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.output}") from None
        self._reader.join(5)
        assert self.popen.returncode == code, f"{self.name} exited with {self.popen.returncode}:\n{self.output}"
        return self.output

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def memory(self) -> dict[str, int]:
        """VmRSS, what it has resident, and VmHWM, the most that it ever had, in kB (Linux); {} once it has ended."""
        assert isinstance(self.popen, subprocess.Popen), "a fork has all that was imported for it: start it fresh"
        try:
            text = Path(f"/proc/{self.popen.pid}/status").read_text()
        except OSError:  # it may end, and another thread see to it, at any moment
            return {}
        return {name: int(kb) for name, kb in re.findall(r"^(VmRSS|VmHWM):\s+(\d+)", text, re.MULTILINE)}

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self._reader.join(5)
        self.popen.stdout.close()


class NetworkLink:
    """A TCP connection to the server that a test can cut: while cut, bytes are held back and neither end is told.

    carried: the bytes that went through, both ways. carried_up: those to the server.
    """

    def __init__(self, address: str):
        host, port = address.split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.carried = self.carried_up = 0
        self._counting = threading.Lock()
        self._up = threading.Event()
        self._up.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._up.clear()

    def restore(self) -> None:
        self._up.set()

    def close(self) -> None:
        self.restore()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:  # nobody listens there yet
                near.close()
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink, source is near), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        try:
            while data := source.recv(65536):
                self._up.wait()
                sink.sendall(data)
                with self._counting:
                    self.carried += len(data)
                    self.carried_up += len(data) if up else 0
        except OSError:
            pass
        finally:
            source.close()
            sink.close()


class Federation:
    """A server on a free port and its clients; a context manager that ends what it started, and nothing else."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run_dir = folder / "run"
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: list[Process] = []

    def __enter__(self) -> "Federation":
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):
            process.end()

    def start(self, name: str, *command: object, **options: object) -> Process:
        process = Process(name, list(command), **options)
        self.processes.append(process)
        return process

    def server(self, *flags: object, **options: object) -> Process:
        """python server.py; the run goes into self.run_dir unless flags hold --resume."""
        where = () if "--resume" in flags else ("--run-dir", self.run_dir)
        return self.start("server", ROOT / "server.py", "--address", self.address, *where, *flags, **options)

    def client(self, *flags: object, **options: object) -> Process:
        """python client.py on generated images."""
        name = f"client process {len(self.processes)}"
        return self.start(
            name,
            ROOT / "client.py",
            *("--server", self.address, "--dataset", "synthetic", "--audit", self.folder / "audit"),
            *flags,
            **options,
        )

    def tiny(self, *flags: object, **options: object) -> Process:
        """tests/helpers/tiny_client.py: the project's session and connection around a model of seven numbers."""
        name = f"tiny client process {len(self.processes)}"
        return self.start(name, ROOT / "tests/helpers/tiny_client.py", "--server", self.address, *flags, **options)

    def history(self) -> dict:
        return json.loads((self.run_dir / "history.json").read_text())

    def model_file(self) -> bytes:
        return (self.run_dir / "model.safetensors").read_bytes()

    def model(self) -> bytes:
        """The same without its metadata, which names the run and the time: names, shapes and values of its arrays."""
        arrays = load_file(self.run_dir / "model.safetensors")
        return save({name: arrays[name] for name in sorted(arrays)})

    def weights(self) -> list[np.ndarray]:
        """Of the final model, by their sorted names."""
        arrays = load_file(self.run_dir / "model.safetensors")
        return [arrays[name] for name in sorted(arrays)]

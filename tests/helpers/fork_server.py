"""Programs of ours that start within milliseconds: forks of one process that has imported what takes seconds.

It holds no module of the project's, so that each program reads those anew. What is about a program's start, memory or
imports needs an ordinary start, and so has an environment that may matter to what is imported already. Linux only.
"""

import atexit
import gc
import marshal
import os
import re
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
# Benchmarks, too, start programs by these helpers: what they measure must be what users have.
SUPPORTED = sys.platform == "linux" and "pytest" in sys.modules
IMPORTED = (
    "torch flwr.client flwr.server flwr.clientapp flwr.serverapp safetensors.numpy cryptography.x509 PIL.Image tqdm"
)
IMPORTED += " numpy.random flwr.compat.client.grpc_client.connection"
IMPORTED += " matplotlib.figure matplotlib.ticker matplotlib.colors matplotlib.backends.backend_agg"
IF_THERE = "sklearn.datasets sklearn.metrics dp_accounting.pld"
# Of the environment, what no import reads. The shell and make set the first of these.
READ_LATER = re.compile(r"PATH|PWD|OLDPWD|SHLVL|_|MAKE\w*|MFLAGS|COLUMNS|FEDERATION_\w+|(http|https|grpc|no)_proxy")
HARMLESS = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


class ForkServer:
    """The process that forks, for this one: it ends with it, and all that it started then does too.

    python: a file that does what Python does with a script or `-m`; what it starts runs as a fork too.
    modules: to import beside the usual ones.
    """

    def __init__(self, environment: dict[str, str], *modules: str):
        self.folder = Path(tempfile.mkdtemp(prefix="forks-"))
        self.python = self.folder / "python"
        self.python.write_text(f"#!{sys.executable} -IS\n{Path(__file__).with_name('forked_python.py').read_text()}")
        self.python.chmod(0o755)
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.folder, *modules],
            env={**environment, "OPENBLAS_NUM_THREADS": "1"},  # else NumPy starts a thread
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        atexit.register(self.end)
        assert self.process.stdout.readline() == b"ready\n", "the fork server did not start"

    def end(self) -> None:
        atexit.unregister(self.end)
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.folder)

    def start(self, words: list[str], cwd: object, env: dict[str, str]) -> "Fork | None":
        """Run `python WORDS`; None where it needs an ordinary start."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.folder / "socket"))
            reading, writing = os.pipe()
            with open(os.devnull) as nothing:
                send(connection, [nothing.fileno(), writing, writing], words, str(cwd), env)
            os.close(writing)
            pid = receive_number(connection)
            if pid:
                return Fork(pid, connection.dup(), reading)
            os.close(reading)
            return None


class Fork:
    """A program that was forked, with what subprocess.Popen has of it."""

    def __init__(self, pid: int, connection: socket.socket, output: int):
        self.pid, self._connection = pid, connection
        self.stdout = open(output, errors="replace")  # noqa: SIM115 (whoever started it closes it)
        self.returncode: int | None = None
        self._ending = threading.Lock()

    def poll(self) -> int | None:
        return self._await(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._await(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _await(self, timeout: float | None) -> int | None:
        with self._ending:
            if self.returncode is None:
                self._connection.settimeout(timeout)
                with suppress(BlockingIOError, TimeoutError):
                    self.returncode = receive_number(self._connection)
                    self._connection.close()
            return self.returncode


# What passes between those who ask and the fork server; forked_python.py has the same without these imports


def send(connection: socket.socket, streams: list[int], *request: object) -> None:
    content = marshal.dumps(request)
    socket.send_fds(connection, [len(content).to_bytes(4, "big")], streams)
    connection.sendall(content)


def receive(connection: socket.socket) -> tuple[list[int], tuple]:
    length, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as file:
        return streams, marshal.loads(file.read(int.from_bytes(length, "big")))


def send_number(connection: socket.socket, number: int) -> None:
    with suppress(OSError):  # whoever asked is gone
        connection.sendall(number.to_bytes(4, "big", signed=True))


def receive_number(connection: socket.socket) -> int:
    content = connection.recv(4)
    if not content:
        raise ConnectionError("the fork server is gone")
    return int.from_bytes(content, "big", signed=True)


# The fork server itself


def serve(folder: Path, modules: list[str]) -> tuple[list[str], str, dict[str, str]]:
    """Fork for whoever asks, and tell them how it ended. Returns in the forks alone, with what each has to run."""
    sys.path[0] = str(ROOT)
    given = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    import_module("federation")  # it sets what flwr reads when it is imported
    HARMLESS.update({name: value for name, value in os.environ.items() if name not in given})  # as demo.py passes it on
    own = relevant(given)
    for name in (*IMPORTED.split(), *modules):
        import_module(name)
    for name in IF_THERE.split():
        with suppress(ImportError):
            import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "federation"]:
        del sys.modules[name]
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
    gc.collect()
    gc.freeze()  # else a collection in a fork would write to every page that it shares with the others
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(100)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    os.write(1, b"ready\n")
    asking: dict[socket.socket, tuple[int, int]] = {}  # the process that each connection asked for, and its pidfd
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:  # our own parent is gone
                for pid, _ in asking.values():
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                os._exit(0)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                streams, request = receive(connection)
                pid = os.fork() if is_fit(request, own) else -1
                if pid == 0:
                    for each in (listener, connection, selector, *asking):
                        each.close()
                    settle(streams, [pidfd for _, pidfd in asking.values()])
                    return request
                for stream in streams:
                    os.close(stream)
                send_number(connection, max(pid, 0))
                if pid == -1:
                    connection.close()
                    continue
                asking[connection] = (pid, os.pidfd_open(pid))
                selector.register(connection, selectors.EVENT_READ)
                selector.register(asking[connection][1], selectors.EVENT_READ, connection)
            elif key.data is None:  # whoever asked for it is gone
                os.kill(asking[key.fileobj][0], signal.SIGKILL)
                selector.unregister(key.fileobj)
            else:
                pid, pidfd = asking.pop(key.data)
                _, status = os.waitpid(pid, 0)
                send_number(key.data, os.waitstatus_to_exitcode(status))
                for each in (pidfd, key.data):
                    with suppress(KeyError):
                        selector.unregister(each)
                os.close(pidfd)
                key.data.close()


def relevant(environment: dict[str, str]) -> dict[str, str]:
    """What a module may have read of an environment when it was imported."""
    return {
        name: value
        for name, value in environment.items()
        if not READ_LATER.fullmatch(name) and HARMLESS.get(name) != value
    }


def is_fit(request: tuple, own: dict[str, str]) -> bool:
    words, _, environment = request
    return words[:1] and (words[0] == "-m" or not words[0].startswith("-")) and relevant(environment) == own


def settle(streams: list[int], others: list[int]) -> None:
    """Make a fork a process of its own: its session, its three streams, and nothing else that is open."""
    os.setsid()
    gc.enable()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for number in (*streams, *others):
        os.close(number)


def run(words: list[str], cwd: str, environment: dict[str, str], python: Path) -> None:
    """Do what Python does with these words, to the end of the process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = str(python)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=sys.stderr.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=True)
    sys.modules["__main__"] = main = ModuleType("__main__")
    sys.path[0] = cwd if words[0] == "-m" else str(Path(words[0]).resolve().parent)
    if "PYTHONPATH" in environment:
        sys.path.insert(1, environment["PYTHONPATH"])
    code = 1
    try:
        if words[0] == "-m":
            sys.argv = ["-m", *words[2:]]
            runpy._run_module_as_main(words[1])
        else:
            sys.argv = words
            main.__file__ = os.path.abspath(words[0])
            exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), vars(main))
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            code = end.code or 0
    except BaseException as error:
        traceback.print_exception(type(error), error, error.__traceback__.tb_next)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run(*serve(Path(sys.argv[1]), sys.argv[2:]), Path(sys.argv[1]) / "python")

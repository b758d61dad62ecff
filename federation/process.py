"""What the operating system is asked for: memory, open files, processor cores, files written whole."""

import contextlib
import ctypes
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt(3)
PR_SET_PDEATHSIG = 1  # of prctl(2)
SMALL = 64 * 1024  # bytes; from gRPC's reading buffers upwards
LARGE = 32 * 1024 * 1024  # the greatest threshold that it takes
HELD = 256 * 1024 * 1024


def give_memory_back() -> None:
    """For the server. Have glibc map large blocks one by one, and keep the small ones in one heap; elsewhere nothing.

    By itself it spreads them over a heap for each of some threads, where one small block keeps whole freed models
    from going back. And gRPC holds buffers ready for as much as a connection once brought at a time
    (github.com/grpc/grpc/issues/42194): mapped, they cost nothing before they are written to.
    """
    _mallopt({M_MMAP_THRESHOLD: SMALL, M_ARENA_MAX: 1})


def keep_memory() -> None:
    """For a client. Have glibc keep what one batch frees for the next.

    By itself it gives a batch's activations back to the system, which then has to clear the pages for the next
    batch: hundreds of page faults a batch, a tenth of the time of a small network.
    """
    _mallopt({M_TRIM_THRESHOLD: HELD, M_MMAP_THRESHOLD: LARGE})


def allow_many_connections() -> None:
    """As many open files as the system grants: a thousand idle connections must not keep clients out."""
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit, and some systems grant no more


def end_on_sigterm() -> None:
    """Have SIGTERM end the process with the exit code that shells give it."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))


def end_with_parent() -> None:
    """In a new process, before its program: SIGTERM comes when its parent ends, however that ends. Linux alone can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for its threads, and without clearing up, which takes torch half a second."""
    sys.stdout.flush()
    os._exit(code)


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_id() -> bytes:
    """Random bytes that all processes on this machine share, and that nobody elsewhere can guess."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()  # Linux: drawn at each start of the machine
    except OSError:
        path = Path(tempfile.gettempdir()) / "federation-machine-id"
        with contextlib.suppress(FileExistsError), open(path, "xb") as file:
            file.write(os.urandom(32))
        return path.read_bytes()


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that after a crash at any moment there is the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself lasts only once the folder is on disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_content(path: Path, content: bytes) -> None:
    """The same of a file's whole content. Raises OSError."""
    write_whole(path, lambda file: file.write(content))


def _mallopt(options: dict[int, int]) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in options.items():
            libc.mallopt(option, value)

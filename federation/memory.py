"""Freed memory: given back to the system by a server of many models, kept by a client that trains one."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt(3)
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


def _mallopt(options: dict[int, int]) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in options.items():
            libc.mallopt(option, value)

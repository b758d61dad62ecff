"""Memory of many clients' models goes back to the system as soon as it is free."""

import ctypes
import platform

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's mallopt(3)
LARGE = 64 * 1024  # bytes; from gRPC's reading buffers upwards


def give_memory_back() -> None:
    """Have glibc map large blocks one by one, and keep the small ones in one heap; elsewhere nothing.

    By itself it spreads them over a heap for each of some threads, where one small block keeps whole freed models
    from going back. And gRPC holds buffers ready for as much as a connection once brought at a time
    (github.com/grpc/grpc/issues/42194): mapped, they cost nothing before they are written to.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_ARENA_MAX, 1)

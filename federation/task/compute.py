"""Where a client computes: its device, and its share of the processor's cores."""

from collections.abc import Callable

from federation.console import fail
from federation.process import num_cores

import torch


def find_device(wanted: str) -> str:
    """The device of --device; auto is the fastest there is. Exits with 2 and one line where it isn't there."""
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if wanted == "auto":
        return next(name for name, there in available.items() if there())
    if wanted not in available:
        fail(f"--device must be one of auto, {', '.join(available)}, got {wanted!r}", 2)
    if not available[wanted]():
        fail(f"--device {wanted} is not there on this machine; use --device auto", 2)
    return wanted


def share_cores(threads: int | None, clients_on_host: int) -> None:
    """Use --threads, or an even share of the machine's cores: clients side by side would otherwise fight for them."""
    torch.set_num_threads(threads or max(1, num_cores() // clients_on_host))

"""Where a client computes: its device, what that is quick with, and its share of the processor's cores."""

from collections.abc import Callable, Mapping

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


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a processor that multiplies bfloat16 numbers twice as quickly as float32 ones (AVX512-BF16).

    Others take longer for them. False, too, where PyTorch is too old to tell, and of a GPU, where it was not measured.
    """
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16"))


def share_cores(threads: int | None, clients_on_host: int) -> None:
    """Use --threads, or an even share of the machine's cores: clients side by side would otherwise fight for them."""
    torch.set_num_threads(threads or max(1, num_cores() // clients_on_host))

"""A PyTorch module's weights in and out, by position and with their own dtypes."""

from federation.console import PublicError

import numpy as np
import torch
from torch import nn


def get_weights(network: nn.Module) -> list[np.ndarray]:
    """Copies, in state_dict order; BatchNorm's running statistics and its int64 counters are among them."""
    return [t.detach().cpu().numpy().copy(order="C") for t in network.state_dict().values()]


def set_weights(network: nn.Module, weights: list[np.ndarray]) -> None:
    """All or nothing: ValueError, before anything is changed, unless number, shapes and dtypes all agree."""
    state = network.state_dict()
    if len(weights) != len(state):
        raise PublicError(f"the network has {len(state)} arrays, was given {len(weights)}")
    arrays = [torch.from_numpy(np.array(w)) for w in weights]
    for i, (name, array) in enumerate(zip(state, arrays, strict=True)):
        want = state[name]
        if array.shape != want.shape or array.dtype != want.dtype:
            raise PublicError(
                f"array {i} ({name}) should be {tuple(want.shape)} {want.dtype}, is {tuple(array.shape)} {array.dtype}"
            )
    network.load_state_dict(dict(zip(state, arrays, strict=True)))


def buffer_positions(network: nn.Module) -> list[int]:
    """Positions of the arrays that are measured and not trained: BatchNorm's running statistics and counters.

    Raises PublicError with the name of an array that can't be averaged, and the remedy.
    """
    measured = {name for name, _ in network.named_buffers()}
    for name, tensor in network.state_dict().items():
        problem = _problem(tensor, name in measured) if isinstance(tensor, torch.Tensor) else "no tensor; leave it out"
        if problem:
            raise PublicError(f"the network's {name} is {problem}")
    return [i for i, name in enumerate(network.state_dict()) if name in measured]


def _problem(tensor: torch.Tensor, measured: bool) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_complex():
        return f"{kind}, which can't be averaged; keep its real and imaginary parts apart"
    try:
        tensor.detach().cpu().numpy()
    except (TypeError, RuntimeError):
        return f"{kind}, which NumPy does not have; build the network in float32"
    if not measured and not torch.isfinite(tensor).all():
        return "not finite at the start; correct its initialisation"
    return ""

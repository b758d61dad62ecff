"""A PyTorch module's weights in and out, by position and with their own dtypes."""

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
        raise ValueError(f"the network has {len(state)} arrays, was given {len(weights)}")
    arrays = [torch.from_numpy(np.array(w)) for w in weights]
    for i, (name, array) in enumerate(zip(state, arrays, strict=True)):
        want = state[name]
        if array.shape != want.shape or array.dtype != want.dtype:
            raise ValueError(
                f"array {i} ({name}) should be {tuple(want.shape)} {want.dtype}, is {tuple(array.shape)} {array.dtype}"
            )
    network.load_state_dict(dict(zip(state, arrays, strict=True)))


def buffer_positions(network: nn.Module) -> list[int]:
    """Positions of the arrays that are measured and not trained: BatchNorm's running statistics and counters."""
    measured = {name for name, _ in network.named_buffers()}
    return [i for i, name in enumerate(network.state_dict()) if name in measured]

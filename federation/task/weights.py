"""A PyTorch module's weights in and out: what travels by position and with its own dtype, the rest never."""

import functools
from collections.abc import Callable

from federation.console import PublicError
from federation.networks import batch_norm

import numpy as np
import torch
from torch import nn


def travelling(network: nn.Module) -> list[str]:
    """Names of the arrays that training changes, in state_dict order: all but frozen ones.

    Frozen are parameters without requires_grad, and the buffers of modules all of whose parameters are frozen, such
    as the BatchNorms of a frozen backbone. Where everything is frozen, everything travels.
    """
    frozen = _frozen(network)
    names = list(network.state_dict())
    return [name for name in names if name not in frozen] or names


def get_weights(network: nn.Module, copy: bool = True) -> list[np.ndarray]:
    """What travels; BatchNorm's running statistics and its int64 counters are among it.

    Without copy, the network's own memory, where it is on the CPU: to look at before it changes.
    """
    state = network.state_dict()
    arrays = (_array(state[name]) for name in travelling(network))
    return [array.copy(order="C") if copy else np.asarray(array, order="C") for array in arrays]


def frozen_weights(network: nn.Module) -> dict[str, np.ndarray]:
    """What doesn't travel, by name."""
    there = set(travelling(network))
    return {name: _array(tensor) for name, tensor in network.state_dict().items() if name not in there}


def set_weights(network: nn.Module, weights: list[np.ndarray]) -> None:
    """All or nothing: ValueError, before anything is changed, unless number, shapes and dtypes all agree."""
    state, names = network.state_dict(), travelling(network)
    if len(weights) != len(names):
        raise PublicError(f"the network has {len(names)} arrays, was given {len(weights)}")
    arrays = {name: _tensor(array) for name, array in zip(names, weights, strict=True)}
    for i, (name, array) in enumerate(arrays.items()):
        want = state[name]
        if array.shape != want.shape or array.dtype != want.dtype:
            raise PublicError(
                f"array {i} ({name}) should be {tuple(want.shape)} {want.dtype}, is {tuple(array.shape)} {array.dtype}"
            )
    network.load_state_dict(arrays, strict=False)


def buffer_positions(network: nn.Module) -> list[int]:
    """Positions, of what travels, of the arrays that are measured and not trained: BatchNorm's running statistics.

    Raises PublicError with the name of an array that can't be averaged, and the remedy.
    """
    measured = {name for name, _ in network.named_buffers()}
    for name, tensor in network.state_dict().items():
        problem = _problem(tensor, name in measured) if isinstance(tensor, torch.Tensor) else "no tensor; leave it out"
        if problem:
            raise PublicError(f"the network's {name} is {problem}")
    return [i for i, name in enumerate(travelling(network)) if name in measured]


def batchnorm_positions(network: nn.Module) -> list[int]:
    """Positions, of what travels, of the running mean and variance of each BatchNorm layer that trains, by turns."""
    places = {name: i for i, name in enumerate(travelling(network))}
    return [places[name] for name in _batchnorm_names(network)]


def measure_batchnorm(network: nn.Module, evaluate: Callable[[], object]) -> list[np.ndarray]:
    """The arrays at these positions, measured anew while evaluate() runs the network, which stays as it was."""
    names = _batchnorm_names(network)
    measured = batch_norm.measure(network, {name.rpartition(".")[0] for name in names}, evaluate)
    return [_array(measured[name]) for name in names]


def keep_frozen(network: nn.Module) -> nn.Module:
    """Keep frozen modules in evaluation mode, whatever train() is called on around them: BatchNorm stays as it came."""
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and module is not network and not any(each.requires_grad for each in parameters):
            module.eval()
            module.train = functools.partial(_stay, module)  # type: ignore[method-assign]
    return network


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _batchnorm_names(network: nn.Module) -> list[str]:
    frozen = _frozen(network)
    names = [f"{layer}.{what}" for layer, _ in batch_norm.layers(network) for what in batch_norm.STATISTICS]
    return [name for name in names if name not in frozen]


def _frozen(network: nn.Module) -> set[str]:
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    for prefix, module in network.named_modules():
        parameters = list(module.parameters())
        if parameters and not any(each.requires_grad for each in parameters):
            frozen |= {f"{prefix}.{name}" if prefix else name for name, _ in module.named_buffers()}
    return frozen


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Without a copy where that can be; what came from bytes may only be read."""
    array = np.asarray(array)  # NumPy's sums of arrays without dimensions are none
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


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

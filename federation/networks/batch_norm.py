"""BatchNorm's running statistics, measured anew.

Averaged weights give other activations than any client's own, and the mean of the clients' running statistics
is not theirs: measuring them on the averaged network is most of the difference after a first round.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

STATISTICS = ("running_mean", "running_var")


def layers(network: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """All BatchNorm layers that keep running statistics, with their names; SyncBatchNorm is one, too."""
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def measure(network: nn.Module, measured: set[str], evaluate: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Mean and variance of what reaches each of these layers while evaluate() runs the network, by the arrays' names.

    As in training, a layer normalises each batch by the batch's own statistics, so all layers are measured in one
    pass. All else is as evaluate() has it, and the network stays as it was. What reaches a layer is counted exactly,
    whatever the batches' sizes; a layer that nothing reaches keeps the statistics that it has.
    """
    watched = {name: Layer(layer) for name, layer in layers(network) if name in measured}
    try:
        evaluate()
    finally:
        for layer in watched.values():
            layer.release()
    return {
        f"{name}.{statistic}": value
        for name, layer in watched.items()
        for statistic, value in zip(STATISTICS, layer.statistics(), strict=True)
    }


class Layer:
    """A layer in training mode, whatever train() is called on around it, that notes what reaches it."""

    def __init__(self, module: _BatchNorm):
        assert module.running_mean is not None
        assert module.running_var is not None
        self.old = (module.running_mean, module.running_var)
        self.module, self.count = module, 0
        self.mean, self.square = (torch.zeros_like(each, dtype=torch.float64) for each in self.old)
        self.was = module.training
        module.train = lambda mode=True: module  # type: ignore[method-assign]
        module.track_running_stats = False  # else it would count batches
        self.hook = module.register_forward_pre_hook(self.note)

    def note(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Add a batch (n, features, ...): the means over all but the features, and the squares around them."""
        batch = inputs[0].detach()
        count = batch.numel() // max(1, batch.shape[1])
        module.training = count > 1  # of one value there is no variance
        if count > 1:
            variance, mean = torch.var_mean(batch.float(), (0, *range(2, batch.dim())), correction=0)
            total, step = self.count + count, mean - self.mean
            # Chan et al. 1983: sums of squares around their own means, put together.
            self.square += variance * count + step**2 * (self.count * count / total)
            self.mean += step * (count / total)
            self.count = total

    def release(self) -> None:
        self.hook.remove()
        del self.module.train
        self.module.training, self.module.track_running_stats = self.was, True

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In the module's own dtype; the variance is that without a bias, as BatchNorm has it."""
        mean, variance = (self.mean, self.square / (self.count - 1)) if self.count else self.old
        return mean.to(self.old[0].dtype), variance.to(self.old[1].dtype)

"""What keeps local training useful to the others where a client's classes are not as frequent as theirs."""

import torch


def one_epoch(labels: torch.Tensor, most: int, generator: torch.Generator) -> torch.Tensor:
    """The places of the examples of an epoch in random order, as many as there are, those of rare classes repeatedly.

    Repeat factor sampling, Gupta et al. 2019, arXiv:1908.03195: it draws from a pool in which an example is as many
    times as the square root of n(most frequent class) / n(its class), rounded, but at most `most` times. With 0 or 1,
    or an even mix, each is there once.
    """
    counts = torch.bincount(labels, minlength=1).double()
    repeats = (counts.max() / counts).sqrt().clamp(1, max(1, most)).round().long()
    pool = torch.arange(len(labels)).repeat_interleave(repeats[labels])
    return pool[torch.randperm(len(pool), generator=generator)[: len(labels)]]


def priors(labels: torch.Tensor, classes: int, own: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The log of these class frequencies, (classes,), and smoothed targets, a row a class.

    Added to the logits, this stops the network from learning how frequent each class is at its client, and from
    forgetting those that it lacks. Logit adjustment, Menon et al. 2021, arXiv:2007.07314; for federations Zhang
    et al. 2022, arXiv:2209.00189. An even mix: no effect.
    """
    smoothing = own["label_smoothing"]
    prior = torch.bincount(labels, minlength=classes).float() + 0.01
    prior = (prior / prior.sum()).to(device)
    log_prior = prior.log() if own["logit_adjustment"] else torch.zeros_like(prior)
    return log_prior, (1 - smoothing) * torch.eye(classes, device=device) + smoothing * prior

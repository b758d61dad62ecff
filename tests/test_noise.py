"""Noise and draws: what they should be like, within five standard errors; and that nobody can repeat them."""

import random

from federation.privacy import noise
from federation.privacy.noise import Source, poisson_draw, secret_normal

import numpy as np
import pytest
import torch

SIZE = 1_000_000


def test_noise_is_standard_normal():
    """Of n normal numbers the standard errors are 1 / sqrt(n) of the mean, sqrt(2 / n) and sqrt(96 / n) of the
    second and fourth moment, which are 1 and 3."""
    drawn = secret_normal(SIZE).double()
    assert drawn.dtype == torch.float64
    assert drawn.mean().item() == pytest.approx(0, abs=5 * SIZE**-0.5)
    assert drawn.pow(2).mean().item() == pytest.approx(1, abs=5 * (2 / SIZE) ** 0.5)
    assert drawn.pow(4).mean().item() == pytest.approx(3, abs=5 * (96 / SIZE) ** 0.5)


def test_noise_of_neighbouring_places_and_halves_has_nothing_in_common():
    drawn = secret_normal(SIZE).double()
    for apart in (1, SIZE // 4, SIZE // 2):
        same = (drawn[:-apart] * drawn[apart:]).mean().item()
        assert same == pytest.approx(0, abs=5 * (SIZE - apart) ** -0.5)


def test_noise_is_float32_of_any_size(monkeypatch):
    monkeypatch.setattr(noise, "PER_BLOCK", 3)
    for size in (0, 1, 3, 7):
        drawn = secret_normal(size)
        assert (drawn.shape, drawn.dtype) == ((size,), torch.float32)
        assert len(set(drawn.tolist())) == size  # blocks are not the same again


def test_the_ends_of_the_random_numbers_give_finite_noise():
    for byte in (b"\0", b"\xff"):
        assert secret_normal(5, lambda size, byte=byte: byte * size).isfinite().all()


def test_noise_and_draws_come_from_no_generator_that_has_a_seed(monkeypatch):
    def seeded(*_: object, **__: object):
        raise AssertionError("a generator with a seed was asked")

    for place, names in (
        (torch, ["randn", "rand", "normal", "randn_like", "rand_like", "bernoulli", "randint", "randperm"]),
        (np.random, ["default_rng", "normal", "random", "rand", "randn", "bytes", "RandomState"]),
        (random, ["random", "gauss", "normalvariate", "getrandbits", "randbytes", "Random"]),
    ):
        for name in names:
            monkeypatch.setattr(place, name, seeded)
    random_bytes = Source().bytes_of(0, 1)
    assert not torch.equal(secret_normal(100, random_bytes), secret_normal(100, random_bytes))
    assert poisson_draw(1000, 0.5, random_bytes).tolist() != poisson_draw(1000, 0.5, random_bytes).tolist()


def test_a_seed_repeats_each_training_and_no_other():
    def drawn(seed: int | None, partition: int, server_round: int) -> list[float]:
        return secret_normal(4, Source(seed).bytes_of(partition, server_round)).tolist()

    assert drawn(7, 0, 1) == drawn(7, 0, 1)
    others = [drawn(7, 0, 1), drawn(8, 0, 1), drawn(7, 1, 1), drawn(7, 0, 2), drawn(None, 0, 1), drawn(None, 0, 1)]
    assert len({tuple(each) for each in others}) == 6


def test_a_seeded_training_draws_anew_in_each_step():
    random_bytes = Source(7).bytes_of(0, 1)
    assert secret_normal(4, random_bytes).tolist() != secret_normal(4, random_bytes).tolist()


def test_draws_are_poissons():
    """Of 4,000 draws from 1,000 at rate 0.1: sizes have mean 100 and variance 90, to five standard errors."""
    number, rate, times = 1000, 0.1, 4000
    sizes = np.array([len(poisson_draw(number, rate)) for _ in range(times)])
    mean, variance = number * rate, number * rate * (1 - rate)
    assert sizes.mean() == pytest.approx(mean, abs=5 * (variance / times) ** 0.5)
    assert sizes.var() == pytest.approx(variance, abs=5 * variance * (2 / times) ** 0.5)


def test_every_example_is_drawn_as_often_and_never_twice():
    counts = torch.zeros(20)
    for _ in range(4000):
        drawn = poisson_draw(20, 0.3)
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        counts[drawn] += 1
    assert ((counts - 1200).abs() < 5 * (4000 * 0.3 * 0.7) ** 0.5).all()


@pytest.mark.parametrize(("rate", "drawn"), [(0, []), (1, [0, 1, 2, 3]), (1.5, [0, 1, 2, 3])])
def test_rate_0_draws_none_and_rate_1_all(rate, drawn):
    assert poisson_draw(4, rate).tolist() == drawn
    assert len(poisson_draw(0, 0.5)) == 0


def test_the_greatest_rate_below_1_draws_nearly_all():
    assert len(poisson_draw(1000, 1 - 2**-53)) == 1000  # one is missing in 9 of 10**13 tries

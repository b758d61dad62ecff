"""Who holds which examples: partitions that are a function of the labels and the seed alone."""

from collections.abc import Callable

from federation.console import PublicError

import numpy as np


def iid_partition(labels: np.ndarray, num_partitions: int, seed: int) -> list[np.ndarray]:
    """Share out examples evenly and at random; sizes differ by one at most.

    labels: (n,) int64. Returns num_partitions sorted int64 index arrays that cover range(n) exactly once.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(part) for part in np.array_split(order, num_partitions)]


def dirichlet_partition(labels: np.ndarray, num_partitions: int, seed: int, alpha: float) -> list[np.ndarray]:
    """Share out examples with skewed labels; the smaller alpha, the fewer classes a client sees.

    Every class is cut among the clients in proportions drawn from Dirichlet(alpha), alpha > 0; drawn
    again until every client has at least ten examples (or its even share, where that is less).
    labels: (n,) int64. Returns num_partitions sorted int64 index arrays that cover range(n) exactly
    once. Raises ValueError if 1,000 draws leave a client short. After Hsu et al. 2019,
    arXiv:1909.06335, in the per-class form of Yurochkin et al. 2019, arXiv:1905.12022.
    """
    rng = np.random.default_rng(seed)
    least = min(10, len(labels) // num_partitions)
    for _ in range(1000):
        parts: list[list[np.ndarray]] = [[] for _ in range(num_partitions)]
        for name in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == name))
            shares = rng.dirichlet([alpha] * num_partitions)
            cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        partitions = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, partitions)) >= least:
            return partitions
    raise PublicError(
        f"--alpha {alpha} leaves one of {num_partitions} clients without examples; raise it, or lower --clients"
    )


def shards_partition(labels: np.ndarray, num_partitions: int, seed: int) -> list[np.ndarray]:
    """Two shards of label-sorted examples a client, so most clients see two classes only.

    labels: (n,) int64. Returns num_partitions sorted int64 index arrays that cover range(n) exactly
    once. The pathological split of McMahan et al. 2017, section 3, arXiv:1602.05629.
    """
    rng = np.random.default_rng(seed)
    by_label = np.lexsort((rng.permutation(len(labels)), labels))
    shards = np.array_split(by_label, 2 * num_partitions)
    order = rng.permutation(2 * num_partitions)
    return [np.sort(np.concatenate([shards[i], shards[j]])) for i, j in order.reshape(-1, 2)]


def quantity_skew_partition(labels: np.ndarray, num_partitions: int, seed: int) -> list[np.ndarray]:
    """Clients of very different size: minor with probability 0.7, else major.

    A minor client holds 2,000 to 3,000 of CIFAR-10's 50,000 images and a major one 10,000 to 15,000;
    of n examples, the same fractions. Disjoint, but not covering: what nobody drew stays unused. Many
    clients may draw more than there is: then all shrink alike.
    """
    rng = np.random.default_rng(seed)
    minor = rng.random(num_partitions) < 0.7
    low, high = np.where(minor, 0.04, 0.20), np.where(minor, 0.06, 0.30)
    fractions = rng.uniform(low, high)
    fractions /= max(1.0, fractions.sum())
    sizes = np.maximum(1, (fractions * len(labels)).astype(int))
    while sizes.sum() > len(labels):  # of few images, one each for the smallest may be more than there is
        sizes[sizes.argmax()] -= 1
    order = rng.permutation(len(labels))
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes))[:-1]]


def local_partition(labels: np.ndarray, num_partitions: int, seed: int) -> list[np.ndarray]:
    """Every client keeps all it has: for clients that bring data of their own."""
    return [np.arange(len(labels))] * num_partitions


PARTITIONERS: dict[str, Callable[..., list[np.ndarray]]] = {
    "iid": iid_partition,
    "dirichlet": dirichlet_partition,
    "shards": shards_partition,
    "quantity-skew": quantity_skew_partition,
    "local": local_partition,
}
BY_LABEL = ("dirichlet", "shards")  # sort the examples by their classes
OLD_NAMES = {"sizes": "quantity-skew", "whole": "local"}


def partition(partitioner: str, labels: np.ndarray, num_partitions: int, seed: int, alpha: float) -> list[np.ndarray]:
    """Cut labels' examples into partitions by the partitioner of that name.

    Raises ValueError where a partition would be empty.
    """
    if len(labels) < 2 * num_partitions and partitioner != "local":
        raise PublicError(
            f"{len(labels)} examples are too few for {num_partitions} clients; give more, or lower --clients"
        )
    options = {"alpha": alpha} if partitioner == "dirichlet" else {}
    return PARTITIONERS[partitioner](labels, num_partitions, seed, **options)


def shares(
    train_labels: np.ndarray, test_labels: np.ndarray, num_partitions: int, partitioner: str, alpha: float, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Which training and which test examples each partition has: two lists of index arrays, by partition.

    The test set is cut evenly whatever the partitioner, so that the example-weighted mean of a metric over the
    clients is exactly that on all of it. Raises ValueError where there are too few examples.
    """
    even = "local" if partitioner == "local" else "iid"
    train = partition(partitioner, train_labels, num_partitions, seed, alpha)
    return train, partition(even, test_labels, num_partitions, seed, alpha)

"""Who holds which examples: every split is a function of the labels and the seed, and fair to what its name says."""

from federation.partition import OLD_NAMES, PARTITIONERS, partition, shares

import numpy as np
import pytest

LABELS = np.arange(1000) % 10  # ten classes of a hundred examples
CIFAR = np.arange(50_000) % 10
CUTTING = [name for name in PARTITIONERS if name != "local"]  # local: every client keeps all of its own
COVERING = [name for name in CUTTING if name != "quantity-skew"]  # what nobody drew stays unused


def cut(name: str, labels: np.ndarray = LABELS, clients: int = 5, seed: int = 0, alpha: float = 10.0):
    return partition(name, labels, clients, seed, alpha)


def num_classes(part: np.ndarray, labels: np.ndarray) -> int:
    return len(np.unique(labels[part]))


@pytest.mark.parametrize("name", CUTTING)
@pytest.mark.parametrize("clients", [1, 2, 3, 7, 50])
def test_partitions_are_disjoint_sorted_and_never_empty(name, clients):
    for seed in range(3):
        parts = cut(name, clients=clients, seed=seed)
        together = np.concatenate(parts)
        assert len(parts) == clients
        assert min(map(len, parts)) >= 1
        assert len(np.unique(together)) == len(together)
        assert together.min() >= 0
        assert together.max() < len(LABELS)
        for part in parts:
            assert part.dtype == np.int64
            assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("clients", [1, 2, 3, 7, 50])
def test_partitions_cover_every_example(name, clients):
    assert np.array_equal(np.sort(np.concatenate(cut(name, clients=clients))), np.arange(1000))


@pytest.mark.parametrize("name", CUTTING)
def test_same_seed_same_split_and_another_seed_another(name):
    same = zip(cut(name, seed=7), cut(name, seed=7), strict=True)
    other = zip(cut(name, seed=7), cut(name, seed=8), strict=True)
    assert all(np.array_equal(a, b) for a, b in same)
    assert not all(np.array_equal(a, b) for a, b in other)


@pytest.mark.parametrize("name", CUTTING)
def test_a_split_leaves_numpys_global_random_state_alone(name):
    np.random.seed(1)
    undisturbed = np.random.random()
    np.random.seed(1)
    cut(name)
    assert np.random.random() == undisturbed


@pytest.mark.parametrize("name", ["iid", "shards", "quantity-skew"])  # dirichlet needs luck with so few, and says so
def test_twice_as_many_examples_as_clients_are_enough_and_one_less_is_too_few(name):
    for clients in (1, 2, 3, 10, 20):
        for seed in range(30):
            enough = cut(name, np.arange(2 * clients) % 2, clients, seed)
            assert min(map(len, enough)) >= 1
        with pytest.raises(
            ValueError, match=rf"^{2 * clients - 1} examples are too few for {clients} clients; .*lower"
        ):
            cut(name, np.arange(2 * clients - 1) % 2, clients)


def test_iid_sizes_differ_by_one_at_most_and_every_client_sees_every_class():
    parts = cut("iid", clients=3)
    assert sorted(map(len, parts)) == [333, 333, 334]
    assert [num_classes(part, LABELS) for part in parts] == [10, 10, 10]


@pytest.mark.parametrize("clients", [5, 10, 50])
def test_shards_hold_two_classes_at_most_where_a_shard_fits_into_a_class(clients):
    for seed in range(5):
        parts = cut("shards", clients=clients, seed=seed)
        assert max(num_classes(part, LABELS) for part in parts) <= 2
        assert {len(part) for part in parts} == {1000 // clients}


def test_three_clients_of_ten_classes_share_them_in_shards_of_two_or_three():
    for seed in range(5):  # a shard of three clients' six holds 1.67 classes, so it touches two or three
        assert max(num_classes(part, LABELS) for part in cut("shards", clients=3, seed=seed)) <= 6


def test_dirichlet_shares_are_the_more_uneven_the_smaller_alpha():
    def unevenness(alpha: float) -> float:
        """Standard deviation of the clients' shares of a class, over classes and seeds."""
        shares = [
            np.bincount(CIFAR[part], minlength=10) / 5000
            for seed in range(10)
            for part in cut("dirichlet", CIFAR, 3, seed, alpha)
        ]
        return float(np.std(shares))

    even, mild, skewed, extreme = map(unevenness, (1e6, 5.0, 0.5, 0.05))
    assert even < 0.005 < mild < skewed < extreme
    # A Dirichlet share of K = 3 has the variance (1/K)(1 - 1/K) / (K alpha + 1): 0.298 for 0.5.
    assert skewed == pytest.approx(0.298, abs=0.03)


def test_dirichlet_gives_every_client_ten_examples_or_its_even_share_where_that_is_less():
    for seed in range(20):
        assert min(map(len, cut("dirichlet", clients=3, seed=seed, alpha=0.05))) >= 10
        assert min(map(len, cut("dirichlet", np.arange(9) % 3, 3, seed, alpha=1.0))) >= 3


@pytest.mark.slow
def test_dirichlet_that_cant_serve_every_client_says_so_with_alpha_and_the_remedy():
    with pytest.raises(ValueError, match=r"^--alpha 1e-06 leaves one of 11 clients without examples; raise it, or"):
        cut("dirichlet", clients=11, alpha=1e-6)  # ten classes, each whole in one client's hands


def test_sizes_are_minor_with_probability_seven_tenths_and_within_the_articles_bounds():
    sizes = np.array([len(part) for seed in range(200) for part in cut("quantity-skew", CIFAR, 3, seed)])
    minor, major = sizes[sizes <= 3000], sizes[sizes > 3000]
    assert minor.min() >= 2000
    assert major.min() >= 10_000
    assert major.max() <= 15_000
    assert len(minor) / len(sizes) == pytest.approx(0.7, abs=0.06)  # three standard deviations of 600 draws


def test_sizes_of_other_data_sets_are_the_same_fractions():
    for cifar, small in zip(cut("quantity-skew", CIFAR, 3), cut("quantity-skew", LABELS, 3), strict=True):
        assert len(small) == pytest.approx(len(cifar) / 50, abs=1)


def test_sizes_of_many_clients_shrink_alike_instead_of_running_out():
    sizes = np.array([len(part) for part in cut("quantity-skew", CIFAR, 40)])
    assert 49_950 < sizes.sum() <= 50_000
    assert sizes.max() / sizes.min() > 3  # minor and major still tell apart


def test_local_gives_every_client_all_of_its_own_examples_and_two_clients_need_only_one():
    train, test = shares(LABELS, LABELS, 3, "local", 0.5, 0)
    assert all(np.array_equal(part, np.arange(1000)) for part in train + test)
    assert [part.tolist() for part in cut("local", np.zeros(1, int), 2)] == [[0], [0]]


@pytest.mark.parametrize("name", CUTTING)
def test_the_test_set_is_split_evenly_whatever_the_training_split(name):
    _, parts = shares(LABELS, LABELS, 3, name, 10.0, 0)
    assert sorted(map(len, parts)) == [333, 333, 334]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))


def test_former_names_of_partitioners_lead_to_todays():
    assert set(OLD_NAMES.values()) <= set(PARTITIONERS)
    assert not set(OLD_NAMES) & set(PARTITIONERS)

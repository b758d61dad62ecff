"""How weights travel: half the bytes, the same bits at both ends, and nothing infinite in silence."""

from types import SimpleNamespace

from federation.aggregation.fedbuff import FedBuff, TrainingJob, replay
from federation.aggregation.validation import BadUpdate, Update, validate_fit
from federation.client.session import Session
from federation.compression import TooLarge, as_sent, num_bytes, pack, unpack
from federation.config import Recipe
from federation.protocol import Assignment
from federation.security.clipping import clip
from federation.server.settings import ServerSettings

import numpy as np
import pytest
from helpers.tiny_client import WEIGHTS, TinyClient
from helpers.updates import strategy, update
from test_strategy import START, rounds, same_bits
from test_validation import fit_res

KERNEL = np.array([[0.1, -2.0], [1 / 3, 1e-9]], np.float32)
ARRAYS = [KERNEL, np.array(70000), np.array(0.1, np.float64), np.array([True])]


def dtypes(arrays: list[np.ndarray]) -> list[str]:
    return [array.dtype.name for array in arrays]


# There and back


def test_floats_travel_as_float16_and_integers_as_they_are():
    packed = pack(ARRAYS, "fp16")
    assert dtypes(packed) == ["float16", "int64", "float16", "bool"]
    assert packed[1] == 70000
    assert num_bytes(ARRAYS, "none") == 4 * 4 + 8 + 8 + 1
    assert num_bytes(ARRAYS, "fp16") == 4 * 2 + 8 + 2 + 1 == sum(array.nbytes for array in packed)


def test_they_arrive_in_their_own_dtypes_rounded_to_11_bits():
    arrived = unpack(pack(ARRAYS, "fp16"), ARRAYS)
    assert dtypes(arrived) == dtypes(ARRAYS)
    assert [array.shape for array in arrived] == [array.shape for array in ARRAYS]
    assert arrived[0].tolist() == [[1638 / 2**14, -2.0], [1365 / 2**12, 0.0]]  # 1e-9 is nearer to 0 than to 2**-24


def test_what_was_sent_once_is_sent_again_without_change():
    once = as_sent(ARRAYS, "fp16")
    assert same_bits(as_sent(once, "fp16"), once)
    assert not same_bits(once, ARRAYS)


def test_uncompressed_weights_are_not_even_copied():
    assert pack(ARRAYS, "none") is ARRAYS
    assert as_sent(ARRAYS, "none") is ARRAYS
    assert all(new is old for new, old in zip(unpack(ARRAYS, ARRAYS), ARRAYS, strict=True))


# The end of float16


@pytest.mark.parametrize("value", [65520.0, -7e4, 1e38])
def test_a_value_beyond_float16_does_not_become_infinite(value):
    with pytest.raises(TooLarge) as caught:
        pack([KERNEL, np.array([1.0, value, np.nan], np.float32)], "fp16")
    assert str(caught.value) == f"array 1 holds {abs(value):g}, beyond the 65504 that --compress fp16 can carry"


def test_the_greatest_that_float16_holds_arrives():
    (arrived,) = as_sent([np.array([65504, 65519, -65504], np.float32)], "fp16")
    assert arrived.tolist() == [65504, 65504, -65504]


def test_nan_and_infinity_stay_for_the_server_to_see():
    (packed,) = pack([np.array([np.nan, np.inf, -np.inf, 1], np.float32)], "fp16")
    assert np.array_equal(packed, np.array([np.nan, np.inf, -np.inf, 1], np.float16), equal_nan=True)
    with pytest.raises(BadUpdate, match=r"^array 0 holds NaN or infinite values$"):
        validate_fit(fit_res([packed]), 0, [np.zeros(4, np.float32)], declared=10, compress="fp16")


# The server


def test_a_compressed_update_counts_in_the_models_own_dtypes():
    new = [KERNEL * 2, np.array(70001), np.array(0.5), np.array([False])]
    got = validate_fit(fit_res(pack(new, "fp16")), 0, ARRAYS, declared=10, compress="fp16")
    assert got.examples == 10
    assert same_bits(got.weights, as_sent(new, "fp16"))


@pytest.mark.parametrize(("compress", "sent"), [("none", np.float16), ("fp16", np.float32)])
def test_an_update_that_is_not_packed_as_agreed_is_left_out(compress, sent):
    agreed = {"none": "float32", "fp16": "float16"}[compress]
    with pytest.raises(BadUpdate, match=rf"^array 0 has dtype {np.dtype(sent)} instead of {agreed}$"):
        validate_fit(fit_res([KERNEL.astype(sent)]), 0, [KERNEL], declared=10, compress=compress)


def test_the_next_model_is_the_one_that_the_clients_will_get():
    rule = strategy("fedavg", [np.zeros(1, np.float32)], [], compress="fp16")
    (new,) = rule.aggregate([np.zeros(1, np.float32)], [update([np.array([w], np.float32)]) for w in (0, 0, 1)])
    assert new.tolist() == [1365 / 2**12]  # one third in 11 bits
    assert new.dtype == np.float32


def test_a_model_that_cant_be_sent_is_an_error():
    weights = [np.zeros(1, np.float32)]
    rule = strategy("fedavgm", weights, [], compress="fp16")
    weights = rule.aggregate(weights, [update([np.array([60000], np.float32)])])
    with pytest.raises(TooLarge, match=r"^array 0 holds 90016, "):  # 60000 is 60000, and half the last step is 30000
        rule.aggregate(weights, [update([np.array([60016], np.float32)])])
    settings = ServerSettings(mode="async", buffer_size=1, server_learning_rate=2.0)
    run = FedBuff([np.zeros(1, np.float32)], [], settings, 1, "fp16")
    run.receive(TrainingJob(0, 1, 0, 0, 1), run.weights, update([np.array([40000], np.float32)]))
    with pytest.raises(TooLarge, match=r"^array 0 holds 80000, "):
        run.apply()


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_restored_optimiser_goes_on_with_the_same_bits_when_weights_are_rounded(name):
    whole = rounds(strategy(name, START, [1], compress="fp16"), START, range(4))
    first = strategy(name, START, [1], compress="fp16")
    weights = rounds(first, START, range(2))
    second = strategy(name, weights, [1], compress="fp16")
    second.restore(first.state(), weights)
    assert same_bits(rounds(second, weights, range(2, 4)), whole)


def test_a_clipped_update_is_measured_from_the_model_that_was_sent():
    base = as_sent([np.array([1 / 3], np.float32)], "fp16")
    assert clip(base, base, 1e-9) is base


# The client


class Learner(SimpleNamespace):
    """A user's client that knows nothing of all this."""

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        return ARRAYS

    def fit(self, parameters: list, config: dict) -> tuple:
        self.given = parameters
        return self.new, 7, {"train_loss": 1.0}

    def evaluate(self, parameters: list, config: dict) -> tuple:
        self.given = parameters
        return 1.0, 7, {"accuracy": 0.5}


CONFIG = {"server_round": 1, "clients_on_host": 1}


def session(compress: str, **client: object) -> Session:
    made = Session(lambda assignment: made.client, ["cat", "dog"])
    made.assignment, made.client = Assignment(0, 3, Recipe(compress=compress)), Learner(**client)
    return made


def test_a_client_is_given_its_own_dtypes_and_what_it_returns_is_packed():
    new = [array + 1 for array in ARRAYS[:3]] + [~ARRAYS[3]]
    made, packed = session("fp16", new=new), pack(ARRAYS, "fp16")
    sent, *rest = made.fit(packed, CONFIG)
    assert same_bits(made.client.given, as_sent(ARRAYS, "fp16"))
    assert same_bits(sent, pack(new, "fp16"))
    assert rest == [7, {"train_loss": 1.0}]
    made.client.given = None
    assert made.evaluate(packed, CONFIG) == (1.0, 7, {"accuracy": 0.5})
    assert same_bits(made.client.given, as_sent(ARRAYS, "fp16"))


def test_uncompressed_a_client_is_passed_the_arrays_themselves():
    made = session("none", new=ARRAYS)
    assert made.fit(ARRAYS, CONFIG)[0] is ARRAYS
    assert made.client.given is ARRAYS


def test_a_client_whose_weights_grow_beyond_float16_says_so_in_one_line():
    made = session("fp16", new=[KERNEL * 1e6])
    words = "array 0 holds 2e+06, beyond the 65504 that --compress fp16 can carry"
    assert made.fit(pack(ARRAYS, "fp16"), CONFIG) == ([], 0, {"error": words})


# Whole runs


def test_a_run_of_half_the_bytes_ends_with_the_bits_that_travelled(federation):
    server = federation.server("--rounds", 2, "--compress", "fp16")
    processes = [server, *(federation.tiny("--partition-id", i) for i in range(3))]
    for process in processes:
        process.ends(0)
    assert [row["bytes_received"] for row in federation.history()["rounds"]] == [0, *2 * [3 * (6 * 2 + 8)]]
    clients = [TinyClient(Assignment(i, 3, Recipe())) for i in range(3)]
    rule, weights = strategy("fedavg", WEIGHTS, TinyClient.buffer_positions, compress="fp16"), WEIGHTS
    for server_round in (1, 2):
        answers = [client.fit(weights, {"server_round": server_round})[:2] for client in clients]
        weights = rule.aggregate(weights, [update(as_sent(new, "fp16"), n) for new, n in answers])
    assert same_bits(federation.weights(), weights)
    assert same_bits(as_sent(weights, "fp16"), weights)


def test_an_asynchronous_run_is_replayed_from_the_bits_that_travelled(federation):
    server = federation.server("--rounds", 3, "--mode", "async", "--compress", "fp16")
    processes = [server, *(federation.tiny("--partition-id", i, "--seconds", 0.1 * i) for i in range(3))]
    for process in processes:
        process.ends(0)
    history = federation.history()
    clients = [TinyClient(Assignment(i, 3, Recipe())) for i in range(3)]

    def train(job: TrainingJob, base: list) -> Update:
        new, examples, _ = clients[job.partition].fit(base, {"server_round": job.number})
        return update(as_sent(new, "fp16"), examples, job.partition)

    settings = ServerSettings(mode="async", buffer_size=history["config"]["buffer_size"])
    versions = [row["updates"] for row in history["rounds"][1:]]
    again = replay(versions, WEIGHTS, TinyClient.buffer_positions, settings, 3, train, "fp16")
    assert same_bits(federation.weights(), again)


def test_a_client_beyond_float16_is_left_out_in_words_and_the_run_goes_on(federation):
    server = federation.server("--rounds", 2, "--compress", "fp16", "--rejoin-wait", 0)
    clients = [federation.tiny("--partition-id", i) for i in range(2)]
    far = federation.tiny("--partition-id", 2, "--behave", "far", "--in-round", 1)
    words = r"array 0 holds 1e\+06, beyond the 65504 that --compress fp16 can carry"
    server.says(f"round 1: client 2 left out: it says: {words}\n")
    far.says(f"error: {words}\n")
    far.ends(1)
    for process in [server, *clients]:
        process.ends(0)


def test_a_model_beyond_float16_ends_the_run_in_one_line(federation):
    server = federation.server("--mode", "async", "--compress", "fp16", "--server-learning-rate", 1e9)
    for _ in range(3):
        federation.tiny()
    output = server.ends(1)
    assert "Traceback" not in output
    assert "error: the new model can't be sent: array 0 holds " in output
    assert output.endswith("that --compress fp16 can carry; begin a new run without it\n")

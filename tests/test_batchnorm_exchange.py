"""The exchange of BatchNorm's statistics in a round: who is asked, what counts, and what the model gets."""

import json
import re

from federation.aggregation.batchnorm import pooled
from federation.aggregation.validation import BadUpdate, validate_statistics
from federation.client.session import Session
from federation.config import Recipe
from federation.participants.agreement import conflict
from federation.pieces import InPieces
from federation.protocol import Assignment, DataSummary, as_stored, from_stored, read_summary
from federation.server.grpc_server import Proxy
from federation.server.settings import ServerSettings

import numpy as np
import pytest
from flwr.common import FitIns, FitRes, GetPropertiesRes, ndarrays_to_parameters
from helpers import in_process
from helpers.in_process import OK, Learner, federation, lost, no_disk  # noqa: F401 (used by every test)
from helpers.updates import strategy, update

# Weights, BatchNorm's mean, variance and counter.
START = [np.zeros(2, np.float32), np.zeros(1, np.float32), np.ones(1, np.float32), np.array(0)]
SUMMARY = DataSummary(1000, 1000, [1, 2, 3], [], [], 0, batchnorm=[1, 2])


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


class Measuring(Learner):
    """Says of any model that the layer's mean and variance are these; `bad` may say it otherwise, by round."""

    def __init__(self, mean: float = 0.0, variance: float = 1.0, examples: int = 10, *, measure=None, **bad):
        super().__init__(1.0, examples, **bad)
        self.statistics, self.bad_measure = [f32(mean), f32(variance)], measure
        self.measured: list[int] = []
        self.on: list[list[np.ndarray]] = []  # what it measured on, and evaluated

    def fit(self, weights, config):
        number = config["server_round"]
        if "measure" in config:
            self.measured.append(number)
            self.on.append(weights)
            answer = self.statistics, self.examples, {}
            return self.bad_measure(number, *answer) if self.bad_measure else answer
        self.fitted.append(number)
        new = [weights[0] + f32(1.0), weights[1] + f32(3.0), weights[2] * f32(0.5), weights[3] + 1]
        answer = new, self.examples, {"train_loss": 1.0}
        return self.bad_fit(number, *answer) if self.bad_fit else answer

    def evaluate(self, weights, config):
        self.on.append(weights)
        self.evaluated.append(config["server_round"])
        loss = float("nan") if abs(weights[-3 if len(weights) > 2 else 0]).max() > 100 else 1.0
        return loss, self.examples, {"accuracy": 0.5}


@pytest.fixture(autouse=True)
def clients_with_batchnorm(monkeypatch):
    monkeypatch.setattr(in_process, "START", START)
    monkeypatch.setattr(in_process, "SUMMARY", SUMMARY)


def reasons(server) -> list[tuple[int, int, str]]:
    return [(row["round"], row["partition"], row["reason"]) for row in server.history.rejected]


def numbers(weights: list[np.ndarray]) -> list[list[float]]:
    return [np.ravel(array).tolist() for array in weights]


def bits(weights: list[np.ndarray]) -> list[bytes]:
    return [array.tobytes() for array in weights]


# A round


def test_the_model_gets_the_statistics_of_all_examples_measured_on_itself(tmp_path):
    learners = [Measuring(0.0, 1.0, examples=10), Measuring(4.0, 5.0, examples=30)]
    server = federation(tmp_path, learners, rounds=1)
    server.federate()
    assert server.exit_code == 0
    # Mean (0 * 10 + 4 * 30) / 40 = 3; variance (1 * 10 + 5 * 30) / 40 = 4 and of the means (9 * 10 + 1 * 30) / 40 = 3.
    assert numbers(server.weights) == [[1, 1], [3], [7], [1]]
    assert numbers(learners[0].on[1]) == [[1, 1], [3], [0.5], [1]]  # what was measured on: the mean of the updates
    assert numbers(learners[0].on[2]) == numbers(server.weights)  # what was evaluated
    assert server.history.rounds[1].bytes_received == 2 * (2 * 4 + 4 + 4 + 8) + 2 * (4 + 4)


def test_all_who_are_there_measure_whoever_trained(tmp_path):
    learners = [Measuring() for _ in range(4)]
    server = federation(tmp_path, learners, rounds=1, fraction_fit=0.25)
    server.federate()
    assert sorted(learner.fitted for learner in learners) == [[], [], [], [1]]
    assert [learner.measured for learner in learners] == [[1]] * 4


@pytest.mark.parametrize("setting", [{"batchnorm": "averaged"}, {"strategy": "krum"}])
def test_without_it_the_statistics_are_those_of_the_updates_and_nobody_is_asked(tmp_path, setting):
    learners = [Measuring(7.0) for _ in range(3)]
    server = federation(tmp_path, learners, rounds=1, **setting)
    server.federate()
    assert numbers(server.weights) == [[1, 1], [3], [0.5], [1]]
    assert [learner.measured for learner in learners] == [[]] * 3


def test_of_krum_and_the_asynchronous_mode_measured_is_refused_in_one_line():
    with pytest.raises(ValueError, match="--batchnorm measured is for strategies that average, which krum does not"):
        ServerSettings(strategy="krum", batchnorm="measured")
    with pytest.raises(ValueError, match="--batchnorm is for --mode sync; give both or none"):
        ServerSettings(mode="async", batchnorm="measured")
    assert (ServerSettings().batchnorm, ServerSettings(strategy="krum").batchnorm) == ("measured", "averaged")


def test_with_a_client_that_does_not_measure_nobody_does(tmp_path):
    learners = [Measuring(7.0), Measuring(7.0)]
    server = federation(tmp_path, learners, rounds=1)
    server.clients.participants[1].summary = DataSummary(1000, 1000, [1, 2, 3], [], [], 0)  # of version 1.0.0
    server.federate()
    assert server.exit_code == 0
    assert numbers(server.weights)[1] == [3]
    assert [learner.measured for learner in learners] == [[], []]


def test_a_network_without_batchnorm_is_asked_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(in_process, "SUMMARY", DataSummary(1000, 1000, [1, 2, 3], [], [], 0))
    learner = Measuring()
    federation(tmp_path, [learner, Measuring()], rounds=1).federate()
    assert (learner.measured, learner.evaluated) == ([], [0, 1])


def test_a_round_in_which_no_update_counts_leaves_the_statistics_too(tmp_path):
    learners = [Measuring(7.0, fit=lambda n, w, e, m: (w, 10**9, m) if n == 2 else (w, e, m)) for _ in range(2)]
    server = federation(tmp_path, learners, rounds=2)
    server.federate()
    assert [learner.measured for learner in learners] == [[1], [1]]
    assert numbers(server.weights)[1] == [7]


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedmedian", "fedtrimmedavg"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_ends_with_the_bits_of_a_quiet_one(tmp_path, name, stop):
    def make(where, **more):
        return federation(where, [Measuring(s, s + 1.0) for s in (0.1, 0.2, 0.4)], strategy=name, **more)

    quiet, server = make(tmp_path / "quiet"), make(tmp_path)
    quiet.federate()
    learner = server.clients.participants[0].client.learner
    learner.bad_measure = lambda n, *usual: (server._on_signal(15, None), usual)[1] if n == stop + 1 else usual
    server.federate()
    assert server.rounds_done == stop
    again = make(tmp_path, resume=True)
    again.federate()
    assert again.exit_code == 0
    assert bits(again.weights) == bits(quiet.weights)


def test_a_run_of_1_0_0_goes_on_as_it_began(tmp_path):
    """Its history names no positions of BatchNorm's, and from then on nobody is asked."""
    assert from_stored({"statistics": [1, 2, 3]}).batchnorm == []
    assert from_stored(as_stored(SUMMARY)).batchnorm == [1, 2]
    assert "batchnorm_positions" not in as_stored(DataSummary(1, 1, [], [], [], 0))


# What is late, lost, wrong or hostile

BAD = {
    "NaN": ([f32(np.nan), f32(1)], 10, "array 0 holds NaN or infinite values"),
    "infinite": ([f32(0), f32(np.inf)], 10, "array 1 holds NaN or infinite values"),
    "negative": ([f32(0), f32(-1e-3)], 10, "the variance of BatchNorm layer 0 is negative"),
    "shape": ([f32(0, 0), f32(1, 1)], 10, r"array 0 has shape \(2,\) instead of \(1,\)"),
    "dtype": ([np.zeros(1), np.ones(1)], 10, "array 0 has dtype float64 instead of float32"),
    "number": ([f32(0)], 10, "1 arrays instead of 2"),
    "claim": ([f32(0), f32(1)], 10**9, "it claims 1000000000 examples, having declared 1000 when it joined"),
    "far": ([f32(1e6), f32(1)], 10, r"its step \(L2 norm 1e\+06\) is .* times the median, above --outlier-factor 20"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_statistics_are_left_out_and_named_and_those_of_the_others_count(tmp_path, kind):
    arrays, claim, words = BAD[kind]
    hostile = Measuring(measure=lambda n, statistics, examples, metrics: (arrays, claim, metrics))
    server = federation(tmp_path, [Measuring(1.0), hostile, Measuring(1.0)], rounds=1)
    server.federate()
    ((number, partition, reason),) = reasons(server)
    assert (number, partition) == (1, 1)
    assert re.fullmatch(words, reason)
    assert numbers(server.weights) == [[1, 1], [1], [1], [1]]


def test_statistics_with_which_most_cant_evaluate_the_model_are_not_used(tmp_path, capsys):
    learners = [Measuring(), Measuring(measure=lambda n, s, e, m: ([f32(1e4), f32(1)], 1000, m))]
    server = federation(tmp_path, learners, rounds=1)  # of two, nobody can say which is out of line
    server.federate()
    words = "round 1: most clients can't evaluate the model with the BatchNorm statistics that they measured"
    assert words in capsys.readouterr().out
    assert server.exit_code == 0
    assert (numbers(server.weights), reasons(server)) == ([[1, 1], [3], [0.5], [1]], [])
    assert server.history.rounds[1].clients == 2


def test_where_most_measure_nonsense_it_may_be_the_models_fault_and_nobody_is_blamed(tmp_path):
    def nonsense(number, statistics, examples, metrics):
        return [f32(np.nan), f32(np.nan)], examples, metrics

    server = federation(tmp_path, [Measuring(9.0), *(Measuring(measure=nonsense) for _ in range(2))], rounds=1)
    server.federate()
    assert (numbers(server.weights)[1], reasons(server)) == ([3], [])


def test_a_client_that_fails_at_it_is_dropped_as_from_a_training(tmp_path):
    failing = Measuring(measure=lambda n, s, e, m: ([], 0, {"error": "its own code failed"}))
    server = federation(tmp_path, [Measuring(1.0), failing, Measuring(1.0)], rounds=1)
    server.federate()
    assert server.clients.dropped == {1: "it failed"}
    assert numbers(server.weights)[1] == [1]


def test_a_client_lost_while_it_measures_costs_its_statistics_only(tmp_path):
    learners = [Measuring(1.0), Measuring(50.0, measure=lost)]
    server = federation(tmp_path, learners, rounds=1, min_clients=1)
    server.federate()
    assert (server.exit_code, numbers(server.weights)) == (0, [[1, 1], [1], [1], [1]])
    assert server.history.rounds[1].clients == 2  # whose updates counted


@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_a_round_that_loses_all_while_they_measure_is_done_again_with_the_same_bits(tmp_path, name):
    def make(where, measure=None):
        learners = [Measuring(s, s + 1.0, measure=measure) for s in (0.1, 0.2)]
        return federation(where, learners, rounds=2, strategy=name, back=True)

    once = {2: 2}

    def lost_once(number, *usual):
        once[number] = once.get(number, 0) - 1
        return lost() if once[number] >= 0 else usual

    server, quiet = make(tmp_path, lost_once), make(tmp_path / "quiet")
    server.federate(), quiet.federate()
    assert server.exit_code == 0
    assert server.clients.participants[0].client.learner.fitted == [1, 2, 2]
    assert bits(server.weights) == bits(quiet.weights)


# What the arrays become


def test_the_variance_of_all_examples_is_that_within_clients_and_that_of_their_means():
    one, two = np.array([1.0, 2.0, 3.0]), np.array([8.0, 12.0])
    told = [([f32(each.mean()), f32(each.var())], len(each)) for each in (one, two)]
    mean, variance = pooled(told)
    together = np.concatenate([one, two])
    assert (mean[0], variance[0]) == pytest.approx((together.mean(), together.var()))
    assert mean.dtype == variance.dtype == np.float32


MEASURED = [update([f32(mean), f32(variance)], n) for mean, variance, n in [(0, 1, 10), (1, 2, 10), (5, 9, 20)]]


@pytest.mark.parametrize(
    ("name", "mean", "variance"),
    [
        ("fedavg", 2.75, 10.4375),  # variances: 1 / 4 + 2 / 4 + 9 / 2; means: (2.75^2 + 1.75^2) / 4 + 2.25^2 / 2
        ("fedavgm", 2.75, 10.4375),
        ("fedadam", 2.75, 10.4375),
        ("fedmedian", 1.0, 2.0),
        ("fedtrimmedavg", 1.0, 2.0),
    ],
)
def test_statistics_are_put_together_by_the_strategys_rule_and_nothing_else_changes(name, mean, variance):
    made = strategy(name, START, [1, 2, 3])
    before = [array.tobytes() for array in made.state()]
    new = made.with_statistics(START, [1, 2], MEASURED)
    assert (new[1].item(), new[2].item()) == pytest.approx((mean, variance))
    assert (new[0] is START[0], new[3] is START[3]) == (True, True)
    assert [array.tobytes() for array in made.state()] == before
    assert made.with_statistics(START, [1, 2], []) is START


def test_statistics_move_no_further_than_an_update_may():
    made = strategy("fedavg", START, [1, 2, 3], max_update_norm=0.5)
    new = made.with_statistics(START, [1, 2], [update([f32(30.0), f32(41.0)])])  # a step of (30, 40)
    assert (new[1].item(), new[2].item()) == pytest.approx((0.3, 1.4))


def test_compressed_statistics_are_what_float16_leaves_of_them():
    made = strategy("fedavg", START, [1, 2, 3], compress="fp16")
    new = made.with_statistics(START, [1, 2], [update([f32(1 / 3), f32(1)])])
    assert new[1].item() == float(np.float16(1 / 3))
    res = FitRes(OK, ndarrays_to_parameters([np.float16([1 / 3]), np.float16([1])]), 10, {})
    assert validate_statistics(res, 0, START[1:3], 10, "fp16").weights[0].dtype == np.float32
    with pytest.raises(BadUpdate, match="dtype float16 instead of float32"):
        validate_statistics(res, 0, START[1:3], 10)


# On the way


def sent(learner: Measuring) -> list[int]:
    return [len(arrays) for arrays in learner.on]


def test_who_has_just_measured_a_model_is_sent_its_new_statistics_alone(tmp_path):
    learners = [Measuring(), Measuring()]
    server = federation(tmp_path, learners, rounds=1)
    server.clients.in_pieces = True  # as over gRPC: a client keeps what it was sent
    asked = []
    real = server.dispatcher.start_evaluate
    server.dispatcher.start_evaluate = lambda *a, **more: (asked.append(more), real(*a, **more))[1]
    server.federate()
    assert sent(learners[0]) == [4, 4, 2]  # round 0; measured on; evaluated
    assert asked == [{}, {}, {"measured": True}, {"measured": True}]


def test_what_is_not_what_a_client_measured_is_sent_whole(tmp_path):
    learners = [Measuring() for _ in range(3)]
    server = federation(tmp_path, learners)
    dispatcher, server.clients.in_pieces = server.dispatcher, True
    server.clients.begin(["cat", "dog"], SUMMARY)
    new = [START[0], f32(5), f32(6), START[3]]

    def evaluated(weights) -> list[int]:
        dispatcher.evaluate(1, weights)
        return [len(learner.on[-1]) for learner in learners]

    dispatcher.measure(1, START)
    assert evaluated(new) == [2, 2, 2]
    assert evaluated(new) == [4, 4, 4]  # it may have evaluated another meanwhile
    dispatcher.measure(1, START)
    assert evaluated([START[0] + 1, *new[1:]]) == [4, 4, 4]
    dispatcher.measure(1, START)
    server.clients.unregister(server.clients.participants[1].client)
    server.clients.join(1, learners[1])  # back, and it may be another program
    assert evaluated(new) == [2, 4, 2]
    dispatcher.measure(1, START)
    dispatcher.fit(1, START, server.clients.ready()[:1])
    assert evaluated(new) == [4, 4, 4]


class Client:
    """Of a session: keeps what it is given, as a network does."""

    num_train, num_test, buffer_positions, batchnorm_positions = 100, 10, (1, 2, 3), (1, 2)

    def __init__(self):
        self.weights = START

    def get_parameters(self, config):
        return list(self.weights)

    def set_parameters(self, parameters):
        self.weights = parameters

    def measure(self, parameters, config):
        self.set_parameters(parameters)
        return [f32(1 / 3), f32(2)], 100, {}

    def evaluate(self, parameters, config):
        self.set_parameters(parameters)
        return 1.0, 10, {"accuracy": 0.5}


@pytest.mark.parametrize("compress", ["none", "fp16"])
def test_a_session_measures_and_puts_the_statistics_of_all_into_the_model_that_it_has(compress):
    client = Client()
    session = Session(lambda assignment: client, ["cat", "dog"])
    session.assignment, session.client = Assignment(0, 1, Recipe(compress=compress)), client
    small = np.float16 if compress == "fp16" else np.float32
    new = [np.array([1.5, 2.5], small), np.array([9], small), np.array([9], small), np.array(7)]
    config = {"server_round": 1, "clients_on_host": 1}
    (mean, variance), examples, metrics = session.fit(new, {**config, "measure": True})
    assert (mean.dtype, variance.dtype, examples, metrics) == (small, small, 100, {})
    session.evaluate([np.array([0.25], small), np.array([4], small)], {**config, "measured": True})
    assert numbers(client.weights) == [[1.5, 2.5], [0.25], [4], [7]]
    assert [array.dtype for array in client.weights] == [array.dtype for array in START]


def test_a_client_says_where_its_statistics_are_and_nonsense_is_refused():
    arrays = [["conv", [2], "float32"], ["mean", [1], "float32"], ["var", [1], "float32"], ["count", [], "int64"]]
    assert read_summary(summary_of(arrays, [1, 2])).batchnorm == [1, 2]
    for positions in ([1], [1, 1], [0, 1], [2, 9], [1, 3], [-1, 1], [1, True]):
        with pytest.raises(ValueError):  # noqa: PT011 (whatever it says, the server calls it nonsense)
            read_summary(summary_of(arrays, positions))
    one, other = read_summary(summary_of(arrays, [1, 2])), read_summary(summary_of(arrays, []))
    assert conflict(one, other) is None
    reversed_ = read_summary(summary_of(arrays, [2, 1]))
    assert (
        conflict(one, reversed_) == "measures BatchNorm's statistics of other layers than the others; use one model.py"
    )


def summary_of(arrays: list, positions: list) -> dict:
    task = {
        "name": "t", "arrays": arrays, "frozen_arrays": [], "frozen": "", "start": "", "code": "", "schema": {},
        "metrics": [{"name": "accuracy"}], "columns": [],
        "recipe": {"model": "net", "batch_size": 1, "learning_rate": 1.0, "own": {}},
    }  # fmt: skip
    told = {"train_examples": 10, "test_examples": 10, "statistics": "[1, 2, 3]", "batchnorm": json.dumps(positions)}
    return {**told, "task": json.dumps(task)}


def test_of_a_large_model_that_came_in_pieces_the_statistics_are_the_answer_itself():
    asked = []

    class Stored(Proxy):
        """Of a client over gRPC, without the connection."""

        def get_properties(self, ins, timeout, group_id):
            asked.append(ins.config["ask"])
            return GetPropertiesRes(OK, {})

        def fit(self, ins, timeout, group_id):
            return self._in_pieces(ins, timeout) if ins.parameters.tensor_type == "pieces" and self.first() else ANSWER

        def first(self):
            return "fit" not in asked and (asked.append("fit"), True)[1]

    got = Stored("client", None).fit(FitIns(InPieces(arrays=START), {"measure": True}), 5.0, None)
    assert got is ANSWER
    assert asked == ["fit", "store"]  # and nothing is fetched


ANSWER = FitRes(OK, ndarrays_to_parameters([f32(0), f32(1)]), 10, {})

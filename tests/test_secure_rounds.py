"""Rounds with secure aggregation, in one process: the project's own sessions, and a server that asks them directly."""

import json
import signal
import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from federation.aggregation.strategy import STRATEGIES
from federation.client.session import Session
from federation.config import Recipe
from federation.pieces import InPieces
from federation.protocol import Assignment, read_summary
from federation.results.history import History
from federation.results.privacy import who_learns_what
from federation.results.run_folder import Run, RunFolder
from federation.security.audit import open_audit
from federation.security.audit_check import compare, read_record
from federation.security.identity import Identity
from federation.server import grpc_server, options
from federation.server.engine_app import read_run_config
from federation.server.rounds import FederatedServer
from federation.server.settings import ServerSettings

import numpy as np
import pytest
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    GetParametersRes,
    GetPropertiesRes,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from helpers import in_process
from helpers.in_process import no_disk  # noqa: F401 (used by every test)
from helpers.processes import ROOT, Federation
from helpers.tasks import DATA
from safetensors.numpy import load_file

OK, RUN = Status(Code.OK, ""), "0123456789abcdef"
START = [np.zeros(2, np.float32), np.ones(1, np.float32), np.array(0)]


class Learner:
    """Adds its step to the weights; keeps them in place, as a network does. What a session asks of a client.

    batchnorm: mean and variance that it measures on any model, for one with BatchNorm.
    """

    num_test, buffer_positions, start = 10, (1, 2), START

    def __init__(self, step: float, examples: int = 10, batchnorm: tuple[float, float] | None = None) -> None:
        self.step, self.num_train, self.class_counts = step, examples, (examples - 5, 5)
        self.trained = self.measured = 0
        if batchnorm:
            self.statistics, self.buffer_positions, self.batchnorm_positions = batchnorm, (1, 2, 3), (1, 2)
            self.start = [START[0], np.zeros(1, np.float32), START[1], START[2]]
        self.weights = [array.copy() for array in self.start]

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        return list(self.weights) if "in_pieces" in config else [array.copy() for array in self.weights]

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        for own, new in zip(self.weights, parameters, strict=True):
            own[...] = new

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        self.set_parameters(parameters)
        self.trained += 1
        self.weights[0] += np.float32(self.step)
        self.weights[-2] *= np.float32(0.5)
        self.weights[-1] += 1
        return self.get_parameters(config), self.num_train, {"train_loss": float(self.step), "train_f1": 0.5}

    def measure(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        self.set_parameters(parameters)
        self.measured += 1
        return [np.float32([value]) for value in self.statistics], self.num_train, {}

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        self.set_parameters(parameters)
        return 1.0, self.num_test, {"accuracy": float(self.weights[0][0])}


class Proxy(in_process.Proxy):
    """Asks a session as the server's own proxy asks it over gRPC.

    broken: what it is asked when its connection breaks, once; or, with "!", when it goes silent.
    """

    pieces = grpc_server.Proxy.pieces
    _in_pieces, _fetch, _properties = (
        getattr(grpc_server.Proxy, name) for name in ("_in_pieces", "fetch", "_properties")
    )

    def __init__(self, session: Session, broken: str = "") -> None:
        super().__init__(session)
        self.session, self.broken = session, broken
        self.seen: list = []  # of what it sent: all that the server could learn from

    def _break(self, what: str) -> None:
        if self.broken == what:
            self.broken = ""
            raise ConnectionError
        if self.broken == f"{what}!":
            self.broken = ""
            threading.Event().wait(2)

    def get_properties(self, ins, timeout, group_id):
        self._break(ins.config["ask"])
        told = self.session.get_properties(dict(ins.config))
        self.seen.append(told)
        return GetPropertiesRes(OK, told)

    def get_parameters(self, ins, timeout, group_id):
        return GetParametersRes(OK, ndarrays_to_parameters(self.session.get_parameters(dict(ins.config))))

    def fit(self, ins, timeout, group_id):
        if isinstance(ins.parameters, InPieces):
            return self._in_pieces(ins, timeout)
        self._break("measure" if "measure" in ins.config else "fit")
        weights, examples, metrics = self.session.fit(parameters_to_ndarrays(ins.parameters), dict(ins.config))
        self.seen += [weights, metrics]
        return FitRes(OK, ndarrays_to_parameters(weights), examples, metrics)

    def evaluate(self, ins, timeout, group_id):
        if isinstance(ins.parameters, InPieces):
            return self._in_pieces(ins, timeout)
        loss, examples, metrics = self.session.evaluate(parameters_to_ndarrays(ins.parameters), dict(ins.config))
        return EvaluateRes(OK, loss, examples, metrics)

    def fetch(self, what, like, model, deadline):
        self._break("fetch")
        return self._fetch(what, like, model, deadline)


class Clients(in_process.Clients):
    """Sessions that have joined; who is lost comes back at once, with the same session or a new one, or never."""

    audits: Path | None = None  # where they keep their records
    restarted = False  # whether who comes back is another process

    def __init__(self, learners: list[Learner], recipe: Recipe, events: list, broken: dict | None, back: bool):
        self.learners, self.broken = learners, dict(broken or {})
        super().__init__(learners, recipe, events, back)

    def join(self, partition: int, learner) -> None:
        proxy = learner if isinstance(learner, Proxy) and not self.restarted else None
        if proxy is None:
            files = {} if self.audits is None else {"open_audit": partial(open_audit, self.audits, None)}
            session = Session(lambda assignment: self.learners[partition], ["cat", "dog"], **files)
            proxy = Proxy(session, self.broken.pop(partition, ""))
            proxy.learner = proxy
            session.get_properties({"ask": "hello", "nonce": "n"})
            place = {"ask": "place", "partition": partition, "num_partitions": len(self.learners)}
            told = session.get_properties({**place, "recipe": self.recipe.to_json(), "run": RUN})
            positions = json.loads(told.pop("batchnorm"))  # known of clients that say what their task is
            proxy.summary = replace(read_summary(told), batchnorm=positions)
        one = in_process.Participant(partition, proxy, proxy.session.instance, "here", ["cat", "dog"])
        one.summary, one.ready = proxy.summary, True
        one.train_examples, one.test_examples = one.summary.train_examples, one.summary.test_examples
        with self.changed:
            self.participants[partition] = one
            self.agreed = self.agreed or proxy.summary
            self.changed.notify_all()


def federation(
    folder: Path,
    learners: list[Learner],
    *,
    broken: dict | None = None,
    back: bool = True,
    resumed: Clients | None = None,
    **values: object,
) -> FederatedServer:
    """resumed: the clients of a server that is no more, whose run goes on."""
    usual = {"rounds": 2, "clients": len(learners), "min_clients": min(3, len(learners)), "secure_aggregation": True}
    usual |= {"rejoin_wait": 0.0, "join_timeout": 0.2, "round_timeout": 5.0, "outlier_factor": 0.0}
    values = {**usual, **values}
    recipe = Recipe(**{name: value for name, value in values.items() if name in Recipe.names()})
    settings = ServerSettings(**{name: value for name, value in values.items() if name in ServerSettings.names()})
    run_folder = RunFolder(folder / "run")
    if resumed:
        checkpoint = run_folder.load_checkpoint()
        run, clients = Run(run_folder, checkpoint.history, checkpoint), resumed
    else:
        run_folder.create()
        run = Run(run_folder, History({**vars(recipe), **vars(settings), "run_id": RUN}))
        clients = Clients(learners, recipe, run.history.events, broken, back)
    return FederatedServer(clients, STRATEGIES[settings.strategy], settings, run)


def bits(server: FederatedServer) -> list[bytes]:
    return [array.tobytes() for array in server.weights]


def three(sizes: tuple = (10, 20, 10)) -> list[Learner]:
    return [Learner(step, n) for step, n in zip((1.0, 2.0, 4.0), sizes, strict=True)]


def test_the_model_is_the_weighted_mean_and_the_server_sees_no_update(tmp_path, capsys):
    """Steps 1, 2, 4 of 10, 20, 10 examples: a mean step of 2.25 a round."""
    server = federation(tmp_path, three())
    server.federate()
    assert server.exit_code == 0
    assert server.weights[0] == pytest.approx([4.5, 4.5], abs=1e-6)
    assert (server.weights[1].tolist(), server.weights[2].tolist()) == ([0.25], 2)
    record = server.history.rounds[-1]
    assert (record.clients, record.bytes_received) == (3, 3 * 4 * (4 + 4))  # four numbers; loss and proof
    assert record.train_metrics["train_loss"] == pytest.approx(2.25, abs=1e-6)
    assert record.by_client["weight"] == {"0": 0.25, "1": 0.5, "2": 0.25}
    for one in server.clients.ready():
        assert [each for each in one.client.seen if isinstance(each, list)] == [[], []]
        told = [each for each in one.client.seen if isinstance(each, dict)]
        entry = {"partition", "examples", "key", "identity", "signature"}
        assert [set(each) for each in told] == [entry, set(), {"content"}] * 2
        assert [len(each["content"]) for each in told[2::3]] == [4 * (4 + 4)] * 2
        assert one.summary.class_counts == []


def test_the_same_bits_come_of_other_masks(tmp_path):
    weights = []
    for name in "ab":
        server = federation(tmp_path / name, three())
        server.federate()
        weights.append([array.tobytes() for array in server.weights])
    assert weights[0] == weights[1]


class Private(Learner):
    """As the client of private training: no loss of its training, and what it has spent beside its scores."""

    def fit(self, parameters, config):
        weights, examples, _ = super().fit(parameters, config)
        return weights, examples, {}

    def evaluate(self, parameters, config):
        loss, examples, metrics = super().evaluate(parameters, config)
        return loss, examples, {**metrics, "dp_epsilon": self.trained * 0.5, "dp_delta": 1e-5}


def test_with_private_training_the_sum_is_the_same_without_any_loss_of_the_training(tmp_path, capsys):
    learners = [Private(step, n) for step, n in zip((1.0, 2.0, 4.0), (10, 20, 10), strict=True)]
    server = federation(tmp_path, learners, private_training=True)
    server.federate()
    assert server.exit_code == 0
    assert server.weights[0] == pytest.approx([4.5, 4.5], abs=1e-6)
    assert server.history.rounds[-1].train_metrics == {}
    assert server.history.rounds[-1].by_client["epsilon"] == {"0": 1.0, "1": 1.0, "2": 1.0}
    said = capsys.readouterr().out
    assert "secure aggregation: in 2 rounds the sum of 3 updates; no single one" in said
    assert "differential privacy: epsilon 1.00 at delta 1e-05 at most" in said


@pytest.mark.parametrize("moment", ["mask", "fetch"])
def test_a_client_that_is_lost_between_the_phases_costs_a_repetition_and_no_bit(moment, tmp_path, capsys):
    quiet, broken = federation(tmp_path / "quiet", three()), federation(tmp_path / "lost", three(), broken={1: moment})
    quiet.federate(), broken.federate()
    assert broken.exit_code == 0
    assert [array.tobytes() for array in broken.weights] == [array.tobytes() for array in quiet.weights]
    assert [learner.trained for learner in broken.clients.learners] == [3, 3, 3]
    assert "round 1: a client was lost before the sum was whole; all train again" in capsys.readouterr().out


def test_a_client_that_is_lost_in_training_is_left_out_where_three_are_left(tmp_path):
    learners = [Learner(1.0), Learner(2.0), Learner(3.0), Learner(100.0)]
    server = federation(tmp_path, learners, broken={3: "fit"}, back=False, rounds=1)
    server.federate()
    assert server.exit_code == 0
    assert server.weights[0] == pytest.approx([2, 2], abs=1e-6)
    assert server.history.rounds[-1].clients == 3


def test_with_two_left_nobodys_training_counts(tmp_path, capsys):
    server = federation(tmp_path, three(), broken={2: "fit"}, back=True, rounds=2)
    server.federate()
    assert server.exit_code == 0
    assert [record.clients for record in server.history.rounds] == [3, 0, 3]
    said = capsys.readouterr().out
    assert "round 1: 2 clients for a sum, which takes 3\nround 1: nobody's training counts\n" in said


def test_a_step_is_shortened_by_the_client_itself(tmp_path):
    """Steps of norm sqrt(2), twice that, four times: each becomes sqrt(2)."""
    server = federation(tmp_path, [Learner(step) for step in (1.0, 2.0, 4.0)], max_update_norm=2**0.5, rounds=1)
    server.federate()
    assert server.weights[0] == pytest.approx([1, 1], abs=0.06)  # the buffer's step counts, too


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_strategies_that_need_the_mean_alone_give_what_they_give_in_the_open(strategy, tmp_path):
    models = []
    for secure in (True, False):
        server = federation(tmp_path / str(secure), three(), strategy=strategy, secure_aggregation=secure)
        server.federate()
        assert server.exit_code == 0
        models.append(server.weights[0])
    assert models[0] == pytest.approx(models[1], abs=1e-4)


def test_a_number_that_cannot_be_summed_costs_its_client_and_no_round(tmp_path, capsys):
    learners = [*three(), Learner(1000.0)]
    server = federation(tmp_path, learners, back=False, rounds=1)
    server.federate()
    assert server.exit_code == 0
    assert "client 3 left out: it says: array 0 holds NaN, or more than the ±128 that" in capsys.readouterr().out


def test_an_update_that_ruins_the_sum_is_found_by_the_evaluation_and_the_model_stays(tmp_path, capsys):
    """Nobody can say whose it was."""
    learners = three()
    for learner in learners:
        usual = learner.evaluate
        learner.evaluate = lambda p, c, usual=usual: (float("nan"), 10, {}) if abs(p[0][0]) > 5 else usual(p, c)
    learners[2].step = 100.0
    server = federation(tmp_path, learners, rounds=1)
    server.federate()
    said = capsys.readouterr().out
    assert "round 1: the sum left out: with its update most clients can't evaluate the model" in said
    assert server.weights[0].tolist() == [0, 0]


def test_a_client_that_does_not_come_back_costs_the_round_and_nobody_else(tmp_path, capsys):
    """A sum without it after one with it would show its update."""
    learners = [Learner(1.0), Learner(2.0), Learner(3.0), Learner(4.0)]
    server = federation(tmp_path, learners, broken={3: "mask"}, back=False, rounds=2)
    server.federate()
    assert server.exit_code == 0
    assert [record.clients for record in server.history.rounds] == [4, 0, 3]
    said = capsys.readouterr().out
    assert "round 1: other clients than before; the difference of two sums would be a client's update" in said


def test_a_server_that_forgot_whom_it_asked_gets_no_second_sum_and_loses_nobody(tmp_path, capsys):
    """As one that was killed between the phases, and came back with a client less."""
    learners = [Learner(1.0), Learner(2.0), Learner(3.0), Learner(4.0)]
    server = federation(tmp_path, learners, rounds=2)
    for session in [one.client.session for one in server.clients.ready()]:
        usual = session.get_properties
        session.get_properties = lambda config, usual=usual, s=session: _forget(usual, config, s)
    server.federate()
    assert server.exit_code == 0
    assert [record.clients for record in server.history.rounds] == [4, 0, 4]
    said = capsys.readouterr().out
    assert "round 1: client 0 was in this sum with other clients before\n" in said


def _forget(usual, config, session):
    """In round 1 each was in this sum before, with another."""
    if config["ask"] == "mask" and session.masking.round == 1:
        session.summed._with = dict.fromkeys(session.masking._trainings, "others")
    return usual(config)


def test_a_client_that_goes_silent_before_it_masks_is_given_up_after_the_round_timeout(tmp_path, capsys):
    quiet, silent = (
        federation(tmp_path / "quiet", three()),
        federation(tmp_path / "silent", three(), broken={2: "mask!"}, round_timeout=0.3),
    )
    quiet.federate(), silent.federate()
    assert silent.exit_code == 0
    assert bits(silent) == bits(quiet)
    assert "client 2 did not answer within 0.3 s (--round-timeout)" in capsys.readouterr().out


def test_a_client_that_is_started_again_makes_a_new_key_and_the_sum_is_the_same(tmp_path):
    """Whose keys are as the server gives them is known by its place."""
    quiet, broken = federation(tmp_path / "quiet", three()), federation(tmp_path / "lost", three(), broken={1: "mask"})
    broken.clients.restarted = True
    quiet.federate(), broken.federate()
    assert (broken.exit_code, bits(broken)) == (0, bits(quiet))


class Killed(BaseException):
    """As SIGKILL: nothing is said or written after it."""


@pytest.mark.parametrize("moment", ["fit", "sum", "checkpoint"])
def test_a_server_that_is_killed_in_any_phase_and_resumed_gives_the_bits_of_a_quiet_run(moment, tmp_path, monkeypatch):
    quiet, killed = federation(tmp_path / "quiet", three()), federation(tmp_path / "killed", three())
    quiet.federate()
    count, dying = [0], True

    def die(usual, *args):
        count[0] += 1
        if dying and count[0] == 2:  # of two rounds; of three checkpoints
            raise Killed
        return usual(*args)

    where = {
        "fit": (killed.dispatcher, "fit"),
        "sum": (killed.dispatcher, "ask_each"),
        "checkpoint": (killed.folder, "save_checkpoint"),
    }[moment]
    monkeypatch.setattr(*where, partial(die, getattr(*where)))
    with pytest.raises(Killed):
        killed.federate()
    dying = False
    killed.audit.close()  # as the end of its process does
    again = federation(tmp_path / "killed", three(), resumed=killed.clients)
    again.federate()
    assert (again.exit_code, bits(again)) == (0, bits(quiet))


def test_words_of_a_wrong_length_cost_their_client_and_the_round(tmp_path, capsys):
    learners = [*three(), Learner(8.0)]
    server = federation(tmp_path, learners, back=False)
    session = server.clients.ready()[3].client.session
    session._transfer.fetch = lambda *args: bytes(5)
    server.federate()
    assert server.exit_code == 0
    assert [record.clients for record in server.history.rounds] == [4, 0, 3]
    words = "round 1: client 3 left out: of its masked update a piece of 32 bytes was asked for, and not given"
    assert words in capsys.readouterr().out


def test_two_clients_with_one_key_are_one_too_many(tmp_path, capsys):
    learners = [*three(), Learner(8.0)]
    server = federation(tmp_path, learners, rounds=1, back=False)
    for partition in (2, 3):
        server.clients.participants[partition].client.session.masking.identity = Identity.new()
    last = [server.clients.participants[partition].client.session.masking for partition in (2, 3)]
    last[1].identity = last[0].identity
    server.federate()
    assert server.history.rounds[-1].clients == 3
    assert "client 3 left out: its key is another client's, too; give each its own" in capsys.readouterr().out


def test_a_large_model_and_its_masked_updates_travel_in_pieces_to_the_same_bits(tmp_path, monkeypatch):
    whole = federation(tmp_path / "whole", three(), max_update_norm=1.0)
    whole.federate()
    monkeypatch.setattr(in_process.Clients, "in_pieces", True)
    monkeypatch.setattr(in_process.Participant, "knows_pieces", True)
    monkeypatch.setattr("federation.server.dispatch.LARGE", 0)
    monkeypatch.setattr("federation.pieces.PIECE", 6)
    pieces = federation(tmp_path / "pieces", three(), max_update_norm=1.0)
    pieces.federate()
    assert (pieces.exit_code, bits(pieces)) == (0, bits(whole))
    contents = [each["content"] for each in pieces.clients.ready()[0].client.seen if "content" in each]
    assert max(map(len, contents)) == 6


BATCHNORM = [(1.0, 1.0), (3.0, 2.0), (-1.0, 4.0)]  # mean and variance of 10, 20 and 10 examples


def with_batchnorm() -> list[Learner]:
    return [Learner(step, n, each) for step, n, each in zip((1.0, 2.0, 4.0), (10, 20, 10), BATCHNORM, strict=True)]


@pytest.mark.parametrize("in_pieces", [False, True])
def test_batchnorms_statistics_are_those_of_all_examples_and_no_clients_own(in_pieces, tmp_path, monkeypatch):
    """By hand: (10 + 60 - 10) / 40 = 1.5; the mean square (2 + 2 * 11 + 5) / 4 = 7.25, less 1.5 squared, is 5."""
    monkeypatch.setattr(in_process.Clients, "in_pieces", in_pieces)
    secure, plain = (federation(tmp_path / str(on), with_batchnorm(), secure_aggregation=on) for on in (True, False))
    for server in (secure, plain):
        server.federate()
        assert server.exit_code == 0
        assert [server.weights[1].item(), server.weights[2].item()] == pytest.approx([1.5, 5.0], abs=1e-6)
    assert secure.weights[0] == pytest.approx(plain.weights[0], abs=1e-6)
    received = 4 * (5 + 2 + 2) + 4 * (2 * 2 + 2)  # five numbers, the loss, the proof; two statistics, the proof
    assert secure.history.rounds[-1].bytes_received == 3 * received
    told = [each for one in secure.clients.ready() for each in one.client.seen if isinstance(each, list)]
    assert told == [[]] * 12


@pytest.mark.parametrize("moment", ["mask", "measure"])
def test_a_client_that_is_lost_while_all_measure_costs_a_repetition_or_its_statistics(moment, tmp_path, capsys):
    quiet = federation(tmp_path / "quiet", with_batchnorm(), rounds=1)
    broken = federation(tmp_path / "lost", with_batchnorm(), rounds=1)
    proxy = broken.clients.ready()[1].client
    usual, asked = proxy._break, []

    def break_(what: str) -> None:
        asked.append(what)
        if asked.count(what) == (2 if what == "mask" else 1) and what == moment:
            raise ConnectionError
        usual(what)

    proxy._break = break_
    quiet.federate(), broken.federate()
    assert broken.exit_code == 0
    said = capsys.readouterr().out
    if moment == "mask":
        assert bits(broken) == bits(quiet)
        assert [learner.measured for learner in broken.clients.learners] == [2, 2, 2]
        assert [learner.trained for learner in broken.clients.learners] == [1, 1, 1]
        assert "a client was lost before the sum was whole; all measure BatchNorm's statistics again" in said
    else:
        assert broken.weights[1].item() == 0  # two are no sum: they are those of the updates
        assert "round 1: BatchNorm's statistics are those of the updates" in said


def test_the_records_of_both_sides_fit_and_hold_the_hash_of_what_was_masked(tmp_path, monkeypatch):
    monkeypatch.setattr(Clients, "audits", tmp_path)
    server = federation(tmp_path, with_batchnorm())
    server.federate()
    ours = read_record(server.folder.path / "audit.jsonl")
    for partition in range(3):
        theirs = read_record(tmp_path / f"{RUN}-client-{partition}.jsonl")
        assert (ours.problems, theirs.problems, compare(ours, theirs)) == ([], [], [])
        kinds = [line["kind"] for line in theirs.lines if line["round"] == 1]
        of_a_sum = ["roster-entry", "roster"]
        assert kinds[:8] == [
            "model-to-train", *of_a_sum, "update", "model-to-measure", *of_a_sum, "statistics",
        ]  # fmt: skip
        assert {line["bytes"] for line in theirs.lines if line["kind"] == "update"} == {4 * (5 + 2 + 2)}


# A server that lies


def session() -> Session:
    one = Session(lambda assignment: Learner(1.0), ["cat", "dog"])
    admit(one)
    return one


def admit(one: Session) -> None:
    one.get_properties({"ask": "hello", "nonce": "n"})
    place = {"ask": "place", "partition": 0, "num_partitions": 3, "run": RUN}
    one.get_properties({**place, "recipe": Recipe(secure_aggregation=True).to_json()})


CONFIG = {"server_round": 1, "clients_on_host": 1}
QUESTIONS = [{"ask": "fetch", "what": what, "start": 0, "stop": 8} for what in ("update", "untrained", "masked")]


@pytest.mark.parametrize(
    "question", [*QUESTIONS, {"ask": "mask", "roster": "[]"}], ids=lambda question: question.get("what", "mask")
)
def test_after_a_training_no_question_gets_the_update(question, capsys):
    one = session()
    weights, _, entry = one.fit(START, CONFIG)
    assert weights == []
    assert "signature" in entry
    assert set(one.get_properties(question)) == {"error"}
    assert one.get_parameters({}) == []


def test_after_a_training_nobody_gets_scores_of_what_was_trained(capsys):
    """Of the network as it is, with BatchNorm's statistics of the server's choice: such scores tell of its weights."""
    one = Session(lambda assignment: Learner(1.0, batchnorm=(0.0, 1.0)), ["cat", "dog"])
    admit(one)
    start = one.client.start
    one.fit(start, CONFIG)
    statistics = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    loss, examples, told = one.evaluate(statistics, {**CONFIG, "measured": True})
    assert (loss, examples, told) == (0.0, 0, {"error": "the server asks for scores of a model that it did not send"})
    one.fit(start, {**CONFIG, "measure": True})
    assert one.evaluate(statistics, {**CONFIG, "measured": True})[1] == 10


def test_a_model_that_comes_in_before_the_masking_does_not_become_the_update(capsys):
    """The update of a large model is the network itself: with the others' made known so, the sum would show one's."""
    one = session()
    model, config = b"".join(array.tobytes() for array in START), {**CONFIG, "in_pieces": True}
    one.get_properties({"ask": "store", "start": 0, "content": model})
    assert "signature" in one.fit([], config)[2]
    one.get_properties({"ask": "store", "start": 0, "content": model})
    one.evaluate([], config)
    words = "the server asks for an update that was masked before, or never trained"
    assert one.get_properties({"ask": "mask", "roster": "[]"}) == {"error": words}


def test_a_recipe_without_secure_aggregation_is_refused_by_who_has_peers(tmp_path, capsys):
    one = Session(lambda assignment: Learner(1.0), ["cat"])
    one.credentials.peers = ()
    one.get_properties({"ask": "hello", "nonce": "n"})
    place = {"ask": "place", "partition": 0, "num_partitions": 3, "recipe": Recipe().to_json()}
    assert one.get_properties(place)["error"].startswith("it takes part in secure aggregation only (--peers)")


# What it can't be had with


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mode async", "--secure-aggregation needs rounds"),
        ("--strategy krum", "--secure-aggregation can't be had with --strategy krum, which needs single updates"),
        ("--strategy fedmedian", "can't be had with --strategy fedmedian"),
        ("--strategy fedtrimmedavg", "can't be had with --strategy fedtrimmedavg"),
        ("--outlier-factor 20", "--secure-aggregation can't be had with --outlier-factor"),
        ("--compress fp16", "--secure-aggregation has its own number format; leave out --compress fp16"),
        (
            "--clients 2 --min-clients 2",
            "as of two each knows the other's part; got --clients 2",
        ),
        ("--min-clients 2", "takes 3 clients at least, as of two each knows the other's part; got --min-clients 2"),
        ("--clients 5 --fraction-fit 0.4", "--fraction-fit 0.4 leaves fewer than the 3 clients that a sum takes"),
    ],
)
def test_what_needs_single_updates_is_refused_with_the_reason(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        options.parse_args(None, ["--secure-aggregation", *flags.split()])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_on_flowers_engines_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="make a client anew for each message, and it would forget what it masked"):
        read_run_config({"secure-aggregation": True}, clients=3)
    assert read_run_config({"secure-aggregation": False}, clients=3).recipe.secure_aggregation is False


def test_its_defaults_are_three_clients_and_no_comparison_of_updates():
    args = options.parse_args(None, ["--secure-aggregation"])
    assert (args.settings.min_clients, args.settings.outlier_factor) == (3, 0)
    assert args.recipe.secure_aggregation is True
    assert json.loads(args.recipe.to_json())["secure_aggregation"] is True
    assert "secure_aggregation" not in json.loads(Recipe().to_json())


def test_the_page_says_who_learns_what_by_the_flags_in_use():
    plain, secure = (
        dict((row[0], row[1:]) for row in who_learns_what({"secure_aggregation": on})) for on in (False, True)
    )
    assert plain["each client's update"] == ["yes", "no", "no"]
    assert secure["each client's update"] == ["no", "no", "no"]
    assert secure["the weighted sum of all updates"][0] == "yes"
    assert Assignment(0, 3, Recipe()).run_id == ""


# With real programs


def test_whoever_is_killed_between_the_phases_the_bits_are_those_of_a_quiet_run(tmp_path):
    """A client that comes back with its key, and a server that is resumed."""
    names = "abc"
    for name in names:
        Identity.new().write(tmp_path / name, name)
    peers = tmp_path / "peers"
    peers.write_text("".join((tmp_path / f"{name}.pub").read_text() for name in names))
    flags = ["--secure-aggregation", "--members", peers, "--rounds", 3, "--rejoin-wait", 100]
    with ExitStack() as stack:
        runs = {}
        for kind in ("quiet", "client", "server"):
            (tmp_path / kind).mkdir()
            run = runs[kind] = stack.enter_context(Federation(tmp_path / kind))
            run.server(*flags)
            for place, name in enumerate(names):
                held = name == "c" and kind != "quiet"
                hold = ["--in-round", 2, "--hold-mask", tmp_path / kind / "go"] if held else []
                mine = ["--partition-id", place, "--identity", tmp_path / name, "--peers", peers]
                run.tiny(*mine, *hold, "--wait", 100)
        for kind in ("client", "server"):
            runs[kind].processes[-1].says("mask 2")
        runs["client"].processes[-1].send(signal.SIGKILL)
        runs["client"].processes[-1].ends(-9)
        again = ["--partition-id", 2, "--identity", tmp_path / "c", "--peers", peers]
        runs["client"].tiny(*again)
        runs["server"].processes[0].send(signal.SIGKILL)
        runs["server"].processes[0].ends(-9)
        (tmp_path / "server/go").touch()
        runs["server"].server("--resume", runs["server"].run_dir, "--members", peers)
        for run in runs.values():
            for process in run.processes:
                if process.popen.poll() != -9:
                    process.ends(0)
        models = [run.weights() for run in runs.values()]
    for other in models[1:]:
        assert [array.tobytes() for array in other] == [array.tobytes() for array in models[0]]
    assert "round 2: a client was lost before the sum was whole" in runs["client"].processes[0].output
    assert "safe from a server that lies, too" in runs["quiet"].processes[1].output


HEAD = """\
from federation.task.classification import evaluate, train_round
from torch import nn


def build(schema, recipe):
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    network[0].requires_grad_(False)
    return network
"""


def test_clients_that_stay_sum_a_task_of_their_own_with_frozen_layers_to_what_it_gives_in_the_open(tmp_path):
    """Run after run by the same three: first as a sum, then in the open."""
    for name, text in (("model.py", HEAD), ("data.py", DATA)):
        (tmp_path / "task").mkdir(exist_ok=True)
        (tmp_path / "task" / name).write_text(text)
    models = []
    with Federation(tmp_path) as federation:
        where = ["--server", federation.address, "--task", tmp_path / "task", "--audit", tmp_path / "audit"]
        clients = [federation.start(f"client {i}", ROOT / "client.py", *where, "--stay") for i in range(3)]
        for secure in (["--secure-aggregation"], []):
            federation.run_dir = tmp_path / f"run{len(models)}"
            server = federation.server("--clients", 3, "--rounds", 2, "--strategy", "fedadam", *secure)
            said = server.ends(0)
            assert ("secure aggregation: in 2 rounds the sum of 3 updates; no single one" in said) == bool(secure)
            models.append(load_file(federation.run_dir / "model.safetensors"))
            for client in clients:
                client.says(f"run {federation.history()['config']['run_id']}: the run is done after 2 rounds")
    summed, open_ones = models
    assert set(summed) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for name in ("0.weight", "0.bias"):
        assert summed[name].tobytes() == open_ones[name].tobytes()
    for name in ("1.weight", "1.bias"):
        assert summed[name] == pytest.approx(open_ones[name], abs=1e-3)

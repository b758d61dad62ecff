"""Rounds with secure aggregation, in one process: the project's own sessions, and a server that asks them directly."""

import json
import signal
from contextlib import ExitStack
from pathlib import Path

from federation.aggregation.strategy import STRATEGIES
from federation.client.session import Session
from federation.config import Recipe
from federation.pieces import InPieces, hash_arrays
from federation.protocol import Assignment, read_summary
from federation.results.history import History
from federation.results.run_folder import Run, RunFolder
from federation.results.tables import who_learns_what
from federation.security.identity import Identity
from federation.server import options
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
from helpers.processes import Federation

OK = Status(Code.OK, "")
START = [np.zeros(2, np.float32), np.ones(1, np.float32), np.array(0)]


class Learner:
    """Adds its step to the weights; what a session asks of a client."""

    num_test, buffer_positions = 10, (1, 2)

    def __init__(self, step: float, examples: int = 10) -> None:
        self.step, self.num_train, self.class_counts = step, examples, (examples - 5, 5)
        self.trained = 0

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        return START

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        self.trained += 1
        new = [parameters[0] + np.float32(self.step), parameters[1] * np.float32(0.5), parameters[2] + 1]
        return new, self.num_train, {"train_loss": float(self.step)}

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        return 1.0, self.num_test, {"accuracy": float(parameters[0][0])}


class Proxy(in_process.Proxy):
    """Asks a session as Flower's proxy asks it over gRPC. broken: what it is asked when its connection breaks, once."""

    def __init__(self, session: Session, broken: str = "") -> None:
        super().__init__(session)
        self.session, self.broken = session, broken
        self.seen: list = []  # of what it sent: all that the server could learn from

    def _break(self, what: str) -> None:
        if self.broken == what:
            self.broken = ""
            raise ConnectionError

    def get_properties(self, ins, timeout, group_id):
        self._break(ins.config["ask"])
        return GetPropertiesRes(OK, self.session.get_properties(dict(ins.config)))

    def get_parameters(self, ins, timeout, group_id):
        return GetParametersRes(OK, ndarrays_to_parameters(self.session.get_parameters(dict(ins.config))))

    def fit(self, ins, timeout, group_id):
        self._break("fit")
        weights, examples, metrics = self.session.fit(parameters_to_ndarrays(ins.parameters), dict(ins.config))
        self.seen += [weights, metrics]
        return FitRes(OK, ndarrays_to_parameters(weights), examples, metrics)

    def evaluate(self, ins, timeout, group_id):
        loss, examples, metrics = self.session.evaluate(parameters_to_ndarrays(ins.parameters), dict(ins.config))
        return EvaluateRes(OK, loss, examples, metrics)

    def fetch(self, what, like, model, deadline):
        self._break("fetch")
        ((shape, dtype),) = like
        size = int(np.prod(shape)) * dtype.itemsize
        question = {"ask": "fetch", "what": what, "start": 0, "stop": size}
        content = self.session.get_properties(question)["content"]
        array = np.frombuffer(content, dtype).reshape(shape)
        self.seen.append(array)
        return InPieces(arrays=[array], sha256=hash_arrays([array]))


class Clients(in_process.Clients):
    """Sessions that have joined; who is lost comes back at once with the same session, or never."""

    def __init__(self, learners: list[Learner], recipe: Recipe, events: list, broken: dict | None, back: bool):
        self.learners, self.broken = learners, broken or {}
        super().__init__(learners, recipe, events, back)

    def join(self, partition: int, learner) -> None:
        proxy = learner if isinstance(learner, Proxy) else None
        if proxy is None:
            session = Session(lambda assignment: self.learners[partition], ["cat", "dog"])
            proxy = Proxy(session, self.broken.get(partition, ""))
            proxy.learner = proxy
            session.get_properties({"ask": "hello", "nonce": "n"})
            place = {"ask": "place", "partition": partition, "num_partitions": len(self.learners)}
            told = session.get_properties({**place, "recipe": self.recipe.to_json(), "run": "0123456789abcdef"})
            proxy.summary = read_summary(told)
        one = in_process.Participant(partition, proxy, f"instance of {partition}", "here", ["cat", "dog"])
        one.summary, one.ready = proxy.summary, True
        one.train_examples, one.test_examples = one.summary.train_examples, one.summary.test_examples
        with self.changed:
            self.participants[partition] = one
            self.agreed = self.agreed or proxy.summary
            self.changed.notify_all()


def federation(
    folder: Path, learners: list[Learner], *, broken: dict | None = None, back: bool = True, **values: object
) -> FederatedServer:
    usual = {"rounds": 2, "clients": len(learners), "min_clients": min(3, len(learners)), "secure_aggregation": True}
    usual |= {"rejoin_wait": 0.0, "join_timeout": 0.2, "round_timeout": 5.0, "outlier_factor": 0.0}
    values = {**usual, **values}
    recipe = Recipe(**{name: value for name, value in values.items() if name in Recipe.names()})
    settings = ServerSettings(**{name: value for name, value in values.items() if name in ServerSettings.names()})
    run_folder = RunFolder(folder / "run")
    run_folder.create()
    run = Run(run_folder, History({**vars(recipe), **vars(settings)}))
    clients = Clients(learners, recipe, run.history.events, broken, back)
    return FederatedServer(clients, STRATEGIES[settings.strategy], settings, run)


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
    assert (record.clients, record.bytes_received) == (3, 3 * 4 * (4 + 3))
    assert record.train_metrics["train_loss"] == pytest.approx(2.25, abs=1e-6)
    assert record.by_client["weight"] == {"0": 0.25, "1": 0.5, "2": 0.25}
    for one in server.clients.ready():
        arrays = [each for each in one.client.seen if isinstance(each, np.ndarray)]
        assert [array.dtype for array in arrays] == [np.uint32] * 2
        assert [each for each in one.client.seen if isinstance(each, list)] == [[], []]
        metrics = [each for each in one.client.seen if isinstance(each, dict)]
        assert {name for each in metrics for name in each} == {"partition", "examples", "key", "identity", "signature"}
        assert one.summary.class_counts == []


def test_the_same_bits_come_of_other_masks(tmp_path):
    weights = []
    for name in "ab":
        server = federation(tmp_path / name, three())
        server.federate()
        weights.append([array.tobytes() for array in server.weights])
    assert weights[0] == weights[1]


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
    assert "client 3 left out: it says: array 0 holds NaN, or more than the 128 that" in capsys.readouterr().out


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
        session.masking._summed[session.masking._subject] = frozenset({"another"})
    return usual(config)


# A server that lies


def session() -> Session:
    one = Session(lambda assignment: Learner(1.0), ["cat", "dog"])
    one.get_properties({"ask": "hello", "nonce": "n"})
    place = {"ask": "place", "partition": 0, "num_partitions": 3, "run": "0123456789abcdef"}
    one.get_properties({**place, "recipe": Recipe(secure_aggregation=True).to_json()})
    return one


@pytest.mark.parametrize(
    "question",
    [
        {"ask": "fetch", "what": "update", "start": 0, "stop": 8},
        {"ask": "fetch", "what": "untrained", "start": 0, "stop": 8},
        {"ask": "fetch", "what": "masked", "start": 0, "stop": 8},
        {"ask": "mask", "roster": "[]"},
    ],
    ids=lambda question: question.get("what", "mask"),
)
def test_after_a_training_no_question_gets_the_update(question, capsys):
    one = session()
    weights, _, entry = one.fit(START, {"server_round": 1, "clients_on_host": 1})
    assert weights == []
    assert "signature" in entry
    assert set(one.get_properties(question)) == {"error"}
    assert one.get_parameters({}) == []


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

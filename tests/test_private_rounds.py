"""Private training as the server sees it: what clients say of their epsilon, and where a run shows it."""

import json

from federation.config import Recipe
from federation.operations.introduction import entered
from federation.results.history import DELTA, EPSILON, WEIGHT, History, RoundRecord
from federation.results.html import run_page
from federation.results.privacy import epsilon_of, spent, spent_in_words, who_learns_what
from federation.results.tables import table
from federation.server import options
from federation.server.engine_app import read_run_config

import pytest
from helpers.example_runs import make_images
from helpers.in_process import Learner, federation, no_disk  # noqa: F401 (the last is used by every test)
from helpers.processes import ROOT, Federation


def private(epsilon: float | None, delta: float = 1e-5, **bad) -> Learner:
    """Tells no loss of its training; says after each round that it has spent so much more."""

    def fit(number, weights, examples, metrics):
        return weights, examples, {}

    def evaluate(number, loss, examples, metrics):
        told = {} if epsilon is None else {"dp_epsilon": epsilon * number, "dp_delta": delta}
        return loss, examples, {**metrics, **told}

    return Learner(**{"fit": fit, "evaluate": evaluate, **bad})


# A run


def test_the_epsilon_of_each_client_is_in_the_history_and_the_greatest_in_table_sentence_and_page(tmp_path, capsys):
    server = federation(tmp_path, [private(0.5), private(1.0), private(0.25)], private_training=True, rounds=2)
    server.federate()
    assert server.exit_code == 0
    rows = json.loads((server.folder.path / "history.json").read_text())["rounds"]
    assert [row["epsilon_by_client"] for row in rows] == [
        {"0": 0.0, "1": 0.0, "2": 0.0},
        {"0": 0.5, "1": 1.0, "2": 0.25},
        {"0": 1.0, "1": 2.0, "2": 0.5},
    ]
    assert rows[2]["delta_by_client"] == {"0": 1e-5, "1": 1e-5, "2": 1e-5}
    assert not {"dp_epsilon", "dp_delta"} & {*rows[2]}  # a mean over clients would say nothing
    sentence = "differential privacy: epsilon 2.00 at delta 1e-05 at most (client 1), as the clients say"
    said = capsys.readouterr().out
    assert sentence in said
    head, *lines = table(server.history).splitlines()
    assert head.split()[-1] == "epsilon"
    assert [line.split()[-1] for line in lines[:3]] == ["0.00", "1.00", "2.00"]
    assert sentence in run_page("run", server.history, None, {})


def test_the_loss_of_a_private_training_is_not_asked_for_and_not_kept(tmp_path):
    server = federation(tmp_path, [private(0.5)] * 3, private_training=True, rounds=1)
    server.federate()
    assert server.history.rounds[1].clients == 3
    assert server.history.rounds[1].train_metrics == {}
    tells = federation(tmp_path / "tells", [Learner()] * 3, private_training=True, rounds=1)
    tells.federate()
    assert tells.history.rounds[1].train_metrics == {}


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_strategies_make_of_private_updates_what_they_make_of_any(strategy, tmp_path):
    models = []
    for on in (True, False):
        learners = [private(0.5) if on else Learner() for _ in range(3)]
        server = federation(tmp_path / str(on), learners, private_training=on, strategy=strategy)
        server.federate()
        assert server.exit_code == 0
        models.append([array.tobytes() for array in server.weights])
    assert models[0] == models[1]


def test_without_private_training_a_run_has_no_epsilon_whatever_a_client_says(tmp_path):
    def boast(number, loss, examples, metrics):
        return loss, examples, {**metrics, "dp_epsilon": 0.1}

    server = federation(tmp_path, [Learner(evaluate=boast)] * 3, rounds=1)
    server.federate()
    assert EPSILON not in server.history.rounds[1].by_client
    assert "dp_epsilon" not in server.history.rounds[1].metrics
    assert "epsilon" not in table(server.history)


@pytest.mark.parametrize("told", [float("nan"), float("inf"), -1.0, "0.1", None])
def test_an_epsilon_that_is_no_number_is_none(tmp_path, told):
    def odd(number, loss, examples, metrics):
        return loss, examples, {**metrics, "dp_epsilon": told}

    learners = [private(0.5), private(0.5), private(0.5, evaluate=odd)]
    server = federation(tmp_path, learners, private_training=True, rounds=1)
    server.federate()
    assert server.history.rounds[1].by_client[EPSILON] == {"0": 0.5, "1": 0.5}
    assert spent_in_words(server.history) == "differential privacy: epsilon is void, as client 2 says none"


# What is known of it


def record(number: int, trained: str = "", **epsilons: float) -> RoundRecord:
    """Of clients by letters: who trained, and what each says to have spent."""
    weights = dict.fromkeys(trained, 1 / max(1, len(trained)))
    return RoundRecord(number, {}, by_client={WEIGHT: weights, EPSILON: epsilons, DELTA: dict.fromkeys(epsilons, 1e-5)})


def history(*records: RoundRecord) -> History:
    return History({"private_training": True, "rounds": 3, "clients": 3}, list(records))


def test_a_client_that_went_has_spent_what_it_said_last():
    run = history(record(0, a=0, b=0), record(1, "ab", a=1, b=2), record(2, "a", a=1.5))
    assert (spent(run).epsilon, spent(run).partition) == (2, "b")
    assert (
        spent_in_words(run)
        == "differential privacy: epsilon 2.00 at delta 1e-05 at most (client b), as the clients say"
    )


def test_of_a_client_that_went_after_a_training_the_last_word_is_too_little():
    run = history(record(0, a=0, b=0), record(1, "ab", a=1))
    assert epsilon_of(run.rounds[1], run) == "≥ 1.00"
    assert "epsilon 1.00 at delta 1e-05 or more, as a client left after its training (client a)" in spent_in_words(run)


def test_each_rounds_epsilon_is_of_that_round():
    run = history(record(0, a=0), record(1, "a", a=1), record(2, "a", a=2))
    assert [epsilon_of(each, run) for each in run.rounds] == ["0.00", "1.00", "2.00"]


def test_epsilon_is_void_where_a_client_whose_training_counts_says_none():
    run = history(record(0, a=0), record(1, "ab", a=1))
    assert epsilon_of(run.rounds[0], run) == "0.00"
    assert epsilon_of(run.rounds[1], run) == "void"


def test_a_private_run_that_is_done_again_has_other_bits_as_its_noise_is_another():
    first, again = (
        History({"private_training": True, "run_id": one}, [RoundRecord(0, {}, weights_sha256=one * 64)])
        for one in "ab"
    )
    again.config["again"] = first.to_repeat()
    assert again.repetition() == (
        "other bits than run a, from round 0 on: private training draws other noise each time"
    )


def test_the_page_says_who_learns_what_under_private_training():
    def of(**flags) -> dict:
        return dict((row[0], row[1:]) for row in who_learns_what(flags))

    alone, both = of(private_training=True), of(private_training=True, secure_aggregation=True)
    assert alone["each client's update"][0] == "yes, within epsilon"
    assert both["each client's update"][0] == "no"
    for what in ("loss of its training", "sums over its columns, where they are scaled alike"):
        assert alone[what][0] == both[what][0] == "no"
    assert alone["examples by class"][0] == "about, from its update"  # python leak.py classes
    assert both["examples by class"][0] == "no"
    assert alone["scores on its test examples"][0] == "yes"
    assert alone["the weighted sum of all updates"][2] == "the last one, within epsilon"


# Flags


def test_the_server_says_what_clients_enter_and_compares_no_updates():
    args = options.parse_args(None, ["--private-training"])
    assert args.settings.outlier_factor == 0  # noise is of whatever size its client needs
    assert options.parse_args(None, ["--private-training", "--outlier-factor", "5"]).settings.outlier_factor == 5
    assert options.describe(args).endswith("3 rounds, private training")
    assert entered(args, []) == "python client.py --server 127.0.0.1:8080 --dp-epsilon E"


def test_it_needs_rounds(capsys):
    with pytest.raises(SystemExit) as end:
        options.parse_args(None, ["--private-training", "--mode", "async"])
    assert end.value.code == 2
    assert "--private-training plans the noise of each client for a number of rounds; leave out --mode async" in (
        capsys.readouterr().err
    )


def test_on_flowers_engines_it_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="nodes have no flags for an epsilon and a ledger of their own"):
        read_run_config({"private-training": True}, clients=3)
    assert read_run_config({"private-training": False}, clients=3).recipe == Recipe()


# With real programs


@pytest.mark.processes
def test_a_private_demo_keeps_its_ledgers_in_the_run_and_can_be_compared_with_training_that_is_not_private(tmp_path):
    images = make_images(tmp_path / "images", train=8, test=2)
    flags = ["--dp-epsilon", 3, "--rounds", 1, "--clients", 1, "--dataset", images, "--run-dir", tmp_path / "run"]
    with Federation(tmp_path) as programs:
        demo = programs.start("demo", ROOT / "demo.py", *flags)
        demo.ends(0, 200)
        assert "examples: epsilon 3 at delta 1e-05; noise" in demo.output
        assert (tmp_path / "run/ledger-client-0.json").exists()
        run = ("--run", tmp_path / "run", "--dataset", images)
        baseline = programs.start("baseline", ROOT / "baseline.py", *run)
        baseline.ends(0, 200)
        assert "the run trained privately; here scattering trains by its ordinary recipe, without privacy" in (
            baseline.output
        )

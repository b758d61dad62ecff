"""Private training at a client: what leaves it is what its budget allows and its ledger holds.

The accountant of most tests counts steps over noise, so that what is spent can be worked out by hand; that of
dp-accounting has tests of its own.
"""

import dataclasses
import json
import random
import signal
from collections.abc import Callable

from federation.config import PRIVATE, Recipe
from federation.console import PublicError
from federation.privacy import private_task, private_training
from federation.privacy.accounting import Spent
from federation.privacy.budget import Budget
from federation.privacy.ledger import LedgerError
from federation.privacy.private_training import PrivateClient, PrivateClients
from federation.protocol import Assignment
from federation.security.audit_check import compare, read_record
from federation.task.classification import loss
from federation.task.weights import get_weights, set_weights

import numpy as np
import pytest
import torch
from helpers.in_process import no_disk  # noqa: F401 (used by every test)
from helpers.processes import Federation, wait_for
from helpers.tasks import MODEL, write_task
from torch import nn

RUN, NEXT = "1" * 16, "2" * 16
START = [np.zeros((2, 3), np.float32), np.zeros(2, np.float32)]
EXAMPLES = (torch.arange(24.0).view(8, 3), torch.arange(8) % 2)


RECIPE = Recipe(model="mine", local_epochs=1, batch_size=4, learning_rate=1.0, private_training=True, own={})


class Counting:
    """Epsilon is steps over noise, whatever delta and rate: 2 steps at noise 4 cost 0.5."""

    def __init__(self, spent=()):
        self.spent = sum(each.number / each.noise for each in spent)

    def epsilon(self, delta: float) -> float:
        return self.spent

    def with_steps(self, steps) -> "Counting":
        more = Counting()
        more.spent = self.spent + steps.number / steps.noise
        return more

    def noise_for(self, target: float, delta: float, rate: float, number: int) -> float:
        if self.spent >= target:
            raise Spent("spent")
        return number / (target - self.spent)


class Task:
    """The parts of a task that private training asks for."""

    def __init__(self, module: nn.Module | None = None, lacks: str = "columns"):
        self.models = {"mine": {}, "other": {PRIVATE: {}}}
        self.module, self.lacks = module, lacks

    def has(self, name: str) -> bool:
        return name != self.lacks

    def private_training(self, network, examples):
        return self.module or network, examples, loss


class Client:
    """A linear layer and eight examples; its own fit must never be called."""

    class_counts, num_train, num_test, batchnorm_positions = (4, 4), 8, 5, [1, 2]

    def __init__(self, recipe: Recipe, network: nn.Module | None = None, task: Task | None = None):
        torch.manual_seed(0)
        self.recipe, self.train_set, self.task = recipe, EXAMPLES, task or Task()
        self.network = network or nn.Linear(3, 2)

    def get_parameters(self, config: dict) -> list[np.ndarray]:
        return get_weights(self.network)

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        set_weights(self.network, parameters)

    def evaluate(self, parameters: list[np.ndarray], config: dict) -> tuple[float, int, dict]:
        return 0.5, 5, {"accuracy": 0.8}


@pytest.fixture
def client(tmp_path, monkeypatch) -> Callable[..., PrivateClient]:
    """A private client of four rounds of 2 steps, that draw half of its examples: noise 4 for an epsilon of 2."""
    monkeypatch.setattr(private_training, "Accountant", Counting)
    opened: list[PrivateClient] = []

    def make(epsilon=2.0, run=RUN, wrapped=None, ledger="ledger.json", rounds=4, batch_size=4, **more):
        for each in opened:
            each.ledger.close()
        recipe = dataclasses.replace(RECIPE, rounds=rounds, batch_size=batch_size)
        budget = Budget(epsilon, ledger=str(tmp_path / ledger), **more)
        opened.append(PrivateClient(wrapped or Client(recipe), budget, Assignment(1, 3, recipe, run_id=run)))
        return opened[-1]

    yield make
    for each in opened:
        each.ledger.close()


def fit(client: PrivateClient, number: int = 1, start: list[np.ndarray] = START) -> list[np.ndarray]:
    update, examples, metrics = client.fit(start, {"server_round": number})
    assert (examples, metrics) == (8, {})  # no loss of the training
    return update


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# What is spent


def test_each_training_is_in_the_ledger_before_its_update_leaves(client, tmp_path, capsys):
    one = client()
    assert one.spent == {"dp_epsilon": 0, "dp_delta": 1e-5}
    fit(one)
    (training,) = json.loads((tmp_path / "ledger.json").read_text())["trainings"]
    assert (training["run"], training["round"]) == (RUN, 1)
    assert (training["rate"], training["noise"], training["steps"], training["clip"]) == (0.5, 4, 2, 1)
    assert one.spent == {"dp_epsilon": 0.5, "dp_delta": 1e-5}
    assert "round 1: epsilon 0.50 of 2 is spent" in capsys.readouterr().out


def test_a_whole_run_spends_the_whole_budget_and_no_round_more(client):
    one = client()
    for number in range(1, 5):
        fit(one, number)
    assert one.spent["dp_epsilon"] == 2
    with pytest.raises(Spent, match=r"it has spent 2\.00 of its epsilon of 2 on these examples, and trains no more"):
        fit(one, 5)


def test_a_round_that_is_done_again_from_another_model_costs_again(client):
    one = client()
    first = fit(one)
    assert not same(first, fit(one, start=[START[0] + 1, START[1]]))
    assert one.spent["dp_epsilon"] == 1


def test_asked_again_for_the_same_it_gives_the_same_bits_at_no_cost(client, capsys):
    one = client()
    update = fit(one)
    assert same(update, fit(one))
    assert same(update, one.get_parameters({}))  # as the network is what was sent
    assert one.spent["dp_epsilon"] == 0.5
    assert "round 1: the same update as before, which costs nothing" in capsys.readouterr().out


def test_a_client_that_is_started_again_gives_the_same_bits_and_goes_on_with_the_same_noise(client):
    update = fit(client())
    again = client()
    assert again.spent["dp_epsilon"] == 0.5
    assert same(update, fit(again))
    fit(again, 2)
    assert again.spent["dp_epsilon"] == 1


def test_epsilons_of_runs_on_the_same_examples_add_up(client, capsys):
    fit(client(rounds=1))  # 2 steps at noise 1
    with pytest.raises(Spent, match=r"spent 2\.00 of its epsilon of 2 .*its owner may raise --dp-epsilon"):
        client(run=NEXT)
    more = client(epsilon=3.0, run=NEXT, rounds=1)
    fit(more)
    assert more.spent["dp_epsilon"] == 3
    assert "epsilon 3 at delta 1e-05, 2.00 of it spent before; noise 2 x clip 1, 2 steps a round" in (
        capsys.readouterr().out
    )


def test_of_a_budget_for_many_runs_one_run_spends_its_part_alone(client):
    for run, spent in ((RUN, 0.5), (NEXT, 1.0)):
        one = client(run=run, rounds=1, epsilon_per_run=0.5)
        fit(one)
        assert one.spent["dp_epsilon"] == spent
        with pytest.raises(Spent):
            fit(one, 2)
        with pytest.raises(Spent):  # nor after a restart
            fit(client(run=run, rounds=1, epsilon_per_run=0.5), 2)


# What can't go on


def test_without_its_ledger_a_client_does_not_go_on_with_a_run(client):
    words = "knows nothing of this run, which is in round 2; bring the one back that this client had"
    with pytest.raises(LedgerError, match=words) as error:
        fit(client(), 2)
    assert error.value.public.startswith("its ledger knows nothing of this run")


def test_who_was_there_from_the_start_may_train_later_for_the_first_time(client):
    one = client()
    one.evaluate(START, {"server_round": 0})
    fit(one, 3)
    assert one.spent["dp_epsilon"] == 0.5


@pytest.mark.parametrize("file", ["ledger.json", "ledger.json.update.npz"])
def test_where_the_disk_is_full_nothing_leaves_and_the_network_is_as_it_came(client, monkeypatch, file):
    one = client()
    one.evaluate(START, {"server_round": 0})
    write = private_training.Ledger.charge.__globals__["write_whole"]

    def full(path, content):
        if path.name == file:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr("federation.privacy.ledger.write_whole", full)
    with pytest.raises(
        LedgerError, match=r"can't be written \(No space left on device\), so there must be no training"
    ):
        fit(one)
    assert same(START, one.get_parameters({}))


def test_an_update_that_is_lost_from_the_disk_is_made_anew_and_paid_again(client, tmp_path):
    first = fit(client())
    (tmp_path / "ledger.json.update.npz").unlink()
    again = client()
    assert not same(first, fit(again))
    assert again.spent["dp_epsilon"] == 1


def test_noise_from_a_seed_can_be_made_again_and_voids_epsilon_for_good(client, capsys):
    one = client(seed=7, ledger="one.json")
    update = fit(one)
    assert "with --dp-seed 7, noise that anybody can make again: EPSILON IS VOID" in capsys.readouterr().out
    assert one.spent == {"dp_epsilon": None, "dp_delta": 1e-5}
    assert same(update, fit(client(seed=7, ledger="other.json")))
    with pytest.raises(LedgerError, match="holds trainings with --dp-seed, so that epsilon is void for these examples"):
        client(ledger="one.json")


def test_noise_and_draws_are_of_no_generator_that_has_a_seed(client, monkeypatch):
    def seeded(*_, **__):
        raise AssertionError("a generator with a seed")

    one, other = client(), None
    for module, names in ((torch, ("randn", "rand", "normal", "randperm", "bernoulli")), (random, ("random", "gauss"))):
        for name in names:
            monkeypatch.setattr(module, name, seeded)
    monkeypatch.setattr(np.random, "default_rng", seeded)
    first = fit(one)
    monkeypatch.undo()
    monkeypatch.setattr(private_training, "Accountant", Counting)
    other = client(ledger="other.json")
    assert not same(first, fit(other))


# What leaves


def test_scores_come_with_what_was_spent(client):
    assert client().evaluate(START, {"server_round": 0}) == (
        0.5,
        5,
        {"accuracy": 0.8, "dp_epsilon": 0, "dp_delta": 1e-5},
    )


def test_nothing_else_that_depends_on_training_examples_leaves(client):
    one = client()
    assert (one.class_counts, one.batchnorm_positions) == ([], [])
    assert (one.num_train, one.num_test) == (8, 5)  # as the client's own
    with pytest.raises(PublicError, match="BatchNorm's statistics are of its training examples"):
        one.measure(START, {"server_round": 1})
    with pytest.raises(PublicError, match="the scaling of its columns"):
        one.scale({})


# Which networks, tasks and numbers are fit for it


class WithMean(nn.Linear):
    """Keeps a running mean of its inputs, without being a BatchNorm."""

    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("mean", torch.zeros(3))


class Averaging(Task):
    def private_training(self, network, examples):
        network.mean += examples[0].mean(0)
        return super().private_training(network, examples)


@pytest.mark.parametrize(
    ("network", "task", "words"),
    [
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), Task(), "mine has BatchNorm, .*; use --model other"),
        (nn.Linear(3, 2).requires_grad_(False), Task(), "all layers of mine are frozen: there is nothing to train"),
        (None, Task(lacks="private_training"), r"has no private_training\(network, examples\)"),
        (None, Task(lacks=""), "scales columns by sums over its examples, which no epsilon covers"),
        (WithMean(), Averaging(), "its task's private_training changes the network"),
    ],
)
def test_what_no_epsilon_would_cover_is_refused_with_the_remedy(client, network, task, words):
    with pytest.raises(PublicError, match=words):
        client(wrapped=Client(RECIPE, network, task))


def test_batchnorm_that_is_frozen_mixes_no_examples(client):
    network = nn.Sequential(nn.BatchNorm1d(3).requires_grad_(False), nn.Linear(3, 2))
    network[0].train = lambda mode=True: network[0]
    network[0].eval()
    network[0].training = False
    recipe = RECIPE
    one = client(wrapped=Client(recipe, network, Task(network[1])))
    assert one.spent["dp_epsilon"] == 0


def test_a_delta_with_which_one_example_could_be_given_away_is_refused(client):
    with pytest.raises(PublicError, match=r"--dp-delta 0\.125 must be below 1 in its 8 examples, 0\.12"):
        client(delta=0.125)


def test_who_has_fewer_examples_than_a_batch_draws_all_of_them_in_each_step(client, tmp_path):
    fit(client(batch_size=9))
    (training,) = json.loads((tmp_path / "ledger.json").read_text())["trainings"]
    assert (training["rate"], training["steps"]) == (1, 1)


def test_a_budget_and_a_recipe_go_together_or_not_at_all():
    opened = PrivateClients(lambda assignment: "client", None)
    assert opened(Assignment(0, 3, Recipe())) == "client"
    with pytest.raises(PublicError, match="this run trains privately; start the client with --dp-epsilon"):
        opened(Assignment(0, 3, Recipe(private_training=True)))
    with pytest.raises(PublicError, match=r"takes part in private training only \(--dp-epsilon\)"):
        PrivateClients(lambda assignment: "client", Budget(1.0))(Assignment(0, 3, Recipe()))


def test_a_client_that_gets_another_place_takes_its_ledger_along(tmp_path, monkeypatch):
    monkeypatch.setattr(private_training, "Accountant", Counting)
    recipe = RECIPE
    opened = PrivateClients(lambda assignment: Client(recipe), Budget(2.0, ledger=str(tmp_path / "ledger.json")))
    opened(Assignment(0, 3, recipe, run_id=RUN))
    opened(Assignment(1, 3, recipe, run_id=RUN)).ledger.close()  # the file was free again


def test_a_ledger_without_a_name_is_called_by_the_examples_and_says_where_there_are_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(private_training, "Accountant", Counting)
    monkeypatch.setattr(private_training, "FOLDER", tmp_path)
    recipe = RECIPE
    (tmp_path / "0123.json").write_text("{}")
    one = PrivateClient(Client(recipe), Budget(2.0), Assignment(0, 3, recipe, run_id=RUN))
    assert one.ledger.path.name == f"{private_task.hash_examples(EXAMPLES)[:16]}.json"
    assert "holds 1 of other examples; where they have examples in common, their epsilons add up" in (
        capsys.readouterr().out
    )
    one.ledger.close()


# The recipe


MODELS = {
    "first": {"batch_size": 8, "learning_rate": 0.1, "smoothing": 0.1},
    "fit": {
        "learning_rate": 0.2,
        "smoothing": 0.1,
        PRIVATE: {"batch_size": 512, "learning_rate": 4.0, "smoothing": 0.0},
    },
}


def test_private_training_takes_the_first_network_that_has_a_recipe_for_it_and_that_recipe():
    private, plain = Recipe(private_training=True).complete(MODELS), Recipe().complete(MODELS)
    assert (plain.model, plain.batch_size, plain.learning_rate, plain.own) == ("first", 8, 0.1, {"smoothing": 0.1})
    assert (private.model, private.batch_size, private.learning_rate) == ("fit", 512, 4.0)
    assert private.own == {"smoothing": 0.0}
    asked = Recipe(private_training=True, batch_size=64).complete(MODELS)
    assert (asked.batch_size, asked.learning_rate) == (64, 4.0)
    assert Recipe(model="fit").complete(MODELS).own == {"smoothing": 0.1}


def test_what_private_training_fixes_cannot_be_set_otherwise():
    with pytest.raises(PublicError, match=r"--set smoothing=0\.5: private training needs 0\.0; leave it out"):
        Recipe(private_training=True, own={"smoothing": 0.5}).complete(MODELS)


def test_it_is_in_the_recipe_that_travels_only_where_it_is_asked_for():
    assert json.loads(Recipe(private_training=True).to_json())["private_training"] is True
    assert "private_training" not in json.loads(Recipe().to_json())


# With real programs

OWN = 'MODELS = {"linear": {"batch_size": 4, "learning_rate": 0.1, "private": {"batch_size": 5}}}'
PRIVATE_MODEL = MODEL.replace("evaluate, train_round", "evaluate, private_training, train_round")
PRIVATE_MODEL = PRIVATE_MODEL.replace("\n\ndef build", f"\n{OWN}\n\n\ndef build")


@pytest.mark.processes
def test_a_client_that_is_killed_before_its_update_leaves_sends_the_same_after_its_restart(tmp_path):
    write_task(tmp_path / "task", model=PRIVATE_MODEL)
    with Federation(tmp_path) as run:
        server = run.server("--private-training", "--clients", 1, "--rejoin-wait", 100)

        def start(*more: object):
            private = ("--dp-epsilon", 3, "--dp-delta", 1e-3, "--ledger", tmp_path / "ledger.json")
            task = ("--task", tmp_path / "task", "--dataset", "any", "--audit", tmp_path / "audit")
            return run.start("client", "client.py", "--server", run.address, *private, *task, *more)

        def trainings() -> list[dict]:
            return json.loads((tmp_path / "ledger.json").read_text())["trainings"]

        slow = start("--slowdown", 1000)  # sleeps between its training and its answer
        wait_for(lambda: (tmp_path / "ledger.json").exists() and trainings(), "a first training in the ledger")
        slow.send(signal.SIGKILL)
        slow.ends(-9)
        again = start()
        again.says("round 1: the same update as before, which costs nothing")
        for process in (server, again):
            process.ends(0)
        assert [each["round"] for each in trainings()] == [1, 2, 3]
        came = [json.loads(line) for line in (run.run_dir / "audit.jsonl").read_text().splitlines()]
        updates = [line["sha256"] for line in came if line["kind"] == "update"]
        assert updates == [each["update"] for each in trainings()]
        record = read_record(next((tmp_path / "audit").glob("*.jsonl")))
        assert not compare(read_record(run.run_dir / "audit.jsonl"), record)
        epsilons = [line["privacy"]["dp_epsilon"] for line in record.lines if line["kind"] == "update"]
        assert 0 < epsilons[0] < epsilons[1] < epsilons[2] <= 3
        rows = run.history()["rounds"]
        assert 0 < rows[1]["epsilon_by_client"]["0"] < rows[3]["epsilon_by_client"]["0"] <= 3
        assert rows[3]["delta_by_client"] == {"0": 1e-3}
        assert [row["train_loss"] for row in rows] == [None] * 4
        assert "differential privacy: epsilon 2.9" in server.output

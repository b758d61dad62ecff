"""A hospital's policy: what its file may say, and that no server gets past it; all in this process."""

import json
import tomllib
from dataclasses import fields
from datetime import time
from types import SimpleNamespace

from federation.client import policy as module
from federation.client.policy import AgainstPolicy, OutsideHours, Policy
from federation.client.session import Session
from federation.config import Recipe
from federation.protocol import Assignment, read_summary
from federation.security.audit import AuditLog

import numpy as np
import pytest
from helpers.processes import ROOT

RUN, OTHER_RUN = "0123456789abcdef", "fedcba9876543210"
MODELS = [[np.full(2, number, np.float32)] for number in range(5)]


def assignment(partitions: int = 3, **recipe: object) -> Assignment:
    return Assignment(0, partitions, Recipe(**recipe))


class Client:
    num_train, num_test, buffer_positions, class_counts = 100, 10, (), [60, 40]

    def __init__(self, _):
        self.task_summary = SimpleNamespace(
            name="cifar10", recipe={"model": "lenet"}, to_json=lambda: '{"a summary": 1}'
        )

    def get_parameters(self, config):
        return MODELS[0]

    def fit(self, parameters, config):
        return parameters, 100, {}

    measure = fit

    def evaluate(self, parameters, config):
        return 1.0, 10, {"accuracy": 0.5}


def session(run: str = RUN, recipe: Recipe | None = None, **rules: object) -> tuple[Session, dict]:
    """A client under these rules that was offered a place among three, and what it answered."""
    one = Session(Client, ["cat", "dog"], policy=Policy.from_dict(rules))
    place = {
        "ask": "place",
        "partition": 0,
        "num_partitions": 3,
        "recipe": (recipe or Recipe(rounds=1)).to_json(),
        "run": run,
    }
    return one, one.get_properties(place)


def ask(number: int, **more: object) -> dict:
    return {"server_round": number, "clients_on_host": 1, **more}


def at(monkeypatch, clock: str) -> None:
    monkeypatch.setattr(module, "_now", lambda: time.fromisoformat(clock))


# The file


def load(tmp_path, text: str | bytes) -> Policy:
    (tmp_path / "policy.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Policy.load(str(tmp_path / "policy.toml"))


def test_the_example_names_every_key_with_its_help_and_a_value_that_can_be_used():
    text = (ROOT / "deploy/policy.toml").read_text()
    values = tomllib.loads("".join(line.removeprefix("# ") if "= " in line else "\n" for line in text.splitlines(True)))
    assert list(values) == [each.name for each in fields(Policy)]
    policy = Policy.from_dict(values)
    for each in fields(Policy):
        assert each.metadata["help"] in " ".join(text.replace("#", "").split())
        assert getattr(policy, each.name) != each.default


def test_what_the_file_leaves_out_is_allowed(tmp_path):
    assert load(tmp_path, "") == Policy() == Policy.load(None)
    Policy().check_run(assignment(partitions=1, rounds=10_000, local_epochs=1000))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_round = 3", "max_round is no key of a policy; its keys are tasks, models, max_rounds, "),
        ("max_rounds = 0", "max_rounds must be a whole number of at least 1, got 0"),
        ("max_local_epochs = 2.5", "max_local_epochs must be a whole number of at least 1, got 2.5"),
        ("min_participants = true", "min_participants must be a whole number of at least 1, got True"),
        ("send_class_counts = 0", "send_class_counts must be true or false, got 0"),
        ("require_private_training = 'no'", "require_private_training must be true or false, got 'no'"),
        ("models = 'lenet'", "models must be a list of names, such as [\"lenet\"], got 'lenet'"),
        ("tasks = []", 'tasks must be a list of names, such as ["lenet"], got []'),
        ("hours = ['20:00-25:00']", 'hours must be a list of hours of the day, such as ["20:00-06:00"], from one to '),
        ("hours = ['20:00-20:00']", "hours must be a list of hours of the day"),
        ("hours = ['8-18']", "hours must be a list of hours of the day"),
        ("hours = '20:00-06:00'", "hours must be a list of hours of the day"),
        ("max_rounds 3", "(at line 1, column 12)"),
        ("max_rounds = 1\nmax_rounds = 2", "Cannot overwrite a value"),
        (b"\xff\xfe\x00", "is not text"),
    ],
)
def test_a_file_that_can_not_be_used_is_one_line_with_file_and_key(tmp_path, capsys, text, words):
    with pytest.raises(SystemExit) as end:
        load(tmp_path, text)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert f"error: --policy {tmp_path}/policy.toml" in line
    assert words in line


def test_a_file_that_is_not_there_is_wrong_use(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        Policy.load(str(tmp_path / "none.toml"))
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith("none.toml can't be read (No such file or directory)\n")


# A run


@pytest.mark.parametrize(
    ("rules", "offered", "words"),
    [
        ({"max_rounds": 3}, {"rounds": 4}, "its policy allows at most 3 rounds, and this run has 4 (max_rounds)"),
        (
            {"max_local_epochs": 1},
            {"local_epochs": 2},
            "its policy allows at most 1 local epochs, and this run has 2 (max_local_epochs)",
        ),
        (
            {"min_participants": 4},
            {},
            "its policy asks for at least 4 participants, and this run has 3 (min_participants)",
        ),
        (
            {"require_secure_aggregation": True},
            {},
            "its policy asks for secure aggregation, and this run has none (require_secure_aggregation)",
        ),
        (
            {"require_private_training": True},
            {},
            "its policy asks for private training, and this run has none (require_private_training)",
        ),
        ({"models": ["resnet8"]}, {}, "its policy allows resnet8 alone, and this run has lenet (models)"),
        ({"tasks": ["xray", "text"]}, {}, "its policy allows the tasks xray, text, and this run has cifar10 (tasks)"),
    ],
)
def test_a_run_against_the_policy_is_refused_in_words_at_both_sides(rules, offered, words):
    one, answer = session(recipe=Recipe(**offered), **rules)
    assert answer == {"error": words}
    assert one.failure == words
    assert one.joined == 0
    assert one.fit(MODELS[0], ask(1))[1] == 0, "a server that goes on all the same"


def test_a_run_within_the_policy_is_joined():
    rules = {"max_rounds": 3, "max_local_epochs": 1, "min_participants": 3, "models": ["lenet"], "tasks": ["cifar10"]}
    one, answer = session(recipe=Recipe(rounds=3), **rules)
    assert one.failure is None
    assert answer["train_examples"] == 100
    assert one.joined == 1


def test_local_epochs_that_the_task_chose_for_private_training_are_bounded_too():
    recipe = {"model": "scattering", "local_epochs": 4}
    client = SimpleNamespace(task_summary=SimpleNamespace(name="cifar10", recipe=recipe))
    Policy(max_local_epochs=4).check_task(client)
    with pytest.raises(AgainstPolicy, match=r"allows at most 3 local epochs, and this run has 4 \(max_local_epochs\)"):
        Policy(max_local_epochs=3).check_task(client)
    Policy(max_local_epochs=1).check_run(assignment(private_training=True))  # not known yet


def test_a_recipe_with_secure_aggregation_and_private_training_is_what_such_a_policy_asks_for():
    recipe = SimpleNamespace(rounds=1, local_epochs=1, secure_aggregation=True, private_training=True)
    policy = Policy(require_secure_aggregation=True, require_private_training=True)
    policy.check_run(SimpleNamespace(recipe=recipe, num_partitions=3))
    recipe.secure_aggregation = False
    with pytest.raises(AgainstPolicy, match="secure aggregation"):
        policy.check_run(SimpleNamespace(recipe=recipe, num_partitions=3))


def test_class_counts_stay_where_the_policy_says_so():
    assert session()[1]["class_counts"] == "[60, 40]"
    assert session(send_class_counts=False)[1]["class_counts"] == "[]"


def test_without_class_counts_the_servers_reader_is_content():
    told = {**session(send_class_counts=False)[1]}
    del told["task"]
    assert read_summary(told).class_counts == []


# Rounds: a server that does not keep to what it said


def test_a_round_beyond_the_most_is_refused():
    one, _ = session(max_rounds=3)
    assert one.fit(MODELS[0], ask(3))[1] == 100
    _, examples, told = one.fit(MODELS[1], ask(4))
    assert examples == 0
    assert told == {"error": "its policy allows at most 3 rounds, and this run has 4 (max_rounds)"}
    assert one.evaluate(MODELS[0], ask(4))[2]["error"].startswith("its policy allows at most 3 rounds")


def test_a_server_that_repeats_a_rounds_number_gets_no_more_trainings():
    one, _ = session(max_rounds=2)
    assert [one.fit(model, ask(1))[1] for model in MODELS[:3]] == [100, 100, 0]
    assert one.failure == "its policy allows at most 2 models to work on, and this run has 3 (max_rounds)"


def test_the_same_model_again_is_a_round_that_is_done_again_and_costs_nothing():
    one, _ = session(max_rounds=1)
    assert [one.fit(MODELS[0], ask(1))[1] for _ in range(3)] == [100] * 3


def test_the_record_has_what_came_in_though_it_was_refused_and_no_update_to_it(tmp_path):
    one, _ = session(max_rounds=1)
    one.audit = AuditLog(tmp_path / "audit.jsonl", RUN, "client 0")
    assert [one.fit(model, ask(1))[1] for model in MODELS[:2]] == [100, 0]
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [kind for kind in kinds if kind in ("model-to-train", "update")] == [
        "model-to-train",
        "update",
        "model-to-train",
    ]


def test_measuring_is_counted_too_and_apart():
    one, _ = session(max_rounds=1)
    assert one.fit(MODELS[0], ask(1))[1] == 100
    assert [one.fit(model, ask(1, measure=True))[1] for model in MODELS[:2]] == [100, 0]


def test_a_client_that_comes_back_to_a_run_goes_on_counting_and_in_another_begins_anew():
    one, _ = session(max_rounds=1)
    one.fit(MODELS[0], ask(1))
    place = {"ask": "place", "partition": 0, "num_partitions": 3, "recipe": Recipe(rounds=1).to_json()}
    one.get_properties({**place, "run": RUN})
    assert one.fit(MODELS[1], ask(1))[1] == 0
    one.get_properties({**place, "run": OTHER_RUN})
    assert one.fit(MODELS[1], ask(1))[1] == 100


def test_a_round_with_too_few_clients_is_refused():
    one, _ = session(min_participants=3)
    assert one.fit(MODELS[0], ask(1, participants=3))[1] == 100
    assert one.fit(MODELS[0], ask(2, participants=2))[2] == {
        "error": "its policy asks for at least 3 participants, and this round has 2 (min_participants)"
    }


# Hours


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        (["20:00-06:00"], ["20:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "19:59"]),
        (["08:00-12:00", "13:00-17:00"], ["08:00", "11:59", "13:00"], ["12:00", "12:59", "17:00", "00:00"]),
        (["18:00-00:00"], ["18:00", "23:59"], ["00:00", "17:59"]),
    ],
)
def test_hours_begin_with_their_first_minute_end_before_their_last_and_may_pass_midnight(
    monkeypatch, hours, inside, outside
):
    policy = Policy.from_dict({"hours": hours})
    for clock, expected in [*((each, True) for each in inside), *((each, False) for each in outside)]:
        at(monkeypatch, clock)
        assert policy.is_open() == expected, clock


def test_at_other_hours_a_run_is_refused_and_one_that_has_begun_gets_no_more(monkeypatch):
    at(monkeypatch, "19:59")
    assert session(hours=["20:00-06:00"])[1] == {"error": "it works at 20:00-06:00 only, and now it is 19:59 (hours)"}
    at(monkeypatch, "20:00")
    one, _ = session(hours=["20:00-06:00"])
    assert one.fit(MODELS[0], ask(1))[1] == 100
    at(monkeypatch, "06:00")
    assert one.fit(MODELS[0], ask(2))[2] == {"error": "it works at 20:00-06:00 only, and now it is 06:00 (hours)"}
    assert isinstance(one.error, OutsideHours)
    assert "error" in one.evaluate(MODELS[0], ask(2))[2]

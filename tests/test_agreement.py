"""What all clients must have alike: what differs is refused with both sides' values, and nonsense is no answer."""

import dataclasses
import json
from typing import Any

from federation import model_file
from federation.config import ACCURACY, Metric, Recipe
from federation.participants.agreement import conflict, initial_conflict, remark
from federation.protocol import DataSummary, TaskSummary, as_stored, from_stored, read_summary

import numpy as np
import pytest
from helpers.fake_clients import FakeAdmission, FakeClient

FROZEN = {"base.weight": np.ones((2, 2), np.float32)}
ARRAYS = [["head.weight", [2, 3], "float32"], ["head.bias", [2], "float32"]]
TASK = TaskSummary(
    name="tabular",
    arrays=ARRAYS,
    frozen_arrays=[["base.weight", [2, 2], "float32"]],
    frozen=model_file.hash_of(FROZEN),
    start="5" * 64,
    code="c" * 64,
    metrics=[Metric("auc", lowest=0, highest=1, chance=0.5, additive=False), Metric("f1")],
    recipe={"model": "mlp", "batch_size": 16, "learning_rate": 0.05, "own": {"hidden": 16}},
    schema={"columns": ["age", "height"], "classes": ["ill", "well"]},
    columns=["age", "height"],
)


def changed(**values: object) -> TaskSummary:
    return dataclasses.replace(TASK, **values)


def summary(task: TaskSummary | None = TASK, **values: object) -> DataSummary:
    return DataSummary(**{**vars(DataSummary(100, 10, [], [], [], 0)), "task": task, **values})


# What is refused


RECIPE, SCHEMA = TASK.recipe, TASK.schema
MANY = [f"gene {i}" for i in range(500)]
LONG = "encoder." * 12 + "weight"
CONFLICTS = {
    "network": (
        changed(recipe={**RECIPE, "model": "resnet"}),
        "trains with model resnet, the others with mlp; use one model.py",
    ),
    "batch size": (
        changed(recipe={**RECIPE, "batch_size": 32}),
        "trains with batch_size 32, the others with 16; use one model.py",
    ),
    "a setting of its own": (
        changed(recipe={**RECIPE, "own": {"hidden": 99}}),
        "trains with hidden 99, the others with 16; use one model.py",
    ),
    "a setting that others lack": (
        changed(recipe={**RECIPE, "own": {"hidden": 16, "dropout": 0.5}}),
        "trains with dropout 0.5, the others with None; use one model.py",
    ),
    "columns in another order": (
        changed(schema={**SCHEMA, "columns": ["height", "age"]}),
        "has columns ['height', 'age'], the others ['age', 'height']; use one data.py, and the same order",
    ),
    "a schema that others lack": (
        changed(schema={**SCHEMA, "unit": "mm"}),
        "has unit mm, the others None; use one data.py, and the same order",
    ),
    "a wider network": (
        changed(arrays=[["head.weight", [2, 9], "float32"], ARRAYS[1]]),
        "has an array head.weight (2, 9) float32 where the others have head.weight (2, 3) float32; use one model.py",
    ),
    "another dtype": (
        changed(arrays=[["head.weight", [2, 3], "float16"], ARRAYS[1]]),
        "has an array head.weight (2, 3) float16 where the others have head.weight (2, 3) float32; use one model.py",
    ),
    "a deeper network": (
        changed(arrays=[*ARRAYS, ["more", [1], "float32"]]),
        "has a network of 3 arrays, the others 2; use one model.py",
    ),
    "other frozen weights": (
        changed(frozen="0" * 64),
        f"has other frozen weights (hash 000000000000, the others' {TASK.frozen[:12]}); give all the same file of them",
    ),
    "no frozen weights": (
        changed(frozen=""),
        f"has other frozen weights (hash none, the others' {TASK.frozen[:12]}); give all the same file of them",
    ),
    "other metrics": (
        changed(metrics=[Metric("mae")]),
        "has metrics ['mae'], the others ['auc', 'f1']; use one model.py",
    ),
    "a metric that is read in another way": (
        changed(metrics=[TASK.metrics[0], Metric("f1", higher_is_better=False)]),
        "has the metric f1 with higher_is_better False, the others with True; use one model.py",
    ),
    "other columns to scale": (
        changed(columns=["age"]),
        "has columns ['age'], the others ['age', 'height']; use one data.py",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_each_kind_of_conflict_is_refused_with_both_sides_values(name):
    theirs, words = CONFLICTS[name]
    assert conflict(summary(theirs), summary()) == words


def test_measured_arrays_and_inputs_are_compared_where_nothing_is_said_of_the_task():
    assert conflict(summary(None, buffer_positions=[1]), summary()).startswith("measures other arrays of the network")
    words = "has inputs of shape [3, 8, 8], the others [3, 9, 9]; use one data.py"
    assert conflict(summary(None, input_shape=[3, 8, 8]), summary(input_shape=[3, 9, 9])) == words
    assert conflict(summary(None, input_shape=[3, 8, 8]), summary()) is None, "clients of 1.0.0 don't say it"


def test_who_has_all_alike_is_in_no_conflict_and_neither_is_who_does_not_say():
    assert conflict(summary(), summary()) is None
    assert conflict(summary(None), summary()) is None
    assert conflict(summary(), summary(None)) is None
    assert conflict(summary(train_examples=1, class_counts=[1, 0], data_sizes=[9, 9]), summary()) is None
    assert conflict(summary(changed(name="another folder")), summary()) is None


@pytest.mark.parametrize(
    ("one", "words"),
    [
        ([*MANY[:400], "a gnome", *MANY[401:]], "has a gnome for number 401 of its columns, the others gene 400"),
        ([*MANY, "a gnome"], "has 501 columns, the others 500 (in one only: a gnome)"),
        (MANY[::-1], "has gene 499 for number 1 of its columns, the others gene 0"),
    ],
)
def test_of_two_long_lists_only_what_differs_is_said(one, words):
    long = summary(changed(columns=MANY))
    assert conflict(summary(changed(columns=one)), long) == f"{words}; use one data.py"


def test_the_shapes_of_an_array_with_a_long_name_are_said_too():
    here, there = (changed(arrays=[[LONG, [2, size], "float32"]]) for size in (3, 4))
    words = conflict(summary(here), summary(there))
    assert "(2, 3)" in words
    assert "(2, 4)" in words


# What is only said


def test_another_hash_of_the_code_is_only_a_line():
    other = changed(code="d" * 64)
    assert conflict(summary(other), summary()) is None
    assert remark(other, TASK) == "its task's code is another (hash dddddddddddd, the others' cccccccccccc)"


def test_other_untrained_weights_are_only_a_line():
    other = changed(start="6" * 64)
    assert conflict(summary(other), summary()) is None
    assert remark(other, TASK) == "its untrained weights are others than the first client's, which all begin with"
    assert remark(TASK, TASK) is remark(None, TASK) is remark(TASK, None) is None


# Initial weights

INITIAL = {"head.weight": np.zeros((2, 3), np.float32), "head.bias": np.zeros(2, np.float32), **FROZEN}


def test_initial_weights_that_fit_are_begun_with_and_more_of_them_does_no_harm():
    assert initial_conflict(TASK, INITIAL) is None
    assert initial_conflict(TASK, {"of another layer": np.zeros(9), **INITIAL}) is None


@pytest.mark.parametrize(
    ("initial", "words"),
    [
        (
            {name: array for name, array in INITIAL.items() if name != "head.bias"},
            "has an array head.bias (2,) float32, --initial-weights has none of that name; "
            "give the weights of this network",
        ),
        (
            {**INITIAL, "head.bias": np.zeros(3, np.float32)},
            "has an array head.bias (2,) float32, --initial-weights has head.bias (3,) float32; "
            "give the weights of this network",
        ),
        (
            {**INITIAL, "head.bias": np.zeros(2, np.float64)},
            "has an array head.bias (2,) float32, --initial-weights has head.bias (2,) float64; "
            "give the weights of this network",
        ),
        (
            {**INITIAL, "base.weight": np.zeros((2, 2), np.float32)},
            "has other frozen weights than --initial-weights; give both the same file",
        ),
    ],
)
def test_initial_weights_of_another_network_are_refused_with_both_sides_values(initial, words):
    assert initial_conflict(TASK, initial) == words


def test_a_client_that_does_not_say_its_arrays_can_not_begin_with_given_weights():
    assert initial_conflict(None, INITIAL) == ("is of a version that --initial-weights can't be used with; update it")


# Who may join


def told(task: TaskSummary | None = TASK, **values: object) -> dict:
    """As a client tells it."""
    return {"statistics": "[]", **({"task": task.to_json()} if task else {}), **values}


WIDER = CONFLICTS["a wider network"][0]
WIDER_WORDS = CONFLICTS["a wider network"][1]


@pytest.fixture
def fake() -> FakeAdmission:
    return FakeAdmission()


def test_a_lone_wrong_client_that_comes_first_shuts_nobody_out_and_is_dropped_when_all_are_there(fake):
    odd = fake.joins(summary=told(WIDER))
    assert all(fake.admitted(fake.joins(summary=told())) for _ in range(2))
    assert fake.admission.agree() == [(fake.admission.of_client(odd), WIDER_WORDS)]
    assert fake.admission.agreed.task == TASK
    fake.admission.drop(fake.admission.of_client(odd), f"it {WIDER_WORDS}")
    assert odd.closed.wait(60)
    assert (odd.told["kind"], odd.told["words"]) == ("dropped", f"it {WIDER_WORDS}")
    assert fake.joins(summary=told()).partition == 0


def test_what_more_than_half_have_shuts_others_out_at_once(fake):
    for _ in range(2):
        fake.joins(summary=told())
    client = fake.joins(summary=told(WIDER))
    assert (client.told["kind"], client.told["words"]) == ("refused", f"client 2 {WIDER_WORDS}")
    assert fake.admitted(fake.joins(summary=told())), "its place is free"


def test_once_it_is_fixed_a_lone_client_of_another_task_is_refused():
    fake = FakeAdmission(5)
    fake.admission.begin(["cat", "dog"], summary())
    assert fake.joins(summary=told(WIDER)).told["words"] == f"client 0 {WIDER_WORDS}"


def test_of_several_that_as_many_have_it_is_the_lowest_partitions():
    fake = FakeAdmission(2)
    fake.joins(summary=told(WIDER))
    other = fake.joins(summary=told())
    assert [one.client for one, _ in fake.admission.agree()] == [other]
    assert fake.admission.agreed.task == WIDER


def test_a_client_that_says_less_of_its_task_is_no_measure_for_those_that_say_all():
    """Of version 1.0.0, which is in no conflict with anybody."""
    fake = FakeAdmission(4)
    for task in (None, WIDER, TASK, TASK):
        fake.joins(summary=told(task))
    assert [one.partition for one, _ in fake.admission.agree()] == [1]
    assert fake.admission.agreed.task == TASK
    assert [metric.name for metric in fake.admission.metrics] == ["auc", "f1"]


def test_clients_that_all_say_less_agree_by_what_they_say(fake):
    for _ in range(3):
        fake.joins(summary=told(None, statistics="[2]"))
    assert fake.admission.agree() == []
    assert fake.admission.buffer_positions == [2]
    assert fake.admission.metrics == [ACCURACY]


def test_the_same_code_in_another_folder_joins_with_a_line(fake, capsys):
    fake.joins(summary=told())
    assert fake.admitted(fake.joins(summary=told(changed(code="d" * 64))))
    assert "client 1: its task's code is another (hash dddddddddddd, " in capsys.readouterr().out
    assert fake.admission.agree() == []


def test_where_initial_weights_are_given_who_can_not_begin_with_them_is_refused():
    fake = FakeAdmission()
    fake.admission.initial = INITIAL
    assert "--initial-weights has head.weight (2, 3) float32" in fake.joins(summary=told(WIDER)).told["words"]
    assert fake.admitted(fake.joins(summary=told()))


SIZES = "a data set of 100 + 20 examples, the others one of 90 + 20"


def test_data_sets_of_different_sizes_can_not_be_parts_of_one_and_that_is_said(fake, capsys):
    fake.joins(summary=told(data_sizes="[90, 20]"))
    assert fake.admitted(fake.joins(summary=told(data_sizes="[100, 20]")))
    said = capsys.readouterr().out
    assert f"warning: client 1 has {SIZES}: the partitions can't come from one data set; " in said
    assert "start the server with --partitioner local\n" in said
    fake.joins(summary=told(data_sizes="[90, 20]"))
    fake.joins(summary=told())  # nor is there a word where it is not told
    assert "warning" not in capsys.readouterr().out


def test_clients_with_data_of_their_own_have_as_much_as_they_have(capsys):
    fake = FakeAdmission(recipe=Recipe(partitioner="local"))
    for sizes in ("[90, 20]", "[100, 20]"):
        assert fake.admitted(fake.joins(summary=told(data_sizes=sizes)))
    assert "warning" not in capsys.readouterr().out


# What a client says of its task


def test_a_task_comes_back_as_it_was_told():
    assert TaskSummary.from_json(TASK.to_json()) == TASK


def test_what_all_have_alike_is_stored_and_comes_back():
    first = read_summary({"train_examples": 7, "test_examples": 3, "input_shape": "[2]", **told(statistics="[1]")})
    stored = json.loads(json.dumps(as_stored(first)))
    assert from_stored(stored) == DataSummary(0, 0, [1], [], [2], 0, task=TASK)
    assert stored["model"] == "mlp", "the settings that the task completed are the run's"
    assert (stored["batch_size"], stored["learning_rate"], stored["own"]) == (16, 0.05, {"hidden": 16})
    assert Recipe.from_stored(stored) == Recipe("mlp", batch_size=16, learning_rate=0.05, own={"hidden": 16})


def test_a_stored_run_of_an_earlier_version_says_nothing_of_its_task():
    assert as_stored(summary(None, buffer_positions=[2])) == {"statistics": [2], "input_shape": []}
    assert from_stored({"statistics": [2], "model": "cnn"}) == DataSummary(0, 0, [2], [], [], 0)


def nonsense(**values: Any) -> str:
    return json.dumps({**json.loads(TASK.to_json()), **values})


METRIC = dataclasses.asdict(ACCURACY)
NONSENSE = {
    "no JSON": "{",
    "nothing": "",
    "null": "null",
    "a number": "12",
    "a text": '"task"',
    "a list": "[[]]",
    "an empty dict": "{}",
    "deep brackets": "[" * 100_000,
    "deep brackets, closed": "[" * 5000 + "]" * 5000,
    "brackets that JSON can read, and no program compare": nonsense(schema=0)[:-1]
    + ', "x": '
    + "[" * 900
    + "]" * 900
    + "}",
    "a deep schema": nonsense(schema={"x": [[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]}),
    "more than two million characters": nonsense(schema={"x": "y" * 2_000_001}),
    "NaN in the schema": nonsense(schema={"mean": float("nan")}),
    "NaN as a setting": nonsense(recipe={**RECIPE, "own": {"x": float("nan")}}),
    "infinity, written small": TASK.to_json().replace("0.05", "1e999"),
    "an infinite learning rate": nonsense(recipe={**RECIPE, "learning_rate": float("inf")}),
    "a batch of none": nonsense(recipe={**RECIPE, "batch_size": 0}),
    "a batch of a text": nonsense(recipe={**RECIPE, "batch_size": "16"}),
    "settings in a list": nonsense(recipe={**RECIPE, "own": [1]}),
    "many settings": nonsense(recipe={**RECIPE, "own": {f"x{i}": i for i in range(101)}}),
    "a recipe that lacks a setting": nonsense(recipe={"model": "mlp"}),
    "a recipe that is a list": nonsense(recipe=[]),
    "a schema that is a list": nonsense(schema=[]),
    "arrays that are a number": nonsense(arrays=3),
    "arrays that are a text": nonsense(arrays="abc"),
    "an array without a dtype": nonsense(arrays=[["w", [1]]]),
    "an array without a name": nonsense(arrays=[[None, [1], "float32"]]),
    "an array with a shape of text": nonsense(arrays=[["w", "12", "float32"]]),
    "an array of half a number": nonsense(arrays=[["w", [0.5], "float32"]]),
    "an array of less than nothing": nonsense(arrays=[["w", [-1], "float32"]]),
    "an array of objects": nonsense(arrays=[["w", [1], "object"]]),
    "an array of a made-up dtype": nonsense(frozen_arrays=[["w", [1], "(2"]]),
    "an array of a dtype that is none": nonsense(arrays=[["w", [1], ["float32"]]]),
    "an array with a very long name": nonsense(arrays=[["w" * 301, [1], "float32"]]),
    "an array whose name no file can hold": nonsense(arrays=[["\ud800", [1], "float32"]]),
    "an array whose name is a command to the terminal": nonsense(arrays=[["\x1b[2J", [1], "float32"]]),
    "two arrays of one name": nonsense(arrays=[["w", [1], "float32"], ["w", [2], "float32"]]),
    "an array that travels and does not": nonsense(arrays=[["base.weight", [2, 2], "float32"]]),
    "a hash of a number": nonsense(frozen=7),
    "a long hash": nonsense(code="0" * 65),
    "no metrics": nonsense(metrics=[]),
    "metrics that are a number": nonsense(metrics=1),
    "a metric that is a text": nonsense(metrics=["auc"]),
    "a metric of a later version": nonsense(metrics=[{**METRIC, "unit": "mm"}]),
    "a metric without a name": nonsense(metrics=[{"digits": 3}]),
    "a metric with a list for a name": nonsense(metrics=[{**METRIC, "name": ["auc"]}]),
    "a metric with a name that no table takes": nonsense(metrics=[{**METRIC, "name": "a b"}]),
    "a metric of a million digits": nonsense(metrics=[{**METRIC, "digits": 1_000_000}]),
    "a metric of half a digit": nonsense(metrics=[{**METRIC, "digits": 0.5}]),
    "a metric from a text": nonsense(metrics=[{**METRIC, "lowest": "0"}]),
    "a metric from NaN": nonsense(metrics=[{**METRIC, "lowest": float("nan")}]),
    "a metric up to infinity": nonsense(metrics=[{**METRIC, "highest": float("inf")}]),
    "a metric up to more than a float holds": nonsense(metrics=[{**METRIC, "highest": 10**400}]),
    "a metric up to more digits than Python reads": TASK.to_json().replace("0.5", "1" * 5000),
    "a metric that is better by a number": nonsense(metrics=[{**METRIC, "higher_is_better": 1}]),
    "columns that are numbers": nonsense(columns=[1]),
    "columns that are null": nonsense(columns=None),
    "a column without a name": nonsense(columns=[""]),
    "a task without a name": nonsense(name=""),
    "a task with a number for a name": nonsense(name=7),
    "a task with a very long name": nonsense(name="x" * 101),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_of_every_kind_raises_one_of_three_and_nothing_else(name):
    with pytest.raises((ValueError, TypeError, KeyError)):
        TaskSummary.from_json(NONSENSE[name])


@pytest.mark.parametrize("key", json.loads(TASK.to_json()))
@pytest.mark.parametrize("value", [None, 7, -0.5, True, "x", [], {}, [[]], [{}], [None], {"x": {"y": []}}], ids=str)
def test_any_value_in_any_place_is_taken_or_raises_one_of_three_and_can_be_compared_and_stored(key, value):
    try:
        read = TaskSummary.from_json(nonsense(**{key: value}))
    except (ValueError, TypeError, KeyError):
        return
    conflict(summary(read), summary())
    assert from_stored(json.loads(json.dumps(as_stored(summary(read))))).task == read


@pytest.mark.parametrize("value", [None, 7, 0.5, b"{}", True])
def test_a_task_that_is_no_text_is_no_answer(value):
    with pytest.raises((ValueError, TypeError)):
        read_summary({"train_examples": 1, "test_examples": 1, "task": value})


@pytest.mark.parametrize("name", ["deep brackets", "an array of objects", "NaN in the schema"])
def test_a_client_whose_task_makes_no_sense_gets_no_place(fake, name):
    assert not fake.admitted(fake.joins(FakeClient(summary={**told(), "task": NONSENSE[name]})))
    assert not fake.admission.participants
    assert fake.said[0].startswith("turned away: a connection whose answer made no sense (")
    assert fake.admitted(fake.joins(summary=told()))

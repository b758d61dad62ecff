"""Columns are scaled alike at all clients, by sums that say nothing of a single row; worked out by hand."""

import dataclasses
import json
from types import SimpleNamespace

from federation import model_file
from federation.config import FEWEST_VALUES, Metric
from federation.participants.column_statistics import means, read_sums, statistics
from federation.protocol import TaskSummary

import numpy as np
import pytest
from helpers.in_process import SUMMARY, Learner, federation, no_disk  # noqa: F401 (used by every test)


def sums(values: list[float], mean: float | None = None) -> tuple[int, float]:
    """What a client tells of a column: the sum, or that of the squared differences to the mean of all."""
    return len(values), sum(values) if mean is None else sum((value - mean) ** 2 for value in values)


def test_mean_and_spread_are_those_of_all_values_together():
    one, other = [1.0] * 10, [4.0] * 20  # mean 90 / 30 = 3; squares 10 * 4 + 20 * 1 = 60, so a variance of 2
    mean = means([{"age": sums(one)}, {"age": sums(other)}])
    assert mean == {"age": 3.0}
    squares = [{"age": sums(values, mean["age"])} for values in (one, other)]
    assert statistics(mean, squares) == {"age": [30, 3.0, 2.0**0.5]}


def test_large_means_lose_no_digits():
    """Of a spread of one in a hundred million, a sum of squares would leave nothing."""
    one, other = [1e8] * 10, [1e8 + 2] * 10
    assert sum(value**2 for value in one + other) / 20 - (sum(one + other) / 20) ** 2 != 1.0
    mean = means([{"t": sums(one)}, {"t": sums(other)}])
    assert mean == {"t": 1e8 + 1}
    assert statistics(mean, [{"t": sums(one, mean["t"])}, {"t": sums(other, mean["t"])}]) == {"t": [20, 1e8 + 1, 1.0]}


def test_a_column_that_is_constant_but_for_rounding_has_no_spread():
    values = [0.1] * 30
    mean = means([{"x": sums(values)}])
    assert mean["x"] != 0.1, "the sum of thirty of them is not quite 3"
    assert statistics(mean, [{"x": sums(values, mean["x"])}])["x"][2] == 0.0
    assert statistics({"x": 0.0}, [{"x": (10, 0.0)}])["x"] == [10, 0.0, 0.0]


def test_a_sum_does_not_depend_on_the_order_of_the_clients():
    told = [{"x": (10, total)} for total in (1e16, 1.0, -1e16, 3.0)]
    assert means(told) == means(told[::-1]) == {"x": 0.1}


def test_a_column_is_of_those_who_tell_of_it_and_one_that_nobody_tells_of_is_none():
    told = [{"age": (10, 20.0)}, {"age": (10, 40.0), "height": (10, 17.0)}, {}]
    assert means(told) == {"age": 3.0, "height": 1.7}
    assert statistics(means(told), [{"age": (10, 40.0)}]) == {"age": [10, 3.0, 2.0]}
    assert means([{}, {}]) == statistics({}, [{}, {}]) == {}


def read(told: object, squares: bool = False) -> dict:
    return read_sums({"columns": told if isinstance(told, str) else json.dumps(told)}, ["age"], 100, squares)


def test_what_a_client_tells_is_read_as_it_is():
    assert read({"age": [10, 2]}) == {"age": (10, 2.0)}
    assert read({"age": [100, -2.5]}) == {"age": (100, -2.5)}
    assert read({}) == {}


NONSENSE = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "7",
    "deep brackets": "[" * 100_000,
    "a column of nobody": '{"weight": [10, 1.0]}',
    "too few values to tell of": json.dumps({"age": [FEWEST_VALUES - 1, 1.0]}),
    "more values than examples": '{"age": [101, 1.0]}',
    "half a value": '{"age": [10.5, 1.0]}',
    "values without a sum": '{"age": [10]}',
    "a sum alone": '{"age": 1.0}',
    "a sum that is a text": '{"age": [10, "1"]}',
    "a sum that is null": '{"age": [10, null]}',
    "NaN": '{"age": [10, NaN]}',
    "infinity": '{"age": [10, 1e999]}',
    "more than a float holds": json.dumps({"age": [10, 10**400]}),
    "what overflows once it is added": '{"age": [10, 1.7e308]}',
    "as many values as no float holds": json.dumps({"age": [10**400, 1.0]}),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_no_sum(name):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, RecursionError)):
        read(NONSENSE[name])


def test_squares_are_never_negative():
    assert read({"age": [10, 0]}, squares=True) == {"age": (10, 0.0)}
    with pytest.raises(ValueError, match="the sum of column 'age'"):
        read({"age": [10, -1e-9]}, squares=True)


def test_an_answer_without_columns_is_none():
    with pytest.raises(KeyError):
        read_sums({"error": "no disk"}, ["age"], 100)


# A whole run


TASK = TaskSummary(
    name="tabular",
    arrays=[["weight", [2], "float32"], ["norm.variance", [1], "float32"], ["norm.count", [], "int64"]],
    frozen_arrays=[],
    frozen="",
    start="",
    code="",
    metrics=[Metric("accuracy")],
    recipe={"model": "mlp", "batch_size": 16, "learning_rate": 0.05, "own": {}},
    schema={},
    columns=["age", "height"],
)


class Holder:
    """A client's side of the three questions; answers: what it says instead, by the number of the question."""

    def __init__(self, columns: dict[str, list[float]], answers: dict[int, dict] | None = None):
        self.columns, self.answers = columns, answers or {}
        self.asked: list[dict] = []
        self.scaled: dict | None = None

    def get_properties(self, ins, timeout, group_id):
        assert ins.config["ask"] == "columns"
        self.asked.append(ins.config)
        return SimpleNamespace(properties=self.answers.get(len(self.asked), self.answer(ins.config)))

    def answer(self, config: dict) -> dict:
        if "statistics" in config:
            self.scaled = json.loads(config["statistics"])
            return {}
        mean = json.loads(config.get("means", "{}"))
        told = {name: sums(values, mean.get(name)) for name, values in self.columns.items()}
        return {"columns": json.dumps({name: pair for name, pair in told.items() if pair[0] >= FEWEST_VALUES})}


def run(folder, holders: list[Holder], **values):
    """A server that has run for a round with these clients."""
    server = federation(folder, [Learner() for _ in holders], rounds=1, **values)
    summary = dataclasses.replace(SUMMARY, task=TASK)
    for participant, holder in zip(server.clients.ready(), holders, strict=True):
        participant.summary = summary
        participant.client.get_properties = holder.get_properties
    server.clients.agreed = summary
    server.federate()
    return server


ONE, OTHER = {"age": [1.0] * 10}, {"age": [4.0] * 20}
AGE = [30, 3.0, 2.0**0.5]


def test_before_the_first_round_all_are_told_the_statistics_of_all(tmp_path, capsys):
    holders = [Holder(ONE), Holder(OTHER)]
    server = run(tmp_path, holders)
    assert server.exit_code == 0
    assert [holder.scaled for holder in holders] == [{"age": AGE}] * 2
    assert server.folder.load_config()["columns"] == server.clients.statistics == {"age": AGE}
    assert "the clients scale 1 of 2 columns alike\n" in capsys.readouterr().out, "nobody tells of the height"


def test_nothing_but_sums_is_asked_for(tmp_path):
    holder = Holder(ONE)
    run(tmp_path, [holder])
    first, second, third = holder.asked
    assert first == {"ask": "columns"}
    assert second == {"ask": "columns", "means": '{"age": 1.0}'}
    assert third == {"ask": "columns", "statistics": '{"age": [10, 1.0, 0.0]}'}


def test_columns_that_nobody_tells_of_are_scaled_by_nobody(tmp_path, capsys):
    holders = [Holder({"age": [1.0] * 9}), Holder({})]
    server = run(tmp_path, holders)
    assert server.exit_code == 0
    assert [holder.scaled for holder in holders] == [{}, {}]
    assert "the clients scale 0 of 2 columns alike" in capsys.readouterr().out


BAD_ANSWERS = {
    "nonsense": ({1: {"columns": "7"}}, "what it tells of its columns makes no sense"),
    "more than a float holds": ({1: {"columns": NONSENSE["more than a float holds"]}}, "makes no sense"),
    "negative squares": ({2: {"columns": '{"age": [10, -1e99]}'}}, "makes no sense"),
    "more values than it has examples": ({1: {"columns": '{"age": [1001, 1.0]}'}}, "makes no sense"),
    "nothing": ({1: {}}, "makes no sense"),
    "a failure of its own": ({1: {"error": "its data\ncan't be read"}}, "its data can't be read"),
    "a failure at the end": ({3: {"error": "it can't scale"}}, "it can't scale"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_client_whose_answer_makes_no_sense_is_dropped_and_the_run_goes_on(tmp_path, name):
    answers, words = BAD_ANSWERS[name]
    holders = [Holder(ONE), Holder({"age": [1.0] * 10}, answers), Holder(OTHER)]
    server = run(tmp_path, holders)
    assert server.exit_code == 0
    ((partition, said),) = server.clients.dropped.items()
    assert partition == 1
    assert said.endswith(words)
    assert [row.clients for row in server.history.rounds] == [2, 2]


def test_what_a_dropped_client_told_does_not_count(tmp_path):
    holders = [Holder(ONE), Holder(ONE, BAD_ANSWERS["nonsense"][0]), Holder(OTHER)]
    assert run(tmp_path, holders).clients.statistics == {"age": AGE}


def test_where_no_client_can_tell_the_run_ends_in_words(tmp_path, capsys):
    server = run(tmp_path, [Holder(ONE, {1: {"error": "no disk"}})])
    assert server.exit_code == 1
    assert "error: no client could tell of its columns; look at what the clients print" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_statistics_and_asks_nobody(tmp_path):
    run(tmp_path, [Holder(ONE), Holder(OTHER)])
    holders = [Holder({"age": [9.0] * 10}), Holder({})]
    server = run(tmp_path, holders, resume=True)
    assert server.exit_code == 0
    assert server.clients.statistics == {"age": AGE}
    assert [holder.asked for holder in holders] == [[], []]


def test_the_final_model_holds_what_its_columns_are_scaled_by(tmp_path):
    server = run(tmp_path, [Holder(ONE), Holder(OTHER)])
    arrays, about = model_file.read(server.folder.path / "model.safetensors")
    assert sorted(arrays) == ["norm.count", "norm.variance", "weight"]
    assert np.array_equal(arrays["weight"], server.weights[0])
    assert about["columns"] == {"age": AGE}
    assert about["task"] == "tabular"

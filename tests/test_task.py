"""Tasks: what their two files must hold, what of a network travels, the ready-made loops, and the model's file."""

import json
import math
import re
import sys
from collections import OrderedDict
from pathlib import Path

from federation import model_file
from federation.config import ACCURACY, Metric, Recipe
from federation.console import PublicError
from federation.privacy.disclosure import summarise
from federation.protocol import Assignment
from federation.task import classification, regression, training
from federation.task.task import DataError, Task, TaskError, open_task
from federation.task.weights import (
    buffer_positions,
    frozen_weights,
    get_weights,
    keep_frozen,
    set_weights,
    travelling,
)

import numpy as np
import pytest
import torch
from helpers.tasks import DATA, MODEL, other_tasks, recipe, write_task  # noqa: F401 (a fixture)
from safetensors.torch import load_file
from torch import nn

from client import TaskClient

pytestmark = pytest.mark.usefixtures("other_tasks")
ROWS = np.arange(4)
PART = recipe().part(0, 1)


def refusal(call, *args: object) -> str:
    """The one line that a TaskError is."""
    with pytest.raises(TaskError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    assert "/" not in caught.value.public, "no path for other eyes"
    return str(caught.value)


def without(text: str, function: str) -> str:
    """A file's text with one of its functions under another name."""
    assert f"def {function}(" in text
    return text.replace(f"def {function}(", f"def another_{function}(")


# What the two files must hold


@pytest.mark.parametrize(("present", "missing"), [("data.py", "model.py"), ("model.py", "data.py")])
def test_a_folder_without_one_of_the_two_files_is_refused_with_what_a_task_is(tmp_path, present, missing):
    (tmp_path / present).write_text({"data.py": DATA, "model.py": MODEL}[present])
    assert refusal(lambda: Task(tmp_path).model) == (
        f"{tmp_path} has no {missing}; a task is a folder with model.py and data.py: see docs/own-federation.md"
    )


def test_a_task_that_is_no_folder_is_refused_by_its_flag(tmp_path):
    words = f"--task {tmp_path / 'none'} is no folder; give one with model.py and data.py: see docs/own-federation.md"
    assert refusal(open_task, str(tmp_path / "none")) == words


CALLED = {
    "open_dataset": "open_dataset(source)",
    "load": "load(dataset, split, rows, seed)",
    "build": "build(schema, recipe)",
    "train_round": "train_round(network, examples, recipe, part)",
    "evaluate": "evaluate(network, examples, recipe)",
}


@pytest.mark.parametrize("function", CALLED)
def test_a_function_that_is_needed_and_not_there_is_named_with_its_file_and_how_it_is_called(tmp_path, function):
    name = "data" if function in ("open_dataset", "load") else "model"
    texts = {"data": DATA, "model": MODEL.replace("import evaluate, train_round", "import *")}
    if name == "model" and function != "build":
        texts["model"] = MODEL.replace(f"{function}, " if function == "evaluate" else f", {function}", "")
    else:
        texts[name] = without(texts[name], function)
    words = refusal(lambda: write_task(tmp_path / "mine", **texts).model)
    assert words == f"{tmp_path}/mine/{name}.py has no function {CALLED[function]}; docs/own-federation.md says more"


def test_what_is_no_function_does_not_count_as_one(tmp_path):
    words = refusal(write_task, tmp_path / "mine", f"{without(DATA, 'load')}\nload = 3\n")
    assert words.startswith(f"{tmp_path}/mine/data.py has no function load(dataset, split, rows, seed); ")


@pytest.mark.parametrize(
    ("file", "takes", "called"),
    [
        ("data", "load(dataset, split)", "load(dataset, split, rows, seed)"),
        ("data", "columns(dataset)", "columns(dataset, rows, seed)"),
        ("model", "build()", "build(schema, recipe)"),
        ("model", "predict(network)", "predict(network, examples)"),
    ],
)
def test_a_function_with_other_parameters_is_refused_with_both_even_where_it_is_optional(tmp_path, file, takes, called):
    texts = {"data": DATA, "model": MODEL}
    texts[file] += f"\ndef {takes}: ...\n"
    words = f"{takes.replace('(', ' takes (')}, but is called as {called}"
    assert refusal(lambda: write_task(tmp_path / "mine", **texts).model) == f"{tmp_path}/mine/{file}.py: {words}"


def test_the_names_of_parameters_are_free_and_there_may_be_more_with_defaults(tmp_path):
    more = "\ndef load(rows, which, positions, s, more=1): return (rows, which, positions, s)\n"
    more += OBJECT.format("size", "7")
    task = write_task(tmp_path / "mine", DATA + more)
    assert task.load("a", "train", ROWS, 3) == ("a", "train", ROWS, 3)
    assert task.size("a", "train", 3) == 7


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError: invalid syntax (model.py, line 1)"),
    ],
)
def test_a_file_that_cant_be_imported_is_named_with_the_reason_and_its_traceback_is_shown(tmp_path, capsys, code, why):
    task = write_task(tmp_path / "mine", DATA, code)
    assert refusal(lambda: task.model) == f"{tmp_path}/mine/model.py can't be imported ({why})"
    assert "Traceback (most recent call last):" in capsys.readouterr().err


# What its functions must give

OBJECT = "\ndef {}(*all): return {}\n"
SCALE = "\ndef scale(dataset, statistics): pass\n"
WHOLE, NAMED = "an array (n,) of whole numbers", "a dict of arrays (rows,) by the column's name"
METRICS, MODELS = "a list of federation.config.Metric", "a dict of dicts, by a network's name"
GIVES = [  # which function or name, what it gives, what it must give, and the words for what it gave
    ("schema", "{'a': {1}}", "a dict of texts, numbers and lists", "dict {'a': {1}}"),
    ("schema", "[1]", "a dict", "list [1]"),
    ("schema", "{'classes': [0, 1]}", 'a list of names under "classes"', "list [0, 1]"),
    ("schema", "{'classes': ['a', '']}", 'a list of names under "classes"', "list ['a', '']"),
    ("labels", "['cat', 'dog']", WHOLE, "ndarray ['cat' 'dog']"),
    ("labels", "[0.5, 1.5]", WHOLE, "ndarray [0.5 1.5]"),
    ("labels", "[[0], [1]]", WHOLE, "ndarray [[0] [1]]"),
    ("size", "'20'", "a whole number", "20"),
    ("size", "2.5", "a whole number", "float 2.5"),
    ("size", "-1", "a whole number", "int -1"),
    ("columns", "[1, 2, 3, 4]", NAMED, "list [1, 2, 3, 4]"),
    ("columns", "{'age': [1, 2, 3]}", NAMED, "dict {'age': [1, 2, 3]}"),
    ("columns", "{'age': ['1', '2', '3', 'old']}", NAMED, "dict {'age': ['1', '2', '3', 'old']}"),
    ("METRICS", "['f1']", METRICS, "list ['f1']"),
    ("METRICS", "[]", METRICS, "list []"),
    ("METRICS", "1", METRICS, "int 1"),
    ("MODELS", "['mlp']", MODELS, "list ['mlp']"),
    ("MODELS", "{}", MODELS, "dict {}"),
    ("MODELS", "{'mlp': 1}", MODELS, "dict {'mlp': 1}"),
    ("MODELS", "{'mlp': {'a': []}}", "defaults that are numbers, words, true or false", "dict {'mlp': {'a': []}}"),
    ("build", "None", "a torch.nn.Module", "NoneType None"),
    ("train_round", "None", "a dict of metrics by name", "NoneType None"),
    ("train_round", "{'train_loss': 'low'}", "a number for 'train_loss'", "low"),
    ("train_round", "{'accuracy': 1}", "a number for 'train_loss'", "accuracy"),
    ("evaluate", "0.5", "a dict of metrics by name", "float 0.5"),
    ("evaluate", "{}", "a number for 'loss'", "none"),
    ("evaluate", "{'loss': 1, 'f1': 1}", "the main metric 'accuracy' (METRICS) among its own", "f1, loss"),
]


def use_all(task: Task) -> None:
    """As a client does."""
    dataset = task.open_dataset("a")
    schema = task.schema(dataset)
    task.labels(dataset, "train", 0), task.size(dataset, "train", 0), task.columns(dataset, ROWS, 0)
    made, examples = task.complete(Recipe()), task.load(dataset, "train", ROWS, 0)
    network = task.build(schema, made)
    task.metrics, task.train_round(network, examples, made, PART), task.evaluate(network, examples, made)


@pytest.mark.parametrize(("name", "given", "must", "gave"), GIVES)
def test_what_a_function_must_not_give_is_one_line_with_file_function_and_what_came(tmp_path, name, given, must, gave):
    texts = {"data": DATA + (SCALE if name == "columns" else ""), "model": MODEL}
    file = "data" if name in ("schema", "labels", "size", "columns") else "model"
    texts[file] += f"\n{name} = {given}\n" if name.isupper() else OBJECT.format(name, given)
    task = write_task(tmp_path / "mine", **texts)
    assert refusal(use_all, task) == f"{tmp_path}/mine/{file}.py: {name} must give {must}, gave {gave}"


def test_what_other_eyes_are_told_of_a_broken_contract_is_the_function_and_no_value(tmp_path):
    task = write_task(tmp_path / "mine", DATA + SCALE + OBJECT.format("columns", "{'age': ['jane doe'] * 4}"))
    with pytest.raises(TaskError) as caught:
        task.columns("a", ROWS, 0)
    assert caught.value.public == (
        "columns of the task's data.py must give a dict of arrays (rows,) by the column's name"
    )


def test_columns_and_scale_go_together(tmp_path):
    with pytest.raises(TaskError, match=r"has no function scale\(dataset, statistics\) to go with the other"):
        write_task(tmp_path / "one", DATA + OBJECT.format("columns", "{}"))
    with pytest.raises(TaskError, match=r"has no function columns\(dataset, rows, seed\) to go with the other"):
        write_task(tmp_path / "two", DATA + SCALE)


def test_examples_are_as_many_as_rows(tmp_path):
    code = "\ndef load(*all):\n    import torch\n    return torch.ones(4, 2), torch.ones(3)\n"
    task = write_task(tmp_path / "mine", DATA + code)
    words = "load must give as many examples as rows, 4, gave Tensor of shape (3,)"
    assert refusal(lambda: task.load("a", "train", ROWS, 0)) == f"{tmp_path}/mine/data.py: {words}"


def test_examples_that_are_not_finite_are_warned_of(tmp_path, capsys):
    code = "\ndef load(*all):\n    import torch\n    return torch.full((4, 2), float('nan')), torch.ones(4)\n"
    write_task(tmp_path / "mine", DATA + code).load("a", "train", ROWS, 0)
    assert "gives examples with NaN or infinite values" in capsys.readouterr().out


def test_the_ready_made_loop_says_what_it_needs_of_load():
    words = (
        "^load of data.py must give a tuple of tensors, inputs and last targets, for this training; gave ndarray, list$"
    )
    with pytest.raises(TaskError, match=words):
        training.check((np.ones(3), [1]))


def test_metrics_of_training_have_names_that_say_so(tmp_path):
    code = OBJECT.format("train_round", "{'loss': 0.5, 'accuracy': 1, 'train_f1': 2}")
    task = write_task(tmp_path / "mine", DATA, MODEL + code)
    told = {"train_loss": 0.5, "train_accuracy": 1.0, "train_f1": 2.0}
    assert task.train_round(None, None, Recipe(), PART) == told


def test_metrics_may_come_as_any_kind_of_number(tmp_path):
    code = "\ndef evaluate(*all):\n    import torch\n    return {'loss': torch.tensor(0.5), 'accuracy': 1}\n"
    task = write_task(tmp_path / "mine", DATA, MODEL + code)
    assert task.evaluate(None, None, Recipe()) == {"loss": 0.5, "accuracy": 1.0}
    assert {type(value) for value in task.evaluate(None, None, Recipe()).values()} == {float}


# What it may leave out


def test_a_task_is_called_as_it_says_and_the_name_of_its_folder_is_told_to_nobody(tmp_path):
    named = write_task(tmp_path / "jane-doe", DATA, MODEL + '\nNAME = "wine"\n')
    assert (named.name, write_task(tmp_path / "john-doe").name) == ("wine", "own")
    assignment = Assignment(0, 2, Recipe())
    told = json.dumps(summarise(TaskClient(named, named.open_dataset("a"), assignment)))
    assert "wine" in told
    assert "doe" not in told
    with pytest.raises(TaskError, match=r"model.py: NAME must give a word of letters, digits, - and _, gave /home/doe"):
        _ = write_task(tmp_path / "third", DATA, MODEL + '\nNAME = "/home/doe"\n').name


def test_the_smallest_task_is_one_and_everything_else_has_its_default(tmp_path):
    task = write_task(tmp_path / "mine")
    use_all(task)
    assert (task.name, task.default_dataset, task.schema("a")) == ("own", "", {})
    assert (task.labels("a", "train", 0), task.columns("a", ROWS, 0)) == (None, {})
    assert (task.metrics, task.models) == ([ACCURACY], {"network": {}})
    assert task.complete(Recipe()) == Recipe(model="network", batch_size=32, learning_rate=0.05, own={})
    optional = ["schema", "labels", "adopt", "columns", "scale", "read_example"]
    optional += ["predict", "show", "pictures", "to_input"]
    assert [name for name in optional if task.has(name)] == []
    assert task.has("size")


def test_what_it_offers_is_used(tmp_path):
    data = f"{DATA}\nDATASET = 'register'\ndef schema(dataset): return {{'columns': ('age', 'sex')}}\n"
    model = f"{MODEL}\nfrom federation.config import Metric\nMODELS = {{'mlp': {{'hidden': 16, 'batch_size': 4}}}}\n"
    task = write_task(tmp_path / "mine", data, f"{model}METRICS = [Metric('accuracy', chance=0.5), Metric('auc')]\n")
    assert (task.default_dataset, task.schema("a")) == ("register", {"columns": ["age", "sex"]})
    assert task.metrics == [Metric("accuracy", chance=0.5), Metric("auc")]
    assert task.complete(Recipe(own={"hidden": "32"})) == Recipe(
        model="mlp", batch_size=4, learning_rate=0.05, own={"hidden": 32}
    )
    with pytest.raises(PublicError, match=r"^--model must be one of the task's \(mlp\), got "):
        task.complete(Recipe(model="cnn"))


def test_the_number_of_examples_is_told_or_that_of_the_labels_and_one_of_both_is_needed(tmp_path):
    labels = OBJECT.format("labels", "[0, 1, 1]")
    assert write_task(tmp_path / "told", DATA + labels).size("a", "train", 0) == 20
    assert write_task(tmp_path / "counted", without(DATA, "size") + labels).size("a", "train", 0) == 3
    task = write_task(tmp_path / "neither", without(DATA, "size"))
    assert refusal(task.size, "a", "train", 0) == (
        f"{tmp_path}/neither/data.py has no function size(dataset, split, seed) or labels(dataset, split, seed); "
        "docs/own-federation.md says more"
    )


def test_the_two_flags_of_a_data_set_reach_only_a_task_that_knows_them(tmp_path):
    plain = write_task(tmp_path / "plain")
    assert plain.open_dataset("a", "my data") == "a"
    with pytest.raises(DataError, match=r"^--skip-damaged is nothing that this task knows; leave it out$"):
        plain.open_dataset("a", "my data", True)
    code = "\ndef open_dataset(source, data_dir='', skip_damaged=False): return (source, data_dir, skip_damaged)\n"
    assert write_task(tmp_path / "more", DATA + code).open_dataset("a", "b", True) == ("a", "b", True)


def test_other_classes_are_taken_over_or_refused_with_the_remedy(tmp_path):
    words = refusal(write_task(tmp_path / "plain").adopt, "a", ["cat", "dog"])
    assert words == (
        "the federation has the classes cat, dog; "
        "give this client the same, or write adopt(dataset, classes) in data.py"
    )
    code = "\ndef adopt(dataset, classes): dataset.extend(classes)\n"
    dataset: list[str] = []
    write_task(tmp_path / "more", DATA + code).adopt(dataset, ["cat", "dog"])
    assert dataset == ["cat", "dog"]


# Who holds what


@pytest.mark.parametrize("partitioner", ["dirichlet", "shards"])
def test_without_labels_nothing_is_sorted_by_class(tmp_path, partitioner):
    task = write_task(tmp_path / "mine")
    with pytest.raises(TaskError) as caught:
        task.shares("a", Recipe(partitioner=partitioner), 2)
    assert str(caught.value) == (
        f"--partitioner {partitioner} sorts examples by class, and this task's data.py has no "
        "labels(dataset, split, seed); use iid, quantity-skew or local"
    )
    assert caught.value.public == (
        f"its task has no classes for --partitioner {partitioner}; use iid, quantity-skew or local"
    )


def test_without_labels_examples_are_shared_out_by_their_number_alone(tmp_path):
    task = write_task(tmp_path / "mine")
    train, test = task.shares("a", Recipe(), 2)
    assert [len(part) for part in (*train, *test)] == [10, 10, 5, 5]
    assert sorted(np.concatenate(train)) == list(range(20))
    train, test = task.shares("a", Recipe(partitioner="local"), 2)
    assert [part.tolist() for part in (*train, *test)] == [[*range(20)]] * 2 + [[*range(10)]] * 2
    assert len(task.shares("a", Recipe(partitioner="quantity-skew"), 2)[0]) == 2


COLUMNS = """
def columns(dataset, rows, seed):
    return {
        "age": np.where(rows < 10, rows, np.nan),
        "rare": np.where(rows < 9, 1.0, np.nan),
        "income": np.where(rows == 11, np.inf, 2.0),
    }
"""


def test_of_a_column_its_count_and_sum_are_told_and_nothing_where_it_has_fewer_than_ten_values(tmp_path):
    task = write_task(tmp_path / "mine", DATA + SCALE + COLUMNS)
    assert task.column_sums("a", np.arange(12), 0, {}) == {"age": (10, 45.0), "income": (11, 22.0)}


def test_given_the_means_it_is_the_sum_of_squared_differences_of_those_columns_that_have_one(tmp_path):
    task = write_task(tmp_path / "mine", DATA + SCALE + COLUMNS)
    assert task.column_sums("a", np.arange(12), 0, {"age": 4.5, "rare": 1.0}) == {"age": (10, 82.5)}


# Its randomness, its code, and other tasks beside it

RANDOM = """
import torch

def build(schema, recipe):
    network = nn.Linear(1, 1)
    nn.init.constant_(network.weight, torch.rand(()).item())
    return network

def train_round(network, examples, recipe, part):
    return {"loss": torch.rand(()).item()}
"""


def test_building_and_training_are_functions_of_the_seed_and_leave_the_random_state_alone(tmp_path):
    task = write_task(tmp_path / "mine", DATA, MODEL + RANDOM)
    before, built, trained = torch.get_rng_state(), {}, {}
    for run, seed in (("one", 1), ("two", 1), ("other", 2)):
        made = task.complete(Recipe(seed=seed))
        built[run] = task.build({}, made).weight.item()
        trained[run] = task.train_round(None, None, made, made.part(0, 1))["train_loss"]
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        before = torch.get_rng_state()
    for drawn in (built, trained):
        assert drawn["one"] == drawn["two"] != drawn["other"]
    made = task.complete(Recipe(seed=1))
    parts = [made.part(partition, number) for partition, number in ((0, 1), (0, 2), (1, 1))]
    assert len({task.train_round(None, None, made, part)["train_loss"] for part in parts}) == 3


def test_the_hash_of_its_code_is_that_of_the_two_files_whatever_ends_their_lines(tmp_path):
    one, other = write_task(tmp_path / "one"), write_task(tmp_path / "other", DATA + "\n")
    (tmp_path / "windows").mkdir()
    for name in ("data.py", "model.py"):
        content = (tmp_path / "one" / name).read_bytes()
        (tmp_path / "windows" / name).write_bytes(content.replace(b"\n", b"\r\n"))
    assert Task(tmp_path / "windows").code_hash == one.code_hash != other.code_hash
    assert re.fullmatch("[0-9a-f]{64}", one.code_hash)


def test_of_two_tasks_each_has_its_own_two_files(tmp_path):
    both = [write_task(tmp_path / name, DATA, f"{MODEL}\nMODELS = {{'{name}': {{}}}}\n") for name in ("one", "two")]
    assert [list(task.models) for task in both] == [["one"], ["two"]]
    assert [Path(task.data.__file__).parent.name for task in both] == ["one", "two"]


def test_a_task_may_import_files_of_its_own_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_own_numbers.py").write_text("NUMBER = 7\n")
    for name, text in (("data", f"{DATA}\nfrom my_own_numbers import NUMBER\n"), ("model", MODEL)):
        (tmp_path / "mine" / f"{name}.py").write_text(text)
    assert Task(tmp_path / "mine").data.NUMBER == 7
    del sys.modules["my_own_numbers"]


def test_without_a_folder_it_is_the_projects_own_task():
    task = open_task()
    assert (task.name, task.default_dataset, list(task.models)) == (
        "cifar10",
        "cifar10",
        ["cnn", "cnn-large", "scattering", "lenet"],
    )
    assert all(task.has(name) for name in ("schema", "labels", "adopt", "read_example", "predict", "show"))


# What of a network travels


def backbone(**norm: object) -> nn.Sequential:
    """A frozen body with a BatchNorm, and a head that learns."""
    body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, **norm))
    body.requires_grad_(False)
    return nn.Sequential(OrderedDict(body=body, head=nn.Linear(2, 1)))


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_parameters_and_the_buffers_of_frozen_modules_do_not_travel(affine):
    network = backbone(affine=affine)
    assert travelling(network) == ["head.weight", "head.bias"]
    assert [array.shape for array in get_weights(network)] == [(1, 2), (1,)]
    norm = ["weight", "bias"] * affine + ["running_mean", "running_var", "num_batches_tracked"]
    assert list(frozen_weights(network)) == ["body.0.weight", "body.0.bias", *(f"body.1.{name}" for name in norm)]
    assert buffer_positions(network) == []


def test_buffers_of_a_module_that_learns_in_part_travel():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network[1].weight.requires_grad_(False)
    names = ["0.weight", "0.bias", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert travelling(network) == names
    assert list(frozen_weights(network)) == ["1.weight"]
    assert buffer_positions(network) == [3, 4, 5]


def test_where_everything_is_frozen_everything_travels():
    network = nn.BatchNorm1d(2).requires_grad_(False)
    assert travelling(network) == list(network.state_dict())
    assert frozen_weights(network) == {}


def test_weights_that_come_leave_the_frozen_ones_alone():
    network = backbone()
    before = {name: array.copy() for name, array in frozen_weights(network).items()}
    set_weights(network, [np.full((1, 2), 3, np.float32), np.full(1, 4, np.float32)])
    assert (network.head.weight.tolist(), network.head.bias.tolist()) == ([[3.0, 3.0]], [4.0])
    for name, array in frozen_weights(network).items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(PublicError, match=r"^the network has 2 arrays, was given 7$"):
        set_weights(network, [*before.values()])


def test_a_number_without_dimensions_comes_in_as_numpys_scalar_too():
    network = nn.BatchNorm1d(1)
    set_weights(network, [*get_weights(network)[:4], np.int64(5)])
    assert network.num_batches_tracked.item() == 5


def test_frozen_modules_stay_in_evaluation_mode_whatever_is_called_around_them():
    network = keep_frozen(nn.Sequential(backbone(), nn.BatchNorm1d(1)))
    for _ in range(2):
        network.train()
        assert [network.training, network[0].head.training, network[1].training] == [True] * 3
        assert [network[0].body.training, network[0].body[1].training] == [False] * 2
    before = network[0].body[1].running_mean.clone()
    network(torch.ones(4, 2))
    assert torch.equal(network[0].body[1].running_mean, before)
    assert network[1].num_batches_tracked.item() == 1
    network.eval()
    assert not network[1].training


def test_a_frozen_norm_without_weights_of_its_own_stays_as_it_came_too():
    network = keep_frozen(backbone(affine=False)).train()
    network(torch.ones(4, 2))
    assert network.body[1].running_mean.tolist() == [0.0, 0.0]


def test_a_network_that_is_frozen_as_a_whole_can_still_be_switched():
    network = keep_frozen(nn.Sequential(nn.Linear(2, 2)).requires_grad_(False))
    assert network.train().training
    assert not network.eval().training


# The model's file

ARRAYS = {
    "weight": np.array([[1.5, 2], [3, 4]], np.float32),
    "count": np.array(2**53 + 1),
    "half": np.ones(3, np.float16),
}
ABOUT = model_file.about("mine", {"model": "mlp", "own": {"b": 1, "a": 2}}, {"classes": ["cat", "dög"]}, {})


def test_the_file_has_the_same_bytes_in_whatever_order_a_process_names_what_is_in_it(tmp_path):
    model_file.write(tmp_path / "one", ARRAYS, ABOUT)
    backwards = json.loads(json.dumps(ABOUT), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert list(backwards) != list(ABOUT)
    model_file.write(tmp_path / "two", dict(reversed(ARRAYS.items())), backwards)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_is_written_comes_back_in_its_shapes_and_types(tmp_path):
    model_file.write(tmp_path / "model", {**ARRAYS, "turned": ARRAYS["weight"].T}, ABOUT)
    arrays, about = model_file.read(tmp_path / "model")
    assert about == ABOUT
    assert arrays["count"].shape == ()
    for name, array in {**ARRAYS, "turned": ARRAYS["weight"].T}.items():
        assert (arrays[name].dtype, arrays[name].tolist()) == (array.dtype, array.tolist())
    assert load_file(tmp_path / "model")["turned"].tolist() == [[1.5, 3], [2, 4]]


@pytest.mark.parametrize("damage", ["empty", "text", "torn head", "torn arrays", "no JSON"])
def test_a_damaged_file_is_a_value_error(tmp_path, damage):
    path = tmp_path / "model"
    model_file.write(path, ARRAYS, ABOUT)
    whole = path.read_bytes()
    damaged = {"empty": b"", "text": b"dear model", "torn head": whole[:50], "torn arrays": whole[:-1]}
    path.write_bytes(damaged.get(damage, whole.replace(b'{\\"', b'[\\"')))
    with pytest.raises(ValueError, match=r"."):
        model_file.read(path)


def test_a_file_that_is_not_there_is_an_error_of_the_systems_own(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        model_file.read(tmp_path / "none")
    assert caught.value.strerror == "No such file or directory"


def test_the_hash_is_of_names_types_shapes_and_values_and_of_nothing_it_is_empty():
    one = {"a": np.zeros(2, np.float32)}
    others = [{"b": np.zeros(2, np.float32)}, {"a": np.zeros((2, 1), np.float32)}, {"a": np.zeros(1, np.float64)}]
    others += [{"a": np.array([0, 1], np.float32)}, {**one, "b": np.zeros(2, np.float32)}]
    assert model_file.hash_of(one) == model_file.hash_of({"a": np.zeros(2, np.float32)})
    assert len({model_file.hash_of(each) for each in (one, *others)}) == 6
    assert model_file.hash_of({}) == ""


# The ready-made loops


def weighted(*weights: float) -> nn.Linear:
    """A network that gives the sum of its inputs times these."""
    network = nn.Linear(len(weights), 1, bias=False)
    network.weight.data = torch.tensor([weights])
    return network


def squared(network: nn.Module, batch: training.Examples) -> torch.Tensor:
    return ((network(batch[0])[:, 0] - batch[1]) ** 2).mean()


@pytest.mark.parametrize(("mu", "weight"), [(0.0, 0.54), (1.0, 0.52)])
def test_two_steps_of_the_ready_made_training_by_hand(mu, weight):
    """From w = 0 to fit 1: slopes -2 and -1.6 (with mu -1.4); momentum 0.9; w = 0.2, then 0.2 + 0.1 (1.8 + 1.6)."""
    made = recipe(local_epochs=2, batch_size=2, learning_rate=0.1, proximal_mu=mu)
    network = weighted(0.0)
    metrics = training.train_round(network, (torch.ones(2, 1), torch.ones(2)), made, PART, squared)
    assert network.weight.item() == pytest.approx(weight)
    assert metrics == {"train_loss": pytest.approx((1 + 0.64) / 2)}


@pytest.mark.parametrize(("size", "seen"), [(1, [1]), (2, [2]), (4, [2, 2]), (5, [2, 2])])
def test_a_last_batch_of_one_is_left_out_unless_it_is_all_there_is(size, seen, monkeypatch):
    batches = []

    def loss(network, batch):
        batches.append(len(batch[0]))
        return squared(network, batch)

    made = recipe(batch_size=2, learning_rate=0.1)
    training.train_round(weighted(0.0), (torch.ones(size, 1), torch.ones(size)), made, PART, loss)
    assert batches == seen


def test_frozen_weights_stay_in_the_ready_made_training():
    network = keep_frozen(backbone())
    before = {name: array.copy() for name, array in frozen_weights(network).items()}
    head = network.head.weight.tolist()
    training.train_round(network, (torch.ones(4, 2), torch.full((4,), 9.0)), recipe(), PART, squared)
    assert network.head.weight.tolist() != head
    for name, array in frozen_weights(network).items():
        np.testing.assert_array_equal(array, before[name])


def test_the_ready_made_bar_counts_the_batches_of_all_epochs_under_its_title(monkeypatch):
    bars = []
    monkeypatch.setattr(training, "tqdm", lambda batches, title, **how: bars.append((len(batches), title)) or batches)
    made = recipe(batch_size=2, local_epochs=3, learning_rate=0.1)
    training.train_round(weighted(0.0), (torch.ones(4, 1), torch.ones(4)), made, made.part(0, 1, "round 1"), squared)
    assert bars == [(6, "round 1")]


def scores_of(*thirds: float) -> tuple[nn.Linear, torch.Tensor]:
    """A network of two classes, and inputs for which it gives these probabilities of the second."""
    network = nn.Linear(1, 2, bias=False)
    network.weight.data = torch.tensor([[0.0], [1.0]])
    return network, torch.tensor([[math.log(p / (1 - p))] for p in thirds])


def test_loss_accuracy_and_probabilities_of_classes_by_hand():
    network, inputs = scores_of(0.75, 0.25, 0.6)
    examples = (inputs, torch.tensor([1, 0, 0]))
    found = classification.evaluate(network, examples, recipe())
    assert found == {"loss": pytest.approx(-math.log(0.75 * 0.75 * 0.4) / 3), "accuracy": pytest.approx(2 / 3)}
    probabilities = classification.predict(network, examples)
    assert probabilities[:, 1].tolist() == pytest.approx([0.75, 0.25, 0.6])
    lines = classification.show({"classes": ["no", "yes"]}, examples, probabilities)
    assert lines == ["✓ yes → yes", "✓ no → no", "✗ no → yes"]


def test_any_number_of_examples_is_evaluated_in_parts(monkeypatch):
    monkeypatch.setattr(training, "EVALUATED", 2)
    network, inputs = scores_of(0.75, 0.25, 0.6)
    together = training.outputs(network, (inputs, torch.zeros(3)))
    assert together.shape == (3, 2)
    assert torch.equal(together, network(inputs))


@pytest.mark.parametrize(
    ("scores", "positive", "area"),
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.75),  # of four pairs three are in order
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 1.0),
        ([0.8, 0.1], [0, 1], 0.0),
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1], 0.5),  # ties count half
        ([0.5, 0.5, 0.2], [1, 0, 0], 0.75),
        ([0.3, 0.7], [1, 1], math.nan),  # all of one kind
        ([0.3, 0.7], [0, 0], math.nan),
    ],
)
def test_the_area_under_the_roc_curve_is_how_often_a_positive_scores_above_a_negative(scores, positive, area):
    assert classification.auc(torch.tensor(scores), torch.tensor(positive)) == pytest.approx(area, nan_ok=True)


def test_errors_and_r2_of_numbers_by_hand():
    """Guesses 1, 2, 6 for 1, 2, 3, whose variance is 2/3."""
    examples = (torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([1.0, 2.0, 3.0]))
    found = regression.evaluate(weighted(1.0), examples, recipe())
    assert found == {"loss": pytest.approx(3), "mae": pytest.approx(1), "r2": pytest.approx(1 - 3 / (2 / 3))}
    guesses = regression.predict(weighted(1.0), examples)
    assert guesses.tolist() == [1, 2, 6]
    assert regression.show({}, examples, guesses) == ["1 → 1", "2 → 2", "3 → 6"]


def test_without_a_spread_of_the_targets_there_is_no_r2():
    found = regression.evaluate(weighted(1.0), (torch.tensor([[1.0], [2.0]]), torch.ones(2)), recipe())
    assert found == {"loss": 0.5, "mae": 0.5}


def test_several_numbers_an_example_are_guessed_and_shown_side_by_side():
    network = nn.Linear(1, 2, bias=False)
    network.weight.data = torch.tensor([[1.0], [2.0]])
    examples = (torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 2.0], [2.0, 3.5]]))
    guesses = regression.predict(network, examples)
    assert regression.show({}, examples, guesses) == ["1, 2 → 1, 2", "2, 3.5 → 2, 4"]


@pytest.mark.parametrize("module", [classification, regression])
def test_the_ready_made_trainings_learn(module):
    torch.manual_seed(0)
    inputs = torch.linspace(-1, 1, 40)[:, None]
    numbers = module is regression
    targets = 2 * inputs[:, 0] + 1 if numbers else (inputs[:, 0] > 0).long()
    network, made = nn.Linear(1, 1 if numbers else 2), recipe(local_epochs=20, batch_size=8, learning_rate=0.05)
    before = module.evaluate(network, (inputs, targets), made)["loss"]
    module.train_round(network, (inputs, targets), made, PART)
    assert module.evaluate(network, (inputs, targets), made)["loss"] < 0.5 * before


# Private training


def private_task(tmp_path, body: str, models: str = "{'network': {}}"):
    model = f"{MODEL}\nfrom federation.task.classification import loss\nMODELS = {models}\n\n\n"
    return write_task(tmp_path / "private", model=f"{model}def private_training(network, examples):\n    {body}\n")


TWO = torch.tensor([[1.0, float("nan")], [3.0, 4.0]]), torch.tensor([0, 1])


def test_what_trains_privately_is_what_the_task_says(tmp_path):
    network = nn.Linear(2, 2)
    told = private_task(tmp_path, "return network, examples, loss").private_training(network, TWO)
    assert (told[0], told[1]) == (network, TWO)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return network, examples", "must give a module, examples, and a loss"),
        ("x, y = examples\n    return network, (x - x[:, :1].mean(), y), loss", "each example by itself"),
        ("x, y = examples\n    return network, (x[:, :len(x)], y), loss", "each example by itself"),
        ("return network, tuple(each[:1] for each in examples), loss", "as many rows as it got examples, 2"),
        ("return network, None, loss", "a tuple of tensors"),
    ],
)
def test_what_can_t_train_privately_is_one_line(tmp_path, body, words):
    with pytest.raises(TaskError, match=words) as caught:
        private_task(tmp_path, body).private_training(nn.Linear(2, 2), TWO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("private", ["1", "{'learning_rate': None}"])
def test_private_defaults_are_a_dict_of_values(tmp_path, private):
    with pytest.raises(TaskError, match=r": MODELS must give"):
        _ = private_task(tmp_path, "pass", f"{{'network': {{'private': {private}}}}}").models

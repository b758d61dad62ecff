"""What a client answers to each of the server's messages, and how its part in a run ends; all in this process."""

import inspect
import json
import math
import pickle
import sys
from types import SimpleNamespace

from federation.client import node_app
from federation.client import session as module
from federation.client.node_app import Node, make_app, read_assignment
from federation.client.session import RunEnded, Session
from federation.config import Recipe
from federation.console import PublicError
from federation.privacy.disclosure import host_name
from federation.protocol import Assignment, read_hello, read_summary
from federation.security.credentials import ClientCredentials
from federation.security.secret import proof

import numpy as np
import pytest
from flwr.app import Context, RecordDict

WEIGHTS = [np.array([0.5, 1 / 3], np.float32), np.array(4)]
PLACE = {"ask": "place", "partition": 1, "num_partitions": 3, "recipe": Recipe().to_json()}
ROUND = {"server_round": 2, "clients_on_host": 3}
GOODBYE = {"ask": "told", "kind": "finished", "words": "the run is done after 3 rounds", "code": 0}


class Client:
    """A user's client; its functions can be replaced."""

    num_train, num_test, buffer_positions = 100, 10, (1,)

    def __init__(self, assignment: Assignment, **replaced: object):
        self.assignment = assignment
        vars(self).update(replaced)

    def get_parameters(self, config):
        return WEIGHTS

    def fit(self, parameters, config):
        self.given = parameters
        return [array + 1 for array in parameters], 100, {"train_loss": 0.25}

    def evaluate(self, parameters, config):
        self.given = parameters
        return 1.5, 10, {"accuracy": 0.75}


def admitted(recipe: Recipe | None = None, *, replaced: dict | None = None, **options: object) -> Session:
    """A session that has its place."""
    session = Session(lambda assignment: Client(assignment, **(replaced or {})), ["cat", "dog"], **options)
    session.get_properties({**PLACE, "recipe": (recipe or Recipe()).to_json()})
    assert session.failure is None
    return session


def fails(*_: object) -> None:
    raise OSError("no folder /data/jane-doe")


# Joining


def test_hello_says_who_comes_with_which_classes_and_what_it_wants():
    session = Session(Client, ["cat", "dog"], wanted_partition=0)
    hello = read_hello(session.get_properties({"ask": "hello", "nonce": "n", "salt": "s"}))
    assert (hello.classes, hello.wanted, hello.held) == (["cat", "dog"], 0, -1)
    assert hello.instance == session.instance
    assert hello.host == host_name("s")


def test_two_sessions_are_two_clients_on_one_machine_under_a_name_for_this_run():
    one, two = (Session(Client, ["cat"]) for _ in range(2))
    assert one.instance != two.instance
    assert host_name("a run") == host_name("a run") != host_name("another run")


def test_the_secret_is_proved_for_each_nonce_and_never_said():
    session = Session(Client, ["cat"], credentials=ClientCredentials(b"battery"))
    answers = [session.get_properties({"ask": "hello", "nonce": nonce}) for nonce in ("one", "two")]
    assert [answer["proof"] for answer in answers] == [proof(b"battery", nonce) for nonce in ("one", "two")]
    assert "battery" not in json.dumps(answers)
    assert Session(Client, ["cat"]).get_properties({"ask": "hello", "nonce": "one"})["proof"] == ""


def test_with_its_place_a_client_opens_its_part_and_says_how_much_that_is():
    session = Session(Client, ["cat", "dog"])
    summary = read_summary(session.get_properties(PLACE))
    assert session.client.assignment == Assignment(1, 3, Recipe(), ())
    assert (summary.train_examples, summary.test_examples, summary.buffer_positions) == (100, 10, [1])
    assert session.get_properties({"ask": "hello", "nonce": "n"})["held"] == 1


def test_the_federations_classes_come_with_the_place_where_they_are_others():
    session = Session(Client, ["dog"])
    session.get_properties({**PLACE, "classes": '["cat", "dog"]'})
    assert session.client.assignment.classes == ("cat", "dog")


def test_back_in_the_same_place_the_data_is_not_read_again_but_in_another_it_is(capsys):
    session = admitted()
    first = session.client
    session.get_properties(PLACE)
    assert session.client is first
    assert capsys.readouterr().out == "back in place 1\n"
    session.get_properties({**PLACE, "partition": 2})
    assert session.client.assignment.partition == 2


def test_the_runs_id_comes_with_the_place_and_another_run_is_another_assignment():
    session = Session(Client, ["cat", "dog"])
    session.get_properties({**PLACE, "run": "0123456789abcdef"})
    first = session.client
    assert first.assignment.run_id == "0123456789abcdef"
    session.get_properties({**PLACE, "run": "0123456789abcdef"})
    assert session.client is first
    session.get_properties({**PLACE, "run": "fedcba9876543210"})
    assert session.client is not first


@pytest.mark.parametrize("run_id", ["../../etc/passwd", "0123456789ABCDEF", "0123", 7, None])
def test_a_runs_id_that_could_be_anything_else_is_refused(run_id):
    answer = Session(Client, ["cat"]).get_properties({**PLACE, "run": run_id})
    assert answer["error"].startswith("the run's id must be 16 hex digits, got ")


# At work


def test_an_update_is_the_clients_own_and_said_in_one_line(capsys):
    weights, examples, metrics = admitted().fit(WEIGHTS, ROUND)
    assert [array.tolist() for array in weights] == [(WEIGHTS[0] + 1).tolist(), 5]
    assert (examples, metrics) == (100, {"train_loss": 0.25})
    assert capsys.readouterr().out == "round 2: trained on 100 examples in 0.0 s, loss 0.250\n"


def test_a_training_of_the_asynchronous_mode_is_called_by_its_number_and_version(capsys):
    admitted().fit(WEIGHTS, {**ROUND, "version": 7})
    assert capsys.readouterr().out.startswith("training 2, from version 7: trained on 100 examples")


def test_scores_are_the_clients_own_and_kept_for_the_summary():
    session = admitted()
    assert session.evaluate(WEIGHTS, ROUND) == (1.5, 10, {"accuracy": 0.75})
    assert session.metrics == {"loss": 1.5, "accuracy": 0.75}


def test_only_numbers_leave_a_client():
    metrics = {"accuracy": 1, "path": "/data/jane-doe", "curve": [1, 2], "f1": math.nan}
    session = admitted(replaced={"evaluate": lambda parameters, config: (1.0, 10, metrics)})
    told = session.evaluate(WEIGHTS, ROUND)[2]
    assert set(told) == {"accuracy", "f1"}
    assert told["accuracy"] == 1.0


def test_the_frozen_weights_are_asked_for_by_a_word_that_reaches_the_client():
    session = admitted()
    session.client.get_parameters = lambda config: [np.zeros(2)] if "frozen" in config else WEIGHTS
    assert session.get_parameters({"frozen": True})[0].tolist() == [0, 0]
    assert session.get_parameters({}) is WEIGHTS


def task_of(column_sums) -> dict:
    """What a client has, for one whose task tells these sums of its columns."""
    task = SimpleNamespace(column_sums=lambda dataset, rows, seed, means: column_sums(means))
    return {"task": task, "dataset": None, "train_rows": None, "recipe": Recipe()}


def columns_of(session: Session, **config: str) -> dict:
    answer = session.get_properties({"ask": "columns", **config})
    return json.loads(answer["columns"]) if "columns" in answer else answer


def test_of_its_columns_a_client_tells_sums_and_takes_in_the_statistics_of_all():
    taken = []
    session = admitted(
        replaced={"scale": taken.append, **task_of(lambda means: {"age": (10, 5.0 - means.get("age", 0))})}
    )
    assert columns_of(session) == {"age": [10, 5.0]}
    assert columns_of(session, means='{"age": 1.5}') == {"age": [10, 3.5]}
    assert columns_of(session, statistics='{"age": [20, 1.5, 0.5]}') == {}
    assert taken == [{"age": [20, 1.5, 0.5]}]
    assert session.assignment.statistics == {"age": [20, 1.5, 0.5]}


def test_a_client_that_comes_back_with_the_statistics_it_has_does_not_read_its_data_again(capsys):
    session = admitted(replaced={"scale": lambda statistics: None})
    first = session.client
    columns_of(session, statistics='{"age": [20, 1.5, 0.5]}')
    session.get_properties({**PLACE, "columns": '{"age": [20, 1.5, 0.5]}'})
    assert session.client is first
    session.get_properties({**PLACE, "columns": '{"age": [30, 1.5, 0.5]}'})
    assert session.client.assignment.statistics == {"age": [30, 1.5, 0.5]}


def test_columns_that_cant_be_summed_are_told_by_their_kind_alone(capsys):
    session = admitted(replaced=task_of(fails))
    assert columns_of(session) == {"error": "its own code failed (OSError)"}


def test_the_machines_cores_are_shared_before_every_work():
    told = []
    session = admitted(share_cores=told.append)
    session.fit(WEIGHTS, ROUND)
    session.evaluate(WEIGHTS, {**ROUND, "clients_on_host": 2})
    assert told == [3, 2]


@pytest.mark.parametrize(("slowdown", "seconds"), [(1, 4.0), (2.5, 10.0)])
def test_slowdown_multiplies_the_time_that_work_takes(monkeypatch, capsys, slowdown, seconds):
    clock = SimpleNamespace(now=0.0)

    def work(parameters, config):
        clock.now += 4
        return parameters, 100, {}

    def sleep(duration):
        clock.now += duration

    session = admitted(replaced={"fit": work}, slowdown=slowdown)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    session.fit(WEIGHTS, ROUND)
    assert clock.now == seconds
    assert capsys.readouterr().out == f"round 2: trained on 100 examples in {seconds:.1f} s\n"


def test_compressed_weights_are_unpacked_for_the_client_and_packed_for_the_way():
    session = admitted(Recipe(compress="fp16"))
    sent = [WEIGHTS[0].astype(np.float16), WEIGHTS[1]]
    weights, *_ = session.fit(sent, ROUND)
    assert [array.dtype for array in session.client.given] == [np.float32, np.int64]
    assert [array.dtype for array in weights] == [np.float16, np.int64]
    session.evaluate(sent, ROUND)
    assert session.client.given[0].tolist() == [0.5, float(np.float16(1 / 3))]


def test_the_untrained_model_too_travels_compressed_where_the_server_knows_its_dtypes():
    session = admitted(Recipe(compress="fp16"))
    assert [array.dtype for array in session.get_parameters({"packed": True})] == [np.float16, np.int64]
    assert [array.dtype for array in session.get_parameters({})] == [np.float32, np.int64]  # for servers of 1.0.0


# What fails


def test_a_failure_of_the_users_code_is_told_by_its_kind_alone_and_shown_whole_here(capsys):
    session = admitted(replaced={"fit": fails, "evaluate": fails})
    session.client.get_parameters = fails
    report = {"error": "its own code failed (OSError)"}
    assert session.get_parameters({}) == []
    assert session.fit(WEIGHTS, ROUND) == ([], 0, report)
    assert session.evaluate(WEIGHTS, ROUND) == (0.0, 0, report)
    assert capsys.readouterr().err.count("\nOSError: no folder /data/jane-doe\n") == 3
    assert session.failure == "OSError: no folder /data/jane-doe"


def test_a_client_whose_weights_cant_be_read_is_told_to_the_server_and_not_raised():
    made = SimpleNamespace(num_train=1, num_test=1, buffer_positions=[], get_parameters=fails)
    session = Session(lambda assignment: made, ["cat", "dog"])
    place = {"ask": "place", "partition": 0, "num_partitions": 1, "recipe": Recipe().to_json()}
    assert session.get_properties(place) == {"error": "its own code failed (OSError)"}


def test_an_exception_class_of_the_users_own_is_not_even_named():
    class JaneDoe(Exception):
        pass

    def raises(*_):
        raise JaneDoe

    session = admitted(replaced={"fit": raises})
    assert session.fit(WEIGHTS, ROUND)[2] == {"error": "its own code failed"}
    assert session.failure == "JaneDoe"


@pytest.mark.parametrize("recipe", ["{", '{"rounds": -1}', '{"momentum": 1}'])
def test_a_recipe_that_can_not_be_used_is_an_answer_and_no_place(capsys, recipe):
    session = Session(Client, ["cat"])
    assert set(session.get_properties({**PLACE, "recipe": recipe})) == {"error"}
    assert session.assignment is None
    assert session.failure


def test_data_that_can_not_be_opened_is_an_answer_in_the_words_meant_for_others(capsys):
    class DataError(Exception):
        public = "2 of its 100 images can't be read"

    def open_client(assignment):
        raise DataError("/data/jane-doe.png can't be read")

    session = Session(open_client, ["cat"])
    assert session.get_properties(PLACE) == {"error": "2 of its 100 images can't be read"}
    assert session.failure == "/data/jane-doe.png can't be read"
    assert capsys.readouterr().err == "", "words meant for people need no traceback"


def test_a_mistake_of_the_user_is_told_in_its_own_words():
    def open_client(assignment):
        raise PublicError("--partitioner local needs a folder of images")

    session = Session(open_client, ["cat"])
    assert session.get_properties(PLACE) == {"error": "--partitioner local needs a folder of images"}


# The end


def test_after_a_finished_run_a_client_goes_on():
    session = admitted()
    assert session.get_properties(GOODBYE) == {}
    session.raise_for_end()


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("refused", 2, "refused: --partition-id 1 is taken"),
        ("dropped", 1, "dropped: --partition-id 1 is taken"),
        ("failed", 1, "failed: --partition-id 1 is taken"),
        ("stopped", 1, "stopped: --partition-id 1 is taken"),
    ],
)
def test_else_it_ends_with_one_line_and_the_code_that_it_was_told(capsys, kind, code, line):
    session = admitted()
    session.get_properties({**GOODBYE, "kind": kind, "words": "--partition-id 1 is\n\x1b[2Jtaken", "code": code})
    with pytest.raises(RunEnded) as end:
        session.raise_for_end()
    assert end.value.code == code
    assert str(end.value) == line.replace("taken", "[2Jtaken")


def test_its_own_failure_is_the_reason_whatever_the_server_says(capsys):
    session = admitted(replaced={"fit": fails})
    session.fit(WEIGHTS, ROUND)
    session.get_properties({**GOODBYE, "kind": "dropped", "words": "it failed", "code": 1})
    with pytest.raises(RunEnded) as end:
        session.raise_for_end()
    assert (str(end.value), end.value.code) == ("OSError: no folder /data/jane-doe", 1)


def test_on_the_waiting_list_its_turn_is_said_when_it_changes(capsys):
    session = Session(Client, ["cat"])
    for number in (2, 2, 1):
        words = f"all 3 places are taken; you are number {number} on the waiting list"
        session.get_properties({"ask": "told", "kind": "wait", "words": words, "code": 1})
        session.get_properties({"ask": "hello", "nonce": "n"})
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("number ")[2] for line in said] == [
        f"{number} on the waiting list; asking again every 3 s" for number in (2, 1)
    ]
    session.raise_for_end()


def test_every_message_counts_as_progress():
    session = admitted()
    session.get_parameters({})
    session.fit(WEIGHTS, ROUND)
    session.evaluate(WEIGHTS, ROUND)
    session.get_properties(GOODBYE)
    assert session.heard == 5


# On Flower's engines, where every message has a client of its own

RUN_CONFIG = {"rounds": 4, "model": "lenet", "learning-rate": "", "dataset": "synthetic", "data-dir": "data"}


def context(**node_config: object) -> Context:
    return Context(1, 2, {key.replace("_", "-"): value for key, value in node_config.items()}, RecordDict(), RUN_CONFIG)


def test_a_node_has_its_partition_from_the_node_config_and_the_recipe_from_the_run_config():
    assignment = read_assignment(context(partition_id=2, num_partitions="3"))
    assert assignment == Assignment(2, 3, Recipe(rounds=4, model="lenet", own={}))


def test_the_tasks_own_settings_are_words_of_the_run_config(monkeypatch):
    monkeypatch.setitem(RUN_CONFIG, "set", "hidden=32 name=a")
    assert read_assignment(context(partition_id=2, num_partitions=3)).recipe.own == {"hidden": "32", "name": "a"}


@pytest.mark.parametrize("config", [{}, {"partition_id": 1}, {"partition_id": "first", "num_partitions": 3}])
def test_a_node_config_without_a_partition_is_said_with_the_remedy(config):
    with pytest.raises(PublicError, match="its node config names no partition; start each node with --node-config"):
        read_assignment(context(**config))


def test_a_node_says_who_it_is_and_what_it_holds_in_one_answer():
    schema = {"classes": ["cat", "dog"]}
    node = Node(context(partition_id=1, num_partitions=3), lambda a: Client(a, schema=schema), lambda number: None)
    answer = node.get_properties({"salt": "s"})
    hello, summary = read_hello(answer), read_summary(answer)
    assert (hello.classes, hello.wanted, hello.host) == (["cat", "dog"], 1, host_name("s"))
    assert (answer["num_partitions"], summary.train_examples) == (3, 100)


def test_a_node_opens_its_part_for_the_work_itself_too():
    node = Node(context(partition_id=1, num_partitions=3), Client, lambda number: None)
    assert node.fit(WEIGHTS, ROUND)[1:] == (100, {"train_loss": 0.25})
    assert node.get_parameters({}) is WEIGHTS


def test_an_app_opens_the_data_once_and_each_partition_once(monkeypatch):
    opened, made, shared = [], [], []
    compute = SimpleNamespace(find_device=lambda name: f"the {name}", share_cores=lambda *n: shared.append(n))
    task = SimpleNamespace(open_dataset=lambda name, folder: opened.append((name, folder)) or name)
    monkeypatch.setitem(sys.modules, "federation.task.compute", compute)  # imports torch
    monkeypatch.setattr(node_app, "open_task", lambda: task)
    monkeypatch.setattr(node_app, "ClientApp", lambda client_fn: client_fn)
    node_app._open_data.cache_clear()

    def client_class(given, dataset, assignment, device):
        made.append((dataset, assignment.partition, device))
        assert given is task
        return Client(assignment)

    client_fn = make_app(client_class)
    for partition in (0, 1, 0):
        node = client_fn(context(partition_id=partition, num_partitions=2, device="gpu", threads=2))
        node.numpy_client.fit(WEIGHTS, ROUND)
    node_app._open_data.cache_clear()
    assert opened == [("synthetic", "data")]
    assert made == [("synthetic", 0, "the gpu"), ("synthetic", 1, "the gpu")]
    assert shared == [(2, 3)] * 3


def test_the_simulation_engine_can_pickle_an_app_for_its_processes(monkeypatch):
    monkeypatch.setattr(node_app, "ClientApp", lambda client_fn: client_fn)
    kept = inspect.getclosurevars(make_app(Client)).nonlocals
    assert pickle.loads(pickle.dumps(kept)) == kept

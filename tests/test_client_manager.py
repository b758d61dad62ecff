"""Who takes part: what both kinds of admission share, the rest of each, and a whole run on made-up nodes."""

import contextlib
import itertools
import json
import threading
from types import SimpleNamespace

from federation.config import Recipe
from federation.operations.monitoring import Monitoring
from federation.participants.client_manager import Participant, Refused, different_classes
from federation.protocol import DataSummary
from federation.results.observers import Observers
from federation.security.credentials import ServerCredentials
from federation.security.secret import proof
from federation.server import admission, engine_app
from federation.server.dispatch import RunFailed
from federation.server.engine_app import EngineServer, NodeAdmission, make_app, read_run_config

import pytest
from helpers.fake_clients import FakeAdmission, FakeClient
from helpers.in_process import Learner, Proxy, no_disk  # noqa: F401 (used by every test)
from helpers.processes import wait_for


@pytest.fixture
def fake() -> FakeAdmission:
    return FakeAdmission()


def end_of(client: FakeClient) -> FakeClient:
    """The client, once its stream has been ended."""
    assert client.closed.wait(60)
    return client


# Of a client's data


def settle(fake: FakeAdmission, participant: Participant, **values: object) -> int:
    """Let a participant declare its data, with these values."""
    usual = {"train_examples": 1, "test_examples": 1, "buffer_positions": [2], "class_counts": []}
    summary = DataSummary(**{**usual, "input_shape": [], "model_bytes": 0, **values})
    return fake.admission.settle(participant, summary, "client 7")


def test_most_clients_say_which_arrays_are_measured_and_the_others_agree(fake):
    """What more than half have shuts others out at once; it is fixed once all are there."""
    for _ in range(2):
        fake.joins(summary={"statistics": "[4]"})
    assert "measures other arrays of the network (BatchNorm's) than the others" in fake.joins().told["words"]
    assert fake.admitted(fake.joins(summary={"statistics": "[4]"}))
    assert fake.admission.agree() == []
    assert fake.admission.buffer_positions == [4]


def test_counts_by_class_are_of_the_classes_that_the_client_has(fake):
    client = fake.joins(summary={"class_counts": "[60, 40]"})
    assert fake.admission.of_client(client).class_counts == [60, 40]
    words = fake.joins(summary={"class_counts": "[60, 30, 10]"}).told["words"]
    assert words == "client 1 counts its examples by other classes than it has"


@pytest.mark.parametrize(("train", "test"), [(0, 1), (1, 0)])
def test_without_examples_of_both_kinds_a_client_is_refused(fake, train, test):
    client = fake.joins()
    with pytest.raises(Refused, match=f"client 7 has {train} training and {test} test examples; it needs both"):
        settle(fake, fake.admission.of_client(client), train_examples=train, test_examples=test)


def test_a_client_with_inputs_of_another_shape_is_refused_with_both(fake):
    for _ in range(2):
        fake.joins(summary={"input_shape": "[3, 32, 32]"})
    words = fake.joins(summary={"input_shape": "[3, 64, 64]"}).told["words"]
    assert words == "client 2 has inputs of shape [3, 64, 64], the others [3, 32, 32]; use one data.py"


def test_a_model_that_no_message_can_carry_is_refused_before_it_is_trained():
    fake = FakeAdmission(max_message_bytes=2e6)
    words = fake.joins(summary={"model_bytes": 2_500_000}).told["words"]
    assert words == "client 0's model takes 2.5 MB, more than --max-message-mb 2; raise it at the server"


def test_a_client_lost_while_it_read_its_data_does_not_count(fake):
    client = fake.joins()
    lost = Participant(0, client, "another", "here")
    assert settle(fake, lost) == 0
    assert not lost.ready


# Waiting, and Flower's names for it


def test_it_waits_until_so_many_are_ready_but_not_longer_than_it_may(fake):
    stop = threading.Event()
    fake.joins()
    assert fake.admission.wait_ready(1, 0, stop)
    assert not fake.admission.wait_ready(2, 0, stop)
    thread = threading.Thread(target=fake.joins)
    thread.start()
    assert fake.admission.wait_for(2, 60)
    thread.join()
    stop.set()
    assert not fake.admission.wait_ready(3, 60, stop)


def test_flowers_functions_tell_of_those_that_are_ready(fake):
    clients = [fake.joins() for _ in range(3)]
    fake.admission.participants[1].ready = False
    assert fake.admission.num_available() == 2
    assert list(fake.admission.all().values()) == [clients[0], clients[2]]
    assert fake.admission.sample(1) == [clients[0]]


def test_who_leaves_is_said_once_and_only_if_it_had_joined(fake):
    client = fake.joins()
    for _ in range(2):
        fake.admission.unregister(client)
    fake.admission.unregister(FakeClient())
    assert [words for words in fake.said if "left" in words] == ["client 0 left; its place is free"]


def test_lists_of_classes_in_another_order_are_said_to_be():
    names = [f"class number {i}" for i in range(20)]
    assert different_classes(names, names[::-1]).endswith("; they are in another order")


# Admission: who is told what


@pytest.mark.parametrize(("claim", "how"), [("", "missing"), ("0" * 64, "wrong")])
def test_without_proof_of_the_secret_a_client_is_refused(claim, how):
    client = FakeAdmission(credentials=ServerCredentials(b"battery")).joins(proof=claim)
    assert client.told["kind"] == "refused"
    assert client.told["words"].startswith(f"{how} shared secret; start the client with the --secret-file")
    assert client.assigned == {}, "it hears nothing of the run"


def test_with_proof_of_the_secret_it_joins():
    class Knowing(FakeClient):
        def get_properties(self, ins, timeout, group_id):
            if ins.config["ask"] == "hello":
                self.hello["proof"] = proof(b"battery", ins.config["nonce"])
            return super().get_properties(ins, timeout, group_id)

    fake = FakeAdmission(credentials=ServerCredentials(b"battery"))
    assert fake.admitted(fake.joins(Knowing()))


def test_a_client_of_another_protocol_is_told_both_versions(fake):
    words = fake.joins(protocol=7).told["words"]
    assert words == "the client's handshake is version 7, the server's 1; update the older one"


def test_without_a_waiting_list_who_finds_no_place_is_refused():
    fake = FakeAdmission(1, waiting_list=False)
    fake.joins()
    client = fake.joins()
    assert (client.told["kind"], client.told["words"]) == (
        "refused", "all 1 places are taken, and this server keeps no waiting list",
    )  # fmt: skip
    assert client.reconnect_in is None


def test_a_waiting_list_has_an_end(monkeypatch):
    monkeypatch.setattr(admission, "WAITERS", 2)
    fake = FakeAdmission(1)
    kinds = [fake.joins(instance=f"{number}" * 32).told.get("kind") for number in range(4)]
    assert kinds == [None, "wait", "wait", "refused"]


class Breaking(FakeClient):
    """Breaks off when it is asked this."""

    def __init__(self, question: str, **answers: object):
        super().__init__(**answers)
        self.question = question

    def get_properties(self, ins, timeout, group_id):
        if ins.config["ask"] == self.question:
            raise admission.GrpcBridgeClosed
        return super().get_properties(ins, timeout, group_id)


def refuses(fake: FakeAdmission, client: FakeClient) -> str:
    """Connect; what the server says of it."""
    said = len(fake.said)
    fake.admission.register(client)
    return wait_for(lambda: fake.said[said:], "a refusal", 60)[0]


def test_who_breaks_off_before_it_has_joined_frees_its_place(fake):
    assert refuses(fake, Breaking("hello")) == "turned away: a connection that broke off before it had joined"
    assert refuses(fake, Breaking("place")) == "turned away: client 0 that broke off before it had joined"
    assert fake.joins().partition == 0


def test_a_connection_is_called_silent_and_a_client_that_reads_its_data_is_not(fake, monkeypatch):
    moments = itertools.count(0, 11)
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    assert refuses(fake, Breaking("hello")) == "turned away: a connection that said nothing for 10 s"
    assert refuses(fake, Breaking("place")) == "turned away: client 0 that broke off before it had joined"


def test_a_client_that_is_lost_may_come_back_at_once(fake):
    client = fake.joins(instance="a" * 32)
    fake.admission.lose(client)
    assert client.closed.is_set()
    assert client.told == {}
    assert fake.joins(instance="a" * 32).partition == 0


def test_a_client_that_is_dropped_is_told_why_and_its_place_is_free(fake):
    client = fake.joins()
    fake.admission.drop(fake.admission.of_client(client), "3 bad updates in a row")
    assert end_of(client).told["kind"] == "dropped"
    assert client.told["words"] == "3 bad updates in a row"
    assert fake.joins().partition == 0


def test_who_can_not_be_told_is_cut_off(fake):
    client = fake.joins(Breaking("told"))
    fake.admission.drop(fake.admission.of_client(client), "it failed")
    assert end_of(client).told == {}


def test_at_the_end_all_are_told_and_the_busy_are_not_waited_for(fake):
    let_go = threading.Event()

    class Busy(FakeClient):
        def get_properties(self, ins, timeout, group_id):
            if ins.config["ask"] == "told":
                let_go.wait(60)
            return super().get_properties(ins, timeout, group_id)

    busy, free = fake.joins(Busy()), fake.joins()
    fake.admission.close("stopped", "the server was stopped", seconds=0)
    assert end_of(free).told["kind"] == "stopped"
    assert not busy.closed.is_set()
    let_go.set()
    end_of(busy)
    fake.admission.unregister(free)  # as Flower does
    assert not any("left" in words for words in fake.said), "at the end that is no news"


def test_who_was_admitted_too_late_is_told_that_the_run_is_over(fake):
    class Late(FakeClient):
        def get_properties(self, ins, timeout, group_id):
            if ins.config["ask"] == "hello":
                fake.admission.closed = True
            return super().get_properties(ins, timeout, group_id)

    assert fake.joins(Late()).told["words"] == "the run is over"


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (FakeClient(classes='["dog"]'), "client 1 could not start: no images of a cat"),
        (Breaking("", classes='["dog"]'), "client 1 broke off"),
    ],
)
def test_who_can_not_take_on_all_classes_makes_way(client, words):
    fake = FakeAdmission(recipe=Recipe(partitioner="local"))
    fake.joins(classes='["cat", "dog"]')
    fake.joins(client)
    (odd,) = fake.admission.agree_on_classes()
    assert odd.client is client
    client.summary, client.question = {"error": "no images of a cat"}, "place"
    fake.admission.reassign(odd)
    assert end_of(client).told["words"] == words
    assert [one.partition for one in fake.admission.ready()] == [0]
    assert f"turned away: {words}" in fake.said


# Nodes of Flower's engines


class Node(Proxy):
    """Flower's proxy of a node, without a node."""

    def __init__(self, partition: int, number: int = 2, **answers: object):
        super().__init__(Learner(partition + 1.0))
        classes = json.dumps(answers.pop("classes", ["cat", "dog"]))
        who = {"instance": f"{partition:032d}", "host": "here", "wanted": partition, "held": -1}
        numbers = {"train_examples": 10, "test_examples": 10, "num_partitions": number}
        self.answer = {**who, **numbers, "classes": classes, "statistics": "[1, 2]", **answers}
        self.asked: list[dict] = []

    def get_properties(self, ins, timeout, group_id):
        self.asked.append(ins.config)
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(properties=self.answer)


@contextlib.contextmanager
def nodes_of(recipe: Recipe | None = None):
    events: list[dict] = []
    nodes = NodeAdmission(recipe or Recipe(), events, load_timeout=7)
    try:
        yield nodes, events
    finally:
        nodes.close("finished", "")


def test_every_node_gets_the_salt_of_the_run_and_nothing_else():
    with nodes_of() as (nodes, _):
        node = Node(1)
        nodes.register(node)
        assert nodes.wait_ready(1, 60, threading.Event())
    assert node.asked == [{"salt": nodes.salt}]
    assert (nodes.num_partitions, [one.partition for one in nodes.ready()]) == (2, [1])


def test_a_node_with_other_classes_is_left_out_when_the_run_begins():
    with nodes_of() as (nodes, events):
        for node in (Node(0, 3, classes=["cow", "dog"]), Node(1, 3), Node(2, 3)):
            nodes.register(node)
        assert nodes.wait_ready(3, 60, threading.Event())
        (odd,) = nodes.agree_on_classes()
        nodes.reassign(odd)
        assert [one.partition for one in nodes.ready()] == [1, 2]
    words = "client 0 is no longer asked: its classes [cow, dog] are not the federation's [cat, dog]"
    assert words in [event["words"] for event in events if event["event"] == "refuse"]


def test_a_node_that_does_not_answer_is_said_once_and_asked_until_the_end(monkeypatch, capsys):
    monkeypatch.setattr(engine_app, "RETRY_SECONDS", 0.001)
    node = Node(0)
    node.answer = ValueError("Message contains an Error")
    with nodes_of() as (nodes, _):
        nodes.register(node)
        wait_for(lambda: len(node.asked) > 3, "asked again", 60)
    asked = threading.active_count()
    wait_for(lambda: threading.active_count() <= asked, "the end of asking", 60)
    line = "a node can't answer yet (Message contains an Error); asking again every 0.001 s\n"
    assert capsys.readouterr().out == line


# A whole run on an engine


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A server on an engine with nodes, and the folder of its run."""

    def start(*nodes, **values):
        config = {"rounds": 2, "join-timeout": 60.0, "run-dir": f"{tmp_path}/run", "dataset": "synthetic", **values}
        server = EngineServer(config, Monitoring)
        for node in nodes:
            server.clients.register(node)
        return server

    monkeypatch.setattr(engine_app, "finish", lambda folder: None)  # draws the pictures
    return start


def test_a_run_on_nodes_ends_with_the_mean_of_their_updates(engine, tmp_path, capsys):
    nodes = [Node(0), Node(1)]
    server = engine(*nodes)
    _, seconds = server.fit(num_rounds=2, timeout=None)
    server.disconnect_all_clients(timeout=None)
    assert [node.learner.fitted for node in nodes] == [[1, 2]] * 2
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [row["accuracy"] for row in history["rounds"]] == [0, 1.5, 3]
    assert sorted(event["event"] for event in history["events"]) == ["join", "join"]
    assert history["config"]["clients"] == 2
    assert seconds >= 0
    assert "server on a Flower engine: " in capsys.readouterr().out


def test_who_looks_at_a_run_is_told_of_it_on_an_engine_too(engine, tmp_path):
    told = []
    server = engine(Node(0), Node(1))
    server.open_monitoring = lambda args: SimpleNamespace(observe=lambda run: told.append(run) or Observers([observer]))
    observer = SimpleNamespace(begin=lambda _: None, round=lambda record: told.append(record.round), end=told.append)
    server.fit(num_rounds=2, timeout=None)
    assert told[0].folder.path == tmp_path / "run"
    assert told[1:] == [0, 1, 2, 0]  # the rounds, and the exit code
    assert told[0].history.events is server.events


def test_a_run_that_fails_is_an_error_for_the_engine(engine):
    nodes = [Node(0), Node(1, classes=["cat", "dog"])]
    nodes[1].learner.bad_fit = nodes[0].learner.bad_fit = lambda n, w, e, m: (w, 0, m)
    with pytest.raises(RunFailed, match="the run ended with exit code 1; its last lines say why"):
        engine(*nodes, **{"rejoin-wait": 0.0}).fit(num_rounds=2, timeout=None)


def test_without_any_node_the_run_is_over_after_join_timeout(engine):
    with pytest.raises(RunFailed, match=r"no node came within 0.01 s"):
        engine(**{"join-timeout": 0.01}).fit(num_rounds=2, timeout=None)


def test_a_folder_that_holds_a_run_is_an_error_for_the_engine_and_not_its_end(engine, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.json").write_text("{}")
    with pytest.raises(RunFailed, match="the run can't begin; the line above says why"):
        engine(Node(0), Node(1)).fit(num_rounds=2, timeout=None)
    assert "already holds a run" in capsys.readouterr().err


def test_an_app_has_its_rounds_from_the_run_config():
    server_fn = make_app(Monitoring)._server_fn
    made = server_fn(SimpleNamespace(run_config={"rounds": 7, "seed": ""}))
    assert made.config.num_rounds == 7
    assert isinstance(made.server, EngineServer)


def test_the_run_config_has_all_checks_of_the_command_line():
    assert read_run_config({"strategy": "fedadam", "device": "cpu"}, clients=5).settings.clients == 5
    with pytest.raises(ValueError, match=r"^run config: --min-clients must be between 1 and --clients"):
        read_run_config({"min-clients": 9}, clients=5)
    with pytest.raises(ValueError, match=r"^run config: unrecognized arguments: --colour=red"):
        read_run_config({"colour": "red"}, clients=5)

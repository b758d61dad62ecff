"""The same code on Flower's engines: nodes in the place of streams, and the same bits."""

import importlib.util
import shlex
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

from federation.client.node_app import Node, find_node_device
from federation.config import Recipe
from federation.console import PublicError
from federation.server.engine_app import NodeAdmission, read_run_config
from federation.server.options import build_parser
from federation.server.settings import ServerSettings
from federation.setting import flag

import pytest
from flwr.app import Context, RecordDict
from helpers.engines import Engine, commands
from helpers.example_runs import make_images
from helpers.processes import ROOT, Federation, wait_for

PAGE = (ROOT / "docs/engines.md").read_text()
LINES = [*commands(PAGE, "Simulation"), *commands(PAGE, "Deployment")]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
pytestmark = pytest.mark.xdist_group("engines")  # they share what is slow to start
QUICK = "rounds=1 model='lenet' run-dir='run'"


# The run config


def test_the_run_config_of_the_app_is_the_default_settings():
    args = read_run_config(CONFIG, clients=3)
    assert (args.recipe, args.settings) == (Recipe(), ServerSettings())


def test_every_key_of_the_run_config_is_a_flag_or_where_the_data_are():
    flags = {each.removeprefix("--") for action in build_parser("")._actions for each in action.option_strings}
    assert set(CONFIG) - flags == {"dataset", "data-dir", "device", "threads"}
    named = {flag(name).removeprefix("--") for name in (*Recipe.names(), *ServerSettings.names())}
    assert set(CONFIG) >= named - {"clients"}


def test_the_app_holds_the_programs_and_every_module_of_every_room(tmp_path):
    with Engine(tmp_path, "local", fresh=True) as engine:
        engine.run(f"flwr build --app {shlex.quote(str(ROOT))}")
    with zipfile.ZipFile(next(tmp_path.glob("*.fab"))) as app:
        inside = {name for name in app.namelist() if name.endswith(".py")}
    modules = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("federation/**/*.py")]}
    assert {"server.py", "federation/config.py", "federation/server/rounds.py"} <= modules
    assert inside == modules


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compress": "zip"}, "run config: --compress must be one of none, fp16, got 'zip'"),
        ({"set": "hidden"}, "run config: --set needs NAME=VALUE, got 'hidden'"),
        ({"rounds": -1}, "run config: --rounds must be at least 1, got -1"),
        ({"rounds": "many"}, "run config: argument --rounds: invalid int value: 'many'"),
    ],
)
def test_a_wrong_run_config_is_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_run_config({**CONFIG, **changes}, clients=3)
    assert len(str(caught.value).splitlines()) == 1


# Who joins


class FakeNode:
    """Flower's proxy of a node, without a node: gives its answer, after the first failure if there is one."""

    def __init__(self, partition: int = 0, number: int = 3, *, first: Exception | None = None, **answer: object):
        self.cid = f"node {id(self)}"
        self.first = first
        self.asked = 0
        self.answer = {
            "classes": '["cat", "dog"]',
            "instance": f"{id(self):032d}",
            "host": "here",
            "wanted": partition,
            "held": -1,
            "num_partitions": number,
            "train_examples": 100,
            "test_examples": 10,
            "statistics": "[2]",
            **answer,
        }

    def get_properties(self, ins, timeout, group_id):
        self.asked += 1
        if self.first and self.asked == 1:
            raise self.first
        return SimpleNamespace(properties=self.answer)


@pytest.fixture
def nodes(monkeypatch) -> NodeAdmission:
    monkeypatch.setattr("federation.server.engine_app.RETRY_SECONDS", 0.01)
    nodes = NodeAdmission(Recipe(), [], load_timeout=1)
    nodes.events = []
    nodes.notify = lambda *event: nodes.events.append(event)
    yield nodes
    nodes.close("finished", "")


def said(nodes: NodeAdmission, kind: str) -> str:
    """The words of the first such event, once it is there."""
    return wait_for(lambda: next((words for event, _, words in list(nodes.events) if event == kind), None), kind, 5)


def test_a_node_gets_the_partition_of_its_node_config(nodes):
    nodes.register(FakeNode(2))
    assert said(nodes, "join") == "client 2 joined, 100 training examples (1 of 3 there)"
    assert [one.partition for one in nodes.ready()] == [2]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (FakeNode(0), "two nodes have partition-id 0; give each its own"),
        (FakeNode(3), "partition-id 3 is not within 0 and 2"),
        (FakeNode(1, number=4), "a node's num-partitions is 4, the others' 3"),
        (FakeNode(1, error="no such folder"), "a node could not start: no such folder"),
        (FakeNode(1, test_examples=0), "it needs both"),
    ],
)
def test_a_node_that_does_not_fit_is_turned_away_with_the_reason(nodes, node, words):
    nodes.register(FakeNode(0))
    said(nodes, "join")
    nodes.register(node)
    assert words in said(nodes, "refuse")
    assert len(nodes.ready()) == 1


def test_a_node_that_does_not_answer_is_asked_again(nodes):
    nodes.register(FakeNode(first=ValueError("Message contains an Error")))
    said(nodes, "join")


def test_a_node_lost_in_a_round_comes_back_when_it_answers_again(nodes):
    node = FakeNode()
    nodes.register(node)
    said(nodes, "join")
    nodes.lose(node)
    assert nodes.wait_ready(1, 5, threading.Event())
    assert node.asked == 2


def test_a_node_that_flower_took_off_its_list_is_asked_no_more(nodes):
    node = FakeNode(first=ValueError())
    nodes.register(node)
    nodes.unregister(node)
    asked = node.asked
    assert not nodes.wait_ready(1, 0.2, threading.Event())
    assert node.asked <= asked + 1


def test_a_node_that_failed_is_left_out_for_good(nodes):
    node = FakeNode()
    nodes.register(node)
    said(nodes, "join")
    nodes.drop(nodes.ready()[0], "it failed")
    assert said(nodes, "refuse") == "client 0 is no longer asked: it failed"
    assert not nodes.wait_ready(1, 0.1, threading.Event())


# A node's own side


def make_node(node_config: dict, open_client=None) -> Node:
    context = Context(1, 2, node_config, RecordDict(), CONFIG)
    return Node(context, open_client, lambda clients_on_host: None)


def test_a_node_without_a_partition_says_how_to_name_one():
    answer = make_node({}).get_properties({})
    assert "--node-config 'partition-id=0 num-partitions=3'" in answer["error"]
    assert "secret" not in make_node({"dataset": "secret"}).get_properties({})["error"]


def test_a_node_whose_device_is_not_there_says_so():
    with pytest.raises(PublicError, match=r"^its device abacus is not there$"):
        find_node_device("abacus")


def test_of_what_opening_the_data_raises_the_server_is_told_the_kind_alone(capsys):
    def open_client(assignment):
        raise FileNotFoundError("no folder /data/jane-doe")

    node = make_node({"partition-id": 1, "num-partitions": 3}, open_client)
    report = {"error": "its own code failed (FileNotFoundError)"}
    assert node.get_properties({}) == report
    assert node.fit([], {}) == ([], 0, report)
    assert "no folder /data/jane-doe" in capsys.readouterr().err


# The engines themselves


@pytest.fixture(scope="module")
def script_weights(tmp_path_factory) -> list:
    """What the scripts make of the quick recipe."""
    with Federation(tmp_path_factory.mktemp("scripts")) as federation:
        server = federation.server("--rounds", 1, "--model", "lenet")
        for partition in range(3):
            federation.client("--partition-id", partition)
        server.ends(0)
        return federation.weights()


def same(these: list, those: list) -> bool:
    return len(these) == len(those) and all((a == b).all() for a, b in zip(these, those, strict=True))


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    if not importlib.util.find_spec("ray"):
        pytest.skip("ray is not installed: pip install -r requirements-simulation.txt")
    with Engine(tmp_path_factory.mktemp("simulation"), "local") as engine:
        engine.configure("insecure = true")
        engine.command("flower-superlink --insecure --simulation --port 9092").says("startup complete|Uvicorn running")
        engine.run(next(line for line in LINES if "simulation-config" in line))
        yield engine


RUNS = [line for line in LINES if line.startswith("flwr run") and "hospitals" not in line]


@pytest.mark.parametrize("line", RUNS)
def test_simulation(line, simulation, script_weights, tmp_path):
    simulation.run_dir = tmp_path / "run"
    images = make_images(tmp_path / "images", train=80, test=80)  # three classes; two for each of 100 nodes
    line = line.replace("/path/to/my-images", str(images))
    more = QUICK.replace("'run'", f"'{simulation.run_dir}'")
    more += f" device='cpu' threads=1 tensorboard='{tmp_path / 'scalars'}'"
    output = simulation.run(f'{line} --run-config "{more}"')
    assert "done: model.safetensors" in output, output
    (events,) = (tmp_path / "scalars").glob("events.out.tfevents.*")
    assert events.stat().st_size > 100
    rounds, nodes = simulation.history()["rounds"], 100 if "100" in line else 3
    assert [row["clients"] for row in rounds] == [nodes, 10 if nodes == 100 else 3]
    assert len(rounds[-1]["accuracy_by_client"]) == nodes
    if "config" not in line:
        assert same(simulation.weights(), script_weights)


def test_deployment_with_tls_and_authenticated_nodes(tmp_path, script_weights):
    with Engine(tmp_path, "hospitals") as engine:
        engine.configure(f'root-certificates = "{tmp_path}/certificates/ca.pem"')
        lines = LINES[LINES.index("python -m federation.certificates --host 127.0.0.1") :]
        for line in lines:
            if line.startswith("flower-superlink"):
                engine.command(line).says("startup complete|Uvicorn running")
            elif line.startswith("flower-supernode"):
                engine.command(line).says("SuperNode ID")
            elif line.startswith("flwr run"):
                unregistered = impostor(engine, lines)
                output = engine.run(f'{line} --run-config "{QUICK}"')
                assert "done: model.safetensors" in output, output
                assert "SuperNode ID" not in unregistered.output
            elif line.startswith("flwr"):
                engine.run(line)
            else:
                python = line.replace("python ", f"{shlex.quote(sys.executable)} ")
                subprocess.run(python, shell=True, cwd=tmp_path, env=engine.env, check=True, capture_output=True)
        assert same(engine.weights(), script_weights)


def impostor(engine: Engine, lines: list[str]):
    """A node whose key nobody has registered."""
    make_key = next(line for line in lines if line.startswith("ssh-keygen")).replace("node0", "unregistered")
    subprocess.run(make_key, shell=True, cwd=engine.folder, check=True)
    start = next(line for line in lines if line.startswith("flower-supernode"))
    return engine.command(start.replace("node0", "unregistered"))


def test_every_command_on_the_engines_is_one_that_a_test_runs():
    """Those of pip are what installed this test's own environment."""
    rest = [line for line in LINES if not line.startswith(("flwr", "flower-", "ssh-keygen", "python -m federation"))]
    assert rest == ["pip install -r requirements-simulation.txt"]
    assert (ROOT / Path(shlex.split(rest[0])[-1])).exists()

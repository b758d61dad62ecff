"""Which module may import which: each side has rooms of its own, and both share what they must agree on."""

import ast
from collections.abc import Iterable

import pytest
from helpers.processes import ROOT

Imports = dict[str, set[str]]  # of each module, by dotted names; our own as modules

# Which rooms' modules a room may import; the scripts may import every room.
MAY_IMPORT = {
    "shared": {"shared"},
    "security": {"shared", "security"},
    "aggregation": {"shared", "security", "aggregation"},
    "results": {"shared", "results"},
    "networks": {"shared", "networks"},
    "task": {"shared", "networks", "task"},
    "privacy": {"shared", "security", "networks", "task", "privacy"},
    "attacks": {"shared", "networks", "task", "privacy", "attacks"},
    "client": {"shared", "security", "networks", "task", "privacy", "client"},
    "participants": {"shared", "security", "participants"},
    "server": {"shared", "security", "aggregation", "results", "participants", "server"},
    "operations": {"shared", "security", "results", "server", "operations"},
}
COMMANDS = {
    "federation.audit",
    "federation.certificates",
    "federation.health",
    "federation.identity",
    "federation.report",
    "federation.verify",
}  # names for `python -m`, of a function in a room
PRIVATE = ("flwr.server.superlink", "flwr.proto", "flwr.supercore", "flwr.client.message_handler", "flwr.compat")
PRIVATE += ("flwr.common.serde",)
MAY_IMPORT_PRIVATE = {"federation.server.grpc_server", "federation.client.connection"}


def room(module: str) -> str:
    names = module.split(".")
    if names[0] != "federation" or module in COMMANDS:
        return "scripts"
    return names[1] if len(names) > 1 and names[1] in MAY_IMPORT else "shared"


def walls(imports: Imports) -> list[str]:
    """No room imports one that it must not."""
    pairs = [(one, other) for one, other in pairs_of(imports) if room(one) != "scripts"]
    return [f"{one} imports {other}" for one, other in pairs if room(other) not in MAY_IMPORT[room(one)]]


def torch_in_the_server(imports: Imports) -> list[str]:
    """Nothing that server.py leads to imports torch."""
    reached, ahead = set(), {"server"}
    while ahead:
        reached |= ahead
        named = {other for one in ahead for other in imports[one] if other in imports}
        ahead = {part for one in named for part in packages(one) if part in imports} - reached
    found = [(one, other) for one, other in pairs_of(imports, ours=False) if other.split(".")[0].startswith("torch")]
    return [f"{one} imports {other}" for one, other in found if one in reached]


def importers_of_the_sides(imports: Imports) -> list[str]:
    """server.py and client.py are programs: who needs a part of one finds it in a room."""
    return [f"{one} imports {other}" for one, other in pairs_of(imports) if other in ("server", "client")]


def importers_of_private_names(imports: Imports) -> list[str]:
    """What Flower may move in any release is imported in one module a side."""
    pairs = [(one, other) for one, other in pairs_of(imports, ours=False) if one not in MAY_IMPORT_PRIVATE]
    return [f"{one} imports {other}" for one, other in pairs if f"{other}.".startswith(tuple(f"{p}." for p in PRIVATE))]


def packages(module: str) -> Iterable[str]:
    """It and the packages around it, which Python imports first."""
    names = module.split(".")
    return (".".join(names[: end + 1]) for end in range(len(names)))


def pairs_of(imports: Imports, ours: bool = True) -> Iterable[tuple[str, str]]:
    return ((one, other) for one in sorted(imports) for other in sorted(imports[one]) if (other in imports) == ours)


def read_imports() -> Imports:
    """Of the scripts and of federation/; those within functions count too."""
    paths = {p.relative_to(ROOT): p for p in [*ROOT.glob("*.py"), *(ROOT / "federation").rglob("*.py")]}
    trees = {
        ".".join(p.parent.parts if p.stem == "__init__" else p.with_suffix("").parts): ast.parse(path.read_bytes())
        for p, path in paths.items()
    }
    return {module: set(names_in(tree, set(trees))) for module, tree in trees.items()}


def names_in(tree: ast.Module, ours: set[str]) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]  # a module, or what a module holds
            yield from (name if name in ours or node.module not in ours else node.module for name in names)


@pytest.fixture(scope="module")
def imports() -> Imports:
    return read_imports()


def test_the_imports_are_read(imports):
    assert {"server", "model", "federation", "federation.config", "federation.server.rounds"} <= set(imports)
    assert {"federation.results.report", "federation.server.engine_app", "flwr.server.start_server"} <= imports[
        "server"
    ]
    assert {"federation.task.compute", "torch"} <= {*imports["client"], *imports["federation.task.compute"]}


RULES = {
    walls: [
        {"federation.client.session": {"federation.server.rounds"}, "federation.server.rounds": set()},
        {"federation.client.session": {"federation.results.html"}, "federation.results.html": set()},
        {"federation.results.html": {"federation.server.rounds"}, "federation.server.rounds": set()},
        {"federation.aggregation.fedbuff": {"federation.results.html"}, "federation.results.html": set()},
        {"federation.security.tls": {"federation.client.session"}, "federation.client.session": set()},
        {"federation.config": {"federation.security.tls"}, "federation.security.tls": set()},
        {"federation.config": {"federation.report"}, "federation.report": set()},
        {"federation": {"model"}, "model": set()},
        {"federation.server.rounds": {"federation.task.task"}, "federation.task.task": set()},
        {"federation.results.html": {"federation.task.task"}, "federation.task.task": set()},
        {"federation.aggregation.fedbuff": {"federation.task.weights"}, "federation.task.weights": set()},
        {"federation.protocol": {"federation.task.task"}, "federation.task.task": set()},
        {"federation.task.task": {"federation.client.session"}, "federation.client.session": set()},
        {"federation.task.task": {"federation.security.tls"}, "federation.security.tls": set()},
        {"federation.task.training": {"federation.results.html"}, "federation.results.html": set()},
        {"federation.task.task": {"data"}, "data": set()},
        {"federation.networks.batch_norm": {"federation.task.task"}, "federation.task.task": set()},
    ],
    torch_in_the_server: [
        {"server": {"a"}, "a": {"b"}, "b": {"torch.nn"}},
        {"server": {"torchvision"}},
        {"server": {"a.b"}, "a.b": set(), "a": {"torch"}},
    ],
    importers_of_the_sides: [{"baseline": {"client"}, "client": set()}],
    importers_of_private_names: [
        {"server": {"flwr.common.serde"}},
        {"federation.protocol": {"flwr.proto.transport_pb2.ClientMessage"}},
    ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_holds(rule, imports):
    assert rule(imports) == []


@pytest.mark.parametrize(("rule", "broken"), [(rule, one) for rule, cases in RULES.items() for one in cases])
def test_the_rule_sees_who_breaks_it(rule, broken):
    assert len(rule(broken)) == 1


def test_what_is_allowed_is_not_taken_for_a_breach():
    fine = {
        "server": {"federation.server.rounds", "flwr.server.start_server", "flwr.protocol"},
        "client": {"torch", "federation.client.session", "federation.task.weights"},
        "model": {"torch", "federation.task.classification"},
        "federation.server.rounds": {"federation.results.html", "federation.config"},
        "federation.client.session": {"federation.config", "federation.security.tls", "federation.task.weights"},
        "federation.task.classification": {"torch", "federation.config", "federation.task.weights"},
        "federation.task.weights": {"torch", "federation.config"},
        "federation.server.grpc_server": {"flwr.common.serde"},
        "federation.report": {"federation.results.html"},
        **{name: set() for name in ("federation.results.html", "federation.config", "federation.security.tls")},
    }
    assert [rule(fine) for rule in RULES] == [[], [], [], []]

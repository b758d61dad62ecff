"""Flower 1.43 keeps what is left of its gRPC code elsewhere: a copy of the installed one with it moved there works."""

import re
import shutil
from pathlib import Path

import flwr
import pytest
from helpers.processes import CLEAN, ROOT, Federation

MOVED = {  # today's package: where it goes
    "flwr.server.superlink.fleet.grpc_bidi": "flwr.compat.server.grpc_bidi",
    "flwr.client.message_handler": "flwr.compat.client.message_handler",
}


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A folder with such a copy of Flower."""
    site = tmp_path / "site"
    shutil.copytree(Path(flwr.__file__).parent, site / "flwr", ignore=shutil.ignore_patterns("__pycache__"))
    for old, new in MOVED.items():
        (site / old.replace(".", "/")).rename(site / new.replace(".", "/"))
    for path in (site / "flwr").rglob("*.py"):
        text = path.read_text()
        for old, new in MOVED.items():
            text = text.replace(old, new)
        if path.is_relative_to(site / "flwr/compat/server/grpc_bidi"):  # what it imports from its former neighbours
            text = re.sub(r"from \.\.\.?(?=\w)", "from flwr.server.superlink.fleet.", text)
        path.write_text(text)
    return site


def test_a_run_on_a_flower_whose_private_code_has_moved(tmp_path, moved):
    environment = {**CLEAN, "PYTHONPATH": f"{moved}:{ROOT}"}
    with Federation(tmp_path) as federation:
        probe = "import flwr.compat.server.grpc_bidi as g, flwr.server.superlink.fleet as f; print(g.__file__)"
        assert str(moved) in federation.start("probe", "-c", probe, env=environment).ends(0)
        absent = federation.start("absent", "-c", "import flwr.server.superlink.fleet.grpc_bidi", env=environment)
        assert "ModuleNotFoundError" in absent.ends(1)
        server = federation.server("--rounds", 2, env=environment)
        clients = [federation.tiny(env=environment) for _ in range(3)]
        for process in [server, *clients]:
            process.ends(0)
        assert [row["clients"] for row in federation.history()["rounds"]] == [3, 3, 3]

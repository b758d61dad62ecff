"""What every program says of itself."""

import re
import subprocess
import sys
import tomllib

import pytest
from helpers.processes import CLEAN, ROOT, quick_python

SCRIPTS = ["server.py", "client.py", "demo.py", "baseline.py", "evaluate.py", "classify.py", "leak.py"]
COMMANDS = {name: [name] for name in SCRIPTS}
COMMANDS |= {name: ["-m", f"federation.{name}"] for name in ("certificates", "report")}


def said_by(*words: str) -> subprocess.CompletedProcess:
    command = [quick_python(), *words]
    return subprocess.run(command, cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_program_has_a_version(name):
    done = said_by(*COMMANDS[name], "--version")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{project['name']} {project['version']} (flwr 1.")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_program_says_what_each_option_is_for_and_its_default_once(name):
    done = said_by(*COMMANDS[name], "--help")
    assert (done.returncode, done.stderr) == (0, "")
    program = " ".join(["python", *COMMANDS[name]]) if "-m" in COMMANDS[name] else name
    assert done.stdout.startswith(f"usage: {program} ")
    options = re.findall(r"^  (--?\w.*?)(?=^  \S|^\S|^$)", done.stdout, re.S | re.M)
    assert len(options) == len(re.findall(r"^  --?\w", done.stdout, re.M)) >= 2
    for option in options:
        assert re.search(r"\S( {2,}|\n +)\S", option), f"nothing about {option}"
        assert option.count("(default") <= 1, option
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_the_client_answers_before_it_imports_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "client.py", "--help"],
        cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "federation.client.options" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torch", "torchvision", "flwr")}

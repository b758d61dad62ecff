"""Every command of the README works as it stands there; only address, folder and size of the work are the test's."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import CLEAN, ROOT, Federation

README = (ROOT / "README.md").read_text()
COMMANDS = sorted({line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()})
QUICK = ["--rounds", "1", "--model", "lenet"]


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """What the Makefile would have made: this Python, with everything installed."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "venv/installed").touch()
    (tmp_path / "venv/installed-test").touch()
    return tmp_path / "venv"


@pytest.fixture
def my_images(tmp_path: Path) -> Path:
    """A folder of one's own, as the README describes it."""
    from PIL import Image

    for split in ("train", "test"):
        for name, colour in (("cat", "orange"), ("dog", "brown")):
            folder = tmp_path / "my-images" / split / name
            folder.mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (40 + number, 50), colour).save(folder / f"{number}.jpg")
    return tmp_path / "my-images"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python")])
def test_python_command(command, tmp_path):
    script, *flags = shlex.split(command)[1:]
    with Federation(tmp_path) as federation:
        if "--help" in flags:
            federation.start(command, ROOT / script, *flags).ends(0)
        elif script == "server.py":
            server = federation.server(*flags)
            for _ in range(3):
                federation.tiny()
            server.ends(0)
        elif script == "client.py":
            server = federation.server("--clients", 1, *QUICK)
            federation.client(*flags, "--threads", 1, cwd=tmp_path).ends(0)
            server.ends(0)
        else:
            pytest.fail(f"no test runs {command!r}")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_command(command, tmp_path, venv, my_images):
    words = [*shlex.split(command.replace("my-images", str(my_images))), f"VENV={venv}"]
    if words[1] == "test":
        words.append("--dry-run")  # it is what runs this test
    elif "DATASET=" not in command:
        words.append(f"ARGS=--dataset synthetic --run-dir {tmp_path / 'run'} -- {' '.join(QUICK)}")
    else:
        words.append(f"ARGS=--run-dir {tmp_path / 'run'} -- {' '.join(QUICK)}")
    done = subprocess.run(words, cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("pytest" if words[1] == "test" else "total time") in done.stdout


def test_every_command_is_one_that_a_test_runs():
    assert all(command.startswith(("python", "make")) for command in COMMANDS)
    assert len(COMMANDS) >= 10

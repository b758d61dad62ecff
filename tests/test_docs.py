"""Every command of the README works as it stands there; only address, folder and size of the work are the test's."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.engines import commands
from helpers.example_runs import CLASSES, make_images, make_run
from helpers.processes import CLEAN, ROOT, Federation

README = (ROOT / "README.md").read_text()
ON_ENGINES = commands(README, "On Flower's engines")  # which test_engines.py runs
COMMANDS = sorted(
    {line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()} - {*ON_ENGINES}
)
QUICK = ["--rounds", "1", "--model", "lenet"]
AFTERWARDS = re.compile(r"python (evaluate\.py|baseline\.py|classify\.py|-m federation\.report) ")  # on a finished run


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


@pytest.fixture
def afterwards(tmp_path: Path) -> Path:
    """A folder with the names that the README uses: RUN_DIR, photo.jpg, and model.pt, which a client saved."""
    import model
    import model_file

    images = make_images(tmp_path / "my-images", train=8, test=2)
    make_run(tmp_path / "RUN_DIR", images)
    (tmp_path / "photo.jpg").write_bytes((images / "test/red/00.png").read_bytes())
    model_file.save(tmp_path / "model.pt", model.build("lenet", 3, seed=0), "lenet", CLASSES)
    return tmp_path


@pytest.mark.parametrize("command", [command for command in COMMANDS if AFTERWARDS.match(command)])
def test_command_on_a_finished_run(command, afterwards):
    words = shlex.split(command)[1:]
    if "--onnx" in words:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    if "--run" in words and "--dataset" not in words:
        words += ["--dataset", "my-images"]
    words[0] = words[0] if words[0] == "-m" else str(ROOT / words[0])
    environment = {**CLEAN, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=afterwards, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def secured(tmp_path: Path) -> list[str]:
    """Certificates and secret as the README makes them; returns the flags that a client then needs."""
    (tmp_path / "secret.txt").write_text("a secret\n")
    made = [sys.executable, "-m", "federation.certificates", "--host", "127.0.0.1", "--out", tmp_path / "certificates"]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    shutil.copy(tmp_path / "certificates/ca.pem", tmp_path)
    return ["--ca-certificate", str(tmp_path / "ca.pem"), "--secret-file", str(tmp_path / "secret.txt")]


def without(flag: str, words: list[str]) -> list[str]:
    """The words but for a flag and its value, which a test has to choose."""
    return [word for i, word in enumerate(words) if word != flag and (i == 0 or words[i - 1] != flag)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "secret" in c and c.startswith("python")])
def test_secured_command(command, tmp_path, secured, my_images):
    server_files = ["--certificate", "certificates/server.pem", "--private-key", "certificates/server.key", *secured]
    script, *flags = shlex.split(command)[1:]
    with Federation(tmp_path) as federation:
        if script == "server.py":
            server = federation.server(*without("--address", flags), cwd=tmp_path)
            for _ in range(3):
                federation.tiny(*secured)
        else:
            server = federation.server("--clients", 1, *QUICK, *server_files, cwd=tmp_path)
            flags = [*without("--server", flags), "--server", federation.address, "--threads", 1]
            federation.start(command, ROOT / script, *flags, cwd=tmp_path).ends(0)
        server.ends(0)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m") and not AFTERWARDS.match(c)])
def test_module_command(command, tmp_path):
    words = [sys.executable, *shlex.split(command)[1:]]
    subprocess.run(words, cwd=tmp_path, env={**CLEAN, "PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("openssl")])
def test_openssl_command(command, tmp_path):
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert len((tmp_path / "secret.txt").read_text().strip()) == 64


OTHER = re.compile(f"{AFTERWARDS.pattern}|.*(secret|-m )")
PLAIN = [c for c in COMMANDS if c.startswith("python") and not OTHER.match(c)]


@pytest.mark.parametrize("command", PLAIN)
def test_python_command(command, tmp_path):
    script, *flags = shlex.split(command)[1:]
    with Federation(tmp_path) as federation:
        if "--help" in flags:
            federation.start(command, ROOT / script, *flags).ends(0)
        elif script == "server.py":
            if "--tensorboard" in flags:
                pytest.importorskip("tensorboard", reason="tensorboard is not installed")
                flags = [flag.replace("runs/", f"{tmp_path}/") for flag in flags]
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
        images = my_images if words[1] == "compare" else "synthetic"
        words.append(f"ARGS=--dataset {images} --run-dir {tmp_path / 'run'} -- {' '.join(QUICK)}")
    else:
        words.append(f"ARGS=--run-dir {tmp_path / 'run'} -- {' '.join(QUICK)}")
    done = subprocess.run(words, cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("pytest" if words[1] == "test" else "total time") in done.stdout


def test_every_command_is_one_that_a_test_runs():
    assert all(command.startswith(("python", "make", "openssl")) for command in COMMANDS)
    assert len(COMMANDS) >= 10

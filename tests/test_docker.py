"""deploy/ and Dockerfile, as far as they can be held to their word without Docker and systemd."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import PurePosixPath

from federation.client import options as client_options
from federation.security import certificates
from federation.server import options

import pytest
from helpers.processes import CLEAN, ROOT, Federation

PAGE = (ROOT / "docs/deploy.md").read_text()
PROGRAMS = {"server": "server.py", "client": "client.py"}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COPIES = sorted(set(re.findall(r"^COPY (\S+) (\S+)$", DOCKERFILE, re.M)))


@pytest.fixture(scope="module")
def services() -> dict:
    """deploy/compose.yaml's services with the defaults of its variables."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    text = (ROOT / "deploy/compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))["services"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_compose_file_gives_commands_that_the_programs_take(services, name):
    script, *flags = shlex.split(services[name]["command"])
    assert script == PROGRAMS[name]
    args = options.parse_args("", flags) if name == "server" else client_options.parse_args("", flags)
    if name == "client":
        assert args.server == "server:8080"
    else:
        port = args.address.rpartition(":")[2]
        assert services["server"]["ports"] == [f"{port}:{port}"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_file_that_a_compose_command_names_is_mounted(services, name):
    mounts = [PurePosixPath(volume.split(":")[1]) for volume in services[name]["volumes"]]
    files = re.findall(r"--\S+ (\S+\.(?:pem|key|txt))", services[name]["command"])
    assert len(files) >= 2
    for file in files:
        path = PurePosixPath("/app") / file
        assert any(mount == path or mount in path.parents for mount in mounts), f"nothing mounts {path}"


def test_the_certificates_that_the_docs_make_hold_the_name_that_the_clients_call(services):
    (line,) = re.findall(r"^\$ docker run .* federation-server -m federation\.certificates (.*)$", PAGE, re.M)
    called = client_options.parse_args("", shlex.split(services["client"]["command"])[1:]).server.rpartition(":")[0]
    assert called in services
    assert called in certificates.parse_args(shlex.split(line)).host


def test_only_the_server_gets_private_keys(services):
    assert not any(volume.startswith("./certificates:") for volume in services["client"]["volumes"])


def test_the_image_holds_the_program_and_nothing_else_goes_into_it(tmp_path):
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(source for source, _ in COPIES) == sorted(kept)
    for pattern, target in COPIES:
        for source in ROOT.glob(pattern):
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / target)
    words = [sys.executable, "server.py", "--help"]  # client.py would take seconds, and imports the same files
    done = subprocess.run(words, cwd=tmp_path, env=CLEAN, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_the_servers_image_has_no_pytorch_and_runs_without_it(tmp_path):
    """The packages of requirements-server.txt are those that the server's target installs."""
    server, client = DOCKERFILE.split("FROM base AS ")[1:]
    assert "--requirement requirements-server.txt" in server
    assert "--requirement requirements.txt" in client
    assert "torch" not in (ROOT / "requirements-server.txt").read_text().replace("needs no PyTorch", "")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class NotThere:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'tqdm'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NotThere())\n"
    )
    with Federation(tmp_path) as federation:
        server = federation.server("--clients", 1, "--rounds", 1, env={**CLEAN, "PYTHONPATH": str(tmp_path)})
        federation.tiny().ends(0)
        server.ends(0)
    assert (federation.run_dir / "report.html").exists()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_unit_gives_a_command_that_the_program_takes_and_can_write_one_folder_only(name, monkeypatch):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(ROOT / f"deploy/federation-{name}.service")
    python, script, *flags = shlex.split(unit["Service"]["ExecStart"])
    assert (python, script) == ("/opt/federation/.venv/bin/python", f"/opt/federation/{PROGRAMS[name]}")
    monkeypatch.setattr("pathlib.Path.is_dir", lambda self: True)
    args = options.parse_args("", flags) if name == "server" else client_options.parse_args("", flags)
    assert args.ca_certificate == "/etc/federation/ca.pem"
    assert {key: unit["Service"][key] for key in ("ProtectSystem", "NoNewPrivileges", "CapabilityBoundingSet")} == {
        "ProtectSystem": "strict",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
    }
    assert unit["Service"]["StateDirectory"] == "federation"
    assert unit["Service"]["WorkingDirectory"] == "/var/lib/federation"

"""deploy/ and Dockerfile, as far as they can be held to their word without Docker and systemd."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import PurePosixPath

from federation.client import options as client_options
from federation.operations import health
from federation.security import certificates
from federation.server import options

import pytest
from helpers.example_runs import call
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


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_container_can_write_its_volumes_alone_and_has_no_capability(services, name):
    service = services[name]
    assert (service["read_only"], service["cap_drop"], service["tmpfs"]) == (True, ["ALL"], ["/tmp"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    written = {volume.split(":")[1] for volume in service["volumes"] if not volume.endswith(":ro")}
    made = re.search(r"install --directory --owner federation (.*)", DOCKERFILE)[1].split()
    assert written <= {f"/app/{folder}" for folder in made}  # which the user of the image owns
    assert service["restart"].startswith("on-failure:")  # wrong use would fail for ever


def test_the_servers_container_is_asked_whether_it_serves_and_goes_on_when_started_again(services, monkeypatch):
    asked = []
    monkeypatch.setattr(health, "ask", lambda address, authority: asked.append(address) or "SERVING")
    monkeypatch.setattr(health, "read_authority", lambda path: asked.append(path))
    kind, python, *words = services["server"]["healthcheck"]["test"]
    assert (kind, python, words[:2]) == ("CMD", "python", ["-m", "federation.health"])
    assert call(health.main, *words[2:]) == 0
    assert asked == ["certificates/ca.pem", "server:8080"]
    assert "--auto-resume" in services["server"]["command"]


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


UNITS = {"server": "federation-server@.service", "client": "federation-client.service"}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("name", PROGRAMS)
def test_systemd_takes_the_unit_and_finds_little_exposed(name, tmp_path):
    """Its program is one that this machine has: systemd asks whether it is there."""
    text = (ROOT / "deploy" / UNITS[name]).read_text().replace("/opt/federation/.venv/bin/python", sys.executable)
    unit = tmp_path / UNITS[name].replace("@", "@spring")
    unit.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if unit.name in line] == []
    exposed = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]  # of 100
    assert subprocess.run(exposed, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_unit_gives_a_command_that_the_program_takes_and_can_write_one_folder_only(name, monkeypatch):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    assert unit.read(ROOT / "deploy" / UNITS[name])
    python, script, *flags = shlex.split(unit["Service"]["ExecStart"])
    assert (python, script) == ("/opt/federation/.venv/bin/python", f"/opt/federation/{PROGRAMS[name]}")
    monkeypatch.setattr("pathlib.Path.is_dir", lambda self: True)
    args = options.parse_args("", flags) if name == "server" else client_options.parse_args("", flags)
    assert args.ca_certificate == "/etc/federation/ca.pem"
    hardening = {"ProtectSystem": "strict", "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "PrivateTmp": "yes"}
    assert {key: unit["Service"][key] for key in hardening} == hardening
    assert unit["Service"]["ReadWritePaths"] == "/var/lib/federation"
    written = [word for word in flags if word.startswith("/var/")]
    assert written
    assert all(word.startswith("/var/lib/federation/") for word in written)
    assert (unit["Service"]["Restart"], unit["Service"]["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert ("--auto-resume" if name == "server" else "--stay") in flags  # started again, it goes on
    assert "FEDERATION_TIMES=off" in unit["Service"]["Environment"].split()
    assert unit["Service"]["StateDirectory"] == "federation"
    assert unit["Service"]["WorkingDirectory"] == "/var/lib/federation"

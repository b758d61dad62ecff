"""README and docs keep to their word: every command works as it stands there (only address, folder and size of the
work are the test's), and every file, function, flag and link that they name exists."""

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from federation import config, setting
from federation.aggregation.validation import validate_evaluate
from federation.client import options
from federation.console import Parser
from federation.privacy.disclosure import numbers
from federation.results import report
from federation.results.history import RoundRecord
from federation.security import certificates, identity
from federation.security.identity import Identity
from federation.server.options import build_parser

import pytest
import torch
from flwr.common import Code, EvaluateRes, Status
from helpers.engines import commands
from helpers.example_runs import add_records, call, make_history, make_images, make_run
from helpers.processes import CLEAN, ROOT, Federation, Process, free_port, quick_python
from helpers.tasks import build, recipe

import baseline
import classify
import demo
import evaluate
import leak
import model

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
README, DESIGN, ENGINES = PAGES["README.md"], PAGES["docs/design.md"], PAGES["docs/engines.md"]
OWN = "docs/own-federation.md"  # whose commands test_examples.py runs
ON_ENGINES = {*commands(ENGINES, "Simulation"), *commands(ENGINES, "Deployment")}  # which test_engines.py runs
COMMANDS = sorted(
    {
        line
        for name, page in PAGES.items()
        if name != OWN
        for block in re.findall(r"```sh\n(.*?)```", page, re.S)
        for line in block.splitlines()
    }
    - ON_ENGINES
)
AGAIN = "python server.py --again RUN_DIR"  # which test_provenance.py runs
LEAK = "python leak.py"  # of which test_leak.py runs one attack; all three take over a minute
QUICK = ["--rounds", "1", "--model", "lenet"]
AFTERWARDS = re.compile(
    r"python (evaluate\.py|baseline\.py|classify\.py|-m federation\.(report|verify|audit)) "
)  # on a finished run
SHELL = re.compile("&&|>")  # more than one program
OTHER = re.compile(f"{AFTERWARDS.pattern}|.*(secret|identity|--secure|--private|--dp-|--stay|--sweep|--again|-m |leak)")
PLAIN = [c for c in COMMANDS if c.startswith("python") and not OTHER.match(c) and not SHELL.search(c)]

# Commands


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """What the Makefile would have made: this Python, with everything installed."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{quick_python()}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "venv/installed").touch()
    (tmp_path / "venv/installed-test").touch()
    return tmp_path / "venv"


@pytest.fixture
def my_images(tmp_path: Path) -> Path:
    """A folder of one's own, as the docs describe it."""
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
    """A folder with the names that the docs use: RUN_DIR, photo.jpg, and model.safetensors, which a client saved."""
    images = make_images(tmp_path / "my-images", train=8, test=2)
    run = make_run(tmp_path / "RUN_DIR", images)
    (tmp_path / "photo.jpg").write_bytes((images / "test/red/00.png").read_bytes())
    add_records(run, tmp_path / "audit/RUN_ID-client-0.jsonl")
    shutil.copy(run.path / "model.safetensors", tmp_path)
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
    command = [quick_python(), *words]
    done = subprocess.run(command, cwd=afterwards, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def secured(tmp_path: Path) -> list[str]:
    """Certificates and secret as the docs make them; returns the flags that a client then needs."""
    (tmp_path / "secret.txt").write_text("a secret\n")
    made = [quick_python(), "-m", "federation.certificates", "--host", "127.0.0.1", "--out", tmp_path / "certificates"]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    shutil.copy(tmp_path / "certificates/ca.pem", tmp_path)
    return ["--ca-certificate", str(tmp_path / "ca.pem"), "--secret-file", str(tmp_path / "secret.txt")]


def without(flag: str, words: list[str]) -> list[str]:
    """The words but for a flag and its value, which a test has to choose."""
    return [word for i, word in enumerate(words) if word != flag and (i == 0 or words[i - 1] != flag)]


SECURED = [c for c in COMMANDS if c.startswith("python") and "--secret-file" in c]


@pytest.mark.parametrize("command", SECURED)
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


def test_the_commands_for_many_runs_make_two_with_one_client(tmp_path):
    (grid,) = re.findall(r"```toml\n(.*?)```", PAGES["docs/many-runs.md"], re.S)
    (tmp_path / "sweep.toml").write_text(grid.replace("[0, 1, 2]", "[0]"))
    (tmp_path / "policy.toml").write_text("max_rounds = 1\n")  # the whole one is tested by test_policy.py
    (client,) = (shlex.split(each)[2:] for each in MANY_RUNS if "client.py" in each)
    (server,) = (shlex.split(each)[2:] for each in MANY_RUNS if "server.py" in each)
    with Federation(tmp_path) as federation:
        flags = [*without("--rounds", server), "--rounds", 1, "--clients", 1, "--model", "lenet"]
        sweeping = federation.server(*flags, cwd=tmp_path)
        staying = federation.client(*client, "--threads", 1, cwd=tmp_path)
        assert "run 2 of 2 (learning-rate 0.15, seed 0): begins" in sweeping.ends(0)
        staying.says("(?s)waiting for the next.*waiting for the next")
        staying.send(signal.SIGTERM)
        staying.ends(143)
    for run in federation.run_dir.glob("*/history.json"):
        run_id = json.loads(run.read_text())["config"]["run_id"]
        saved = tmp_path / f"model-{run_id}.safetensors"
        assert saved.read_bytes() == (run.parent / "model.safetensors").read_bytes()
    assert (federation.run_dir / "sweep.png").exists()


SECURE = [command for command in COMMANDS if re.search("--secure-aggregation|--peers", command)]


def test_the_commands_for_secure_aggregation_make_a_run(tmp_path):
    (server,) = (shlex.split(each)[2:] for each in SECURE if "server.py" in each)
    (client,) = (shlex.split(each)[2:] for each in SECURE if "client.py" in each)
    lines = []
    for name in "abc":
        (tmp_path / name).mkdir()
        Identity.new().write(tmp_path / name / "identity", name)
        lines.append((tmp_path / name / "identity.pub").read_text())
    with Federation(tmp_path) as federation:
        running = federation.server(*server, "--rounds", 1)
        for name in "abc":
            (tmp_path / name / "peers").write_text("".join(lines))
            federation.tiny(*client, cwd=tmp_path / name)
        assert "secure aggregation: in 1 rounds the sum of 3 updates; no single one" in running.ends(0)


PRIVATE = [command for command in COMMANDS if re.search("--private-training|--dp-", command)]


def test_the_commands_for_private_training_make_a_run(tmp_path):
    (server,) = (shlex.split(each)[2:] for each in PRIVATE if "server.py" in each)
    (client,) = (shlex.split(each)[2:] for each in PRIVATE if "client.py" in each)
    with Federation(tmp_path) as federation:
        running = federation.server(*server, *QUICK, "--clients", 1)
        federation.client(*client, cwd=tmp_path)
        assert "differential privacy: epsilon 2.9" in running.ends(0)
    assert len([*(tmp_path / "privacy").glob("*.json")]) == 1


def test_the_page_on_members_leads_from_nothing_to_a_verified_record(tmp_path, venv):
    """Its commands in their order; the clients are tiny ones whose training takes half a second."""
    block = PAGES["docs/deploy.md"].partition("from nothing to a verified record\n")[2]
    lines = [line[2:] for line in block.partition("```console\n")[2].partition("```")[0].splitlines()]
    assert len(lines) <= 40
    shell = {**CLEAN, "PATH": f"{venv / 'bin'}:{CLEAN['PATH']}", "PYTHONPATH": str(ROOT)}
    with Federation(tmp_path) as federation:
        federation.run_dir = tmp_path / "run"
        jobs: list[Process] = []
        for line in lines:
            here = line.replace("fl.example.org:8080", federation.address).replace("fl.example.org", "127.0.0.1")
            here = here.replace("0.0.0.0:8080", federation.address)
            words = shlex.split(here)
            if line == "kill -9 %1":
                jobs[4].says("fit")  # of the one that has come
                jobs[0].send(signal.SIGKILL)
                jobs[0].ends(-9)
            elif "server.py" in line:
                run_dir = [] if "--resume" in line else ["--run-dir", federation.run_dir]
                flags = without("--run-dir", without("--address", words[2:-1]))
                command = ROOT / "server.py", "--address", federation.address, *run_dir, *flags
                jobs.append(federation.start("server", *command, cwd=tmp_path))
            elif "client.py" in line:
                flags = without("--dataset", without("--server", words[2:-1]))
                jobs.append(federation.tiny(*flags, "--seconds", 0.5, cwd=tmp_path))
                jobs[0].says(f"hospital-{words[words.index('--identity') + 1]} joined")
            else:
                if "d.pub" in line:
                    jobs[0].says(r"\n +1 +3 ")
                if "federation.audit" in line and "audit-a" in line:
                    jobs[-1].ends(0)
                subprocess.run(here, shell=True, cwd=tmp_path, env=shell, check=True, capture_output=True)
                if "d.pub" in line:
                    assert "it is no member of this federation any more" in jobs[3].ends(1)
    assert [row["clients"] for row in federation.history()["rounds"]][-1] == 3


MANY_RUNS = [command for command in COMMANDS if re.search("--stay|--sweep", command)]
MEMBERS = [command for command in COMMANDS if re.search("identity", command) and "--peers" not in command]


def test_the_commands_for_members_make_a_run(tmp_path, secured, my_images):
    """The key's, the server's and the client's, in this order; --server-key pins the server's own."""
    (make,) = (shlex.split(each)[1:] for each in MEMBERS if "-m federation.identity" in each)
    ((_, *server_flags),) = (shlex.split(each)[1:] for each in MEMBERS if "server.py" in each)
    ((_, *client_flags),) = (shlex.split(each)[1:] for each in MEMBERS if "client.py" in each)
    environment = {**CLEAN, "PYTHONPATH": str(ROOT)}
    subprocess.run([quick_python(), *make], cwd=tmp_path, env=environment, check=True, capture_output=True)
    shutil.copy(tmp_path / "identity.pub", tmp_path / "members")
    shutil.copy(tmp_path / "identity.pub", tmp_path / "server.pub")
    with Federation(tmp_path) as federation:
        server = federation.server(*without("--address", server_flags), "--clients", 1, *QUICK, cwd=tmp_path)
        flags = [*without("--server", client_flags), "--server", federation.address, "--threads", 1]
        federation.start("client", ROOT / "client.py", *flags, cwd=tmp_path).ends(0)
        assert "hospital-a joined" in server.ends(0)


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
@pytest.mark.parametrize("command", [c for c in COMMANDS if SHELL.search(c)])
def test_certificates_and_a_secret_that_nobody_else_may_read(command, tmp_path, venv):
    path = f"{venv / 'bin'}:{CLEAN['PATH']}"
    environment = {**CLEAN, "PATH": path, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len((tmp_path / "secret.txt").read_text().strip()) == 64
    assert (tmp_path / "certificates/ca.pem").exists()
    assert stat.S_IMODE((tmp_path / "secret.txt").stat().st_mode) == 0o600


@pytest.mark.parametrize("command", PLAIN)
def test_python_command(command, tmp_path):
    script, *flags = shlex.split(command)[1:]
    with Federation(tmp_path) as federation:
        if script == "server.py":
            if "--tensorboard" in flags:
                pytest.importorskip("tensorboard", reason="tensorboard is not installed")
                flags = [flag.replace("runs/", f"{tmp_path}/") for flag in flags]
            if "--metrics" in flags:
                pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
                ports = {"8081": str(free_port()), "9464": str(free_port())}
                flags = [ports.get(flag, flag) for flag in flags]
            server = federation.server(*flags, cwd=tmp_path)
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
    elif "TASK=" in command:
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        words.append(f"ARGS=--run-dir {tmp_path / 'run'} -- --rounds 1")
    elif "DATASET=" not in command:
        images = my_images if words[1] == "compare" else "synthetic"
        words.append(f"ARGS=--dataset {images} --run-dir {tmp_path / 'run'} -- {' '.join(QUICK)}")
    else:
        words.append(f"ARGS=--run-dir {tmp_path / 'run'} -- {' '.join(QUICK)}")
    done = subprocess.run(words, cwd=ROOT, env=CLEAN, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("pytest" if words[1] == "test" else "total time") in done.stdout


def test_every_command_is_one_that_a_test_runs():
    for command in COMMANDS:
        runners = [AFTERWARDS.match(command), command in SECURED, SHELL.search(command), command in PLAIN]
        runners += [command in MEMBERS, command in MANY_RUNS, command == AGAIN, command == LEAK, command in SECURE]
        runners += [command in PRIVATE]
        assert command.startswith("make") or sum(map(bool, runners)) == 1, command
    assert len(COMMANDS) >= 10


def test_the_observer_in_the_docs_works(monkeypatch):
    """With MLflow's functions as they are called, but without MLflow."""
    calls: list[tuple] = []
    names = ("start_run", "log_params", "log_metrics", "end_run")
    fake = {name: lambda *args, name=name, **more: calls.append((name, *args, *more.values())) for name in names}
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(**fake))
    (source,) = re.findall(r"```python\n(class MLflow.*?)```", PAGES["docs/after-the-run.md"], re.S)
    scope: dict = {}
    exec(source, scope)
    observer = scope["MLflow"]()
    observer.begin(make_history())
    observer.round(RoundRecord(1, {"accuracy": 0.5}, {"train_loss": 2.0}))
    observer.end(0)
    assert [call[0] for call in calls] == list(names)
    assert calls[2] == ("log_metrics", {"accuracy": 0.5, "train_loss": 2.0}, 1)
    assert calls[3] == ("end_run", "FINISHED")


# What they name


LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def anchors(page: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_points_to_a_file_and_a_heading_that_exist(name):
    for target in ("".join(found) for found in LINK.findall(PAGES[name])):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.is_relative_to(ROOT), target
        assert file.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{name} links to {target}"


@pytest.mark.parametrize("name", PAGES)
def test_every_python_file_that_is_named_exists(name):
    for path in (word for code in CODE.findall(PAGES[name]) for word in re.findall(r"(?<!\S)[\w/]+\.py(?!\S)", code)):
        assert (ROOT / path).exists(), f"{name} names {path}"


def section(page: str, heading: str) -> str:
    return page.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def functions(text: str) -> set[tuple[str, str]]:
    """Files, and the functions named after them, as [`file`](link) `function`."""
    return set(re.findall(r"\[`([\w/]+\.py)`\]\([^)]+\)\s+`([\w.]+)`", text))


def lines_of(path: str, name: str) -> int:
    """Lines of a function of a file, as module.function or Class.function. Fails where there is none."""
    node: ast.AST = ast.parse((ROOT / path).read_text())
    for part in name.split("."):
        found = [each for each in ast.iter_child_nodes(node) if getattr(each, "name", None) == part]
        assert found, f"{path} has no {name}"
        node = found[0]
    return node.end_lineno - node.lineno + 1


def test_a_round_is_described_in_at_most_eight_steps_of_300_lines_in_eight_files():
    text = section(DESIGN, "A round in order")
    steps = re.findall(r"^\d\. .*", text, re.M)
    assert 6 <= len(steps) <= 8
    named = functions(text)
    lines, files = sum(lines_of(*each) for each in named), len({path for path, _ in named})
    assert (lines <= 300, files <= 8) == (True, True), (lines, files)
    assert f"fewer than 300 lines of code in {files} files" in " ".join(text.split()), (lines, files)


def test_the_six_steps_of_the_readme_are_functions_that_exist():
    text = section(README, "A round in six steps")
    assert len(re.findall(r"^\d\. ", text, re.M)) == 6
    assert len(functions(text)) >= 7
    assert all(lines_of(*each) for each in functions(text))


def test_functions_of_the_recipes_for_changes_exist():
    """In "How to add", a function stands before the file that it is in."""
    text = section(DESIGN, "How to add")
    for function, path in re.findall(r"`(\w+)`[^`|]*(?:in|:)\s+`([\w/]+\.py)`", text):
        assert re.search(rf"\b{function}\b", (ROOT / path).read_text()), f"{path} has no {function}"


def test_the_readme_can_be_read_in_one_go():
    assert len(README.splitlines()) <= 150


OTHERS = {  # flags of programs that are not ours
    "flwr": "--stream --run-config --federation-config --num-supernodes --client-resources-num-cpus",
    "flower-superlink": "--ssl-ca-certfile --ssl-certfile --ssl-keyfile --enable-supernode-auth --port",
    "flower-supernode": "--superlink --root-certificates --auth-supernode-private-key --port --node-config",
    "flower-supernode too": "--trusted-entities",
    "docker": "--tag --rm --user --volume --scale --build-arg --target --project-directory --file",
    "useradd, install, systemctl, journalctl": "--system --home-dir --directory --owner --mode --now --unit --follow",
    "the reader's own, of the example": "--weight-decay",
}


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """All flags of our programs."""
    parsers = [build_parser(None).format_help()]
    for main in (
        demo.main,
        baseline.main,
        evaluate.main,
        classify.main,
        leak.main,
        certificates.main,
        identity.main,
        report.main,
    ):
        parsers.append(help_of(lambda main=main: call(main, "--help")))
    parsers.append(help_of(lambda: options.parse_args(None, ["--help"])))
    sources = [path.read_text() for path in (ROOT / "benchmarks").glob("*.py")]
    return {flag for text in parsers + sources for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}


def help_of(program) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        program()
    return text.getvalue()


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_that_is_named_exists(name, flags):
    known = flags | {flag for line in OTHERS.values() for flag in line.split()}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGES[name]))
    assert named <= known


def test_the_metric_of_the_example_reaches_the_server_beside_the_metrics_that_were_there():
    (source,) = re.findall(r"```python\n(@torch.inference_mode.*?)```", PAGES["docs/own-data.md"], re.S)
    scope = dict(vars(model))
    exec(source, scope)
    network, told = build("lenet", classes=4), recipe(model="lenet")
    examples = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 4
    network[-1].weight.data.zero_()
    network[-1].bias.data = torch.tensor([1.0, 4.0, 3.0, 2.0])  # guesses 1, then 2, then 3, of any image: never 0
    metrics = scope["evaluate"](network, examples, told)
    assert {**metrics, **model.evaluate(network, examples, told)} == metrics
    assert (metrics["accuracy"], metrics["top3_accuracy"]) == (0.25, 0.75)
    res = EvaluateRes(Status(Code.OK, ""), metrics.pop("loss"), 8, numbers(metrics))
    assert validate_evaluate(res, 0, 8).metrics["top3_accuracy"] == 0.75


def test_the_setting_of_the_example_has_a_flag_a_default_and_a_check():
    (line,) = re.findall(r"^(\w+: float = setting\(.*?\))  #", PAGES["docs/own-data.md"], re.M)
    scope = {**vars(config), **vars(setting), "dataclass": dataclass}
    exec(f"@dataclass(frozen=True)\nclass Longer(Settings):\n    {line}\n", scope)
    parser = Parser(None)
    setting.add_flags(parser, [scope["Longer"]])
    assert parser.parse_args(["--weight-decay", "0.1"]).weight_decay == 0.1
    assert scope["Longer"]().weight_decay == 5e-4
    with pytest.raises(ValueError, match="--weight-decay must be at least 0"):
        scope["Longer"](weight_decay=-1.0)

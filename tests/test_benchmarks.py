"""The benchmarks start; what they measure takes minutes, and is run by hand."""

import re
import subprocess

import pytest
from helpers.processes import CLEAN, ROOT, quick_python

FLAGS = {
    name: "--images FOLDER"
    for name in ("accuracy", "async", "engines", "overhead", "private", "repeats", "steps", "wire")
} | {
    "scale": "--clients",
    "churn": "--dying",
    "memory": "--sizes",
    "examples": "--seeds",
    "xray": "--epsilons",
    "record": "--megabytes",
    "round_cost": "--kinds",
    "secure": "--seeds",
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_benchmark_says_what_it_measures(name, tmp_path):
    command = [quick_python(), ROOT / "benchmarks" / f"{name}.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=CLEAN, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert FLAGS[name] in done.stdout


def test_all_sh_runs_every_benchmark():
    named = re.findall(r"^run (\w+)", (ROOT / "benchmarks/all.sh").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(FLAGS)

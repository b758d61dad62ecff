"""Run folders of version 1.0.0: they are resumed, drawn and compared as if they were today's.

tests/data/runs-of-1.0.0.json holds two, as that version left them when it was stopped after round 2 of 4, packed by
tar and xz, as base64: one of fedadam, one of the asynchronous mode.
"""

import base64
import io
import json
import tarfile

from federation.results import report
from federation.results.run_folder import RunFolder

import numpy as np
import pytest
from helpers.example_runs import call
from helpers.processes import ROOT, Federation

RUNS = json.loads((ROOT / "tests/data/runs-of-1.0.0.json").read_text())


def unpack(name: str, federation: Federation) -> None:
    packed = io.BytesIO(base64.b64decode("".join(RUNS[name])))
    with tarfile.open(fileobj=packed, mode="r:xz") as archive:
        archive.extractall(federation.folder, filter="data")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_version_1_0_0_is_drawn(name, federation, capsys):
    unpack(name, federation)
    history = RunFolder(federation.run_dir).load_history()
    assert [record.round for record in history.rounds][:3] == [0, 1, 2]
    assert history.rounds[-1].unit == ("version" if name == "async" else "round")
    assert call(report.main, federation.run_dir) == 0
    assert (federation.run_dir / "report.html").stat().st_size > 1000


def test_a_run_of_version_1_0_0_goes_on_to_the_weights_of_a_quiet_one(federation):
    unpack("fedadam", federation)
    server = federation.server("--resume", federation.run_dir)
    for partition in range(3):
        federation.tiny("--partition-id", partition)
    assert "after round 2" in server.ends(0)
    with Federation(federation.folder / "quiet") as quiet:
        quiet.folder.mkdir()
        server = quiet.server("--rounds", 4, "--strategy", "fedadam")
        for partition in range(3):
            quiet.tiny("--partition-id", partition)
        server.ends(0)
        assert all(np.array_equal(a, b) for a, b in zip(federation.weights(), quiet.weights(), strict=True))


def test_an_asynchronous_run_of_version_1_0_0_goes_on(federation):
    unpack("async", federation)
    before = len(RunFolder(federation.run_dir).load_history().rounds)
    server = federation.server("--resume", federation.run_dir)
    for partition in range(3):
        federation.tiny("--partition-id", partition)
    server.ends(0)
    rows = federation.history()["rounds"]
    assert [row["round"] for row in rows] == list(range(len(rows)))
    assert sum(len(row["updates"]) for row in rows) == 4 * 3
    assert len(rows) > before

"""What the programs set before they import Flower."""

import subprocess
import sys

import pytest
from helpers.processes import CLEAN, ROOT


@pytest.mark.parametrize("program", ["server", "client"])
def test_no_program_phones_home(program):
    code = f"import {program}; from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=CLEAN, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]

"""Read by pytest before any test file."""

import importlib
import signal
from pathlib import Path

import pytest
from helpers.processes import Federation

importlib.import_module("federation")  # it sets what flwr reads when it is imported; a test may import flwr first

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def federation(tmp_path: Path):
    with Federation(tmp_path) as federation:
        yield federation

"""Read by pytest before any test file."""

import importlib
from pathlib import Path

import pytest
from processes import Federation

importlib.import_module("federation")  # it sets what flwr reads when it is imported; a test may import flwr first


@pytest.fixture
def federation(tmp_path: Path):
    with Federation(tmp_path) as federation:
        yield federation

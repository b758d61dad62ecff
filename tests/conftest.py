"""Read by pytest before any test file."""

from pathlib import Path

import pytest
from processes import Federation


@pytest.fixture
def federation(tmp_path: Path):
    with Federation(tmp_path) as federation:
        yield federation

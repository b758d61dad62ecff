"""Read by pytest before any test file."""

import functools
import importlib
import inspect
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import Federation

os.environ["FEDERATION_TIMES"] = "off"
importlib.import_module("federation")  # it sets what flwr reads when it is imported; a test may import flwr first

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOWEST = ["test_engines", "test_docs", "test_smoke", "test_examples", "test_hosts", "test_async", "test_resume"]
SLOWEST += ["test_faults", "test_admission", "test_output"]


@pytest.fixture
def federation(tmp_path: Path):
    with Federation(tmp_path) as federation:
        yield federation


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes: those that take seconds, and that -m "not processes" leaves out.

    The files that take longest come first: begun last, they would leave the other workers with nothing to do.
    """
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))
    for item in items:
        fixtures = [each.func for found in item._fixtureinfo.name2fixturedefs.values() for each in found]
        if any(_starts_processes(thing, set()) for thing in [item.function, *fixtures]):
            item.add_marker(pytest.mark.processes)


def _starts_processes(thing: object, seen: set[object]) -> bool:
    """Whether the source of a test, a fixture or a helper names subprocess, or something in tests/ that does."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    ours = inspect.isfunction(thing) or inspect.isclass(thing)
    if not ours or thing in seen or not thing.__module__.startswith(("test_", "helpers.", "conftest")):
        return False
    seen.add(thing)
    words, known = _words(thing), vars(sys.modules[thing.__module__])
    return "subprocess" in words or any(_starts_processes(known[word], seen) for word in words if word in known)


@functools.cache  # finding a source takes milliseconds, and many tests share helpers
def _words(thing: Any) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", inspect.getsource(thing)))

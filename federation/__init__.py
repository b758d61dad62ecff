"""The machinery around Flower: what both sides agree on is here, each side has a room of its own."""

import gc
import os
import sys
from pathlib import Path

# All are read when flwr or grpc is first imported: import federation before them (pyproject.toml sorts it so).
# Data that never leaves the client goes badly with a phone-home: FLWR_TELEMETRY_ENABLED=1 turns it on.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# Flower logs every message and a banner of many lines; FLWR_LOG_LEVEL=INFO brings them back.
os.environ.setdefault("FLWR_LOG_LEVEL", "CRITICAL")
# gRPC writes lines of its own for every senseless connection, which must not fill the operator's terminal, and
# for TLS that doesn't fit, which we say in words; GRPC_VERBOSITY=ERROR (or INFO, DEBUG) brings them back.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Importing torch and Flower makes a quarter of a million objects, among which Python would look for garbage every 700
# objects: a sixth of a client's start.
gc.set_threshold(10_000)
# One of our own programs begins here, before the seconds that it takes to import Flower and torch (python -m imports
# this package before it knows its program). Other programs that import us keep their output and their signals.
if sys.argv[0] == "-m" or Path(sys.argv[0]).absolute().parent == Path(__file__).absolute().parent.parent:
    from federation.console import begin_program

    begin_program()

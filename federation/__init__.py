"""The machinery around Flower: admission, checked aggregation, the loop of rounds, checkpoints."""

import os

# Both are read when flwr is first imported: import federation before flwr (pyproject.toml sorts it so).
# Data that never leaves the client goes badly with a phone-home: FLWR_TELEMETRY_ENABLED=1 turns it on.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# Flower logs every message and a banner of many lines; FLWR_LOG_LEVEL=INFO brings them back.
os.environ.setdefault("FLWR_LOG_LEVEL", "CRITICAL")

"""Where a model comes from: what history.json and the model's metadata say of software, recipe, and who took part."""

import functools
import platform
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from federation import model_file
from federation.participants.client_manager import ClientManager
from federation.security.audit import AuditLog, utc_now

import numpy as np

ROOT = Path(__file__).parent.parent.parent
DIGITS = 6  # of a client's weight in a round
PATIENCE = 10  # seconds for git to answer


@functools.cache
def software() -> dict[str, Any]:
    """Versions of what runs the server, and the commit of the project's folder where git knows one.

    dirty: whether tracked files are not as they are in that commit; None without git.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {"federation": project["version"], "python": platform.python_version()}
    versions |= {name: version(name) for name in ("flwr", "numpy")}
    commit = _git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    changed = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {**versions, "commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(*words: str) -> str | None:
    """What git says; None where there is none, or it refuses, as in a folder of another user."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def provenance(
    clients: ClientManager,
    config: Mapping[str, Any],
    took_part: Iterable[tuple[int, Mapping[str, float]]],
    arrays: dict[str, np.ndarray],
    log: AuditLog,
) -> dict[str, Any]:
    """Of the final model: config as in history.json; took_part: each round's number, and by partition the weights.

    Raises audit.Unwritable.
    """
    task = clients.task
    return {
        "run_id": clients.run_id,
        "recipe": asdict(clients.recipe) | (task.recipe if task else {}),
        "strategy": config.get("strategy"),
        "software": config.get("software"),
        "task": {"name": task.name, "code": task.code} if task else None,
        "initial_weights": config.get("initial_weights"),
        "took_part": in_spans(took_part),
        "members": config.get("members", {}),
        "arrays": model_file.hash_sorted(arrays),
        "audit_head": log.sync(),
        "time": utc_now(),
    }


def in_spans(took_part: Iterable[tuple[int, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Rounds one after the other in which the same clients had the same weights, as one: first, last, weights."""
    spans: list[dict[str, Any]] = []
    for number, weights in took_part:
        if not weights:  # nobody's update counted
            continue
        rounded = {partition: round(weight, DIGITS) for partition, weight in weights.items()}
        if spans and spans[-1]["last"] == number - 1 and spans[-1]["weights"] == rounded:
            spans[-1]["last"] = number
        else:
            spans.append({"first": number, "last": number, "weights": rounded})
    return spans

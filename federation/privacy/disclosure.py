"""What leaves a client beside its weights: numbers, and words of ours."""

import hashlib
import hmac
import json
from typing import Any

from federation.process import machine_id


def code_failed(error: Exception) -> str:
    """Of an exception of anybody's code only the kind, and that only where Python gave it its name."""
    kind = f" ({type(error).__name__})" if type(error).__module__ == "builtins" else ""
    return f"its own code failed{kind}"


def numbers(metrics: dict) -> dict[str, float]:
    """Of a client's metrics what may leave it: texts may hold anything."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def summarise(client: Any, class_counts: bool = True) -> dict:
    """What the server gets to know of a client's data; see session.Learner and protocol.DataSummary."""
    numbers = {"train_examples": client.num_train, "test_examples": client.num_test}
    counts = getattr(client, "class_counts", []) if class_counts else []
    lists = {"statistics": client.buffer_positions, "class_counts": counts}
    lists["input_shape"] = getattr(client, "input_shape", [])
    lists["data_sizes"] = getattr(client, "data_sizes", [])
    lists["batchnorm"] = getattr(client, "batchnorm_positions", [])
    numbers["model_bytes"] = sum(array.nbytes for array in client.get_parameters({"in_pieces": True}))
    told = {**numbers, **{name: json.dumps(values) for name, values in lists.items()}}
    return {**told, "task": client.task_summary.to_json()} if hasattr(client, "task_summary") else told


def host_name(salt: str) -> str:
    """The same for all clients on a machine in one run; HMAC-SHA256 under the server's salt for the run.

    Of something random, not of the MAC address: that could be found again by trying all.
    """
    return hmac.new(salt.encode(), machine_id(), hashlib.sha256).hexdigest()[:16]

"""What a client says of itself: its task and data, how its data reach the layers of the averaged model, and what it
can do with the final one."""

from typing import Any

from federation import model_file
from federation.client.session import Session
from federation.config import MEASURED, OF_TASK
from federation.console import say
from federation.protocol import Assignment, TaskSummary
from federation.task import weights

import numpy as np

COUNTED = "; training examples by class:"


def summarise_task(client: Any) -> TaskSummary:
    """What the server compares of a client's task; see protocol.TaskSummary."""
    task, network = client.task, client.network
    travelling = dict(zip(weights.travelling(network), weights.get_weights(network, copy=False), strict=True))
    frozen = weights.frozen_weights(network)
    schema = {key: value for key, value in client.schema.items() if key != "classes"}
    return TaskSummary(
        name=task.name,
        arrays=_described(travelling),
        frozen_arrays=_described(frozen),
        frozen=model_file.hash_of(frozen),
        start=model_file.hash_of(travelling),
        code=task.code_hash,
        metrics=task.metrics,
        recipe=client.recipe.of_task(),
        schema=schema,
        columns=list(task.columns(client.dataset, client.train_rows[:1], client.recipe.seed)),
    )


def _described(arrays: dict[str, np.ndarray]) -> list[list]:
    return [[name, list(array.shape), str(array.dtype)] for name, array in arrays.items()]


def class_counts(client: Any) -> list[int]:
    """Training examples by class; none where the task has no classes."""
    labels, classes = client.task.labels(client.dataset, "train", client.recipe.seed), client.schema.get("classes", [])
    if labels is None or not classes:
        return []
    return np.bincount(labels[client.train_rows], minlength=len(classes)).tolist()


def measure_batchnorm(client: Any) -> list[np.ndarray]:
    """BatchNorm's statistics of its network as it is, on as many of its training examples as protocol-wide agreed.

    They are the same in all rounds, so that what a task keeps of them stays useful.
    """
    if not hasattr(client, "measured_set"):
        seed = client.recipe.round_seed(client.partition, 0)
        client.measured_set = client.task.draw(client.dataset, client.train_set, client.train_rows, MEASURED, seed)
    return client.task.measure_batchnorm(client.network, client.measured_set, client.recipe)


def about(client: Any) -> dict:
    """What a file of its model says of it."""
    recipe = {name: getattr(client.recipe, name) for name in OF_TASK}
    return model_file.about(client.task.name, recipe, client.schema, getattr(client, "statistics", {}))


def introduce(client: Any, assignment: Assignment) -> None:
    """Say what this client has: its class distribution, where it knows one."""
    partition, sizes = assignment.partition, f"{client.num_train:,} training and {client.num_test:,} test examples"
    counts = getattr(client, "class_counts", [])  # which a client may keep to itself
    say(f"joined with partition {partition} of {assignment.num_partitions}: {sizes}" + (COUNTED if counts else ""))
    columns = [f"{name} {count:,}" for name, count in zip(client.schema.get("classes", []), counts, strict=False)]
    for start in range(0, len(columns) if counts else 0, 5):
        say("  " + "".join(f"{column:<18}" for column in columns[start : start + 5]).rstrip())


def final_score(session: Session) -> str:
    """The main metric of the run's final model."""
    client, main = session.client, session.client.task.metrics[0]
    words = f"on this client's {client.num_test:,} test examples: {session.metrics[main.name]:.{main.digits}f}"
    return f"{main.name} of the final global model {words}"


def show_final_model(session: Session, saved: str | None) -> None:
    """What this client can do with the global model that the run left it."""
    client, task = session.client, session.client.task
    say(final_score(session))
    if saved:
        say(f"saved the final global model as {saved}")
    if not (task.has("predict") and task.has("show")):
        return
    some = client.test_rows[np.linspace(0, client.num_test - 1, min(10, client.num_test)).astype(int)]
    examples = task.load(client.dataset, "test", some, client.recipe.seed)
    lines = task.model.show(client.schema, examples, task.model.predict(client.network, examples))
    number = "ten" if len(some) == 10 else str(len(some))
    say(f"{number} of its test examples (truth → prediction):")
    for line in lines:
        say(f"  {line}")

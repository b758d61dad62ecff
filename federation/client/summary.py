"""What a client says of itself: what data it has, and what it can do with the final global model."""

from collections.abc import Callable
from typing import Any

from federation.client.session import Session
from federation.config import MAIN_METRIC
from federation.console import say
from federation.protocol import Assignment

import numpy as np

COUNTED = "; training images by class:"


def introduce(client: Any, assignment: Assignment) -> None:
    """Say what this client has: its class distribution."""
    partition, sizes = assignment.partition, f"{client.num_train:,} training and {client.num_test:,} test images"
    counts = getattr(client, "class_counts", [])  # which a client may keep to itself
    say(f"joined with partition {partition} of {assignment.num_partitions}: {sizes}" + (COUNTED if counts else ""))
    columns = [f"{name} {count:,}" for name, count in zip(client.classes, counts, strict=bool(counts))]
    for start in range(0, len(columns), 5):
        say("  " + "".join(f"{column:<18}" for column in columns[start : start + 5]).rstrip())


def show_final_model(session: Session, saved: str | None, predict: Callable[[Any], Any]) -> None:
    """What this client can do with the global model that the run left it; predict: from images to probabilities."""
    client, score = session.client, session.metrics[MAIN_METRIC]
    say(f"{MAIN_METRIC} of the final global model on this client's {client.num_test:,} test images: {score:.4f}")
    if saved:
        say(f"saved the final global model as {saved}")
    some = np.linspace(0, client.num_test - 1, min(10, client.num_test)).astype(int)
    images, labels = (each[some] for each in client.test_set)
    guesses = predict(images).argmax(1)
    say("ten of its test images (truth → prediction):")
    for label, guess in zip(labels.tolist(), guesses.tolist(), strict=True):
        say(f"  {'✓' if label == guess else '✗'} {client.classes[label]} → {client.classes[guess]}")

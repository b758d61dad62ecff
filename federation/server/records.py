"""What the record of a round holds of each client: its step, its weight in the mean, what it has spent."""

from collections import Counter
from collections.abc import Sequence

from federation.aggregation.steps import Step
from federation.aggregation.validation import Score, Update
from federation.compression import num_bytes
from federation.results.history import COSINE, DELTA, EPSILON, STEP_SIZE


def by_partition(steps: dict[int, Step]) -> dict[str, dict[str, float]]:
    """The size of each step and its cosine to the mean of the others', as a record has them."""
    sizes = {str(partition): step.size for partition, step in steps.items()}
    cosines = {str(partition): step.cosine for partition, step in steps.items() if step.cosine is not None}
    return {STEP_SIZE: sizes, COSINE: cosines}


def spent(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """Epsilon and delta of the clients that say them, as a record has them."""
    told = {str(score.partition): (score.epsilon, score.delta) for score in scores}
    epsilons = {partition: epsilon for partition, (epsilon, _) in told.items() if epsilon is not None}
    deltas = {partition: delta for partition, (_, delta) in told.items() if delta is not None}
    return {EPSILON: epsilons, DELTA: deltas}


def received(update: Update, compress: str) -> int:
    """Bytes that came in for it."""
    return num_bytes(update.weights, compress) if update.parts is None else update.received


def shares(updates: Sequence[Update]) -> dict[str, float]:
    """Each update's weight in the mean of McMahan et al.: its part of the examples; other strategies start from it."""
    total, examples = sum(update.examples for update in updates), Counter[int]()
    for update in updates:
        examples.update(update.clients)
    return {str(partition): number / total for partition, number in sorted(examples.items())}

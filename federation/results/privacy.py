"""What a run tells about its clients' examples: who learns what, and the epsilon of private training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from federation.results.history import DELTA, EPSILON, WEIGHT, History, RoundRecord

VOID = "void"
EPSILON_MEANS = (
    "Whatever anybody concludes about one training example of a client from all that left it, they would have "
    "concluded with at most e^epsilon times the probability, plus delta, had the example not been used. An example, "
    "not a patient: several examples of a patient add up. Scores on test examples and the number of examples "
    "are not covered. The server repeats what the clients say."
)


def who_learns_what(config: Mapping[str, Any]) -> list[list[str]]:
    """What each party gets to know of a client, by the settings in use; the first row is the head."""
    secure, private = bool(config.get("secure_aggregation")), bool(config.get("private_training"))
    within = ", within epsilon" if private else ""
    counts = "about, from its update" if private else "yes, where the client says so; about, from its update"
    rows = [
        ["", "server", "other clients", "reader of the model"],
        ["examples", "no", "no", "no"],
        ["each client's update", "no" if secure else f"yes{within}", "no", "no"],
        ["the weighted sum of all updates", f"yes{within}", f"the model made of it{within}", f"the last one{within}"],
        ["examples by class", "no" if secure else counts, "no", "no"],
        ["number of training examples", "yes", "yes" if secure else "its part of all", "its part of all"],
        ["sums over its columns, where they are scaled alike", "no" if private else "yes", "no", "no"],
        ["loss of its training", "no" if private else "the mean of all" if secure else "yes", "no", "no"],
        ["scores on its test examples", "yes", "no", "no"],
    ]
    return rows


@dataclass(frozen=True)
class Spent:
    """Of the client that has spent the most, as it says."""

    epsilon: float | None  # None where a client says nothing, or is void by --dp-seed
    delta: float | None = None
    partition: str = ""  # of that client, or of the one that says nothing
    whole: bool = True  # whether all have told since their last training


def spent(history: History, until: RoundRecord | None = None) -> Spent:
    """After that round, or all; of the clients whose training counts."""
    told: dict[str, float | None] = {}
    deltas: dict[str, float] = {}
    behind: set[str] = set()
    for record in history.rounds:
        trained, epsilons = record.by_client.get(WEIGHT, {}).keys(), record.by_client.get(EPSILON, {})
        told |= dict.fromkeys(trained - told.keys())
        told |= epsilons
        deltas |= record.by_client.get(DELTA, {})
        behind = (behind | trained) - epsilons.keys()
        if record is until:
            break
    silent = next((partition for partition, epsilon in told.items() if epsilon is None), "")
    if silent or not told:
        return Spent(None, partition=silent)
    epsilon, partition = max((epsilon or 0.0, partition) for partition, epsilon in told.items())
    return Spent(epsilon, deltas.get(partition), partition, whole=not behind)


def epsilon_of(record: RoundRecord, history: History) -> str:
    """The greatest of all clients after this round, for the table."""
    now = spent(history, record)
    return VOID if now.epsilon is None else f"{'' if now.whole else '≥ '}{now.epsilon:.2f}"


def spent_in_words(history: History) -> str:
    """The sentence under a run's rounds."""
    now = spent(history)
    if now.epsilon is None:
        who = f", as {history.title_of(now.partition)} says none" if now.partition else ""
        return f"differential privacy: epsilon is void{who}"
    delta = "" if now.delta is None else f" at delta {now.delta:g}"
    most = "at most" if now.whole else "or more, as a client left after its training"
    who = history.title_of(now.partition)
    return f"differential privacy: epsilon {now.epsilon:.2f}{delta} {most} ({who}), as the clients say"

"""Rounds with secure aggregation: all train, then each sends its update under masks that vanish in the sum.

The server learns the weighted mean of the updates and of their losses, and who trained on how many examples.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from federation.aggregation.validation import SUM, TRAIN_LOSS, BadUpdate, Update
from federation.console import clean, say
from federation.participants.client_manager import Participant
from federation.pieces import InPieces, StoredArray, blocks
from federation.security.masks import (
    LEAST,
    Entry,
    decode,
    from_moments,
    num_words,
    read_entry,
    roster_json,
)
from federation.server.acceptance import Acceptance
from federation.server.dispatch import Dispatcher

import numpy as np
from flwr.common import FitRes, GetPropertiesIns
from flwr.server.client_proxy import ClientProxy

ATTEMPTS = 3  # at a sum that lost a client
Answers = Sequence[tuple[Participant, FitRes]]


@dataclass(frozen=True)
class Sum:
    """What came of adding up: an update, or none. asked: the partitions of those who were asked to mask."""

    update: Update | None = None
    asked: frozenset[int] = frozenset()


def secure_updates(
    number: int, weights: list[np.ndarray], selected: list[Participant], dispatcher: Dispatcher, acceptance: Acceptance
) -> list[Update]:
    """The mean of all updates as one; none where the sum did not come about. Raises RoundLost as Dispatcher.fit."""

    def train(attempt: int) -> Answers:
        return dispatcher.fit(number, weights, dispatcher.select(number) if attempt else selected)

    return _with_attempts(number, train, weights, "update", dispatcher, acceptance)


def secure_statistics(
    number: int, weights: list[np.ndarray], dispatcher: Dispatcher, acceptance: Acceptance
) -> list[Update]:
    """BatchNorm's statistics over the examples of all, as one update; none where there are none, or no sum."""

    def measure(attempt: int) -> Answers:
        if attempt:
            dispatcher.wait_ready(dispatcher.settings.clients, dispatcher.settings.rejoin_wait)
        return dispatcher.measure(number, weights)

    like = [weights[i] for i in dispatcher.clients.batchnorm]
    return _with_attempts(number, measure, like, "statistics", dispatcher, acceptance)


def _with_attempts(
    number: int,
    ask: Callable[[int], Answers],
    like: list[np.ndarray],
    kind: str,
    dispatcher: Dispatcher,
    acceptance: Acceptance,
) -> list[Update]:
    """One sum as one update, or none. Where it loses a client, ask(attempt) has the same clients do it again."""
    asked = frozenset[int]()
    for attempt in range(ATTEMPTS):
        if attempt:
            again = {"update": "train again, from the same seeds", "statistics": "measure BatchNorm's statistics again"}
            say(f"round {number}: a client was lost before the sum was whole; all {again[kind]}")
        answers = ask(attempt)
        if not answers:  # there is no BatchNorm
            return []
        found = masked_sum(number, answers, like, kind, dispatcher, acceptance, asked)
        if found.update:
            return [found.update]
        if not found.asked:
            break
        asked = found.asked
    words = {"update": "nobody's training counts", "statistics": "BatchNorm's statistics are those of the updates"}
    say(f"round {number}: {words[kind]}")
    return []


def masked_sum(
    number: int,
    answers: Answers,
    like: list[np.ndarray],
    kind: str,
    dispatcher: Dispatcher,
    acceptance: Acceptance,
    before: frozenset[int] = frozenset(),
) -> Sum:
    """What those who answered hold, added up: arrays like these, and a loss, or BatchNorm's statistics like these.

    before: who was asked to mask for the same sum, and must be again.
    """
    entries: list[tuple[Participant, Entry]] = []
    for one, res in answers:
        try:
            entry = _entry(one, res, kind)
            if any(entry.identity == other.identity for _, other in entries):
                raise BadUpdate("its key is another client's, too; give each its own --identity")
            entries.append((one, entry))
            dispatcher.exchange.message("roster-entry", one, number, {})
        except BadUpdate as bad:
            acceptance.reject(number, one.partition, bad)
    asked = frozenset(entry.partition for _, entry in entries)
    if len(entries) < LEAST:
        say(f"round {number}: {len(entries)} clients for a sum, which takes {LEAST}")
        return Sum()
    if before and asked != before:
        say(f"round {number}: other clients than before; the difference of two sums would be a client's update")
        return Sum()
    arrays, wide = (like, 1) if kind == "update" else ([], sum(array.size for array in like))
    roster, words = roster_json([entry for _, entry in entries]), num_words(arrays, wide)
    came = dispatcher.ask_each([one for one, _ in entries], _masked(number, roster, words, kind, dispatcher))
    refused = [(one, answer) for one, answer in came if isinstance(answer, Refusal)]
    arrived = [answer for _, answer in came if isinstance(answer, InPieces)]
    masked = [each for answer in arrived for each in answer.arrays if isinstance(each, StoredArray)]
    total = _added(masked, words)
    for one, refusal in refused:
        if refusal.other_clients:  # as after a restart of ours, which forgot whom we had asked
            say(f"round {number}: {one.title} was in this sum with other clients before")
            return Sum()
        acceptance.reject(number, one.partition, BadUpdate(refusal.words, client_failed=True))
    if len(masked) < len(entries):
        return Sum(asked=asked)
    decoded = decode(total, arrays, wide)
    if decoded is None:
        say(f"round {number}: masks are left in the sum; the clients had different models or rosters, or one lied")
        return Sum(asked=asked)
    mean, numbers = decoded
    parts = {entry.partition: entry.examples for _, entry in entries}
    has_loss = kind == "update" and not dispatcher.recipe.private_training
    metrics = {TRAIN_LOSS: float(numbers[0])} if has_loss else {}
    mean = mean if kind == "update" else from_moments(numbers, like)
    return Sum(Update(SUM, mean, sum(parts.values()), metrics, parts, 4 * words * len(masked)), asked)


@dataclass(frozen=True)
class Refusal:
    """A client gives no masked update."""

    words: str
    other_clients: bool


def _entry(one: Participant, res: FitRes, kind: str) -> Entry:
    """Raises BadUpdate where a client's answer is no entry of its own."""
    if "error" in res.metrics:
        raise BadUpdate(f"it says: {clean(res.metrics['error'])}", client_failed=True)
    try:
        entry = read_entry(res.metrics)
    except (KeyError, TypeError, ValueError) as error:
        raise BadUpdate(f"its answer is no entry for a roster ({type(error).__name__})") from None
    fits = entry.examples == one.train_examples if kind == "update" else 0 < entry.examples <= one.train_examples
    if entry.partition != one.partition or not fits:
        raise BadUpdate("its entry has another partition or number of examples than it declared")
    if one.member and one.member.public != entry.identity:
        raise BadUpdate("its entry has another key than it joined with")
    return entry


def _masked(number: int, roster: str, words: int, kind: str, dispatcher: Dispatcher) -> Callable:
    """Asks a client to mask what it holds, and fetches it; its own words where it refuses."""

    def ask(one: Participant, client: ClientProxy, timeout: float) -> InPieces | Refusal:
        question = GetPropertiesIns({"ask": "mask", "roster": roster})
        dispatcher.exchange.told("roster", one, number)
        told = client.get_properties(question, timeout, None).properties
        if "error" in told:
            return Refusal(f"it says: {clean(told['error'])}", bool(told.get("other_clients")))
        like = [((words,), np.dtype(np.uint32))]
        try:
            came = client.fetch("masked", like, dispatcher.pieces([]), time.monotonic() + timeout)  # type: ignore[attr-defined]
        except ValueError as error:
            return Refusal(f"of its masked update {error}", False)
        dispatcher.exchange.came(kind, one, number, came)
        return came

    return ask


def _added(masked: Sequence[StoredArray], words: int) -> np.ndarray:
    """Modulo 2**32, a part at a time, from their files, which are closed then."""
    total = np.zeros(words, np.uint32)
    for place in blocks(words):
        for each in masked:
            total[slice(*place)] += each.read(*place)
    for each in masked:
        each.file.close()
    return total

"""Rounds with secure aggregation: all train, then each sends its update under masks that vanish in the sum.

The server learns the weighted mean of the updates and of their losses, and who trained on how many examples.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from federation.aggregation.validation import SUM, TRAIN_LOSS, BadUpdate, Update
from federation.console import clean, say
from federation.participants.client_manager import Participant
from federation.pieces import InPieces, block, blocks
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
    """What came of adding up: an update, or none. asked: the keys of those who were asked to mask."""

    update: Update | None = None
    asked: frozenset[str] = frozenset()


def secure_updates(
    number: int, weights: list[np.ndarray], selected: list[Participant], dispatcher: Dispatcher, acceptance: Acceptance
) -> list[Update]:
    """The mean of all updates as one; none where the sum did not come about. Raises RoundLost as Dispatcher.fit."""
    asked: frozenset[str] = frozenset()
    for attempt in range(ATTEMPTS):
        if attempt:
            say(f"round {number}: a client was lost before the sum was whole; all train again, from the same seeds")
            selected = dispatcher.select(number)
        answers = dispatcher.fit(number, weights, selected)
        found = masked_sum(number, answers, weights, "update", dispatcher, acceptance, asked)
        if found.update:
            return [found.update]
        if not found.asked:
            break
        asked = found.asked
    say(f"round {number}: nobody's training counts")
    return []


def secure_statistics(
    number: int, weights: list[np.ndarray], dispatcher: Dispatcher, acceptance: Acceptance
) -> list[Update]:
    """BatchNorm's statistics over the examples of all, as one update; none where there are none, or no sum."""
    like = [weights[i] for i in dispatcher.clients.batchnorm]
    answers = dispatcher.measure(number, weights)
    if not answers:
        return []
    moments = [np.zeros(array.shape, np.float64) for array in like]
    found = masked_sum(number, answers, moments, "statistics", dispatcher, acceptance).update
    if found is None:
        return []
    return [Update(SUM, from_moments(found.weights, like), found.examples, {}, found.parts)]


def masked_sum(
    number: int,
    answers: Answers,
    like: list[np.ndarray],
    kind: str,
    dispatcher: Dispatcher,
    acceptance: Acceptance,
    before: frozenset[str] = frozenset(),
) -> Sum:
    """What those who answered hold, added up. before: who was asked to mask for the same sum, and must be again."""
    entries: list[tuple[Participant, Entry]] = []
    for one, res in answers:
        try:
            entries.append((one, _entry(one, res, kind)))
        except BadUpdate as bad:
            acceptance.reject(number, one.partition, bad)
    asked = frozenset(entry.identity for _, entry in entries)
    if len(entries) < LEAST:
        say(f"round {number}: {len(entries)} clients for a sum, which takes {LEAST}")
        return Sum()
    if before and asked != before:
        say(f"round {number}: other clients than before; the difference of two sums would be a client's update")
        return Sum()
    roster, words = roster_json([entry for _, entry in entries]), num_words(sum(array.size for array in like))
    came = dispatcher.ask_each([one for one, _ in entries], _masked(number, roster, words, kind, dispatcher))
    refused = [(one, answer) for one, answer in came if isinstance(answer, Refusal)]
    for one, refusal in refused:
        if refusal.other_clients:  # as after a restart of ours, which forgot whom we had asked
            say(f"round {number}: {one.title} was in this sum with other clients before")
            return Sum()
        acceptance.reject(number, one.partition, BadUpdate(f"it says: {refusal.words}", client_failed=True))
    if len(came) < len(entries) or refused:
        return Sum(asked=asked)
    decoded = decode(_added([answer.arrays[0] for _, answer in came], words), like)
    if decoded is None:
        say(f"round {number}: masks are left in the sum; the clients had different models or rosters, or one lied")
        return Sum(asked=asked)
    mean, loss = decoded
    parts = {entry.partition: entry.examples for _, entry in entries}
    metrics = {TRAIN_LOSS: loss} if kind == "update" else {}
    return Sum(Update(SUM, mean, sum(parts.values()), metrics, parts), asked)


@dataclass(frozen=True)
class Refusal:
    """A client masks nothing, in its own words."""

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
        told = client.get_properties(question, timeout, None).properties
        if "error" in told:
            return Refusal(clean(told["error"]), bool(told.get("other_clients")))
        like = [((words,), np.dtype(np.uint32))]
        came = client.fetch("masked", like, dispatcher.pieces([]), time.monotonic() + timeout)  # type: ignore[attr-defined]
        dispatcher.exchange.came(kind, one, number, came)
        return came

    return ask


def _added(updates: Sequence[Any], words: int) -> np.ndarray:
    """Modulo 2**32, a part at a time: what was stored stays on disk."""
    total = np.zeros(words, np.uint32)
    for place in blocks(words):
        for update in updates:
            total[slice(*place)] += block(update, *place)
    return total

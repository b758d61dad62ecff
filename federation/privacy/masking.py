"""The client's part in secure aggregation: what it keeps between its training and the sum, and what it distrusts."""

from collections.abc import Sequence
from typing import Any

from federation.console import PublicError
from federation.pieces import hash_arrays
from federation.security.identity import Identity
from federation.security.masks import (
    Distrust,
    Entry,
    OneTimeKey,
    OtherClients,
    check_range,
    check_roster,
    encode,
    read_roster,
    subject_of,
)
from federation.security.members import Members

import numpy as np


class Masking:
    """One client in one run. Without an identity of its own it makes a key for the run; peers: the others' keys."""

    def __init__(self, run: str, partition: int, identity: Identity | None = None, peers: Members | None = None):
        self.run, self.partition, self.peers = run, partition, peers
        self.identity = identity or Identity.new()
        self._update: tuple[Sequence[Any], float] | None = None  # the newest, until it is masked: arrays and loss
        self._key: OneTimeKey | None = None
        self._entry: Entry | None = None
        self._subject, self.round, self.kind = "", 0, ""  # what the newest training is of
        self._summed: dict[str, frozenset[str]] = {}  # with whom each subject was summed before, by public keys

    def remember(self, before: "Masking") -> None:
        """What was summed with whom, of the same client in the same run, and its key."""
        self.identity, self._summed = before.identity, before._summed

    def check_open(self) -> None:
        """Whether the network may be sent as it is. Raises Distrust once it has been trained."""
        if self.round:
            raise Distrust("the server asks for the network itself, after a training")

    def begin(self, server_round: int, kind: str, received: Sequence[np.ndarray]) -> None:
        """A training or measuring from this model. received: as it travelled; hashed before it changes."""
        self.round, self.kind = server_round, kind
        self._subject = subject_of(self.run, server_round, kind, hash_arrays(received))

    def seal(self, arrays: Sequence[Any], loss: float, examples: int) -> dict[str, Any]:
        """Keep what shall be summed; returns the entry that is sent instead of it. Raises PublicError."""
        check_range(arrays, loss)  # now: once others have masked, a failure would cost them the round
        self._update, self._key = (arrays, loss), OneTimeKey()
        self._entry = Entry.signed(self._subject, self.partition, examples, self._key.public, self.identity)
        return vars(self._entry)

    def mask(self, roster_text: object) -> np.ndarray:
        """The words to send, once. Raises Distrust before anything is given away."""
        if self._update is None or self._key is None or self._entry is None:
            raise Distrust("the server asks for an update that was masked before, or never trained")
        roster = read_roster(roster_text)
        check_roster(roster, self._entry, self._subject)
        self._check_peers(roster)
        (arrays, loss), identities = self._update, frozenset(entry.identity for entry in roster)
        before = self._summed.get(self._subject, identities)
        if identities != before:
            raise OtherClients(
                "the server asks for the same sum again with other clients, which would tell the difference"
            )
        share = self._entry.examples / sum(entry.examples for entry in roster)
        masked = self._key.mask(encode(arrays, loss, share), self._entry, roster, self._subject)
        self._summed[self._subject] = identities
        self._update = self._key = self._entry = None
        return masked

    def _check_peers(self, roster: Sequence[Entry]) -> None:
        if self.peers is None:
            return
        self.peers.refresh()
        for entry in roster:
            if entry.identity != self.identity.public and self.peers.find(entry.identity) is None:
                raise Distrust(f"the key of client {entry.partition} is not in this client's --peers")

    def describe(self) -> str:
        """What it is safe from, for the hospital."""
        if self.peers is None:
            return "secure aggregation, keys as the server gives them: not safe from a server that lies (--peers)"
        number = len([each for each in self.peers if each.public != self.identity.public])
        keys = f"this client's key {self.identity.fingerprint}, {number} peers' keys from {self.peers.path}"
        return f"secure aggregation, {keys}: safe from a server that lies, too"


def check_peers(peers: Members | None, secure: bool) -> None:
    """Raises PublicError where a client that has --peers is asked for anything else than secure aggregation."""
    if peers is not None and not secure:
        raise PublicError(
            "it takes part in secure aggregation only (--peers); start the server with --secure-aggregation"
        )

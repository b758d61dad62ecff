"""The client's part in secure aggregation: what it keeps between its training and the sum, and what it distrusts."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.console import PublicError, fail, say
from federation.pieces import hash_arrays
from federation.process import write_content
from federation.protocol import Assignment, class_name
from federation.security.identity import Identity
from federation.security.masks import (
    FLOAT_BITS,
    LEAST,
    UNITS,
    WIDE,
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

OWN = ("clients_on_host", "in_pieces", "server_round")  # of what comes with a model: not alike for all, or told apart
LARGE_SHARE = 0.9  # of the examples, from which on the sum is nearly this client's own update
LARGEST_LOSS = 0.99 * UNITS * 2.0 ** (WIDE - FLOAT_BITS)


def terms_of(assignment: Assignment, classes: Sequence[str], config: Mapping[str, Any]) -> str:
    """Hash of what a training follows from beside its model and its examples: all clients must have it alike."""
    told = {name: value for name, value in config.items() if name not in OWN}
    names = [class_name(name) for name in assignment.classes or classes]
    place = [assignment.num_partitions, assignment.recipe.to_json(), names, assignment.statistics, told]
    return hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()


class Summed:
    """With whom each training of this client was summed: a second sum of it with others would show by its difference
    what one client sent.

    Kept in a file, where there is a path, so that a client that is started again knows it, too.
    """

    def __init__(self, path: Path | None = None, known: dict[str, str] | None = None) -> None:
        self.path = path
        self._with = known or {}  # hash of the clients, by training

    @classmethod
    def load(cls, folder: Path, identity: Identity | None) -> "Summed":
        """Of the client with this key; without one, of this process. Exits with 1 and one line if it is damaged."""
        if identity is None:
            return cls()
        path = folder / f"summed-{identity.public[:16]}.json"
        try:
            known = json.loads(path.read_text()) if path.exists() else {}
            if not isinstance(known, dict):
                raise ValueError
        except (OSError, ValueError):
            fail(
                f"{path} can't be read: it says with whom this client's updates were summed; put it back, or remove it"
            )
        return cls(path, known)

    def add(self, trainings: Sequence[str], clients: Sequence[str]) -> None:
        """Before anything is given. Raises OtherClients where one of the trainings was summed with others, and
        PublicError where the file can't be written.
        """
        digest = hashlib.sha256("\n".join(sorted(clients)).encode()).hexdigest()
        if any(self._with.get(training, digest) != digest for training in trainings):
            raise OtherClients(
                "it was in this sum with other clients before, and the difference of the two would be a client's "
                "update (in another run give another --seed)"
            )
        if not all(training in self._with for training in trainings):
            self._with |= dict.fromkeys(trainings, digest)
            try:
                if self.path:
                    write_content(self.path, json.dumps(self._with, indent=1).encode())
            except OSError as error:
                raise PublicError(f"it can't write down with whom it is summed ({error.strerror})") from None


@dataclass
class Sealed:
    """A client's update from its training until it is masked, once."""

    arrays: Sequence[Any]
    wide: np.ndarray
    key: OneTimeKey
    entry: Entry
    subject: str
    trainings: list[str]


class Masking:
    """One client in one run. Without an identity of its own it makes a key for the run.

    peers: the others' keys. summed: what it was in before, in any run. least: clients in a sum.
    """

    def __init__(
        self,
        assignment: Assignment,
        identity: Identity | None = None,
        peers: Members | None = None,
        summed: Summed | None = None,
        least: int = LEAST,
    ):
        self.assignment, self.peers, self.least = assignment, peers, max(LEAST, least)
        self.identity = identity or Identity.new()
        self.summed = summed or Summed()
        self.round, self.kind = 0, ""  # of the newest training
        self._subject, self._trainings = "", [""]
        self._constant: list[int] = []  # positions of arrays that hold no numbers to be averaged
        self._sealed: Sealed | None = None

    def check_open(self) -> None:
        """Whether the network may be sent as it is. Raises Distrust once it has been trained."""
        if self.round:
            raise Distrust("the server asks for the network itself, after a training")

    def forget(self) -> None:
        """Another model comes in, on which what is kept may depend."""
        self._sealed = None

    def begin(
        self, kind: str, received: Sequence[np.ndarray], classes: Sequence[str], config: Mapping, sha256: str = ""
    ) -> None:
        """A training or measuring from this model. received: as it travelled; sha256: its hash, where it is known."""
        self.round, self.kind = config["server_round"], kind
        model, terms = sha256 or hash_arrays(received), terms_of(self.assignment, classes, config)
        run, recipe = self.assignment.run_id, self.assignment.recipe.to_json()
        self._subject = subject_of(run, self.round, kind, model, terms)
        # A model that is changed a little, or another run from the same seed, would make nearly the same update.
        again = hashlib.sha256(f"{recipe} {model}".encode()).hexdigest()
        self._trainings = [f"{kind} {self.round} of run {run}", f"{kind} {self.round} from {again}"]
        kept = (i for i, array in enumerate(received) if array.dtype.kind == "f" and not np.isfinite(array).all())
        self._constant = list(kept)

    def seal_update(self, weights: Sequence[Any], loss: float, examples: int) -> dict[str, Any]:
        """Keep a trained model; returns the entry that is sent instead of it. Raises PublicError.

        What is constant, such as a mask with infinities, the server has already.
        """
        if not math.isfinite(loss):
            raise PublicError(f"its training loss is {loss}")
        arrays = [np.zeros_like(array) if i in self._constant else array for i, array in enumerate(weights)]
        return self.seal(arrays, np.clip([loss], -LARGEST_LOSS, LARGEST_LOSS), examples)

    def seal(self, arrays: Sequence[Any], wide: np.ndarray, examples: int) -> dict[str, Any]:
        """The same of arrays and of numbers that may be larger. Raises TooLarge."""
        check_range(arrays, wide)  # now: once others have masked, a failure would cost them the round
        key, partition = OneTimeKey(), self.assignment.partition
        entry = Entry.signed(self._subject, partition, examples, key.public, self.identity)
        self._sealed = Sealed(arrays, wide, key, entry, self._subject, self._trainings)
        return vars(entry)

    def mask(self, roster_text: object) -> np.ndarray:
        """The words to send, once. Raises PublicError before anything is given away."""
        sealed = self._sealed
        if sealed is None:
            raise Distrust("the server asks for an update that was masked before, or never trained")
        roster = read_roster(roster_text)
        check_roster(roster, sealed.entry, sealed.subject, self.least, self.assignment.num_partitions)
        self._check_peers(roster)
        known = [entry.identity if self.peers else str(entry.partition) for entry in roster]
        self.summed.add(sealed.trainings, known)
        self._sealed = None
        share = sealed.entry.examples / sum(entry.examples for entry in roster)
        if share > LARGE_SHARE:
            say(f"warning: {share:.0%} of the examples in this sum are this client's: it is nearly its own update")
        return sealed.key.mask(encode(sealed.arrays, sealed.wide, share), sealed.entry, roster, sealed.subject)

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
            return "secure aggregation, keys as the server gave them: safe from a server that only looks (see --peers)"
        number = len([each for each in self.peers if each.public != self.identity.public])
        keys = f"this client's key {self.identity.fingerprint}, {number} peers' keys from {self.peers.path}"
        return f"secure aggregation, {keys}: safe from a server that lies, too"


def check_peers(peers: Members | None, secure: bool) -> None:
    """Raises PublicError where a client that has --peers is asked for anything else than secure aggregation."""
    if peers is not None and not secure:
        raise PublicError(
            "it takes part in secure aggregation only (--peers); start the server with --secure-aggregation"
        )

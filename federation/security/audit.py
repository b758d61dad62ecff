"""One party's record of a run: audit.jsonl, a line for everything that went out or came in, each with the hash of the
line before (a hash chain, as in RFC 6962's logs, of one branch).

A line is a JSON object, its keys sorted, without spaces. Of arrays it holds the SHA-256 (pieces.hash_arrays) and the
bytes; of all other messages only that they were sent: a hash of a few small numbers, such as counts of classes,
could be found again by trying. security/audit_check.py verifies such files.
"""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from federation.console import PublicError, fail
from federation.protocol import Assignment
from federation.security.identity import Identity

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FIRST = "0" * 64  # what stands in the place of the hash of the line before the first
HASH, SIGNATURE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{128}")
TAIL = 65_536  # bytes; no line is longer
SERVER, FILE = "server", "audit.jsonl"
PRIVATE = re.compile("secure_aggregation|private_training|dp_")  # names of settings
# All that a line may hold, and as what. Nothing else is ever written: no path, no count, no text from elsewhere.
KEYS: dict[str, type | tuple[type, ...]] = {
    "previous": str,  # hash of the line before
    "time": str,  # UTC, RFC 3339
    "run": str,
    "round": (int, type(None)),  # or version, or number of a training, of the asynchronous mode; 0: the untrained model
    "kind": str,  # KINDS
    "from": str,
    "to": str,
    "session": str,  # names a client's process: the same at both sides
    "bytes": int,
    "sha256": (str, type(None)),  # null where what came in holds no readable arrays
    "privacy": dict,  # settings of the recipe, by name, and what a client that trains privately has spent
    "head": str,  # the other party's, of its newest line when it was told
    "key": str,  # public key of the party that "from" names, as hex
    "signature": str,  # with that key, of signed_text(run, round, head)
    "outcome": str,  # how the run ended: a kind of protocol.CloseReason
}
GOES_OUT = ("model-to-train", "model-to-measure", "statistics-to-evaluate", "model-to-evaluate")  # of the server
COMES_IN = ("untrained-model", "frozen-weights", "update", "statistics")  # to the server
ARRAYS = (*GOES_OUT, *COMES_IN)
MESSAGES = (
    "assignment",
    "data-summary",
    "column-sums",
    "scores",
    "roster-entry",
    "roster",
)  # the last two: see masks.py
KINDS = (*ARRAYS, *MESSAGES, "begin", "resume", "model", "head", "end")


def privacy_of(recipe: Any) -> dict[str, Any]:
    """The settings of a recipe that keep something from the other side, where they are in use."""
    values = {each.name: getattr(recipe, each.name) for each in dataclasses.fields(recipe)}
    return {name: value for name, value in values.items() if value and PRIVATE.match(name)}


class Unwritable(OSError, PublicError):
    """The disk does not take the record, so there must be no training."""

    def __str__(self) -> str:
        return f"the audit file {self.filename} can't be written ({self.strerror}); free or change the disk"

    @property
    def public(self) -> str:
        return f"its audit file can't be written ({self.strerror})"


def utc_now() -> str:
    """As RFC 3339 has it, to a thousandth of a second."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def session_name(instance: str) -> str:
    """What names a client's process in the records of both sides: not the instance, by which a place is taken again."""
    return hashlib.sha256(instance.encode()).hexdigest()[:16]


def line_of(values: Mapping[str, Any]) -> bytes:
    """As it stands in the file, without the newline."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def signed_text(run: str, server_round: int | None, head: str) -> bytes:
    """What a party signs to say: this was my newest line."""
    return f"federation audit\n{run}\n{server_round}\n{head}".encode()


class AuditLog:
    """Appends to one file; threads may share it. Without a path it writes nothing.

    Methods raise Unwritable where the disk does not take it, and from then on always.
    """

    def __init__(
        self,
        path: Path | None = None,
        run: str = "",
        party: str = SERVER,
        *,
        privacy: Mapping[str, Any] | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.path, self.run, self.party = path, run, party
        self.privacy = dict(privacy or {})
        self.identity = identity
        self.head = FIRST
        self._file: int | None = None
        self._synced = ""
        self._broken: Unwritable | None = None
        self._lock = threading.Lock()
        if path is not None:
            try:
                self._open(path)
                more: dict[str, Any] = {"key": identity.public} if identity else {}
                self.write("begin" if self.head == FIRST else "resume", **more)
            except OSError as error:
                self._break(error)

    def _open(self, path: Path) -> None:
        """Lock the file, read its head, and end a line that a crash cut in the middle."""
        self._file = file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OSError(error.errno, "another process writes it") from None
        size = os.lseek(file, 0, os.SEEK_END)
        os.lseek(file, max(0, size - TAIL), os.SEEK_SET)
        tail = os.read(file, TAIL)
        if tail:
            self.head = hashlib.sha256(tail.removesuffix(b"\n").rpartition(b"\n")[2]).hexdigest()
            if not tail.endswith(b"\n"):
                os.write(file, b"\n")

    def _break(self, error: OSError) -> None:
        self._broken = Unwritable(error.errno, error.strerror, str(self.path))

    def write(
        self,
        kind: str,
        server_round: int | None = None,
        *,
        sender: str = "",
        receiver: str = "",
        **more: Any,
    ) -> None:
        """One line; more: what KEYS has beside. It is with the system, and on the disk after sync()."""
        with self._lock:
            self._raise_if_broken()
            if self._file is None:
                return
            values = {**more, "time": utc_now(), "run": self.run, "round": server_round, "kind": kind}
            values |= {"privacy": self.privacy, "from": sender or self.party, **({"to": receiver} if receiver else {})}
            line = line_of({**values, "previous": self.head})
            try:
                left = memoryview(line + b"\n")
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError as error:
                self._break(error)
            self._raise_if_broken()
            self.head = hashlib.sha256(line).hexdigest()

    def sync(self) -> str:
        """Have all lines on the disk; returns the head. Once a round is enough: it costs milliseconds."""
        with self._lock:
            self._raise_if_broken()
            if self._file is not None and self._synced != self.head:
                try:
                    os.fsync(self._file)
                except OSError as error:
                    self._break(error)
                self._raise_if_broken()
                self._synced = self.head
            return self.head

    def _raise_if_broken(self) -> None:
        if self._broken:
            raise Unwritable(*self._broken.args, str(self.path))

    def close(self) -> None:
        """Nothing more is written by this object; another may go on with the file."""
        if self._file is not None:
            os.close(self._file)
        self.path = self._file = None

    # Heads: each party keeps the other's, so that neither can change its own lines unseen

    def told(self, server_round: int | None = None) -> dict[str, str]:
        """The head, for the other party, as part of a message: of lines that are on the disk; signed with a key."""
        if self.path is None:
            return {}
        head = self.sync()
        if self.identity is None:
            return {"audit": head}
        signature = self.identity.sign(signed_text(self.run, server_round, head))
        return {"audit": head, "audit_signature": signature}

    def take(self, told: Mapping[str, Any], server_round: int | None, sender: str, **more: str) -> None:
        """Write down the head that the other party told in a message; nothing where it told none, as before 1.1."""
        head, signature = told.get("audit"), told.get("audit_signature", "")
        if isinstance(head, str) and HASH.fullmatch(head):
            signed = {"signature": signature} if isinstance(signature, str) and SIGNATURE.fullmatch(signature) else {}
            self.write("head", server_round, sender=sender, receiver=self.party, head=head, **signed, **more)


def audit_folder(path: str) -> Path:
    """Where the client's record is kept. Exits with 1 and one line where nothing can be written there."""
    folder = Path(path)
    try:
        # A client that never joins leaves no folder behind, nor takes one away that others just began to use.
        there = next(one for one in (folder, *folder.parents) if one.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        words = f"--audit {path} can't be written ({error.strerror})"
        fail(f"{words}, and without a record there is no training; name another folder")
    return folder


def open_audit(folder: Path, identity: Identity | None, assignment: Assignment) -> AuditLog:
    """The record of a client's part in a run; one that comes back goes on with its file."""
    party, run = f"client {assignment.partition}", assignment.run_id
    name = f"{run or 'run'}-{party.replace(' ', '-')}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable(error.errno, error.strerror, str(folder)) from None
    return AuditLog(folder / name, run, party, privacy=privacy_of(assignment.recipe), identity=identity)

"""Who belongs to a federation: a file of public keys, a line each, as OpenSSH's authorized_keys has them (sshd(8)).

    ssh-ed25519 AAAAC3Nza... hospital-a
    partition=1,expiry-time="20271231" ssh-ed25519 AAAAC3Nza... hospital-b

The comment is the member's name. Empty lines and those that begin with # don't count.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from federation.console import clean, fail, read_text, say
from federation.security.identity import KEY_TYPE, KeyFileError, fingerprint, read_public

OPTIONS = ("partition", "expiry-time")
OPTION = re.compile(r'([A-Za-z-]+)(?:=("[^"]*"|[^\s,"]*))?(,|\s+|$)')
TIMES = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}  # by the number of digits
LONGEST_NAME, MOST = 40, 100_000


class MembersError(ValueError):
    """The file can't be used; the text is one line, with the line's number and the remedy."""


@dataclass(frozen=True)
class Member:
    name: str
    public: str  # 32 bytes as hex
    partition: int | None = None  # the only one that it may have
    expires: datetime | None = None  # in UTC; from then on it is no member

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public)

    def expired(self, now: datetime | None = None) -> bool:
        return self.expires is not None and (now or datetime.now(UTC)) >= self.expires


class Members:
    """The members that the file names now: it is read again when it has changed."""

    def __init__(self, path: Path, members: list[Member], flag: str = "--members"):
        self.path, self.flag = path, flag
        self._members = {each.public: each for each in members}
        self._seen = stamp(path)

    @classmethod
    def load(cls, path: str, flag: str = "--members") -> "Members":
        """Exits with 2 and one line where the file can't be used."""
        try:
            return cls(Path(path), read_members(Path(path)), flag)
        except (OSError, MembersError) as error:
            fail(f"{flag} {path} {_why(error)}", 2)

    def __iter__(self) -> Iterator[Member]:
        return iter([each for each in self._members.values() if not each.expired()])

    def find(self, public: str) -> Member | None:
        """The member that has this key, if it has not expired."""
        member = self._members.get(public)
        return None if member is None or member.expired() else member

    def refresh(self) -> None:
        """Read the file again where it has changed; of one that can't be used, say so, and keep the members."""
        now = stamp(self.path)
        if now == self._seen:
            return
        self._seen = now
        try:
            self._members = {each.public: each for each in read_members(self.path)}
        except (OSError, MembersError) as error:
            say(f"warning: {self.flag} {self.path} {_why(error)}; the members stay as they were")


def read_members(path: Path) -> list[Member]:
    """Raises OSError, or MembersError with the number of the line."""
    try:
        text = read_text(path.read_bytes())
    except UnicodeDecodeError:
        raise MembersError("is not text; give a line of each member's .pub file") from None
    members: list[Member] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.strip().startswith("#"):
            try:
                member = read_member(line.strip())
                _check_new(member, members)
            except (KeyFileError, MembersError) as error:
                raise MembersError(f"line {number}: {error}") from None
            members.append(member)
    if not members:
        raise MembersError("names nobody; give a line of each member's .pub file")
    return members


def read_member(line: str) -> Member:
    """Raises MembersError or KeyFileError, without the line's number."""
    if "PRIVATE KEY" in line:
        raise MembersError("holds a private key, which must not leave its owner; give the line of its .pub file")
    options, rest = _options(line)
    words = rest.split(None, 2)
    if len(words) < 2:
        raise MembersError(f"has no key; a line is {KEY_TYPE} KEY NAME")
    public = read_public(*words[:2])
    name = clean(words[2], LONGEST_NAME) if len(words) > 2 else ""
    if not name:
        raise MembersError("has no name; write it behind the key")
    partition = options.get("partition")
    if partition is not None and not re.fullmatch("[0-9]{1,6}", partition):
        raise MembersError(f"partition must be a whole number from 0 on, got {clean(partition, 40)}")
    expires = _time(options["expiry-time"]) if "expiry-time" in options else None
    return Member(name, public, None if partition is None else int(partition), expires)


def _check_new(member: Member, members: list[Member]) -> None:
    for other in members:
        if other.public == member.public:
            raise MembersError(f"has the key of {other.name}, above; a key is one member's")
        if other.name == member.name:
            raise MembersError(f"has the name {member.name}, as one above; give each its own")
        if member.partition is not None and other.partition == member.partition:
            raise MembersError(f"has partition {member.partition}, which {other.name} has, above")


def _options(line: str) -> tuple[dict[str, str], str]:
    """What stands before the kind of key, and the rest."""
    options: dict[str, str] = {}
    while not re.match(r"(ssh|ecdsa|sk)-\S", line):
        if not line:
            break
        found = OPTION.match(line)
        if not found or found[1] not in OPTIONS or not found[2]:
            word = clean(found[1] if found else line.split()[0], 40)
            raise MembersError(f"has {word}, which is no option here; there are partition=N and expiry-time=TIME")
        if found[1] in options:
            raise MembersError(f"has {found[1]} twice")
        options[found[1]] = found[2].strip('"')
        line = line[found.end() :]
    return options, line


def _time(text: str) -> datetime:
    """OpenSSH's YYYYMMDD[HHMM[SS]], in this machine's time, or with Z behind it in UTC."""
    digits, utc = text.rstrip("Zz"), text[-1:] in "Zz"
    try:
        when = datetime.strptime(digits, TIMES[len(digits)])
        return when.replace(tzinfo=UTC) if utc else when.astimezone(UTC)
    except (KeyError, ValueError, OverflowError):
        raise MembersError(f"expiry-time must be YYYYMMDD or YYYYMMDDHHMM, got {clean(text, 40)}") from None


def stamp(path: str | Path | None) -> tuple[int, int, int] | None:
    """What changes when a file does."""
    try:
        status = os.stat(path or "")
        return status.st_mtime_ns, status.st_size, status.st_ino
    except OSError:
        return None


def _why(error: OSError | MembersError) -> str:
    return f"can't be read ({error.strerror})" if isinstance(error, OSError) else str(error)

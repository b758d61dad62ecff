"""What each side proves itself with, and checks the other by.

A client signs the server's question together with the run and the name by which it calls the server. So a signature
is worth nothing to another server: one that passes it on is found out by the name.
"""

import argparse
import json
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, date, datetime

from federation.console import PublicError, clean, say
from federation.net import is_loopback, parse_address
from federation.security.identity import Identity, load_public, verify
from federation.security.members import Member, Members, stamp
from federation.security.secret import load_secret, proof, read_secret
from federation.security.tls import ends_soon, hosts_of, read_authority, read_server_files


class NotAdmitted(Exception):
    """A client does not prove what it must. kind: what such refusals are counted by; the text is what it is told."""

    def __init__(self, kind: str, words: str):
        super().__init__(words)
        self.kind = kind


def signed_text(kind: str, run: str, address: str, nonce: str, challenge: str) -> bytes:
    """What a client signs (kind join) and a server (serve): the nonce is the server's, the challenge the client's."""
    # As JSON: whatever a hostile party puts into one text, it can't be read as the next one.
    return json.dumps([f"federation {kind} 1", run, address, nonce, challenge]).encode()


CHALLENGE = re.compile("[0-9a-f]{64}")
RENEW = {
    "--ca-certificate": "make a new authority with python -m federation.certificates, and give all clients its ca.pem",
    "--certificate": "python -m federation.certificates --host NAME --renew makes a new one",
}


class Reminder:
    """Which certificates end within 30 days, said at the start and then once a day."""

    def __init__(self, certificates: dict[str, bytes]):
        self._certificates = certificates  # PEM, by what they are called
        self._day: date | None = None

    def remind(self) -> None:
        today = datetime.now(UTC).date()
        if self._day != today:
            self._day = today
            for name, pem in self._certificates.items():
                end = ends_soon(pem)
                if end:
                    say(f"warning: {name} ends on {end:%Y-%m-%d}; {RENEW[name]}")


@dataclass
class ServerCredentials:
    """Files are read again when they change. Who is inside stays inside, but for those that are no members any more."""

    secret: bytes | None = None
    secret_file: str | None = None
    members: Members | None = None
    identity: Identity | None = None
    certificates: tuple[bytes, bytes, bytes] | None = None  # authority, certificate, key
    insecure: bool = False
    reminder: Reminder = field(default_factory=lambda: Reminder({}))

    def __post_init__(self) -> None:
        self._seen = stamp(self.secret_file)
        self.reminder.remind()

    @classmethod
    def load(cls, args: argparse.Namespace) -> "ServerCredentials":
        """Exits with 2 and one line where a file can't be used."""
        certificates = read_server_files(args.ca_certificate, args.certificate, args.private_key)
        named = dict(zip(("--ca-certificate", "--certificate"), certificates[:2] if certificates else (), strict=False))
        return cls(
            load_secret(args.secret_file),
            args.secret_file,
            Members.load(args.members) if args.members else None,
            Identity.load(args.identity) if args.identity else None,
            certificates,
            args.insecure,
            Reminder(named),
        )

    def refresh(self) -> None:
        """Read changed files again; one that can't be used changes nothing."""
        self.reminder.remind()
        if self.members:
            self.members.refresh()
        if read_again(self):
            say(f"--secret-file {self.secret_file} has changed; who joins from now on needs the new secret")

    def check(self, answer: dict, run: str, nonce: str) -> Member | None:
        """Which member a hello is from; None without --members. Raises NotAdmitted."""
        if self.members is None:
            return None
        public, address = str(answer.get("identity", "")), str(answer.get("address", ""))
        if not public:
            words = "this server admits members only; start the client with --identity, the key that the server knows"
            raise NotAdmitted("no identity", words)
        member = self.members.find(public)
        if member is None:
            words = "its key is no member's, or has expired; give the server the line of the .pub file"
            raise NotAdmitted("no member", words)
        if not self.is_own(address):
            words = f"{member.name} calls this server {clean(address, 100)}, which is none of its certificate's names"
            raise NotAdmitted("other server", f"{words}; make a certificate with that --host")
        challenge = str(answer.get("challenge", ""))
        text = signed_text("join", run, address, nonce, challenge)
        if not CHALLENGE.fullmatch(challenge) or not verify(public, str(answer.get("signature", "")), text):
            raise NotAdmitted("wrong signature", f"the signature of {member.name} is wrong")
        return member

    def is_own(self, address: str) -> bool:
        """Whether a client that means us may say this address. Without a certificate it can't be known."""
        try:
            host, _ = parse_address(address)
        except ValueError:
            return False
        if self.certificates:
            return host.lower() in self.hosts
        return is_loopback(host) or self.insecure

    @property
    def hosts(self) -> list[str]:
        """By which clients may call us: those of the certificate, names before addresses."""
        found = hosts_of(self.certificates[1]) if self.certificates else set()
        return sorted(found, key=lambda host: (host[0].isdigit() or ":" in host, host))

    def prove(self, answer: dict, run: str, nonce: str) -> str:
        """Our signature for a client that asked for it; "" without a key, or where the client means another server."""
        address, challenge = str(answer.get("address", "")), str(answer.get("challenge", ""))
        if self.identity is None or not CHALLENGE.fullmatch(challenge) or not self.is_own(address):
            return ""
        return self.identity.sign(signed_text("serve", run, address, nonce, challenge))


@dataclass
class ClientCredentials:
    secret: bytes | None = None
    identity: Identity | None = None
    peers: Members | None = None  # the others' keys, for secure aggregation
    server_key: str = ""  # the server's public key, where it is pinned
    address: str = ""  # as this client calls the server
    authority: bytes | None = None  # of the server's certificate
    reminder: Reminder = field(default_factory=lambda: Reminder({}))
    secret_file: str | None = None
    _question: tuple[str, str, str] = ("", "", "")  # run, nonce, challenge of the newest hello

    @classmethod
    def load(cls, args: argparse.Namespace) -> "ClientCredentials":
        """Exits with 2 and one line where a file can't be used."""
        authority = read_authority(args.ca_certificate)
        return cls(
            load_secret(args.secret_file),
            Identity.load(args.identity) if args.identity else None,
            Members.load(args.peers, "--peers") if args.peers else None,
            load_public(args.server_key, "--server-key") if args.server_key else "",
            args.server,
            authority,
            Reminder({"--ca-certificate": authority} if authority else {}),
            args.secret_file,
        )

    def __post_init__(self) -> None:
        self._seen = stamp(self.secret_file)
        self.reminder.remind()

    def refresh(self) -> None:
        """Read a changed secret again; one that can't be used changes nothing."""
        read_again(self)

    def answer(self, question: dict) -> dict:
        """What a hello says for these credentials: proof of the secret, and a signature that is good for this once."""
        run, nonce, challenge = str(question.get("run", "")), str(question["nonce"]), secrets.token_hex(32)
        self._question = run, nonce, challenge
        told = {"proof": proof(self.secret, nonce) if self.secret else ""}
        if self.identity or self.server_key:
            told |= {"address": self.address, "challenge": challenge}
        if self.identity:
            text = signed_text("join", run, self.address, nonce, challenge)
            told |= {"identity": self.identity.public, "signature": self.identity.sign(text)}
        return told

    def check_server(self, assignment: dict) -> None:
        """Raises PublicError where the server is not the one of --server-key."""
        if not self.server_key:
            return
        run, nonce, challenge = self._question
        signature = str(assignment.get("signature", ""))
        if not verify(self.server_key, signature, signed_text("serve", run, self.address, nonce, challenge)):
            how = "gave a wrong signature" if signature else "has no --identity, or not by this name"
            raise PublicError(f"the server is not the one of this client's --server-key: it {how}")


def read_again(credentials: ServerCredentials | ClientCredentials) -> bool:
    """Whether the file of the secret has changed, and holds another now; one that can't be used changes nothing."""
    path, seen = credentials.secret_file, stamp(credentials.secret_file)
    if path is None or seen == credentials._seen:
        return False
    credentials._seen = seen
    try:
        credentials.secret = read_secret(path)
        return True
    except ValueError as error:
        say(f"warning: {error}; the secret stays as it was")
        return False

"""A key pair for one hospital, or for the server: Ed25519 (RFC 8032), in OpenSSH's files.

`ssh-keygen -t ed25519` makes the same; the fingerprint is the one that `ssh-keygen -lf FILE.pub` prints.
"""

import base64
import errno
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from federation.console import Parser, command_line, fail, read_text, say

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_TYPE = "ssh-ed25519"
LONGEST_FILE = 100_000  # bytes; a key has a few hundred
MAKE = "make one with python -m federation.identity"
EXAMPLES = """\
examples:
  python -m federation.identity --name hospital-a              identity and identity.pub
  python -m federation.identity --name hospital-a --out keys/a

Keep the first file to yourself. Send the line of the .pub file to who runs the server, and compare the
fingerprint with them on the telephone. `ssh-keygen -t ed25519` makes such files, too.
"""


class KeyFileError(ValueError):
    """A key file can't be used; the text is one line, without the file's name."""


@dataclass(frozen=True)
class Identity:
    """A party's private key."""

    key: Ed25519PrivateKey

    @classmethod
    def new(cls) -> "Identity":
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str, flag: str = "--identity") -> "Identity":
        """From a private key file. Exits with 2 and one line where it can't be used."""
        try:
            key = cls(_private_key(_content(Path(path))))
        except (OSError, KeyFileError) as error:
            fail(f"{flag} {path} {_why(error)}", 2)
        if os.name == "posix" and Path(path).stat().st_mode & 0o077:
            say(f"warning: others on this machine may read {path}; forbid it: {command_line('chmod', '600', path)}")
        return key

    @property
    def public(self) -> str:
        """The public key: 32 bytes as hex."""
        return self.key.public_key().public_bytes_raw().hex()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public)

    def sign(self, message: bytes) -> str:
        """64 bytes as hex."""
        return self.key.sign(message).hex()

    def write(self, path: Path, name: str) -> None:
        """path, which only its owner may read, and path.pub, one line. Raises OSError, such as FileExistsError."""
        private = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        public = path.with_name(f"{path.name}.pub")
        if public.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(public))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
        public.write_text(f"{public_line(self.public)} {name}\n")


def verify(public: str, signature: str, message: bytes) -> bool:
    """Whether the owner of this public key signed the message; both as hex, whatever anyone may have sent for them."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def fingerprint(public: str) -> str:
    """As OpenSSH shows it: SHA-256 of the key as its files hold it, in base64."""
    digest = hashlib.sha256(_wire(public)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def public_line(public: str) -> str:
    """As a .pub file has it, without the comment."""
    return f"{KEY_TYPE} {base64.b64encode(_wire(public)).decode()}"


def read_public(kind: str, encoded: str) -> str:
    """The public key of a line `kind encoded`, as hex. Raises KeyFileError."""
    if kind != KEY_TYPE:
        raise KeyFileError(f"holds a key of the kind {kind}, not {KEY_TYPE}; {MAKE}")
    try:
        key = serialization.load_ssh_public_key(f"{kind} {encoded}".encode())
        assert isinstance(key, Ed25519PublicKey)
        return key.public_bytes_raw().hex()
    except (ValueError, UnsupportedAlgorithm, AssertionError):
        raise KeyFileError("holds no whole key; copy the line of the .pub file anew") from None


def load_public(path: str, flag: str) -> str:
    """The public key of a .pub file, as hex. Exits with 2 and one line where it can't be used."""
    try:
        words = _content(Path(path)).split()
        if "PRIVATE" in words[:3]:
            raise KeyFileError("holds a private key, which must not leave its owner; give its .pub file")
        if len(words) < 2:
            raise KeyFileError(f"holds no public key; {MAKE}")
        return read_public(*words[:2])
    except (OSError, KeyFileError) as error:
        fail(f"{flag} {path} {_why(error)}", 2)


def _wire(public: str) -> bytes:
    """The key as RFC 8709 has it: two texts, each with its length before it."""
    parts = KEY_TYPE.encode(), bytes.fromhex(public)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _content(path: Path) -> str:
    """Raises OSError, or KeyFileError where it is no text of a sensible size."""
    with open(path, "rb") as file:
        content = file.read(LONGEST_FILE + 1)
    try:
        text = read_text(content)
    except UnicodeDecodeError:
        raise KeyFileError(f"is not text; {MAKE}") from None
    if not text.strip() or len(content) > LONGEST_FILE:
        raise KeyFileError(f"is {'empty' if not text.strip() else 'too large for a key'}; {MAKE}")
    return text


def _private_key(text: str) -> Ed25519PrivateKey:
    if text.split()[0].startswith(("ssh-", "ecdsa-")):
        raise KeyFileError("holds a public key; give the private one, the file without .pub")
    content = "\n".join(line.strip() for line in text.strip().splitlines()).encode() + b"\n"
    load = serialization.load_ssh_private_key if b"OPENSSH" in content else serialization.load_pem_private_key
    try:
        key = load(content, password=None)
    except TypeError:  # it is encrypted
        raise KeyFileError("needs a passphrase, which nobody could enter here; make one with -N ''") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        if re.search("password|passphrase", str(error), re.IGNORECASE):
            raise KeyFileError("needs a passphrase, which nobody could enter here; make one with -N ''") from None
        raise KeyFileError(f"holds no private key; {MAKE}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"holds a key of another kind than Ed25519; {MAKE}")
    return key


def _why(error: OSError | KeyFileError) -> str:
    return f"can't be read ({error.strerror})" if isinstance(error, OSError) else str(error)


def main() -> None:
    parser = Parser(__doc__, prog="python -m federation.identity", epilog=EXAMPLES)
    parser.add_argument("--name", required=True, help="what the others call you, one word")
    parser.add_argument("--out", default="identity", metavar="FILE", help="the private key; the public one is FILE.pub")
    args = parser.parse_args()
    if not re.fullmatch(r"[^\s#\"',=]{1,40}", args.name) or not args.name.isprintable():
        parser.error(f"--name must be one word of at most 40 characters, without , = # and quotes, got {args.name!r}")
    identity, path = Identity.new(), Path(args.out)
    try:
        identity.write(path, args.name)
    except FileExistsError:
        fail(f"--out {path} is there already; a new key would make you somebody else: name another file", 2)
    except OSError as error:
        fail(f"--out {path} can't be written ({error.strerror}); name another file", 2)
    say(f"{path}: the private key, which stays here; {path}.pub: the line to send")
    say(f"fingerprint, to be compared on the telephone: {identity.fingerprint}")

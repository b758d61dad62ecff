"""The secret that server and clients share, and how a client proves that it has it without sending it."""

import hashlib
import hmac
import os
import unicodedata
from pathlib import Path

from federation.console import command_line, fail, read_text, say


def proof(secret: bytes, nonce: str) -> str:
    """HMAC-SHA256 (RFC 2104) of the server's nonce under the shared secret, as hex."""
    return hmac.new(secret, b"federation join " + nonce.encode(), hashlib.sha256).hexdigest()


def load_secret(path: str | None) -> bytes | None:
    """The shared secret from a file, or FEDERATION_SECRET, or None. Exits with 2 and one line if it is unusable."""
    try:
        if path is not None:
            return read_secret(path)
        text = os.environ.get("FEDERATION_SECRET")
        return None if text is None else _checked("FEDERATION_SECRET", text)
    except ValueError as error:
        fail(str(error), 2)


def read_secret(path: str) -> bytes:
    """The secret in a file. Raises ValueError with one line if it is unusable."""
    try:
        text = read_text(Path(path).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"--secret-file {path} can't be read ({why})") from None
    if os.name == "posix" and Path(path).stat().st_mode & 0o077:
        say(f"warning: others on this machine may read {path}; forbid it: {command_line('chmod', '600', path)}")
    return _checked(path, text)


def _checked(source: str, text: str) -> bytes:
    if not text.strip():
        raise ValueError(f"the shared secret in {source} is empty; write one with `openssl rand -hex 32`")
    return unicodedata.normalize("NFC", text).strip().encode()

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
    if path is None:
        source, text = "FEDERATION_SECRET", os.environ.get("FEDERATION_SECRET")
        if text is None:
            return None
    else:
        source = path
        try:
            text = read_text(Path(path).read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--secret-file {path} can't be read ({getattr(error, 'strerror', None) or 'it is not text'})", 2)
        if os.name == "posix" and Path(path).stat().st_mode & 0o077:
            say(f"warning: others on this machine may read {path}; forbid it: {command_line('chmod', '600', path)}")
    if not text.strip():
        fail(f"the shared secret in {source} is empty; write one with `openssl rand -hex 32`", 2)
    return unicodedata.normalize("NFC", text).strip().encode()

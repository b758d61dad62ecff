"""The words that server and client exchange inside Flower's get_properties messages.

hello   server: protocol, nonce        client: who it is, its class names, proof of the secret
place   server: partition, recipe      client: how many examples it has, and of which class (or why it can't)
told    server: why the stream ends    client: nothing
"""

import hashlib
import hmac
import os
from pathlib import Path

from federation.words import fail

PROTOCOL = 1
RETRY_SECONDS = 3  # how soon a client on the waiting list asks again


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
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--secret-file {path} can't be read ({getattr(error, 'strerror', None) or 'it is not text'})", 2)
    if not text.strip():
        fail(f"the shared secret in {source} is empty; write one with `openssl rand -hex 32`", 2)
    return text.strip().encode()

"""Secure aggregation: updates under pairwise masks that vanish in their sum, so that the server learns the sum alone.

Masks as in Bonawitz et al. 2017 (doi:10.1145/3133956.3133982), section 4.1, for a handful of steady clients: after its
training each client sends a one-time key, signed; the server hands the list of them, the roster, to all; each pair
agrees on a mask (X25519, RFC 7748; HKDF-SHA256, RFC 5869; ChaCha20, RFC 8439), which one adds and the other
subtracts. Nobody is left out once the roster stands: a client that is lost then costs the attempt.

Numbers travel in fixed point, modulo 2**32: sums are exact, whatever their order.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from federation.console import PublicError
from federation.pieces import block, blocks
from federation.security.identity import Identity, verify

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

LEAST = 3  # clients in a sum: of a sum of two, each knows the other's part
MOST = 1000  # on a roster
FLOAT_BITS, INTEGER_BITS = 24, 8  # binary places: floats within ±128 to 6e-8, integers (counters) within ±8e6
PROOF = 2  # words in which the shares add up to 1, if no masks are left in the sum
CLOSE = 1e-3  # to 1; a wrong sum passes by chance once in 10**10 times
KEY, SIGNATURE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{128}")
MOMENTS = 16
ROSTER_BYTES = 500 * MOST


class Distrust(PublicError):
    """What the server asks for would tell it more than the sum; the text is the reason."""


class OtherClients(Distrust):
    """The same sum is asked for again with other clients, which an honest server may do that lost some."""


@dataclass(frozen=True)
class Entry:
    """A client on the roster; keys and signature as hex."""

    partition: int
    examples: int
    key: str  # X25519, for this training alone
    identity: str  # Ed25519, the client's own
    signature: str

    @classmethod
    def signed(cls, subject: str, partition: int, examples: int, key: str, identity: Identity) -> "Entry":
        public = identity.public
        text = signed_text(subject, partition, examples, key, public)
        return cls(partition, examples, key, public, identity.sign(text))

    def is_signed(self, subject: str) -> bool:
        text = signed_text(subject, self.partition, self.examples, self.key, self.identity)
        return verify(self.identity, self.signature, text)


def subject_of(run: str, server_round: int, kind: str, model: str) -> str:
    """What a sum is of. model: hash_arrays of the weights as this client received them, so that clients that were
    given different models come to different masks (Pasquini et al. 2022, arXiv:2111.07380); kind: update or statistics.
    """
    return f"{run} {server_round} {kind} {model}"


def signed_text(subject: str, partition: int, examples: int, key: str, identity: str) -> bytes:
    return f"federation sum 1\n{subject}\n{partition}\n{examples}\n{key}\n{identity}".encode()


def roster_json(entries: Sequence[Entry]) -> str:
    return json.dumps([asdict(entry) for entry in sorted(entries, key=lambda entry: entry.partition)])


def read_entry(told: dict[str, Any]) -> Entry:
    """What anyone may have sent as an entry. Raises ValueError, KeyError or TypeError."""
    partition, examples = told["partition"], told["examples"]
    for number in (partition, examples):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**53:
            raise ValueError("not a number of ours")
    for name, form in (("key", KEY), ("identity", KEY), ("signature", SIGNATURE)):
        if not isinstance(told[name], str) or not form.fullmatch(told[name]):
            raise ValueError(f"no {name}")
    return Entry(partition, examples, told["key"], told["identity"], told["signature"])


def read_roster(text: object) -> list[Entry]:
    """Raises Distrust where it is none."""
    try:
        if not isinstance(text, str) or len(text) > ROSTER_BYTES:
            raise ValueError("too long")
        told = json.loads(text)
        if not isinstance(told, list) or len(told) > MOST:
            raise ValueError("no list")
        return [read_entry(each) for each in told]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Distrust("the server's roster is none") from None


def check_roster(roster: Sequence[Entry], own: Entry, subject: str) -> None:
    """Raises Distrust where a sum over this roster would tell more than it should."""
    for what, values in (("partition", [e.partition for e in roster]), ("key", [e.identity for e in roster])):
        if len(set(values)) < len(values):
            raise Distrust(f"the server's roster names a {what} twice")
    if own not in roster:
        raise Distrust("the server's roster does not have this client as it signed")
    if len(roster) < LEAST:
        raise Distrust(f"a sum of {len(roster)} clients would tell too much; it takes {LEAST}")
    for entry in roster:
        if not entry.is_signed(subject):
            raise Distrust(f"client {entry.partition} did not sign for this round and model")


class OneTimeKey:
    """Of one client in one training; what it masks can be unmasked by the sum alone."""

    def __init__(self, secret: X25519PrivateKey | None = None) -> None:
        self._secret = secret or X25519PrivateKey.generate()

    @property
    def public(self) -> str:
        return self._secret.public_key().public_bytes_raw().hex()

    def mask(self, words: np.ndarray, own: Entry, roster: Sequence[Entry], subject: str) -> np.ndarray:
        """words, (n,) uint32, under the masks with all others on the roster."""
        info = hashlib.sha256(f"{subject}\n{roster_json(roster)}".encode()).digest()
        masked = words.copy()
        for other in roster:
            if other.partition == own.partition:
                continue
            try:
                shared = self._secret.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(other.key)))
            except ValueError:  # a point of small order, with which everybody would know the mask
                raise Distrust(f"the key of client {other.partition} is none") from None
            stream = key_stream(shared, info, masked.size)
            masked = masked - stream if own.partition < other.partition else masked + stream
        return masked


def key_stream(shared: bytes, info: bytes, words: int) -> np.ndarray:
    """ChaCha20's key stream under a key of HKDF-SHA256, nonce and counter 0: the key serves once. (words,) uint32."""
    key = HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(shared)
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * words)), np.dtype("<u4"))


def bits_of(dtype: np.dtype) -> int:
    return FLOAT_BITS if dtype.kind == "f" else INTEGER_BITS


def num_words(numbers: int) -> int:
    """Of a masked update of a model of so many numbers: those, the loss, and the proof."""
    return numbers + 1 + PROOF


def check_range(arrays: Sequence[Any], loss: float) -> None:
    """Raises PublicError where a number is not finite, or too large for fixed point."""
    for i, array in enumerate([*arrays, np.array([loss])]):
        most = 2.0 ** (31 - bits_of(array.dtype))
        for place in blocks(array.size):
            if not (np.abs(np.asarray(block(array, *place), np.float64)) < most).all():  # NaN is no less than anything
                raise PublicError(f"array {i} holds NaN, or more than the {most:g} that secure aggregation can carry")


def encode(arrays: Sequence[Any], loss: float, share: float) -> np.ndarray:
    """share times all numbers and the loss in fixed point, then PROOF times the share: (num_words,) uint32.

    share: this client's part of all examples. The numbers are such as check_range lets through.
    """
    words = np.empty(num_words(sum(array.size for array in arrays)), np.uint32)
    at = 0
    for array in [*arrays, np.array([loss] + [1.0] * PROOF)]:
        bits = bits_of(array.dtype)
        for place in blocks(array.size):
            numbers = np.asarray(block(array, *place), np.float64).reshape(-1)
            fixed = np.rint(numbers * (share * 2.0**bits)).astype(np.int64)
            words[at : at + fixed.size] = fixed.astype(np.uint32)
            at += fixed.size
    return words


def to_moments(statistics: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Mean and variance by turns as mean and mean square, which can be summed; smaller, to be within ±2048."""
    pairs = zip(statistics[::2], statistics[1::2], strict=True)
    moments = [(mean.astype(np.float64), mean.astype(np.float64) ** 2 + variance) for mean, variance in pairs]
    return [each / MOMENTS for pair in moments for each in pair]


def from_moments(moments: Sequence[np.ndarray], like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Inverse of to_moments, of all clients' examples together: the variance is that of the mixture."""
    statistics = []
    for mean, square in zip(moments[::2], moments[1::2], strict=True):
        mean = mean.astype(np.float64) * MOMENTS
        statistics += [mean, np.maximum(square.astype(np.float64) * MOMENTS - mean**2, 0)]
    return [array.astype(old.dtype) for array, old in zip(statistics, like, strict=True)]


def decode(total: np.ndarray, like: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float] | None:
    """The weighted mean of what was encoded, in the shapes and dtypes of `like`, and of the losses; None where masks
    are left in the sum.
    """
    signed, at, mean = total.view(np.int32), 0, []
    loss, *proof = signed[-1 - PROOF :] / 2.0**FLOAT_BITS
    if any(abs(one - 1) > CLOSE for one in proof):
        return None
    for old in like:
        values = signed[at : at + old.size].reshape(old.shape) / 2.0 ** bits_of(old.dtype)
        mean.append(np.asarray(values if old.dtype.kind == "f" else np.rint(values)).astype(old.dtype))
        at += old.size
    return mean, float(loss)

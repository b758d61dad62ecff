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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from federation.compression import TooLarge
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
UNITS = 2**31 - 2**16  # of the last place, a number has fewer; so that rounding can't carry a sum over the end
WIDE = 16  # bits in the lower of two words, of a number that has two: within ±8e6 to 6e-8
PROOF = 2  # words in which the shares add up to 1, if no masks are left in the sum
CLOSE = 1e-3  # to 1; a wrong sum passes by chance once in 10**10 times
KEY, SIGNATURE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{128}")
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


def subject_of(run: str, server_round: int, kind: str, model: str, terms: str) -> str:
    """What a sum is of: kind is update or statistics. Of clients that were told different things, none is made.

    model: hash_arrays of the weights as this client received them (Pasquini et al. 2022, arXiv:2111.07380). terms: hash
    of all else that the training follows from. A server that gave the others a learning rate of next to nothing would
    know their updates, and so the last one's from the sum.
    """
    return f"{run} {server_round} {kind} {model} {terms}"


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


def check_roster(
    roster: Sequence[Entry], own: Entry, subject: str, least: int = LEAST, num_partitions: int = MOST
) -> None:
    """Raises Distrust where a sum over this roster would tell more than it should."""
    for what, values in (("partition", [e.partition for e in roster]), ("key", [e.identity for e in roster])):
        if len(set(values)) < len(values):
            raise Distrust(f"the server's roster names a {what} twice")
    if own not in roster:
        raise Distrust("the server's roster does not have this client as it signed")
    if len(roster) < least:
        raise Distrust(f"a sum of {len(roster)} clients would tell too much; it takes {least}")
    for entry in roster:
        if entry.partition >= num_partitions:
            raise Distrust(f"the server's roster names client {entry.partition} of {num_partitions}")
        if not entry.is_signed(subject):
            raise Distrust(f"client {entry.partition} did not sign for this round, model and recipe")


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
            combine = np.subtract if own.partition < other.partition else np.add
            for place, stream in key_stream(shared, info, masked.size):
                part = masked[slice(*place)]
                combine(part, stream, out=part)
        return masked


def key_stream(shared: bytes, info: bytes, words: int) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """ChaCha20's key stream under a key of HKDF-SHA256, block by block, as uint32 with their places.

    Nonce and counter are 0: the key serves once.
    """
    key = HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(shared)
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    for start, stop in blocks(words):
        yield (start, stop), np.frombuffer(encryptor.update(bytes(4 * (stop - start))), np.dtype("<u4"))


def bits_of(dtype: np.dtype) -> int:
    return FLOAT_BITS if dtype.kind == "f" else INTEGER_BITS


def num_words(arrays: Sequence[Any], wide: int) -> int:
    """Of a masked update: a word for each number of the arrays, two for each wide number, and the proof."""
    return sum(array.size for array in arrays) + 2 * wide + PROOF


def check_range(arrays: Sequence[Any], wide: np.ndarray) -> None:
    """Raises TooLarge where a number is not finite, or too large for fixed point."""
    limits = [UNITS / 2.0 ** bits_of(array.dtype) for array in arrays] + [UNITS * 2.0 ** (WIDE - FLOAT_BITS)]
    for i, (array, most) in enumerate(zip([*arrays, wide], limits, strict=True)):
        for place in blocks(array.size):
            if not (np.abs(np.asarray(block(array, *place), np.float64)) < most).all():  # NaN is no less than anything
                what = f"array {i}" if i < len(arrays) else "a statistic"
                raise TooLarge(f"{what} holds NaN, or more than the ±{most:.0f} that secure aggregation can carry")


def encode(arrays: Sequence[Any], wide: np.ndarray, share: float) -> np.ndarray:
    """share times all numbers in fixed point, then PROOF times the share: (num_words,) uint32.

    share: this client's part of all examples. wide: (n,) float64, numbers that may be larger: the upper words of all,
    then the lower ones. The numbers are such as check_range lets through.
    """
    words, at = np.empty(num_words(arrays, wide.size), np.uint32), 0
    for array in arrays:
        for place in blocks(array.size):
            fixed = _fixed(block(array, *place), share, bits_of(array.dtype))
            words[at : at + fixed.size] = fixed.astype(np.uint32)
            at += fixed.size
    units = _fixed(wide, share, FLOAT_BITS)
    tail = [units >> WIDE, units & (2**WIDE - 1), _fixed(np.ones(PROOF), share, FLOAT_BITS)]
    words[at:] = np.concatenate(tail).astype(np.uint32)
    return words


def _fixed(numbers: Any, share: float, bits: int) -> np.ndarray:
    return np.rint(np.asarray(numbers, np.float64).reshape(-1) * (share * 2.0**bits)).astype(np.int64)


def decode(total: np.ndarray, like: Sequence[np.ndarray], wide: int) -> tuple[list[np.ndarray], np.ndarray] | None:
    """The weighted mean of what was encoded: arrays in the shapes and dtypes of `like`, and so many wide numbers.

    None where masks are left in the sum.
    """
    signed, at, mean = total.view(np.int32), 0, []
    if any(abs(one / 2.0**FLOAT_BITS - 1) > CLOSE for one in signed[-PROOF:]):
        return None
    for old in like:
        values = signed[at : at + old.size].reshape(old.shape) / 2.0 ** bits_of(old.dtype)
        mean.append(np.asarray(values if old.dtype.kind == "f" else np.rint(values)).astype(old.dtype))
        at += old.size
    upper, lower = signed[at : at + wide].astype(np.float64), total[at + wide : at + 2 * wide]
    return mean, (upper * 2.0**WIDE + lower) / 2.0**FLOAT_BITS


def to_moments(statistics: Sequence[np.ndarray]) -> np.ndarray:
    """Mean and variance by turns as mean and mean square, which can be summed: (n,) float64."""
    moments = []
    for mean, variance in zip(statistics[::2], statistics[1::2], strict=True):
        exact = mean.astype(np.float64).reshape(-1)
        moments += [exact, exact**2 + variance.reshape(-1)]
    return np.concatenate(moments)


def from_moments(moments: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Inverse of to_moments, of all clients' examples together: the variance is that of the mixture."""
    parts = iter(np.split(moments, np.cumsum([array.size for array in like])[:-1]))
    statistics = []
    for mean, square in zip(parts, parts, strict=True):
        statistics += [mean, np.maximum(square - mean**2, 0)]
    return [array.reshape(old.shape).astype(old.dtype) for array, old in zip(statistics, like, strict=True)]

"""Secure aggregation's arithmetic, with answers from the RFCs and by hand; and every lie that a server can tell."""

import json
from dataclasses import asdict, replace

from federation.console import PublicError
from federation.privacy.masking import Masking, check_peers
from federation.security import masks
from federation.security.identity import Identity, public_line
from federation.security.masks import (
    Distrust,
    Entry,
    OneTimeKey,
    check_roster,
    decode,
    encode,
    from_moments,
    key_stream,
    num_words,
    read_entry,
    read_roster,
    roster_json,
    subject_of,
    to_moments,
)
from federation.security.members import Members

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

RUN, SUBJECT = "0123456789abcdef", subject_of("0123456789abcdef", 1, "update", "00" * 32)
IDENTITIES = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([i] * 32))) for i in range(1, 6)]
START = [np.zeros(2, np.float32), np.array(0)]  # two weights, and a counter


# The parts, as their documents have them


def test_x25519_is_rfc_7748s():
    """Section 6.1."""
    alice, bob = (
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",  # public
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",  # private
    )
    key = X25519PrivateKey.from_private_bytes(bytes.fromhex(bob))
    assert OneTimeKey(key).public == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(alice)))
    assert shared.hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def test_chacha20_is_rfc_8439s():
    """The key stream of section 2.4.2: counter 1, nonce 00:00:00:00:00:00:00:4a:00:00:00:00."""
    nonce = (1).to_bytes(4, "little") + bytes.fromhex("000000000000004a00000000")
    stream = Cipher(algorithms.ChaCha20(bytes(range(32)), nonce), None).encryptor().update(bytes(32))
    assert stream.hex() == "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06e27e4fcaec9ef3cf78"


def test_hkdf_is_rfc_5869s_and_the_mask_is_chacha20_under_its_key():
    """Appendix A.1; then with what is fixed here: no salt, the subject as info, 32 bytes, nonce and counter 0."""
    derived = HKDF(hashes.SHA256(), 42, bytes(range(13)), bytes(range(0xF0, 0xFA))).derive(b"\x0b" * 22).hex()
    assert derived == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    key = HKDF(hashes.SHA256(), 32, None, b"info").derive(b"shared")
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(8))
    words = [int.from_bytes(stream[i : i + 4], "little") for i in (0, 4)]
    assert key_stream(b"shared", b"info", 2).tolist() == words


# Fixed point


def test_numbers_travel_as_24_places_of_their_share_and_integers_as_8():
    words = encode([np.float32([0.5, -0.5]), np.array(3)], loss=2.0, share=0.25)
    assert words.tolist() == [2_097_152, 2**32 - 2_097_152, 192, 8_388_608, 4_194_304, 4_194_304]
    assert len(words) == num_words(3)


def test_the_sum_of_shares_is_the_weighted_mean_and_wraps_around():
    total = encode([np.float32([1, -100])], 4.0, 0.25) + encode([np.float32([3, -60])], 8.0, 0.75)
    mean, loss = decode(total, [np.zeros(2, np.float32)])
    assert mean[0].tolist() == [2.5, -70]
    assert loss == 7.0
    large = encode([np.float32([127])], 0.0, 0.5) + encode([np.float32([-127])], 0.0, 0.5)
    assert decode(large, [np.zeros(1, np.float32)])[0][0].tolist() == [0]


def test_integers_keep_their_kind_and_are_rounded():
    total = encode([np.array([7])], 0.0, 0.5) + encode([np.array([8])], 0.0, 0.5)
    (mean,), _ = decode(total, [np.zeros(1, np.int64)])
    assert (mean.dtype, mean.tolist()) == (np.int64, [8])


@pytest.mark.parametrize("value", [128.0, -128.0, float("nan"), float("inf")])
def test_what_fixed_point_cannot_carry_is_named_before_anything_is_given(value):
    with pytest.raises(PublicError, match=r"array 0 holds NaN, or more than the 128 that secure aggregation can carry"):
        Masking(RUN, 0).seal([np.float32([value])], 0.0, 10)


def test_a_sum_in_which_the_shares_are_not_one_is_none():
    assert decode(encode(START, 0.0, 0.5), START) is None
    assert decode(encode(START, 0.0, 0.5) + encode(START, 0.0, 0.5), START) is not None


def test_statistics_are_summed_as_moments_and_the_variance_is_the_mixtures():
    """Of two clients with one value each, 1 and 3: mean 2, variance 1, though each alone has variance 0."""
    one, other = (to_moments([np.float32([value]), np.float32([0])]) for value in (1, 3))
    mean, variance = from_moments([(a + b) / 2 for a, b in zip(one, other, strict=True)], [np.zeros(1, np.float32)] * 2)
    assert (mean.tolist(), variance.tolist(), variance.dtype) == ([2], [1], np.float32)


# Masks


def entries(keys: list[OneTimeKey], subject: str = SUBJECT, examples: int = 100) -> list[Entry]:
    people = zip(keys, IDENTITIES, strict=False)
    return [Entry.signed(subject, i, examples, key.public, identity) for i, (key, identity) in enumerate(people)]


def fixed_keys(number: int = 3) -> list[OneTimeKey]:
    return [OneTimeKey(X25519PrivateKey.from_private_bytes(bytes([i] * 32))) for i in range(1, number + 1)]


@pytest.mark.parametrize("number", [3, 5])
def test_masks_vanish_in_the_sum_of_all_and_in_no_other(number):
    keys = fixed_keys(number)
    roster = entries(keys)
    plain = [np.arange(8, dtype=np.uint32) * (i + 1) for i in range(number)]
    masked = [
        key.mask(words, roster[i], roster, SUBJECT) for i, (key, words) in enumerate(zip(keys, plain, strict=True))
    ]
    assert sum(masked).tolist() == sum(plain).tolist()
    assert (sum(masked[1:]) != sum(plain[1:])).all()


def test_a_single_masked_update_looks_like_chance():
    """Chi-square of the bytes of 100,000 zeros under fixed keys: 255 degrees of freedom, 330 is the 0.1 % point."""
    keys = fixed_keys()
    roster = entries(keys)
    masked = keys[0].mask(np.zeros(100_000, np.uint32), roster[0], roster, SUBJECT)
    counts = np.bincount(masked.view(np.uint8), minlength=256)
    expected = masked.nbytes / 256
    assert ((counts - expected) ** 2 / expected).sum() < 330


def test_another_round_model_or_roster_gives_other_masks():
    keys = fixed_keys()
    roster = entries(keys)
    zero = np.zeros(4, np.uint32)
    usual = keys[0].mask(zero, roster[0], roster, SUBJECT)
    for subject in (subject_of(RUN, 2, "update", "00" * 32), subject_of(RUN, 1, "update", "01" * 32)):
        assert (keys[0].mask(zero, roster[0], roster, subject) != usual).all()
    assert (keys[0].mask(zero, roster[0], [*roster[:2], replace(roster[2], examples=5)], SUBJECT) != usual).all()


def test_a_key_of_small_order_with_which_all_would_know_the_mask_is_refused():
    keys = fixed_keys()
    roster = entries(keys)
    bad = replace(roster[1], key="00" * 32)
    with pytest.raises(Distrust, match="the key of client 1 is none"):
        keys[0].mask(np.zeros(1, np.uint32), roster[0], [roster[0], bad, roster[2]], SUBJECT)


# The lying server


class Sealed:
    """Three clients that have trained, and what each would mask."""

    def __init__(self, number: int = 3, peers=None, rounds: tuple = (1, 1, 1, 1, 1), models: tuple = ()):
        self.clients = [Masking(RUN, i, IDENTITIES[i], peers) for i in range(number)]
        self.told = []
        for i, client in enumerate(self.clients):
            client.begin(rounds[i], "update", models[i] if models else START)
            self.told.append(client.seal([np.float32([i, 0]), np.array(i)], 1.0, 100))

    @property
    def roster(self) -> list[dict]:
        return [dict(each) for each in self.told]

    def sum(self, roster: list[dict]) -> np.ndarray:
        return sum(client.mask(json.dumps(roster)) for client in self.clients)


def test_an_honest_server_gets_the_mean():
    sealed = Sealed()
    mean, loss = decode(sealed.sum(sealed.roster), START)
    assert mean[0] == pytest.approx([1, 0], abs=1e-6)
    assert (mean[1].tolist(), loss) == (1, pytest.approx(1, abs=1e-6))


SIGNED = "client 2 did not sign for this round and model"
NOT_ME = "the server's roster does not have this client as it signed"
TWICE = "the server's roster names a key twice"
FEW = "clients would tell too much; it takes 3"


def third(**change: object):
    """The roster with another third entry."""
    return lambda roster: [*roster[:2], {**roster[2], **change}]


LIES = {
    "a roster of two": (lambda r: r[:2], f"a sum of 2 {FEW}"),
    "a roster of one": (lambda r: r[:1], f"a sum of 1 {FEW}"),
    "without this client": (lambda r: r[1:], NOT_ME),
    "other examples of this client": (lambda r: [{**r[0], "examples": 1}, *r[1:]], NOT_ME),
    "a partition twice": (
        lambda r: [*r, {**r[1], "identity": "11" * 32}],
        "the server's roster names a partition twice",
    ),
    "a key twice": (lambda r: [r[0], r[1], {**r[1], "partition": 2}], "the server's roster names a key twice"),
    "other examples": (third(examples=10**6), SIGNED),
    "another partition": (third(partition=7), SIGNED.replace("2", "7")),
    "another one-time key": (third(key=fixed_keys(5)[4].public), SIGNED),
    "another's signature": (lambda r: [*r[:2], {**r[2], "signature": r[1]["signature"]}], SIGNED),
    "another identity": (third(identity=IDENTITIES[4].public), SIGNED),
}


@pytest.mark.parametrize(("change", "words"), LIES.values(), ids=LIES)
def test_a_lie_gives_the_server_its_reason_and_nothing_else(change, words):
    sealed = Sealed()
    with pytest.raises(Distrust) as refusal:
        sealed.clients[0].mask(json.dumps(change(sealed.roster)))
    assert refusal.value.public == words


OTHER = [np.ones(2, np.float32), np.array(0)]


@pytest.mark.parametrize(
    "different", [{"rounds": (1, 1, 2)}, {"models": (START, START, OTHER)}], ids=["round", "model"]
)
def test_clients_that_were_given_another_round_or_model_give_no_sum(different):
    sealed = Sealed(**different)
    with pytest.raises(Distrust, match="client 2 did not sign for this round and model"):
        sealed.clients[0].mask(json.dumps(sealed.roster))


def test_an_update_is_masked_once():
    sealed = Sealed()
    sealed.clients[0].mask(json.dumps(sealed.roster))
    with pytest.raises(Distrust, match="asks for an update that was masked before, or never trained"):
        sealed.clients[0].mask(json.dumps(sealed.roster))
    with pytest.raises(Distrust, match="masked before, or never trained"):
        Masking(RUN, 0).mask("[]")


def test_the_same_round_again_is_summed_with_the_same_clients_only():
    """Else the difference of the two sums would be one client's update."""
    sealed = Sealed(4)
    for client in sealed.clients:
        client.mask(json.dumps(sealed.roster))
    again = Sealed(4)
    for client, old in zip(again.clients, sealed.clients, strict=True):
        client._summed = old._summed
    with pytest.raises(Distrust, match="the same sum again with other clients, which would tell the difference"):
        again.clients[0].mask(json.dumps(again.roster[:3]))
    assert again.clients[0].mask(json.dumps(again.roster)).size == num_words(3)


def test_with_peers_nobody_else_is_in_the_sum(tmp_path):
    path = tmp_path / "peers"
    path.write_text("".join(f"{public_line(IDENTITIES[i].public)} h{i}\n" for i in range(2)))
    peers = Members.load(str(path), "--peers")
    sealed = Sealed(peers=peers)
    with pytest.raises(Distrust, match="the key of client 2 is not in this client's --peers"):
        sealed.clients[0].mask(json.dumps(sealed.roster))
    path.write_text("".join(f"{public_line(IDENTITIES[i].public)} h{i}\n" for i in range(3)))
    assert sealed.clients[0].mask(json.dumps(sealed.roster)).size == num_words(3)


def test_with_peers_a_client_takes_part_in_nothing_else(tmp_path):
    (tmp_path / "peers").write_text(f"{public_line(IDENTITIES[0].public)} h0\n")
    peers = Members.load(str(tmp_path / "peers"), "--peers")
    with pytest.raises(PublicError, match="takes part in secure aggregation only"):
        check_peers(peers, secure=False)
    check_peers(peers, secure=True)
    check_peers(None, secure=False)


def test_after_a_training_the_network_itself_is_not_to_be_had():
    client = Masking(RUN, 0)
    client.check_open()
    client.begin(1, "update", START)
    with pytest.raises(Distrust, match="asks for the network itself, after a training"):
        client.check_open()


# Whatever bytes


HOSTILE = [None, 7, "", "[", "{}", '"x"', "[1]", "[[]]", "[{}]", "[" * 10_000, "x" * 10**6, json.dumps([{}] * 10_000)]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_roster_that_is_none_is_refused(text):
    with pytest.raises(Distrust):
        check_roster(read_roster(text), entries(fixed_keys())[0], SUBJECT)


@pytest.mark.parametrize(
    "change",
    [
        {"partition": -1},
        {"partition": True},
        {"partition": 1.5},
        {"examples": 2**60},
        {"key": "00" * 31},
        {"key": "G" * 64},
        {"key": 5},
        {"identity": None},
        {"signature": "00" * 10**6},
    ],
)
def test_an_entry_that_is_none_is_refused(change):
    usual = asdict(entries(fixed_keys())[0])
    assert read_entry(usual) == entries(fixed_keys())[0]
    with pytest.raises((ValueError, TypeError)):
        read_entry({**usual, **change})


def test_a_roster_is_the_same_text_in_whatever_order_its_entries_came():
    roster = entries(fixed_keys())
    assert roster_json(roster) == roster_json(roster[::-1])
    assert read_roster(roster_json(roster)) == roster
    assert masks.LEAST == 3

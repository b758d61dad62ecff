"""Secure aggregation's arithmetic, with answers from the RFCs and by hand; and every lie that a server can tell."""

import json
from dataclasses import asdict, replace

from federation.compression import TooLarge
from federation.config import Recipe
from federation.console import PublicError
from federation.privacy.masking import Masking, Summed, check_peers, terms_of
from federation.protocol import Assignment
from federation.security import masks
from federation.security.identity import Identity, public_line
from federation.security.masks import (
    Distrust,
    Entry,
    OneTimeKey,
    OtherClients,
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

RUN, TERMS = "0123456789abcdef", "11" * 32
SUBJECT = subject_of(RUN, 1, "update", "00" * 32, TERMS)
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
    ((place, first),) = key_stream(b"shared", b"info", 2)
    assert (place, first.tolist()) == ((0, 2), words)


def test_a_mask_of_many_blocks_is_one_stream(monkeypatch):
    whole = np.concatenate([part for _, part in key_stream(b"shared", b"info", 1000)])
    monkeypatch.setattr(masks, "blocks", lambda size: ((start, min(start + 7, size)) for start in range(0, size, 7)))
    assert np.concatenate([part for _, part in key_stream(b"shared", b"info", 1000)]).tolist() == whole.tolist()


# Fixed point


def test_numbers_travel_as_24_places_of_their_share_and_integers_as_8():
    words = encode([np.float32([0.5, -0.5]), np.array(3)], np.zeros(0), share=0.25)
    assert words.tolist() == [2_097_152, 2**32 - 2_097_152, 192, 4_194_304, 4_194_304]
    assert len(words) == num_words([np.zeros(2), np.array(3)], 0)


def test_a_wide_number_is_two_words_the_lower_of_16_bits():
    """A quarter of 2 is 2**23 units of 2**-24: 128 times 2**16. A quarter of -2**-20 is -4 units: -1 times 2**16, and
    65532."""
    words = encode([], np.float64([2, -(2.0**-20)]), share=0.25)
    assert words.tolist() == [128, 2**32 - 1, 0, 65532, 4_194_304, 4_194_304]


def total(*parts: tuple) -> np.ndarray:
    """The sum of what clients encode, each (arrays, wide numbers, share)."""
    return sum(encode(arrays, np.float64(wide), share) for arrays, wide, share in parts)


def test_the_sum_of_shares_is_the_weighted_mean_and_wraps_around():
    added = total(([np.float32([1, -100])], [4.0], 0.25), ([np.float32([3, -60])], [8.0], 0.75))
    mean, (loss,) = decode(added, [np.zeros(2, np.float32)], 1)
    assert (mean[0].tolist(), loss) == ([2.5, -70], 7.0)
    large = total(([np.float32([127])], [], 0.5), ([np.float32([-127])], [], 0.5))
    assert decode(large, [np.zeros(1, np.float32)], 0)[0][0].tolist() == [0]


def test_wide_numbers_are_summed_within_8_million():
    added = total(([], [8e6, -8e6, 1e-6], 0.5), ([], [8e6, -8e6, 3e-6], 0.5))
    assert decode(added, [], 3)[1] == pytest.approx([8e6, -8e6, 2e-6], abs=6e-8)


def test_integers_keep_their_kind_and_are_rounded():
    (mean,), _ = decode(total(([np.array([7])], [], 0.5), ([np.array([8])], [], 0.5)), [np.zeros(1, np.int64)], 0)
    assert (mean.dtype, mean.tolist()) == (np.int64, [8])


@pytest.mark.parametrize("value", [128.0, -128.0, float("nan"), float("inf")])
def test_what_fixed_point_cannot_carry_is_named_before_anything_is_given(value):
    with pytest.raises(TooLarge, match=r"^array 0 holds NaN, or more than the ±128 that secure aggregation can carry$"):
        client(0).seal_update([np.float32([value])], 0.0, 10)


def test_the_largest_numbers_of_a_thousand_clients_don_t_wrap():
    """The share of each is rounded, in the worst case up: together half a thousand units."""
    largest = np.float64([(masks.UNITS - 1) / 2**24])
    masks.check_range([largest], np.zeros(0))
    mean, _ = decode(encode([largest], np.zeros(0), 1 / 1000) * np.uint32(1000), [largest], 0)
    assert mean[0] == pytest.approx(largest, abs=1e-4)


def test_a_sum_in_which_the_shares_are_not_one_is_none():
    assert decode(total((START, [], 0.5)), START, 0) is None
    assert decode(total((START, [], 0.5), (START, [], 0.5)), START, 0) is not None


def test_statistics_are_summed_as_moments_and_the_variance_is_the_mixtures():
    """Of two clients with one value each, 1 and 3: mean 2, variance 1, though each alone has variance 0."""
    one, other = (to_moments([np.float32([value]), np.float32([0])]) for value in (1, 3))
    assert (one.tolist(), other.tolist()) == ([1, 1], [3, 9])
    mean, variance = from_moments((one + other) / 2, [np.zeros(1, np.float32)] * 2)
    assert (mean.tolist(), variance.tolist(), variance.dtype) == ([2], [1], np.float32)


def test_a_loss_that_is_no_number_is_the_clients_failure_and_a_huge_one_is_cut():
    with pytest.raises(PublicError, match="its training loss is nan"):
        client(0).seal_update(START, float("nan"), 10)
    one = client(0)
    one.seal_update(START, 1e30, 10)
    assert one._sealed.wide == pytest.approx(8.3e6, rel=0.01)


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
    for subject in (
        subject_of(RUN, 2, "update", "00" * 32, TERMS),
        subject_of(RUN, 1, "update", "01" * 32, TERMS),
        subject_of(RUN, 1, "update", "00" * 32, "22" * 32),
        subject_of(RUN, 1, "statistics", "00" * 32, TERMS),
        subject_of("fedcba9876543210", 1, "update", "00" * 32, TERMS),
    ):
        assert (keys[0].mask(zero, roster[0], roster, subject) != usual).all()
    assert (keys[0].mask(zero, roster[0], [*roster[:2], replace(roster[2], examples=5)], SUBJECT) != usual).all()


def test_a_key_of_small_order_with_which_all_would_know_the_mask_is_refused():
    keys = fixed_keys()
    roster = entries(keys)
    bad = replace(roster[1], key="00" * 32)
    with pytest.raises(Distrust, match="the key of client 1 is none"):
        keys[0].mask(np.zeros(1, np.uint32), roster[0], [roster[0], bad, roster[2]], SUBJECT)


# The lying server


RECIPE = Recipe(secure_aggregation=True)
CLASSES = ["cat", "dog"]


def client(number: int, *, run: str = RUN, recipe: Recipe = RECIPE, told: dict | None = None, **more) -> Masking:
    """One that has begun to train: in round 1 from START, unless told otherwise."""
    told = {"server_round": 1, "clients_on_host": number, "model": START, **(told or {})}
    one = Masking(Assignment(number, 5, recipe, run_id=run), IDENTITIES[number], **more)
    one.begin("update", told.pop("model"), CLASSES, told)
    return one


class Sealed:
    """Clients that have trained, and what each would mask. last: what the last one was told otherwise."""

    def __init__(self, number: int = 3, last: dict | None = None, summed: list | None = None, **more):
        summed = summed or [Summed() for _ in range(number)]
        self.clients = [client(i, summed=summed[i], **more) for i in range(number - 1)]
        self.clients.append(client(number - 1, summed=summed[-1], **{**more, **(last or {})}))
        self.told = [one.seal_update([np.float32([i, 0]), np.array(i)], 1.0, 100) for i, one in enumerate(self.clients)]
        self.summed = summed

    @property
    def roster(self) -> list[dict]:
        return [dict(each) for each in self.told]

    def sum(self, roster: list[dict]) -> np.ndarray:
        return sum(one.mask(json.dumps(roster)) for one in self.clients)


def test_an_honest_server_gets_the_mean():
    sealed = Sealed()
    mean, (loss,) = decode(sealed.sum(sealed.roster), START, 1)
    assert mean[0] == pytest.approx([1, 0], abs=1e-6)
    assert (mean[1].tolist(), loss) == (1, pytest.approx(1, abs=1e-6))


SIGNED = "client 2 did not sign for this round, model and recipe"
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
    "another partition": (third(partition=4), SIGNED.replace("2", "4")),
    "another one-time key": (third(key=fixed_keys(5)[4].public), SIGNED),
    "another's signature": (lambda r: [*r[:2], {**r[2], "signature": r[1]["signature"]}], SIGNED),
    "another identity": (third(identity=IDENTITIES[4].public), SIGNED),
    "a client that the run does not have": (third(partition=9), "the server's roster names client 9 of 5"),
}


@pytest.mark.parametrize(("change", "words"), LIES.values(), ids=LIES)
def test_a_lie_gives_the_server_its_reason_and_nothing_else(change, words):
    sealed = Sealed()
    with pytest.raises(Distrust) as refusal:
        sealed.clients[0].mask(json.dumps(change(sealed.roster)))
    assert refusal.value.public == words


DIFFERENT = {
    "round": {"told": {"server_round": 2}},
    "model": {"told": {"model": [np.ones(2, np.float32), np.array(0)]}},
    "run": {"run": "fedcba9876543210"},
    "learning rate": {"recipe": Recipe(secure_aggregation=True, learning_rate=1e-30)},
    "clipping": {"told": {"max_update_norm": 1e-30}},
    "part of the run": {"told": {"start": 0.9, "end": 1.0}},
}


@pytest.mark.parametrize("last", DIFFERENT.values(), ids=DIFFERENT)
def test_clients_that_were_told_different_things_give_no_sum(last):
    """Of a client that trained with no step to speak of, the server knows the update: the model that it sent."""
    sealed = Sealed(last=last)
    for one in sealed.clients:
        with pytest.raises(Distrust, match=r"client \d did not sign for this round, model and recipe"):
            one.mask(json.dumps(sealed.roster))


def test_clients_on_machines_of_different_loads_are_told_the_same():
    sealed = Sealed(last={"told": {"clients_on_host": 9, "in_pieces": True}})
    assert decode(sealed.sum(sealed.roster), START, 1)


@pytest.mark.parametrize(
    "change", [{"num_partitions": 9}, {"classes": ("cat", "fox")}, {"statistics_json": '{"age": [1, 2]}'}]
)
def test_the_number_of_partitions_classes_and_scales_are_among_the_terms(change):
    usual = Assignment(0, 3, RECIPE, statistics_json='{"age": [0, 1]}')
    told = {"participants": 3}
    same = terms_of(replace(usual, partition=2, classes=("cat", "dog")), ["dog"], told)
    assert terms_of(usual, CLASSES, told) == same
    assert terms_of(replace(usual, **change), CLASSES, told) != same


def test_an_update_is_masked_once():
    sealed = Sealed()
    sealed.clients[0].mask(json.dumps(sealed.roster))
    with pytest.raises(Distrust, match="asks for an update that was masked before, or never trained"):
        sealed.clients[0].mask(json.dumps(sealed.roster))
    with pytest.raises(Distrust, match="masked before, or never trained"):
        client(0).mask("[]")


def test_an_update_is_forgotten_once_another_model_comes_in():
    """The arrays of a large one are the network's own: the server would know what the next model made of them."""
    sealed = Sealed()
    sealed.clients[0].forget()
    with pytest.raises(Distrust, match="masked before, or never trained"):
        sealed.clients[0].mask(json.dumps(sealed.roster))


AGAIN = {
    "the same round": {},
    "the same round from a model that is changed a little": {"told": {"model": [START[0] + 1e-6, START[1]]}},
    "the same training in another run": {"run": "fedcba9876543210"},
}


@pytest.mark.parametrize("told", AGAIN.values(), ids=AGAIN)
def test_a_training_is_summed_again_with_the_same_clients_only(told):
    """Else the difference of the two sums would be one client's update."""
    first = Sealed(4)
    first.sum(first.roster)
    fewer = Sealed(4, summed=first.summed, **told)
    with pytest.raises(OtherClients, match="in this sum with other clients before"):
        fewer.clients[0].mask(json.dumps(fewer.roster[:3]))
    assert fewer.sum(fewer.roster).size == num_words(START, 1)


def test_another_round_of_the_run_may_have_other_clients():
    first = Sealed(4)
    first.sum(first.roster)
    later = Sealed(4, summed=first.summed, told={"server_round": 2, "model": [START[0] + 1, START[1]]})
    assert later.clients[0].mask(json.dumps(later.roster[:3])).size == num_words(START, 1)


def test_with_whom_a_client_was_summed_survives_its_restart(tmp_path):
    first = Sealed(4, summed=[Summed.load(tmp_path, identity) for identity in IDENTITIES[:4]])
    first.sum(first.roster)
    again = Sealed(4, summed=[Summed.load(tmp_path, identity) for identity in IDENTITIES[:4]])
    with pytest.raises(OtherClients):
        again.clients[0].mask(json.dumps(again.roster[:3]))
    assert "update 1 of run 0123456789abcdef" in next(iter(tmp_path.iterdir())).read_text()


def test_a_damaged_list_of_sums_is_one_line_and_not_an_empty_list(tmp_path, capsys):
    (tmp_path / f"summed-{IDENTITIES[0].public[:16]}.json").write_text("[")
    with pytest.raises(SystemExit) as end:
        Summed.load(tmp_path, IDENTITIES[0])
    assert end.value.code == 1
    assert "it says with whom this client's updates were summed; put it back, or remove it" in capsys.readouterr().err


def test_where_the_list_of_sums_cant_be_written_nothing_is_given(tmp_path):
    sealed = Sealed(summed=[Summed(tmp_path / "none" / "summed.json") for _ in range(3)])
    with pytest.raises(PublicError, match=r"it can't write down with whom it is summed \(No such file or directory\)"):
        sealed.clients[0].mask(json.dumps(sealed.roster))


def test_with_peers_nobody_else_is_in_the_sum(tmp_path):
    path = tmp_path / "peers"
    path.write_text("".join(f"{public_line(IDENTITIES[i].public)} h{i}\n" for i in range(2)))
    peers = Members.load(str(path), "--peers")
    sealed = Sealed(peers=peers)
    with pytest.raises(Distrust, match="the key of client 2 is not in this client's --peers"):
        sealed.clients[0].mask(json.dumps(sealed.roster))
    path.write_text("".join(f"{public_line(IDENTITIES[i].public)} h{i}\n" for i in range(3)))
    assert sealed.clients[0].mask(json.dumps(sealed.roster)).size == num_words(START, 1)


def test_with_peers_a_client_takes_part_in_nothing_else(tmp_path):
    (tmp_path / "peers").write_text(f"{public_line(IDENTITIES[0].public)} h0\n")
    peers = Members.load(str(tmp_path / "peers"), "--peers")
    with pytest.raises(PublicError, match="takes part in secure aggregation only"):
        check_peers(peers, secure=False)
    check_peers(peers, secure=True)
    check_peers(None, secure=False)


def test_a_policy_that_asks_for_five_participants_gets_no_sum_of_four():
    sealed = Sealed(4, least=5)
    with pytest.raises(Distrust, match="a sum of 4 clients would tell too much; it takes 5"):
        sealed.clients[0].mask(json.dumps(sealed.roster))


def test_who_has_nearly_all_examples_is_told_that_the_sum_is_its_own(capsys):
    keys = fixed_keys()
    for examples, said in ((100, False), (10_000, True)):
        one = client(0)
        own = one.seal_update(START, 1.0, examples)
        others = [e for e in entries(keys, one._subject) if e.partition]
        one.mask(json.dumps([own, *map(asdict, others)]))
        words = "warning: 98% of the examples in this sum are this client's: it is nearly its own update\n"
        assert (words in capsys.readouterr().out) == said


def test_arrays_with_infinities_are_constant_and_don_t_travel():
    start = [np.float32([0, -np.inf]), np.zeros(2, np.float32)]
    one = client(0, told={"model": start})
    one.seal_update([start[0], np.float32([1, 2])], 1.0, 10)
    assert [array.tolist() for array in one._sealed.arrays] == [[0, 0], [1, 2]]


def test_after_a_training_the_network_itself_is_not_to_be_had():
    one = Masking(Assignment(0, 3, RECIPE))
    one.check_open()
    with pytest.raises(Distrust, match="asks for the network itself, after a training"):
        client(0).check_open()


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

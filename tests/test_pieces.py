"""Weights in pieces: a model that travels piece by piece, and updates that wait on disk, give the bits that they would
have in one message and in memory."""

import errno
import gc
import hashlib
import io
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from federation.aggregation.steps import measure
from federation.aggregation.strategy import STRATEGIES
from federation.aggregation.validation import BadUpdate, validate_fit
from federation.client.session import Session
from federation.compression import num_bytes, travels_as, unpack
from federation.config import Recipe
from federation.participants.client_manager import Participant
from federation.pieces import (
    AT_A_TIME,
    PIECE,
    Assembly,
    InPieces,
    Store,
    StoredArray,
    StoreFull,
    block,
    blocks,
    cut,
    hash_arrays,
    joined,
    parts,
)
from federation.security.clipping import clip
from federation.server import grpc_server
from federation.server.settings import ServerSettings

import numpy as np
import pytest
from flwr.common import FitIns, FitRes, GetPropertiesIns, GetPropertiesRes, ndarrays_to_parameters
from flwr.server.client_proxy import ClientProxy
from helpers import in_process
from helpers.in_process import OK, no_disk  # noqa: F401 (a fixture)
from helpers.processes import ROOT, Federation
from helpers.updates import strategy, update

RNG = np.random.default_rng(0)
ARRAYS = [
    RNG.normal(size=(5, 3)).astype(np.float32),
    np.array(7),
    np.zeros((0, 4), np.float32),
    RNG.normal(size=7).astype(np.float16),
    np.array([True, False, True]),
    np.array(200, np.uint8),
    np.zeros(0, np.int64),
    RNG.normal(size=(2, 1, 2)),
    np.arange(6, dtype=np.float32).reshape(2, 3).T,  # its rows are not one after the other in memory
]
SIZE = 15 * 4 + 8 + 0 + 7 * 2 + 3 + 1 + 0 + 4 * 8 + 6 * 4


@pytest.fixture(autouse=True)
def files(monkeypatch) -> Iterator[list[IO[bytes]]]:
    """The files that stores made; they are closed when the test is over, and not left to the interpreter."""
    made: list[IO[bytes]] = []
    make = tempfile.TemporaryFile

    def kept(**options: object) -> IO[bytes]:
        made.append(make(**options))
        return made[-1]

    monkeypatch.setattr("federation.pieces.tempfile.TemporaryFile", kept)
    before = set(threading.enumerate())
    yield made
    threads = [each for each in threading.enumerate() if each.name.startswith("ThreadPoolExecutor")]
    threads = [each for each in threads if each not in before]
    if threads:  # a client may still be at work after the end
        gc.collect()  # a dispatcher that was not closed keeps its threads ready
    for thread in threads:
        thread.join(10)
    for file in made:
        file.close()


def same_bits(one: list, two: list) -> bool:
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(one, two, strict=True)]
    return all((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in pairs)


def shapes(arrays: list[np.ndarray]) -> list[tuple]:
    return [(array.shape, array.dtype) for array in arrays]


def stored(arrays: list[np.ndarray], folder: Path | None = None, compress: str = "none") -> list[StoredArray]:
    """On disk as they travel, and read in the dtypes that they have here."""
    kinds = [travels_as(array.dtype, compress) for array in arrays]
    store = Store(folder, [(array.shape, kind, array.dtype) for array, kind in zip(arrays, kinds, strict=True)])
    for array, kind in zip(arrays, kinds, strict=True):
        store.add(array.astype(kind).tobytes())
    return store.arrays


# Cut, and put together again


def test_a_piece_is_the_bytes_at_its_places_across_arrays():
    arrays = [np.array([1, 2, 3], np.uint8), np.zeros(0, np.uint8), np.array(4, np.uint8), np.array([5], np.uint8)]
    assert cut(arrays, 0, 2) == bytes([1, 2])
    assert cut(arrays, 2, 5) == bytes([3, 4, 5])
    assert cut(arrays, 4, 99) == bytes([5])
    assert cut(arrays, 5, 9) == b""


@pytest.mark.parametrize("piece", [1, 3, 4, 7, 64, SIZE - 1, SIZE, SIZE + 1, 10**6])
def test_pieces_of_any_size_make_the_same_arrays(piece):
    assembly = Assembly(shapes(ARRAYS))
    for start in range(0, SIZE, piece):
        assembly.add(start, cut(ARRAYS, start, start + piece))
    assert assembly.filled == assembly.size == num_bytes(ARRAYS, "none") == SIZE
    assert same_bits(assembly.arrays, ARRAYS)


@pytest.mark.parametrize("piece", [1, 5, SIZE])
def test_pieces_of_any_size_make_the_same_stored_arrays(piece, tmp_path):
    store = Store(tmp_path, [(shape, dtype, dtype) for shape, dtype in shapes(ARRAYS)])
    for start in range(0, SIZE, piece):
        store.add(cut(ARRAYS, start, start + piece))
    assert store.size == SIZE
    assert same_bits(store.arrays, ARRAYS)


def test_values_that_are_no_numbers_travel_as_they_are():
    odd = [np.array([np.nan, -np.inf, -0.0], np.float32), np.array([np.inf, 5e-324])]
    assembly = Assembly(shapes(odd))
    assembly.add(0, cut(odd, 0, num_bytes(odd, "none")))
    assert same_bits(assembly.arrays, odd)
    assert same_bits(stored(odd), odd)


@pytest.mark.parametrize(
    ("start", "content"),
    [(4, b"too late"), (1, b"again"), (-1, b"before"), (2, b"longer than what is left")],
    ids=["a gap", "a second time", "before the first", "beyond the end"],
)
def test_a_piece_that_is_not_the_next_one_is_refused(start, content):
    assembly = Assembly([((6,), np.dtype(np.uint8))])
    assembly.add(0, b"ab")
    with pytest.raises(ValueError, match=rf"piece {start} \+ {len(content)} where 2 of 6 bytes are there"):
        assembly.add(start, content)
    assert assembly.filled == 2
    assembly.add(2, b"cdef")
    assert assembly.arrays[0].tobytes() == b"abcdef"


def test_a_model_that_broke_off_begins_anew_with_the_first_piece():
    assembly = Assembly([((4,), np.dtype(np.uint8))])
    assembly.add(0, b"xyz")
    assembly.add(0, b"ab")
    assert assembly.filled == 2
    assembly.add(2, b"cd")
    assert assembly.arrays[0].tobytes() == b"abcd"


def test_a_piece_is_at_most_half_a_message_and_never_more_than_a_few_megabytes():
    assert [InPieces(largest=most).piece for most in (9, 200_000, 10**9)] == [4, 100_000, PIECE]
    assert InPieces().piece == PIECE <= 4_000_000


# On disk


def test_a_stored_array_is_read_a_block_at_a_time_in_the_dtype_in_use():
    (array,) = stored([np.array([[1, 2, 3], [4, 5, 6]], np.float32)], compress="fp16")
    assert (array.shape, array.size, array.stored, array.dtype) == ((2, 3), 6, np.float16, np.float32)
    assert array.read(1, 4).tolist() == [2, 3, 4]
    assert array.read(4, 99).tolist() == [5, 6]
    assert array.read(6, 9).tolist() == []
    assert block(array, 0, 2).tolist() == [1, 2]
    assert block(array, 0, 2).dtype == np.asarray(array).dtype == np.float32
    assert np.asarray(array, np.float64).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_block_is_the_same_in_memory_and_on_disk():
    for memory, disk in zip(ARRAYS, stored(ARRAYS), strict=True):
        for start, stop in blocks(memory.size, 2):
            assert block(memory, start, stop).tobytes() == block(disk, start, stop).tobytes()


def test_blocks_cover_each_place_once_and_of_nothing_there_is_one():
    assert list(blocks(7, 3)) == [(0, 3), (3, 6), (6, 7)]
    assert list(blocks(6, 3)) == [(0, 3), (3, 6)]
    assert list(blocks(0, 3)) == [(0, 0)]


def test_the_blocks_of_many_arrays_are_shorter_so_that_those_at_work_take_the_same_room():
    assert list(blocks(2_000_000, 1_000_000, of=4)) == [(0, 1_000_000), (1_000_000, 2_000_000)]
    assert list(blocks(1_000_000, 1_000_000, of=8)) == [(0, 500_000), (500_000, 1_000_000)]
    assert list(blocks(10_000, 16_384, of=1_000)) == [(0, 4_000), (4_000, 8_000), (8_000, 10_000)]
    assert list(blocks(2, 1, of=10**9)) == [(0, 1), (1, 2)]


def test_small_arrays_of_one_dtype_share_a_block_and_large_ones_are_divided():
    sizes = {"float32": (3, 2, 0, 9), "float16": (1, 1)}
    arrays = [np.zeros(size, dtype) for dtype, each in sizes.items() for size in each]
    together = [(0, 0, 3), (1, 0, 1)], [(1, 1, 2), (2, 0, 0), (3, 0, 3)], [(3, 3, 7)], [(3, 7, 9)]
    assert list(parts(arrays, 4)) == [*together, [(4, 0, 1), (5, 0, 1)]]
    assert list(parts(arrays[:2], 16_384, of=AT_A_TIME // 2)) == [[(0, 0, 2)], [(0, 2, 3), (1, 0, 1)], [(1, 1, 2)]]
    assert list(parts([], 4)) == []


def test_parts_joined_are_the_numbers_of_all_arrays_in_order():
    for arrays in (ARRAYS, stored(ARRAYS)):
        found = [number for place in parts(arrays, 4) for number in joined(arrays, place).tolist()]
        assert found == [number for array in ARRAYS for number in array.reshape(-1).tolist()]


def test_what_is_stored_leaves_no_file_behind(tmp_path):
    arrays = stored(ARRAYS, tmp_path)
    assert same_bits(arrays, ARRAYS)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk(monkeypatch, files):
    """Linux's file that is always full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")

    def full(**options: object) -> IO[bytes]:
        files.append(open("/dev/full", "r+b", buffering=0))  # noqa: SIM115 (the fixture closes it)
        return files[-1]

    monkeypatch.setattr("federation.pieces.tempfile.TemporaryFile", full)


def test_a_store_on_a_full_disk_says_so(full_disk, tmp_path):
    store = Store(tmp_path, [((4,), np.dtype(np.uint8), np.dtype(np.uint8))])
    with pytest.raises(StoreFull) as caught:
        store.add(b"abcd")
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOSPC, "No space left on device")


def test_a_store_in_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(StoreFull) as caught:
        Store(tmp_path / "gone", [])
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOENT, "No such file or directory")


# Aggregation


def model(rng: np.random.Generator, around: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Weights, a variance, a counter, and two that are odd; or an update of such a model."""
    if around is None:
        around = [np.zeros((50, 7), np.float32), np.ones(9, np.float32), np.array(3), np.zeros((0, 2), np.float32)]
        return [*around, np.array(0.5, np.float32)]
    moved = [(array + rng.normal(size=array.shape)).astype(array.dtype) for array in around]
    return [*moved[:2], np.array(around[2] + 1), *moved[3:]]


@pytest.fixture
def small_pieces(monkeypatch):
    """Arrays of tens of numbers are aggregated in several pieces."""
    monkeypatch.setattr("federation.aggregation.strategy.PIECE", 16)


@pytest.mark.parametrize("norm", [None, 3.0], ids=["as they are", "clipped"])
@pytest.mark.parametrize("compress", ["none", "fp16"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_updates_on_disk_give_the_bits_of_updates_in_memory(name, compress, norm, small_pieces):
    rng = np.random.default_rng(1)
    memory = disk = model(rng)
    rules = [strategy(name, memory, [1], compress, max_update_norm=norm) for _ in range(2)]
    for _ in range(3):
        fresh = [model(rng, memory) for _ in range(4)]
        on_disk = [stored(arrays, compress=compress) for arrays in fresh]
        in_memory = [[np.asarray(array) for array in arrays] for arrays in on_disk]
        examples = [7, 11, 3, 20]
        memory = rules[0].aggregate(memory, [update(a, n) for a, n in zip(in_memory, examples, strict=True)])
        disk = rules[1].aggregate(disk, [update(a, n) for a, n in zip(on_disk, examples, strict=True)])
        assert same_bits(memory, disk)
        assert same_bits(rules[0].state(), rules[1].state())


def by_flower(name: str, start: list[np.ndarray], rounds: list[list[tuple[list[np.ndarray], int]]]) -> list:
    """What Flower's own strategy makes of whole updates, round by round."""
    flower, models = STRATEGIES[name](ServerSettings(strategy=name), ndarrays_to_parameters(start)), []
    for number, updates in enumerate(rounds, start=1):
        results = [(None, FitRes(OK, ndarrays_to_parameters(arrays), n, {})) for arrays, n in updates]
        parameters, _ = flower.aggregate_fit(number, results, [])
        made = [np.load(io.BytesIO(tensor)) for tensor in parameters.tensors]
        models.append([array.astype(old.dtype) for array, old in zip(made, start, strict=True)])
    return models


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedmedian", "fedtrimmedavg", "krum"])
def test_a_strategy_gives_bit_for_bit_what_flowers_own_gives_on_whole_updates(name, where, small_pieces):
    rng = np.random.default_rng(2)
    start = [rng.normal(size=size).astype(np.float32) for size in ((40, 3), (5,), ())]
    rounds = [
        [([(a + rng.normal(size=a.shape)).astype(a.dtype) for a in start], n) for n in (7, 11, 3)] for _ in range(4)
    ]
    expected = by_flower(name, start, rounds)
    rule, weights = strategy(name, start, []), start
    for updates, wanted in zip(rounds, expected, strict=True):
        kept = [(stored(arrays) if where == "disk" else arrays, n) for arrays, n in updates]
        weights = rule.aggregate(weights, [update(arrays, n) for arrays, n in kept])
        assert same_bits(weights, wanted)


def test_a_clipped_update_on_disk_is_the_one_in_memory():
    old = [np.array([1, 0], np.float32), np.array([0], np.float32), np.array(7)]
    new = [np.array([4, 0], np.float32), np.array([4], np.float32), np.array(9)]  # a step of (3, 0, 4): norm 5
    assert [np.asarray(array).tolist() for array in clip(stored(new), old, 2.5)] == [[2.5, 0], [2], 9]
    assert same_bits(clip(stored(new), old, 2.5), clip(new, old, 2.5))
    assert same_bits(clip(stored(new), old, 5.0), new)


def test_the_steps_of_updates_on_disk_are_those_in_memory():
    rng = np.random.default_rng(3)
    start = [np.zeros(1_000_003, np.float32), np.zeros(4, np.float32), np.array(2), np.zeros((0, 2), np.float32)]
    fresh = [[*(rng.normal(size=a.shape).astype(a.dtype) for a in start[:2]), start[2] + 1, start[3]] for _ in range(3)]
    memory = measure([update(arrays, n) for arrays, n in zip(fresh, (1, 2, 3), strict=True)], [start] * 3, [1])
    disk = measure([update(stored(arrays), n) for arrays, n in zip(fresh, (1, 2, 3), strict=True)], [start] * 3, [1])
    assert disk == memory
    assert disk[0].size == pytest.approx(np.linalg.norm(fresh[0][0].astype(np.float64)))


def test_the_step_of_an_update_on_disk_by_hand():
    (step,) = measure([update(stored([np.array([3, 0, 4], np.float32)]), 6)], [[np.zeros(3, np.float32)]], [])
    assert (step.size, step.examples) == (5.0, 6)


# Validation

LONG = 1_000_005  # more than a block


def validated(new: list[np.ndarray], old: list[np.ndarray], compress: str = "none", **more: object):
    """An update as the server fetched it: in the dtypes in which it travelled."""
    packed = [np.asarray(array).astype(travels_as(array.dtype, compress)) for array in new]
    res = FitRes(OK, InPieces(arrays=stored(packed)), 10, {"train_loss": 1.0, **more})
    return validate_fit(res, 0, old, 10, compress)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "array 1 holds NaN or infinite values"),
        (-np.inf, "array 1 holds NaN or infinite values"),
        (-2e19, r"array 1 holds 2e\+19, too large to be averaged"),  # its square is beyond float32
    ],
)
def test_one_bad_number_in_a_stored_array_is_found(value, words):
    old = [np.zeros(3, np.float32), np.zeros(LONG, np.float32)]
    new = [old[0], old[1].copy()]
    new[1][-1] = value
    with pytest.raises(BadUpdate, match=words):
        validated(new, old)


def test_a_number_beyond_float16_arrives_as_infinite_and_is_found():
    with np.errstate(over="ignore"), pytest.raises(BadUpdate, match="array 0 holds NaN or infinite values"):
        validated([np.array([1e5], np.float32)], [np.zeros(1, np.float32)], "fp16")


@pytest.mark.parametrize("compress", ["none", "fp16"])
def test_a_good_update_stays_in_its_file_in_the_dtypes_of_the_model(compress):
    old = [np.zeros((2, 2), np.float32), np.array(0)]
    found = validated([np.array([[1, 2], [3, 4]], np.float32), np.array(9)], old, compress)
    assert all(isinstance(array, StoredArray) for array in found.weights)
    assert same_bits(found.weights, [np.array([[1, 2], [3, 4]], np.float32), np.array(9)])


def test_a_mask_of_infinities_that_the_model_has_too_is_no_bad_number():
    mask = np.array([0, -np.inf], np.float32)
    assert same_bits(validated([mask], [mask]).weights, [mask])
    with pytest.raises(BadUpdate, match="array 0 holds NaN"):
        validated([mask[::-1]], [mask])


def test_what_is_asked_of_every_update_is_asked_of_a_stored_one():
    old = [np.zeros(2, np.float32)]
    with pytest.raises(BadUpdate, match="training loss is nan"):
        validated(old, old, train_loss=float("nan"))
    with pytest.raises(BadUpdate, match="it says: no"):
        validated(old, old, error="no")


# A client's answers

WEIGHTS = [np.array([[1, 2], [3, 4]], np.float32), np.array(5), np.array([0.5], np.float32)]
BYTES = 16 + 8 + 4
PLACE = {"ask": "place", "partition": 0, "num_partitions": 1}
IN_PIECES = {"server_round": 1, "clients_on_host": 1, "in_pieces": True}


class Client:
    """A user's client of three arrays; a training adds 1 to all."""

    num_train, num_test, buffer_positions = 100, 10, (1,)

    def __init__(self):
        self.weights = [array.copy() for array in WEIGHTS]
        self.trained = 0

    def get_parameters(self, config):
        if "frozen" in config:
            return [np.array([9], np.uint8)]
        return self.weights

    def set_parameters(self, parameters):
        self.weights = [np.array(array) for array in parameters]

    def fit(self, parameters, config):
        self.set_parameters([array + np.ones((), array.dtype) for array in parameters])
        self.trained += 1
        return self.weights, 100, {"train_loss": 0.25}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 10, {"accuracy": 0.75}


def admitted(compress: str = "none") -> Session:
    client = Client()
    session = Session(lambda assignment: client, ["cat", "dog"])
    session.get_properties({**PLACE, "recipe": Recipe(compress=compress).to_json()})
    assert session.failure is None
    return session


def store(session: Session, arrays: list[np.ndarray], piece: int = 5, stop: int = BYTES) -> list[dict]:
    """Send it so many bytes of a model; returns its answers."""
    starts = range(0, min(stop, num_bytes(arrays, "none")), piece)
    pieces = [{"ask": "store", "start": start, "content": cut(arrays, start, start + piece)} for start in starts]
    return [session.get_properties(each) for each in pieces]


def fetch(session: Session, what: str, stop: int, piece: int = 5) -> bytes:
    asked = [{"ask": "fetch", "what": what, "start": start, "stop": start + piece} for start in range(0, stop, piece)]
    return b"".join(session.get_properties(each)["content"] for each in asked)


def test_the_update_that_is_fetched_is_the_trained_one():
    session, sent = admitted(), [array * np.array(2, array.dtype) for array in WEIGHTS]
    assert store(session, sent) == [{}] * 6
    assert session.fit([], IN_PIECES) == ([], 100, {"train_loss": 0.25})
    assert fetch(session, "update", BYTES) == cut([array + np.ones((), array.dtype) for array in sent], 0, BYTES)


def test_a_compressed_model_comes_and_goes_in_half_the_bytes():
    session, size = admitted("fp16"), 8 + 8 + 2
    half = [np.array([[0.1, 2], [3, 4]], np.float16), np.array(5), np.array([0.5], np.float16)]
    store(session, half)
    session.fit([], IN_PIECES)
    float32 = [array + np.ones((), array.dtype) for array in unpack(half, WEIGHTS)]
    assert fetch(session, "update", size) == cut([a.astype(b.dtype) for a, b in zip(float32, half, strict=True)], 0, 99)


def test_a_model_in_pieces_is_evaluated_as_one_that_came_whole():
    session, whole = admitted(), admitted()
    store(session, WEIGHTS)
    config = {"server_round": 1, "clients_on_host": 1}
    assert session.evaluate([], IN_PIECES) == whole.evaluate(WEIGHTS, config) == (10.0, 10, {"accuracy": 0.75})


@pytest.mark.parametrize("stop", [0, 5, 25], ids=["nothing", "one piece", "all but one"])
def test_a_model_that_has_not_come_whole_is_refused_in_words(stop):
    session = admitted()
    store(session, WEIGHTS, stop=stop)
    refusal = {"error": "the model has not come whole"}
    assert session.fit([], IN_PIECES) == ([], 0, refusal)
    assert session.evaluate([], IN_PIECES) == (0.0, 0, refusal)
    assert session.client.trained == 0


def test_a_model_is_used_once():
    session = admitted()
    store(session, WEIGHTS)
    session.evaluate([], IN_PIECES)
    assert session.fit([], IN_PIECES)[2] == {"error": "the model has not come whole"}


def test_a_piece_out_of_order_is_answered_with_an_error_and_the_model_is_then_not_whole():
    session = admitted()
    store(session, WEIGHTS, stop=5)
    late = {"ask": "store", "start": 10, "content": cut(WEIGHTS, 10, BYTES)}
    assert set(session.get_properties(late)) == {"error"}
    assert session.fit([], IN_PIECES)[2] == {"error": "the model has not come whole"}
    store(session, WEIGHTS)  # from the first piece on it is as if nothing had happened
    assert session.fit([], IN_PIECES)[1] == 100


def test_the_untrained_model_and_the_frozen_arrays_are_fetched_as_they_are():
    session = admitted()
    assert fetch(session, "untrained", BYTES) == cut(WEIGHTS, 0, BYTES)
    assert fetch(session, "frozen", 1) == bytes([9])
    assert fetch(admitted("fp16"), "untrained", 18) == cut([array.astype("e") for array in WEIGHTS[:1]], 0, 8) + cut(
        [WEIGHTS[1], WEIGHTS[2].astype("e")], 0, 10
    )


# Both ends, in this process


class Direct(grpc_server.Proxy):
    """The server's proxy of a session without a network between them; keeps how long the pieces were."""

    def __init__(self, session: Session):
        ClientProxy.__init__(self, session.instance)
        self.session = session
        self.lengths: list[int] = []

    def get_properties(self, ins: GetPropertiesIns, timeout, group_id):
        answer = self.session.get_properties(ins.config)
        self.lengths += [len(each["content"]) for each in (ins.config, answer) if "content" in each]
        return GetPropertiesRes(OK, answer)

    def fit(self, ins: FitIns, timeout, group_id):
        if isinstance(ins.parameters, InPieces):
            return super().fit(ins, timeout, group_id)
        weights, examples, metrics = self.session.fit([], ins.config)
        return FitRes(OK, ndarrays_to_parameters(weights), examples, metrics)


CONFIG = {"server_round": 1, "clients_on_host": 1}


def test_a_training_in_pieces_gives_an_update_that_counts():
    proxy = Direct(admitted())
    res = proxy.fit(FitIns(InPieces(arrays=WEIGHTS, largest=20), CONFIG), 60, None)
    found = validate_fit(res, 0, WEIGHTS, 100)
    assert (found.examples, found.metrics) == (100, {"train_loss": 0.25})
    assert same_bits(found.weights, [array + np.ones((), array.dtype) for array in WEIGHTS])
    assert proxy.lengths == [10, 10, 8] * 2  # there and back


def test_of_a_client_that_fails_nothing_is_fetched():
    proxy = Direct(admitted())
    proxy.session.client.fit = lambda parameters, config: 1 / 0
    res = proxy.fit(FitIns(InPieces(arrays=WEIGHTS, largest=20), CONFIG), 60, None)
    assert proxy.lengths == [10, 10, 8]
    with pytest.raises(BadUpdate, match=r"it says: its own code failed \(ZeroDivisionError\)"):
        validate_fit(res, 0, WEIGHTS, 100)


@pytest.mark.parametrize("content", [b"short", b"longer than it was asked for", "no bytes", None])
def test_a_piece_that_is_not_what_was_asked_for_breaks_the_exchange_off(content):
    proxy = Direct(admitted())
    answers = proxy.session.get_properties
    proxy.session.get_properties = lambda config: (
        ({"content": content} if content else {}) if config["ask"] == "fetch" else answers(config)
    )
    with pytest.raises(ValueError, match="a piece of 10 bytes was asked for, and not given"):
        proxy.fit(FitIns(InPieces(arrays=WEIGHTS, largest=20), CONFIG), 60, None)


class InPiecesAtHand(in_process.Proxy):
    """Of a client of in_process.py: keeps its update in a file, as the server's proxy does with a large one."""

    def fit(self, ins, timeout, group_id):
        assert isinstance(ins.parameters, InPieces)
        weights, examples, metrics = self.learner.fit(list(ins.parameters.arrays), ins.config)
        kept = Store(ins.parameters.folder, [(array.shape, array.dtype, array.dtype) for array in weights])
        for array in weights:
            kept.add(array.tobytes())
        return FitRes(OK, InPieces(arrays=kept.arrays), examples, metrics)

    def evaluate(self, ins, timeout, group_id):
        parameters = ndarrays_to_parameters(list(ins.parameters.arrays))
        return super().evaluate(type(ins)(parameters, ins.config), timeout, group_id)


def many_updates(monkeypatch) -> None:
    """The updates of a round of in_process.py are more than its server keeps in memory."""
    monkeypatch.setattr("federation.server.dispatch.IN_MEMORY", 0)


@pytest.fixture
def large(monkeypatch):
    """The model of in_process.py is a large one."""
    monkeypatch.setattr(in_process, "Proxy", InPiecesAtHand)
    monkeypatch.setattr(Participant, "knows_pieces", True)
    monkeypatch.setattr(in_process.Clients, "in_pieces", True)
    monkeypatch.setattr("federation.server.dispatch.LARGE", 0)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_on_stored_updates_counts_them_as_any(mode, large, tmp_path):
    server = in_process.federation(tmp_path, [in_process.Learner(1.0), in_process.Learner(3.0)], rounds=2, mode=mode)
    server.federate()
    assert server.exit_code == 0
    if mode == "sync":
        assert [array.tolist() for array in server.weights] == [[4, 4], [0.25], 2]  # (1 + 3) / 2 in each round


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_full_disk_ends_the_run_in_one_line_and_no_client_is_blamed(mode, large, full_disk, tmp_path, capsys):
    server = in_process.federation(tmp_path, [in_process.Learner() for _ in range(3)], mode=mode)
    server.federate()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error:")]
    assert f"the run folder {tmp_path / 'run'} can't be written (No space left on device)" in line
    assert "--resume" in line
    assert server.exit_code == 1
    assert server.clients.dropped == {}
    assert [one.partition for one in server.clients.ready()] == [0, 1, 2]
    assert not any(event["event"] == "left" for event in server.history.events)


@pytest.mark.parametrize("number", [1, 3, 4], ids=["all in memory", "three clients' just fit", "one more does not"])
def test_the_updates_of_a_round_wait_on_disk_where_all_together_take_too_much_memory(number, tmp_path, monkeypatch):
    monkeypatch.setattr("federation.server.dispatch.IN_MEMORY", 3 * (2 * 4 + 4 + 8))  # bytes of three of its models
    server = in_process.federation(tmp_path, [in_process.Learner() for _ in range(number)])
    answers = server.dispatcher.fit(1, in_process.START, server.clients.ready())
    on_disk = [isinstance(answer.parameters, InPieces) for _, answer in answers]
    assert on_disk == [number > 3] * number


@pytest.mark.parametrize("compress", ["none", "fp16"])
def test_a_run_whose_updates_wait_on_disk_gives_the_bits_and_the_record_of_any(compress, tmp_path, monkeypatch):
    def run(name: str) -> tuple:
        learners = [in_process.Learner(step, examples) for step, examples in ((0.1, 3), (0.7, 5), (-0.3, 2))]
        server = in_process.federation(tmp_path / name, learners, compress=compress)
        server.federate()
        lines = map(json.loads, (tmp_path / name / "run/audit.jsonl").read_text().splitlines())
        came = [(line["sha256"], line["bytes"]) for line in lines if line["kind"] == "update"]
        rows = [{**vars(row), "utc": "", "seconds": 0} for row in server.history.rounds]
        return [array.tobytes() for array in server.weights], rows, sorted(came)

    usual = run("memory")
    many_updates(monkeypatch)
    assert run("disk") == usual
    assert len(usual[2]) == 9


@pytest.mark.parametrize(
    "answer",
    [[np.zeros(3, np.float32), np.ones(1, np.float32), np.array(1)], [np.zeros(2, np.float32)], [np.array(["a"])]],
    ids=["another shape", "too few arrays", "no numbers"],
)
def test_an_update_of_other_arrays_is_refused_in_the_same_words_where_updates_wait_on_disk(
    answer, tmp_path, monkeypatch
):
    def reasons(name: str) -> list[str]:
        wrong = in_process.Learner(fit=lambda number, weights, n, metrics: (answer, n, metrics))
        server = in_process.federation(tmp_path / name, [in_process.Learner(), wrong], rounds=1)
        server.federate()
        return [each["reason"] for each in server.history.rejected]

    usual = reasons("memory")
    many_updates(monkeypatch)
    assert reasons("disk") == usual != []


def test_a_disk_that_does_not_take_the_updates_of_a_round_ends_the_run_in_one_line(
    full_disk, tmp_path, capsys, monkeypatch
):
    many_updates(monkeypatch)
    server = in_process.federation(tmp_path, [in_process.Learner() for _ in range(3)])
    server.federate()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error:")]
    assert f"the run folder {tmp_path / 'run'} can't be written (No space left on device)" in line
    assert (server.exit_code, server.clients.dropped) == (1, {})


# In processes


def test_the_hash_of_arrays_is_that_of_dtype_shape_and_bytes_in_order():
    by_hand = hashlib.sha256(b"<f4 (2,)\n" + bytes.fromhex("0000803f00000040") + b"<i8 ()\n" + bytes([3, *[0] * 7]))
    assert hash_arrays([np.float32([1, 2]), np.int64(3)]) == by_hand.hexdigest()
    assert hash_arrays([np.float32([1, 2]).reshape(1, 2)]) != hash_arrays([np.float32([1, 2])])


SMALL = ["--max-message-mb", 0.1]  # LeNet has 0.25 MB, and half of it as float16: neither fits


def run(folder: Path, *flags: object) -> Federation:
    """A run of two clients to its end, of which the first saves the model."""
    folder.mkdir()
    with Federation(folder) as federation:
        server = federation.server("--clients", 2, "--rounds", 2, "--model", "lenet", *flags)
        federation.client("--threads", 1, "--partition-id", 0, "--save", folder / "saved.safetensors")
        federation.client("--threads", 1, "--partition-id", 1)
        server.ends(0)
        for process in federation.processes:
            process.ends(0)
    return federation


@pytest.mark.parametrize("compress", ["fp16"])  # the harder of the two
def test_a_run_in_pieces_ends_with_the_same_model_file_to_the_byte_at_server_and_client(compress, tmp_path):
    whole = run(tmp_path / "whole", "--compress", compress)
    pieces = run(tmp_path / "pieces", "--compress", compress, *SMALL)
    assert pieces.model() == whole.model()
    for each in (whole, pieces):
        assert (each.folder / "saved.safetensors").read_bytes() == each.model_file()
    received = [[row.get("bytes_received") for row in each.history()["rounds"]] for each in (whole, pieces)]
    assert received[0] == received[1]


@pytest.mark.parametrize(("kind", "number"), [("fetch", 2)], ids=["of its update"])  # the second: round 1's
def test_a_client_that_dies_between_two_pieces_costs_its_round_only(kind, number, federation):
    server = federation.server("--clients", 3, "--rounds", 3, "--model", "lenet", "--rejoin-wait", 100, *SMALL)
    flags = ["--server", federation.address, "--dataset", "synthetic", "--threads", 1]
    dying = federation.start("dying client", ROOT / "tests/helpers/dying_client.py", kind, number, *flags)
    federation.client("--threads", 1)
    federation.client("--threads", 1)
    dying.ends(9)
    federation.client("--threads", 1)
    server.ends(0)
    rows = federation.history()["rounds"]
    assert [row["clients"] for row in rows] == [3, 3, 2, 3]
    assert federation.history()["rejected"] == []

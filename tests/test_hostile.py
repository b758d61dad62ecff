"""Hostile bytes: a flood of nonsense changes neither the model nor the server's memory by much, and shows little."""

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.common import ndarrays_to_parameters
from flwr.common.serde import parameters_to_proto
from flwr.proto.transport_pb2 import ClientMessage
from helpers.fake_clients import FakeAdmission, FakeClient
from helpers.processes import CLEAN, Federation, Process, wait_for
from helpers.raw_connections import JOIN, RawConnection, hello, open_channel, properties

MESSAGES = 10_000
MOST_SENT = 2000  # megabytes; a sender that is held back stops far below, after 50 to 500, as the machine is busy
CONNECTIONS = 1500  # of plain garbage, one message each
LINUX = Path("/proc/self/status").exists()


class Memory:
    """Watches a process's memory until it ends, in kB."""

    def __init__(self, process: Process):
        self.last: dict[str, int] = {}
        self._thread = threading.Thread(target=self._watch, args=(process,), daemon=True)
        self._thread.start()

    def _watch(self, process: Process) -> None:
        while process.popen.poll() is None:
            self.last |= process.memory()  # nothing of a process that is just ending
            time.sleep(0.01)

    def at_the_end(self) -> dict[str, int]:
        self._thread.join(60)
        return self.last


class Nonsense:
    """Bytes from valid to random, a function of the seed."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        arrays = parameters_to_proto(ndarrays_to_parameters([np.ones((2, 2), np.float32), np.ones(2, np.float32)]))
        fit, evaluate = ClientMessage(), ClientMessage()
        fit.fit_res.parameters.CopyFrom(arrays)
        fit.fit_res.num_examples = 100
        fit.fit_res.metrics["train_loss"].double = 0.5
        evaluate.evaluate_res.loss, evaluate.evaluate_res.num_examples = 0.5, 10
        evaluate.evaluate_res.metrics["accuracy"].double = 1.0
        leave = ClientMessage(disconnect_res=ClientMessage.DisconnectRes(reason=4))
        place = properties(train_examples=100, test_examples=10, statistics="[2]")
        self.valid = [*(message.SerializeToString() for message in (fit, evaluate, leave)), place, properties()]

    def message(self) -> bytes:
        """Any message: as it should be but out of place, changed here and there, or made of nothing."""
        valid = self.rng.choice([hello(instance=self.rng.randbytes(16).hex()), *self.valid])
        match self.rng.randrange(6):
            case 0:
                return valid
            case 1:
                return self.garbage()
            case _:
                return self.mutate(bytearray(valid))

    def mutate(self, message: bytearray) -> bytes:
        for _ in range(self.rng.choice([1, 1, 2, 5, 20])):
            at = self.rng.randrange(len(message) + 1)
            match self.rng.randrange(5):
                case 0 if at < len(message):
                    message[at] ^= 1 << self.rng.randrange(8)
                case 1:
                    message[at:at] = self.rng.randbytes(self.rng.randrange(1, 9))
                case 2:
                    del message[at : at + self.rng.randrange(1, 9)]
                case 3:
                    message[at:at] = message[: self.rng.randrange(50)]
                case 4 if at < len(message):
                    message[at] = self.rng.choice(b"\x00\x7f\x80\xff")
        return bytes(message)

    def garbage(self) -> bytes:
        return self.rng.randbytes(self.rng.choice([0, 1, 10, 100, 1000, 20_000]))

    def connection(self) -> bytes:
        """What a connection may begin with: HTTP/2 and nonsense, TLS, HTTP/1, or nothing at all."""
        http2, tls = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"
        start = [http2, tls, b"GET / HTTP/1.1\r\n\r\n", b""]
        return self.rng.choice(start) + self.garbage()


def chatter(address: str, number: int, seed: int) -> Counter:
    """Send so many messages as answers to whatever the server asks, a hundred streams a connection.

    gRPC itself refuses all streams of a connection on which some thousand have been broken off.
    """
    nonsense, sent = Nonsense(seed), Counter()
    while sent["messages"] < number:
        with closing(open_channel(address)) as channel:
            for _ in range(100):
                connection = RawConnection(channel)
                sent["streams"] += 1
                try:
                    while sent["messages"] < number:
                        connection.hear()
                        connection.say(nonsense.message())
                        sent["messages"] += 1
                except (grpc.RpcError, StopIteration):
                    pass
                connection.hang_up()
    return sent


def babble(address: str, number: int, seed: int) -> Counter:
    """Send so many pieces of plain garbage, each over a connection of its own."""
    nonsense, sent = Nonsense(seed), Counter()
    host, port = address.split(":")
    for _ in range(number):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            try:
                connection.sendall(nonsense.connection())
                sent["connections"] += 1
                connection.settimeout(0.005)
                connection.recv(100)
            except OSError:  # closed in our face, as it should be; or it waits for more
                pass
    return sent


def run(federation: Federation, hostilities: Callable[[Memory], None] | None = None) -> dict:
    """Five rounds of three clients, the last of which ends when the hostilities do; how it went."""
    federation.folder.mkdir()
    over = federation.folder / "over"
    server = federation.server("--rounds", 5, fresh=True)
    clients = [federation.tiny("--partition-id", i, "--in-round", 5, "--until", over) for i in range(3)]
    memory = Memory(server)
    server.says("3 of 3 there")
    if hostilities:
        hostilities(memory)
    over.touch()
    for process in [server, *clients]:
        process.ends(0)
    return {"model": federation.model(), "memory": memory.at_the_end(), "said": server.output}


def test_ten_thousand_messages_of_nonsense_leave_the_model_as_it_would_be(tmp_path):
    sent, half_way = Counter(), []
    with Federation(tmp_path / "quiet") as federation:
        quiet = run(federation)
    with Federation(tmp_path / "loud") as federation:

        def hostilities(memory: Memory) -> None:
            share = (MESSAGES - CONNECTIONS) // 10
            for half in range(2):
                with ThreadPoolExecutor(6) as threads:
                    tasks = [threads.submit(chatter, federation.address, share, 10 * half + i) for i in range(5)]
                    tasks.append(threads.submit(babble, federation.address, CONNECTIONS // 2, 10 * half + 5))
                sent.update(sum((task.result() for task in tasks), Counter()))
                half_way.append(dict(memory.last))

        loud = run(federation, hostilities)
        clients_by_round = [row["clients"] for row in federation.history()["rounds"]]
    print(f"sent {dict(sent)}; quiet {quiet['memory']}, loud {loud['memory']}, by halves {half_way}\n{loud['said']}")
    assert sent["messages"] + sent["connections"] == MESSAGES
    assert loud["model"] == quiet["model"]
    assert clients_by_round == [3] * 6
    assert "Traceback" not in loud["said"]
    assert len(loud["said"].splitlines()) < len(quiet["said"].splitlines()) + 60
    assert all(line.isprintable() for line in loud["said"].splitlines())
    if LINUX:
        assert loud["memory"]["VmRSS"] < 2 * quiet["memory"]["VmRSS"]
        assert loud["memory"]["VmHWM"] < 2 * quiet["memory"]["VmHWM"]
        assert half_way[1]["VmRSS"] < half_way[0]["VmRSS"] + 15_000, "kB: the second half adds nothing lasting"


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_an_unverified_connection_that_never_stops_sending_is_held_back_and_fills_no_memory(federation):
    server = federation.server("--max-message-mb", 2, fresh=True, env={**CLEAN, "FEDERATION_SECRET": "not for all"})
    server.says("waiting for 3 clients")
    memory = Memory(server)
    wait_for(lambda: memory.last, "a first look")
    before, megabyte, sent = memory.last["VmRSS"], hello(classes="x" * 1_000_000), 0

    def flood():
        nonlocal sent
        while sent < MOST_SENT:
            sent += 1
            yield megabyte

    with closing(open_channel(federation.address)) as channel:
        for _ in range(10):
            call = channel.stream_stream(JOIN)(flood(), timeout=60)
            with suppress(grpc.RpcError):
                for _ in call:  # taken in without a word: all words are sent already
                    pass
    assert 10 < sent < MOST_SENT
    assert memory.last["VmHWM"] < before + 250_000, "kB; unheld it would be all that is sent"


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_what_an_admitted_client_sends_unasked_stays_with_the_sender(federation):
    """Its stream stays open, unlike that of a client that is refused: the server could read on without end."""
    server = federation.server("--max-message-mb", 2, fresh=True)
    server.says("waiting for 3 clients")
    before, megabyte, sent = server.memory()["VmRSS"], hello(classes="x" * 1_000_000), 0

    def flood():
        nonlocal sent
        yield hello()
        yield properties(train_examples=100, test_examples=10, statistics="[2]")
        while sent < 300:  # what fits into gRPC's buffers, and leaves the sender, is 5 to 20
            sent += 1
            yield megabyte

    with closing(open_channel(federation.address)) as channel:
        call = channel.stream_stream(JOIN)(flood(), timeout=60)
        server.says("client 0 joined")
        seen, since = sent, time.monotonic()
        while sent < 300 and time.monotonic() - since < 3:  # until nothing has left for so long
            if sent != seen:
                seen, since = sent, time.monotonic()
            time.sleep(0.02)
        memory = server.memory()
        call.cancel()
    assert sent < 150
    assert memory["VmHWM"] < before + 100_000, "kB; unheld it would be all that is sent"


@pytest.mark.slow
def test_a_thousand_senseless_clients_leave_no_senseless_place_and_an_admission_that_works():
    rng = random.Random(0)
    values = [None, True, 0, -1, 2**62, -(2**63), 1.5, float("nan"), "", "0", "[]", "[2]", '["cat", "dog"]', "[" * 5000]
    values += [b"", b"\xff", "\x1b[2J", "\u202e", "x" * 100_000, '"' * 64, "null", "[[]]", "[1e999]", "0" * 32]
    fake = FakeAdmission(num_partitions=2)
    for _ in range(1000):
        client = FakeClient()
        for answer in (client.hello, client.summary):
            for key in rng.sample(sorted(answer), rng.randrange(3)):
                answer[key] = rng.choice(values)
            if rng.random() < 0.1:
                del answer[rng.choice(sorted(answer))]
        fake.joins(client)
        for one in fake.admission.ready():
            assert one.train_examples > 0
            assert one.test_examples > 0
            fake.admission.unregister(one.client)
        assert not fake.admission.participants
    assert all(line.isprintable() for line in fake.said)

"""Who may join: first come, first served, after proof of the secret; unverified connections cost the run nothing."""

import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

from federation.config import Recipe
from federation.protocol import DataSummary
from federation.server import admission
from federation.server.admission import MOST_UNVERIFIED
from federation.server.options import parse_args

import grpc
import pytest
from flwr.proto.transport_pb2 import ServerMessage
from flwr.proto.transport_pb2_grpc import FlowerServiceServicer, add_FlowerServiceServicer_to_server
from helpers.fake_clients import FakeAdmission, FakeClient
from helpers.processes import CLEAN, wait_for
from helpers.raw_connections import Http2, RawConnection, hello, open_channel, properties

SECRET = "correct-horse-battery-staple"


def finish(*processes) -> None:
    for process in processes:
        process.ends(0)


def clients_by_round(federation) -> list[int]:
    return [row["clients"] for row in federation.history()["rounds"]]


def words_of(question: ServerMessage) -> dict[str, object]:
    """The configuration that came with a get_properties question."""
    config = question.get_properties_ins.config
    return {key: getattr(config[key], config[key].WhichOneof("scalar")) for key in config}


# With real processes


def test_a_fourth_client_is_told_to_wait_and_takes_the_place_of_one_that_is_killed(federation):
    server = federation.server("--rounds", 3)
    clients = [federation.tiny("--partition-id", i, "--seconds", 300 if i == 1 else 0) for i in range(3)]
    clients[1].says("fit 1")
    fourth = federation.tiny()
    fourth.says("all 3 places are taken; you are number 1 on the waiting list; asking again every 3 s")
    clients[1].send(signal.SIGKILL)
    server.says("client 1 left; its place is free")
    finish(server, fourth, clients[0], clients[2])
    assert server.output.count("client 1 joined") == 2
    assert clients_by_round(federation) == [3, 2, 3, 3]
    assert re.findall("fit .", fourth.output) == ["fit 2", "fit 3"]


def test_without_a_waiting_list_a_fourth_client_is_refused(federation):
    server = federation.server("--no-waiting-list", "--rounds", 1)
    clients = [federation.tiny("--partition-id", i, "--seconds", 300 if i == 1 else 0) for i in range(3)]
    clients[1].says("fit 1")
    fourth = federation.tiny()
    assert "refused: all 3 places are taken, and this server keeps no waiting list" in fourth.ends(1)
    assert len(fourth.output.splitlines()) == 1
    clients[1].send(signal.SIGKILL)
    finish(server, clients[0], clients[2])
    assert "turned away: all 3 places are taken" in server.output


def test_only_who_proves_the_secret_joins_and_it_shows_nowhere(federation):
    (federation.folder / "secret").write_text(SECRET + "\n")
    (federation.folder / "other").write_text("a guess\n")
    right = ["--secret-file", federation.folder / "secret"]
    server = federation.server("--rounds", 1, *right)
    server.says("waiting for 3 clients")
    missing, wrong = federation.tiny(), federation.tiny("--secret-file", federation.folder / "other")
    assert "refused: missing shared secret; start the client with the --secret-file" in missing.ends(1)
    assert "refused: wrong shared secret; start the client with the --secret-file" in wrong.ends(1)
    clients = [federation.tiny(*right), federation.tiny(*right)]
    clients.append(federation.tiny(env={**CLEAN, "FEDERATION_SECRET": SECRET}))
    finish(server, *clients)
    said = "".join(process.output for process in federation.processes)
    written = b"".join(path.read_bytes() for path in federation.run_dir.iterdir())
    assert SECRET not in said
    assert SECRET.encode() not in written


def test_who_does_not_prove_the_secret_hears_nothing_of_the_run(federation):
    server = federation.server(env={**CLEAN, "FEDERATION_SECRET": SECRET})
    server.says("waiting for 3 clients")
    nonces = []
    with closing(open_channel(federation.address)) as channel:
        for claim in ("", "0" * 64):
            connection = RawConnection(channel)
            challenge = words_of(connection.hear())
            assert set(challenge) == {"ask", "nonce", "protocol", "salt"}
            nonces.append(challenge["nonce"])
            connection.say(hello(proof=claim))
            reason = words_of(connection.hear())
            assert set(reason) == {"ask", "kind", "words", "code"}
            assert (reason["ask"], reason["kind"]) == ("told", "refused")
            connection.say(properties())
            assert connection.hear().WhichOneof("msg") == "reconnect_ins"
            connection.hear_the_end()
            assert len(connection.heard) == 3
    assert nonces[0] != nonces[1], "a challenge came twice: an old proof would do"


def test_other_class_names_are_refused_with_both_lists(federation):
    server = federation.server("--rounds", 1)
    clients = [federation.tiny() for _ in range(2)]
    server.says("2 of 3 there")
    farmer = federation.tiny("--classes", "cow,dog,\x1b[2Jpig")
    line = "its classes [cow, dog, [2Jpig] are not the federation's [cat, dog]"
    assert f"refused: {line}" in farmer.ends(1)
    finish(server, *clients, federation.tiny())
    assert f"turned away: {line}" in server.output


def test_a_silent_connection_is_dropped_after_ten_seconds_even_if_it_does_not_listen(federation):
    server = federation.server()
    server.says("waiting for 3 clients")
    with closing(open_channel(federation.address)) as channel, closing(Http2(federation.address)) as deaf:
        began = time.monotonic()
        deaf.open_streams(1)
        RawConnection(channel).hear_the_end()
        assert 9 < time.monotonic() - began < 20
        wait_for(
            lambda: server.output.count("turned away: a connection that said nothing for 10 s") == 2, "both turned away"
        )


def test_a_thousand_silent_connections_do_not_keep_clients_out(federation):
    server = federation.server("--rounds", 2)
    server.says("waiting for 3 clients")
    host, port = federation.address.split(":")
    with ExitStack() as open_ones:
        for _ in range(1000):
            open_ones.enter_context(closing(socket.create_connection((host, int(port)))))
        for _ in range(10):
            deaf = open_ones.enter_context(closing(Http2(federation.address)))
            deaf.open_streams(100)
        clients = [federation.tiny() for _ in range(3)]
        finish(server, *clients)
    assert clients_by_round(federation) == [3, 3, 3]
    assert len(server.output.splitlines()) < 30, "unverified connections fill the operator's terminal"


def test_a_client_that_finds_too_many_connections_keeps_asking(federation):
    full = grpc.server(ThreadPoolExecutor(1), maximum_concurrent_rpcs=0)  # as Flower's server beyond 1,000
    add_FlowerServiceServicer_to_server(FlowerServiceServicer(), full)
    full.add_insecure_port(federation.address)
    full.start()
    client = federation.tiny("--wait", 60)
    client.says(f"the server at {federation.address} has too many connections; asking again for 60 s")
    full.stop(None).wait()
    finish(federation.server("--rounds", 1, "--clients", 1), client)


def test_an_oversized_message_costs_the_sender_its_place_and_nobody_else_anything(federation):
    server = federation.server("--rounds", 3, "--max-message-mb", 1, "--rejoin-wait", 0)
    server.says("waiting for 3 clients")  # else a client may say first that no server is there
    clients = [federation.tiny("--partition-id", i, "--seconds", 1) for i in (0, 2)]  # else the server is gone first
    huge = federation.tiny("--partition-id", 1, "--behave", "huge", "--in-round", 2)
    said = huge.ends(1).splitlines()
    assert [line for line in said if line.startswith("fit")] == ["fit 1", "fit 2"]
    assert "a message is larger than the server takes" in said[-1]
    assert said[-1].endswith("raise the server's --max-message-mb")
    finish(server, *clients)
    assert clients_by_round(federation) == [3, 3, 2, 2]
    assert "client 1 left; its place is free" in server.output


@pytest.mark.parametrize("guards", [[], ["secret"], ["tls"]])
def test_beyond_loopback_the_server_wants_tls_and_secret_or_insecure(monkeypatch, capsys, guards):
    monkeypatch.delenv("FEDERATION_SECRET", raising=False)
    flags = {
        "secret": ["--secret-file", "s"],
        "tls": ["--certificate", "c", "--private-key", "k", "--ca-certificate", "a"],
    }
    given = ["--address", "0.0.0.0:8080", *(flag for guard in guards for flag in flags[guard])]
    with pytest.raises(SystemExit) as end:
        parse_args("", given)
    assert end.value.code == 2
    assert "is open to other machines; give --members or --secret-file, and TLS" in capsys.readouterr().err
    assert parse_args("", [*given, "--insecure"]).insecure
    assert parse_args("", ["--address", "0.0.0.0:8080", *flags["secret"], *flags["tls"]])
    assert parse_args("", ["--address", "[::1]:8080"])


# With made-up clients


@pytest.fixture
def fake() -> FakeAdmission:
    return FakeAdmission()


def test_places_go_by_lowest_number_unless_one_is_wanted_or_was_held(fake):
    assert [fake.joins().partition for _ in range(2)] == [0, 1]
    assert fake.joins(wanted=2).partition == 2
    other = FakeAdmission(5)
    assert [other.joins(held=held).partition for held in (3, 3, 99, -7)] == [3, 0, 1, 2]


def test_a_wanted_place_that_is_taken_or_not_there_is_refused_with_exit_code_2(fake):
    fake.joins(wanted=1)
    for wanted, words in ((1, "is taken"), (3, "is not there: this run has partitions 0 to 2")):
        client = fake.joins(wanted=wanted)
        assert client.told["code"] == 2
        assert words in client.told["words"]


def test_a_client_takes_over_its_own_broken_connection(fake):
    first = fake.joins(instance="a" * 32)
    again = fake.joins(instance="a" * 32)
    assert first.closed.is_set()
    assert again.partition == first.partition == 0
    assert fake.admission.num_available() == 1
    fake.admission.unregister(first)  # Flower notices late that the old stream has ended
    assert fake.admitted(again)


def test_the_waiting_list_keeps_its_order(fake):
    first = [fake.joins() for _ in range(3)]
    for number in (1, 2):
        client = fake.joins(instance=f"{number}" * 32)
        assert client.told["words"].endswith(f"you are number {number} on the waiting list")
        assert client.told["kind"] == "wait"
        assert client.reconnect_in == 3
    fake.admission.unregister(first[1])
    assert fake.joins(instance="2" * 32).told["kind"] == "wait", "it jumped the queue"
    assert fake.joins(instance="1" * 32).partition == 1


@pytest.mark.slow
def test_who_stops_asking_loses_its_turn(fake, monkeypatch):
    monkeypatch.setattr(admission, "RETRY_SECONDS", 0.1)
    first = [fake.joins() for _ in range(3)]
    assert fake.joins().told["kind"] == "wait"
    fake.admission.unregister(first[0])
    patient = "b" * 32
    wait_for(lambda: fake.admitted(fake.joins(instance=patient)), "a turn for who goes on asking", 10)


def test_a_lone_client_with_other_classes_that_comes_first_shuts_nobody_out(fake):
    odd = fake.joins(classes='["cow", "dog"]')
    for _ in range(2):
        assert fake.admitted(fake.joins())
    assert fake.admission.agree_on_classes() == [fake.admission.of_client(odd)]
    assert fake.admission.classes == ["cat", "dog"]


def test_classes_that_more_than_half_have_shut_others_out_at_once(fake):
    for _ in range(2):
        fake.joins()
    words = fake.joins(classes='["cow", "dog"]').told["words"]
    assert words == "its classes [cow, dog] are not the federation's [cat, dog]"


def test_classes_that_the_server_was_given_are_the_federations():
    fake = FakeAdmission(classes=["cat", "dog"])
    assert fake.joins(classes='["cow", "dog"]').told["kind"] == "refused"
    assert fake.admitted(fake.joins())


def test_with_data_of_their_own_the_classes_are_all_that_any_client_has():
    fake = FakeAdmission(recipe=Recipe(partitioner="local"))
    clients = [fake.joins(classes=json.dumps(names)) for names in (["dog", "ship"], ["cat", "dog"], ["cat"])]
    odd = fake.admission.agree_on_classes()
    assert fake.admission.classes == ["cat", "dog", "ship"]
    assert [one.partition for one in odd] == [0, 1, 2]
    for one in odd:
        fake.admission.reassign(one)
    wait_for(lambda: fake.admission.num_available() == 3, "all three again", 5)
    assert [client.assigned["classes"] for client in clients] == ['["cat", "dog", "ship"]'] * 3
    assert fake.admission.agree_on_classes() == []
    assert fake.joins(classes='["cat", "owl"]').told["kind"] == "refused"


def test_the_assignment_names_the_run(fake):
    fake.admission.run_id = "0123456789abcdef"
    assert fake.joins().assigned["run"] == "0123456789abcdef"


def test_equal_classes_keep_their_order_and_nobody_is_asked_twice(fake):
    clients = [fake.joins(classes='["dog", "cat"]') for _ in range(3)]
    assert fake.admission.agree_on_classes() == []
    assert fake.admission.classes == ["dog", "cat"]
    assert not any("classes" in client.assigned for client in clients)


@pytest.mark.parametrize("name", ["cafe\u0301", "caf\u00e9"])
def test_a_class_is_the_same_however_its_letters_are_composed(name):
    fake = FakeAdmission(classes=["caf\u00e9", "dog"])
    assert fake.admitted(fake.joins(classes=json.dumps([name, "dog"])))


def test_from_the_first_round_on_classes_and_buffers_are_fixed(fake):
    fake.admission.begin(["cat", "dog"], DataSummary(0, 0, [2], [], [], 0))
    assert fake.joins(classes='["cow"]').told["kind"] == "refused"
    assert "measures other arrays" in fake.joins(summary={"statistics": "[0, 1, 2]"}).told["words"]
    assert fake.admission.buffer_positions == [2]
    assert fake.admitted(fake.joins())


def test_a_task_without_classes_has_none_at_any_client(fake):
    fake.joins(classes="[]")
    fake.joins(classes="[]")
    assert fake.joins().told["words"] == "its classes [cat, dog] are not the federation's []"
    assert fake.admitted(fake.joins(classes="[]"))
    assert fake.admission.agree_on_classes() == []
    assert fake.admission.classes == []


def test_long_lists_of_classes_are_cut_but_the_odd_one_is_named(fake):
    names = [f"a species of beetle, the {i}th" for i in range(200)]
    for _ in range(2):
        fake.joins(classes=json.dumps(names))
    words = fake.joins(classes=json.dumps([*names[:150], "a moth"])).told["words"]
    assert len(words) <= 300
    assert "in one only: a moth, a species of beetle, the 150th" in words


SENSELESS_HELLOS = [
    {"classes": "not json"},
    {"classes": "[" * 100_000},
    {"classes": '["cat", 7]'},
    {"classes": '{"cat": 1}'},
    {"classes": json.dumps(["x" * 2000])},
    {"classes": json.dumps(["x"] * 10_001)},
    {"classes": json.dumps(["x" * 900] * 5000)},
    {"classes": b"[]"},
    {"instance": ""},
    {"instance": "x" * 65},
    {"instance": 7},
    {"wanted": "0"},
    {"wanted": 1.5},
    {"held": True},
    {"host": "x" * 65},
    {"protocol": "\x1b[2J"},
    {"protocol": 2**62},
]


@pytest.mark.parametrize("change", SENSELESS_HELLOS, ids=lambda change: f"{str(change)[:30]}")
def test_a_senseless_hello_gets_no_place(fake, change):
    assert not fake.admitted(fake.joins(**change))
    assert not fake.admission.participants
    assert len(fake.said) == 1
    assert fake.said[0].startswith("turned away: ")
    assert fake.said[0].isprintable()
    assert len(fake.said[0]) < 200
    assert fake.admitted(fake.joins())


SENSELESS_ANSWERS = [
    {"train_examples": 0},
    {"test_examples": -1},
    {"train_examples": "100"},
    {"train_examples": float("nan")},
    {"statistics": "[0.5]"},
    {"statistics": "null"},
    {"statistics": 2},
    {"error": "no disk \x1b[31m\n\n" + 10_000 * "!"},
]


@pytest.mark.parametrize("change", SENSELESS_ANSWERS, ids=lambda change: f"{str(change)[:30]}")
def test_a_senseless_answer_to_the_place_frees_it_again(fake, change):
    assert not fake.admitted(fake.joins(summary=change))
    assert not fake.admission.participants
    assert fake.said[0].startswith("turned away: ")
    assert fake.said[0].isprintable()
    assert len(fake.said[0]) < 400


def test_a_flood_of_refusals_does_not_fill_the_terminal_whatever_its_words(fake):
    for _ in range(2):
        fake.joins()
    for i in range(110):
        fake.joins(classes=f'["{i}"]')
    assert len(fake.said) == 2 + 5
    assert fake.said[-1] == "turned away: its classes [99] are not the federation's [cat, dog] (100 times)"


def test_of_the_unverified_connections_only_some_stay(fake):
    class Silent(FakeClient):
        def get_properties(self, ins, timeout, group_id):
            self.closed.wait()
            raise admission.GrpcBridgeClosed

    silent = [Silent() for _ in range(MOST_UNVERIFIED + 40)]
    for client in silent:
        fake.admission.register(client)
    assert sum(client.closed.is_set() for client in silent) == 40
    assert [fake.joins().partition for _ in range(3)] == [0, 1, 2]
    for client in silent:
        client.close()


def test_as_many_unverified_connections_stay_as_there_are_places():
    class Silent(FakeClient):
        def get_properties(self, ins, timeout, group_id):
            self.closed.wait()
            raise admission.GrpcBridgeClosed

    places = MOST_UNVERIFIED + 36
    large = admission.Admission(places, Recipe(), lambda *words: None)
    silent = [Silent() for _ in range(places + 5)]
    for client in silent:
        large.register(client)
    assert sum(client.closed.is_set() for client in silent) == 5
    for client in silent:
        client.close()


def test_after_the_end_nobody_is_admitted(fake):
    client = fake.joins()
    fake.admission.close("finished", "the run is done after 3 rounds")
    assert client.told["kind"] == "finished"
    assert client.closed.is_set()
    assert not fake.admission.register(FakeClient())

"""A client that stays for the next run: what it says, when it comes back, and what alone ends it."""

import weakref
from types import SimpleNamespace

from federation.client import connection, staying
from federation.client import policy as policy_module
from federation.client.policy import Policy
from federation.client.session import RunEnded, Session
from federation.client.staying import stay
from federation.config import Recipe

import grpc
import pytest
from helpers.processes import Federation
from helpers.scripted_server import (
    ADDRESS,
    AWAY,
    CUT,
    FINISHED,
    Broken,
    Client,
    Server,
    evaluate,
    fit,
    hello,
    properties,
    reconnect,
    told,
)

ONE, TWO = "1" * 16, "2" * 16
AWAY_LINE = "no server at 127.0.0.1:8080; asking again, in the end once a minute"
WAITING = "waiting for the next run at 127.0.0.1:8080"


class Enough(BaseException):
    """The test has seen what it wanted."""


class DataError(Exception):
    public = "its data can't be read"


def place(run: str, partition: int = 1, **recipe: object):
    recipe_json = Recipe(**recipe).to_json()
    return properties(ask="place", partition=partition, num_partitions=3, recipe=recipe_json, run=run)


def run(number: str, *, end: list = FINISHED, first: int = 1) -> list:
    return [hello(), place(number), evaluate(0), fit(first), evaluate(first), *end]


@pytest.fixture
def take_part(monkeypatch, capsys):
    """Stay for these streams of a server, and then for `more` attempts without one; what is said, and all sessions."""
    monkeypatch.setattr(staying.random, "uniform", lambda low, high: high)

    def play(*streams: list, more: int = 0, client=Client, fatal=(), policy=lambda: Policy(), finished=None, keep=True):
        server = Server(monkeypatch, *streams)
        if keep:  # nothing is let go, and to look for it among all objects of the tests takes a while
            monkeypatch.setattr(staying, "gc", SimpleNamespace(collect=lambda: 0))
        sessions: list[Session] = []

        def new_session(left_run: str) -> Session:
            session = Session(client, ["cat", "dog"], left_run=left_run)
            if keep:
                sessions.append(session)
            return session

        attempts = len(streams) + more

        def read_again(session: Session) -> None:
            nonlocal attempts
            if not attempts:
                raise Enough
            attempts -= 1
            session.policy = policy()

        score = finished or (lambda session: f"accuracy {session.metrics['accuracy']}")
        with pytest.raises(Enough):
            stay(new_session, read_again, score, ADDRESS, fatal=fatal)
        return capsys.readouterr().out.splitlines(), sessions, server

    return play


def ours(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("round ")]


# One run after the other


def test_two_runs_one_after_the_other_are_a_line_each_and_a_line_for_the_waiting(take_part):
    lines, sessions, _ = take_part(run(ONE), [AWAY], [AWAY], run(TWO))
    assert ours(lines) == [
        f"run {ONE}: the run is done after 3 rounds; accuracy 0.5",
        WAITING,
        f"run {TWO}: the run is done after 3 rounds; accuracy 0.5",
        WAITING,
    ]
    assert [each.run_id for each in sessions] == [ONE, TWO, ""]


def test_a_server_that_is_not_there_at_the_start_is_said_once(take_part):
    lines, _, _ = take_part(more=30)
    assert lines == [AWAY_LINE]


def test_it_asks_ever_less_often_but_once_a_minute_and_after_a_run_often_again(take_part):
    _, _, server = take_part(*[[AWAY]] * 9, run(ONE), more=3)
    pauses = [seconds for seconds in server.slept if seconds]  # 0 is of the stream's own end
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 1, 2, 4, 8]


def test_those_who_lost_the_same_server_do_not_all_come_back_in_the_same_moment(monkeypatch, take_part):
    spread = []
    monkeypatch.setattr(staying.random, "uniform", lambda *ends: spread.append(ends) or 0.5)
    _, _, server = take_part(more=3)
    assert server.slept == [0.5, 1, 2]
    assert set(spread) == {(0.5, 1)}


def test_what_a_run_needed_is_let_go_when_it_is_over(take_part):
    clients = []

    def remembered(assignment):
        client = Client(assignment)
        client.itself = client  # as an exception holds the frame that holds it
        clients.append(weakref.ref(client))
        return client

    alive = []

    def finished(session: Session) -> str:
        alive.append(sum(one() is not None for one in clients))
        return "done"

    runs = [run(f"{number:016x}") for number in range(5)]
    take_part(*runs, client=remembered, finished=finished, keep=False)
    assert alive == [1] * 5


def test_a_final_model_is_kept_only_where_there_is_one(take_part):
    lines, _, _ = take_part([hello(), *FINISHED], [hello(), place(ONE), *FINISHED])
    assert lines == [
        "the run is done after 3 rounds; asking again, in the end once a minute",
        f"run {ONE}: the run is done after 3 rounds",
        WAITING,
    ]


# A run that ends otherwise


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ([CUT], "the server at 127.0.0.1:8080 ended the connection"),
        ([AWAY], "no server at 127.0.0.1:8080"),
        ([told("stopped", "the server was stopped by SIGINT after round 1"), reconnect()], None),
        (
            [told("failed", "1 of 3 clients left after round 1"), reconnect()],
            "failed: 1 of 3 clients left after round 1",
        ),
    ],
)
def test_a_run_that_may_be_resumed_is_gone_on_with_in_the_same_place(take_part, end, words):
    begun = [hello(), place(ONE), evaluate(0), fit(1), *end]
    lines, sessions, server = take_part(begun, [AWAY], run(ONE, first=2))
    assert ours(lines) == [
        f"run {ONE}: {words or 'the server was stopped by SIGINT after round 1'}",
        WAITING,
        "back in place 1",
        f"run {ONE}: the run is done after 3 rounds; accuracy 0.5",
        WAITING,
    ]
    assert len(sessions) == 2, "the second is for the run after it"
    answered = len([said for said in begun if not isinstance(said, Exception)])
    assert server.properties(answered)["held"] == 1


def test_in_place_of_the_run_that_it_waits_for_another_may_come(take_part):
    lines, _, _ = take_part([hello(), place(ONE), fit(1), CUT], run(TWO))
    assert [line for line in lines if line.startswith("run ")] == [
        f"run {ONE}: the server at 127.0.0.1:8080 ended the connection",
        f"run {TWO}: the run is done after 3 rounds; accuracy 0.5",
    ]


DROPPED = [told("dropped", "it failed"), reconnect()]


class Failing(Client):
    def fit(self, parameters, config):
        raise RuntimeError("out of memory")


def test_a_run_in_which_it_failed_or_was_dropped_is_left_for_good_and_the_next_one_joined(take_part):
    back = [hello(), place(ONE), told("refused", "client 1 could not start: it has left this run"), reconnect()]
    lines, sessions, server = take_part(
        [hello(), place(ONE), fit(1), *DROPPED], back, back, run(TWO, end=DROPPED), client=Failing
    )
    left = "it has left this run, and waits for the next; asking again, in the end once a minute"
    assert ours(lines) == [
        f"run {ONE}: RuntimeError: out of memory",
        WAITING,
        left,
        f"run {TWO}: RuntimeError: out of memory",
        WAITING,
    ]
    assert server.properties(6) == {"error": "it has left this run, and waits for the next"}
    assert [each.left_run for each in sessions] == ["", ONE, ONE, ONE, TWO]


def test_the_run_that_dropped_it_is_not_come_back_to(take_part):
    _, sessions, _ = take_part([hello(), place(ONE), told("dropped", "it is no member any more"), reconnect()])
    assert [each.left_run for each in sessions] == ["", ONE]


def refused(words: str, code: int = 1) -> list:
    return [hello(), told("refused", words, code), reconnect()]


def test_a_refusal_is_said_once_and_again_when_it_is_another_and_never_ends_it(take_part):
    secret, taken = "wrong shared secret; start the client with …", "--partition-id 7 is not there"
    lines, _, _ = take_part(
        *[refused(secret)] * 5, [AWAY], refused(secret), *[refused(taken, code=2)] * 3, run(ONE), more=4
    )
    assert ours(lines) == [
        f"refused: {secret}; asking again, in the end once a minute",
        f"refused: {taken}; asking again, in the end once a minute",
        f"run {ONE}: the run is done after 3 rounds; accuracy 0.5",
        WAITING,
    ]


@pytest.mark.parametrize(
    ("stream", "line"),
    [
        ([properties(ask="nonsense")], "KeyError: 'nonsense'"),
        ([hello(), ("nonsense", None)], "ValueError: "),
        (
            [Broken(grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT: larger than max")],
            "a message is larger than the server",
        ),
    ],
)
def test_nothing_that_the_other_side_says_ends_it(take_part, stream, line):
    lines, _, _ = take_part(stream, stream, run(ONE))
    assert lines[0].startswith(line)
    assert lines[-2] == f"run {ONE}: the run is done after 3 rounds; accuracy 0.5"


def test_tls_that_does_not_fit_is_said_once_as_the_server_may_get_another_certificate(monkeypatch, take_part):
    monkeypatch.setattr(Server, "mismatch", "the server's certificate has expired", raising=False)
    make = Server.__init__

    def with_mismatch(self, *rest):
        make(self, *rest)
        monkeypatch.setattr(connection, "tls_mismatch", lambda *_: self.mismatch)

    monkeypatch.setattr(Server, "__init__", with_mismatch)
    lines, _, _ = take_part(more=5)
    assert lines == ["the server's certificate has expired; asking again, in the end once a minute"]


# What ends it


def test_its_own_data_that_can_not_be_read_ends_it(take_part, capsys):
    def broken(assignment):
        raise DataError("/data/scans can't be read")

    stream = [hello(), place(ONE), told("refused", "client 1 could not start: its data can't be read"), reconnect()]
    with pytest.raises(RunEnded, match="/data/scans can't be read"):
        take_part(stream, client=broken, fatal=(DataError,))


def test_its_own_policy_that_can_not_be_read_any_more_ends_it_before_the_next_run(take_part, tmp_path, capsys):
    path = tmp_path / "policy.toml"
    path.write_text("max_rounds = 10")

    def read() -> Policy:
        policy = Policy.load(str(path))
        path.write_text("max_rounds = ten")
        return policy

    with pytest.raises(SystemExit) as end:
        take_part(run(ONE), run(TWO), policy=read)
    assert end.value.code == 2
    assert f"run {ONE}: the run is done" in (said := capsys.readouterr()).out
    assert f"--policy {path}: Invalid value" in said.err


# The policy


def test_a_run_against_the_policy_is_said_once_and_joined_once_the_file_allows_it(take_part):
    policies = iter([Policy(max_rounds=2)] * 3 + [Policy(max_rounds=3)] * 2)
    no = [hello(), place(ONE, rounds=3), told("refused", "client 1 could not start: …"), reconnect()]
    lines, _, _ = take_part(no, no, no, run(ONE), policy=lambda: next(policies))
    assert ours(lines) == [
        "its policy allows at most 2 rounds, and this run has 3 (max_rounds); asking again, in the end once a minute",
        f"run {ONE}: the run is done after 3 rounds; accuracy 0.5",
        WAITING,
    ]


def test_outside_its_hours_it_does_not_even_ask_and_goes_on_with_the_run_in_the_next_ones(take_part, monkeypatch):
    clock = ["05:59"]
    monkeypatch.setattr(policy_module, "_now", lambda: policy_module.time.fromisoformat(clock[0]))
    policy = Policy.from_dict({"hours": ["20:00-06:00"]})

    def morning():
        clock[0] = "06:00"
        return fit(2)

    def until_then():
        """Ten attempts after the hours' end they begin again."""
        attempts.append(1)
        if len(attempts) == 11:
            clock[0] = "20:00"
        return policy

    attempts: list[int] = []
    night = [hello(), place(ONE), fit(1), lambda: as_message(morning()), *DROPPED]
    lines, sessions, server = take_part(night, run(ONE, first=2), more=9, policy=until_then)
    assert len(server.opened) == 2
    assert ours(lines) == [
        f"run {ONE}: it works at 20:00-06:00 only, and now it is 06:00 (hours)",
        WAITING,
        "back in place 1",
        f"run {ONE}: the run is done after 3 rounds; accuracy 0.5",
        WAITING,
    ]
    assert len(sessions) == 2


def as_message(said):
    from flwr.compat.client.grpc_client import connection as flowers

    kind, content = said
    metadata = flowers.Metadata(0, "id", 0, 0, "", "", 0.0, 60.0, kind)
    return flowers.make_message(metadata=metadata, content=content)


# Processes


def test_one_client_is_there_for_two_runs_and_for_the_first_again_after_its_server_was_killed(tmp_path):
    killed = tmp_path / "killed"
    with Federation(tmp_path) as federation:
        server = federation.server("--clients", 1, "--rounds", 3)
        client = federation.tiny("--stay", "--in-round", 2, "--until", killed)
        client.says("fit 2")
        server.end()
        killed.touch()
        federation.server("--resume", federation.run_dir).ends(0)
        first = federation.history()
        client.says(f"run {first['config']['run_id']}: the run is done after 3 rounds; accuracy 0.5\n{WAITING[:-14]}")
        federation.run_dir = tmp_path / "second"
        federation.server("--clients", 1, "--rounds", 1).ends(0)
        second = federation.history()["config"]["run_id"]
        client.says(f"run {second}: the run is done after 1 rounds; accuracy 0.5")
        assert client.popen.poll() is None
    assert [each["round"] for each in first["rounds"]] == [0, 1, 2, 3]
    assert [line.partition(":")[0] for line in client.output.splitlines() if line.startswith("run ")] == [
        f"run {run}" for run in (first["config"]["run_id"], first["config"]["run_id"], second)
    ]

"""A hospital's policy: what it takes part in, whatever the server says; and a client that stays for run after run."""

from datetime import datetime
from types import SimpleNamespace

from federation.client import participation
from federation.client.policy import Policy
from federation.client.session import RunEnded, Session
from federation.config import Recipe
from federation.console import PublicError
from federation.protocol import Assignment

import pytest


def load(folder, text: str) -> Policy:
    (folder / "policy.toml").write_text(text)
    return Policy.load(str(folder / "policy.toml"))


def test_without_a_file_everything_is_allowed():
    Policy.load(None).check(Assignment(0, 1, Recipe(rounds=1000)))
    Policy.load(None).check_round(1000)


def test_every_key_is_read(tmp_path):
    text = """
        tasks = ["cifar10"]
        models = ["cnn", "lenet"]
        max_rounds = 20
        max_local_epochs = 5
        min_participants = 3
        require_secure_aggregation = true
        require_private_training = true
        send_class_counts = false
        hours = "20:00-06:00"
    """
    expected = Policy(["cifar10"], ["cnn", "lenet"], 20, 5, 3, True, True, False, "20:00-06:00")
    assert load(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds = 3", "rounds is no key of a policy; there are tasks, models, max_rounds, max_local_epochs, "),
        ("max_rounds = 0", "max_rounds must be a whole number from 1 on, got 0"),
        ("max_rounds = true", "max_rounds must be a whole number from 1 on, got True"),
        ("max_local_epochs = 1.5", "max_local_epochs must be a whole number from 1 on, got 1.5"),
        ('models = "cnn"', "models must be a list of names, such as [\"cnn\"], got 'cnn'"),
        ("tasks = []", 'tasks must be a list of names, such as ["cnn"], got []'),
        ("send_class_counts = 0", "send_class_counts must be true or false, got 0"),
        ('hours = "25:00-06:00"', "hours must be like \"20:00-06:00\", got '25:00-06:00'"),
        ("hours = 8", 'hours must be like "20:00-06:00", got 8'),
        ("max_rounds =", "Invalid value (at end of document)"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(text, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        load(tmp_path, text)
    assert end.value.code == 2
    line = capsys.readouterr().err.partition("error: ")[2]
    assert line.startswith(f"--policy {tmp_path}/policy.toml: {words}")
    assert line.count("\n") == 1


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        Policy.load(f"{tmp_path}/none")
    assert capsys.readouterr().err.endswith(f"--policy {tmp_path}/none can't be read (No such file or directory)\n")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy(max_rounds=2), "its policy asks for at most 2 rounds, and this is 3"),
        (Policy(max_local_epochs=1), "its policy asks for at most 1 local epochs, and this is 2"),
        (Policy(min_participants=4), "its policy asks for at least 4 participants, and this is 3"),
        (Policy(require_secure_aggregation=True), "its policy asks for secure aggregation, and this is none"),
        (Policy(require_private_training=True), "its policy asks for private training, and this is none"),
    ],
)
def test_a_run_that_is_against_it_is_refused_in_words_that_the_server_gets(policy, words):
    with pytest.raises(PublicError) as refusal:
        policy.check(Assignment(0, 3, Recipe(rounds=3, local_epochs=2)))
    assert refusal.value.public == words


def test_a_run_just_within_it_is_taken_part_in():
    Policy(max_rounds=3, max_local_epochs=2, min_participants=3).check(Assignment(0, 3, Recipe(local_epochs=2)))


def test_task_and_model_must_be_named_where_any_are():
    policy = Policy(tasks=["xray"], models=["cnn", "lenet"])
    policy.check_task("xray", "lenet")
    with pytest.raises(PublicError, match="asks for task xray, and this is cifar10"):
        policy.check_task("cifar10", "lenet")
    with pytest.raises(PublicError, match="asks for model cnn or lenet, and this is big"):
        policy.check_task("xray", "big")


@pytest.mark.parametrize(
    ("hours", "clock", "allowed"),
    [
        ("08:00-18:00", "08:00", True),
        ("08:00-18:00", "17:59", True),
        ("08:00-18:00", "18:00", False),
        ("20:00-06:00", "23:00", True),
        ("20:00-06:00", "05:59", True),
        ("20:00-06:00", "06:00", False),
        ("20:00-06:00", "12:00", False),
    ],
)
def test_hours_are_those_of_this_machines_clock_over_midnight_too(hours, clock, allowed):
    now = lambda: datetime.fromisoformat(f"2026-11-25T{clock}:00")  # noqa: E731
    if allowed:
        return Policy(hours=hours).check_round(1, now)
    with pytest.raises(PublicError, match=f"asks for work at {hours} only, and this is {clock}"):
        Policy(hours=hours).check_round(1, now)


# In a session


class Client:
    num_train, num_test, buffer_positions, class_counts = 3, 2, (), (1, 2)
    task, recipe = SimpleNamespace(name="cifar10"), SimpleNamespace(model="cnn")

    def get_parameters(self, config):
        return []

    def fit(self, parameters, config):
        return [], 3, {"train_loss": 1.0}


def assigned(policy: Policy) -> tuple[Session, dict]:
    session = Session(lambda assignment: Client(), ["cat"], policy=policy)
    session.get_properties({"ask": "hello", "nonce": "n"})
    place = {"ask": "place", "partition": 0, "num_partitions": 3, "recipe": Recipe(rounds=3).to_json()}
    return session, session.get_properties(place)


def test_a_refused_run_opens_no_data(capsys):
    session, told = assigned(Policy(max_rounds=2))
    assert told == {"error": "its policy asks for at most 2 rounds, and this is 3"}
    assert session.client is None
    assert session.failure == told["error"]


def test_class_counts_stay_at_home_where_the_policy_says_so(capsys):
    assert assigned(Policy())[1]["class_counts"] == "[1, 2]"
    assert assigned(Policy(send_class_counts=False))[1]["class_counts"] == "[]"


def test_a_server_that_goes_on_beyond_the_rounds_it_announced_gets_no_training(capsys):
    session, _ = assigned(Policy(max_rounds=3))
    config = {"clients_on_host": 1, "server_round": 4}
    assert session.fit([], config) == ([], 0, {"error": "its policy asks for at most 3 rounds, and this is 4"})
    assert session.fit([], {**config, "server_round": 3})[1] == 3


# Run after run


class Stopped(Exception):
    pass


def stay(monkeypatch, *ends: Exception | str) -> list[float]:
    """A client that stays while its runs end so, and how long it waited after each."""
    slept: list[float] = []
    monkeypatch.setattr(participation, "time", SimpleNamespace(sleep=slept.append))
    runs = iter([*ends, Stopped()])

    def one_run(wait: float) -> SimpleNamespace:
        end = next(runs)
        if isinstance(end, Exception):
            raise end
        return SimpleNamespace(assignment=SimpleNamespace(run_id=end))

    with pytest.raises((Stopped, RunEnded)):
        participation.stay(one_run)
    return slept


def test_a_staying_client_takes_part_in_run_after_run_and_says_a_line_for_each(monkeypatch, capsys):
    assert stay(monkeypatch, "a" * 16, RunEnded("failed: too few clients"), "b" * 16) == [1, 1, 1]
    assert capsys.readouterr().out.splitlines() == [
        "run aaaaaaaaaaaaaaaa is done; waiting for the next",
        "failed: too few clients; waiting for the next run",
        "run bbbbbbbbbbbbbbbb is done; waiting for the next",
    ]


def test_the_same_refusal_again_and_again_is_said_once_and_asked_ever_less_often(monkeypatch, capsys):
    slept = stay(monkeypatch, *[RunEnded("refused: wrong shared secret")] * 15)
    assert slept[:3] == [1, 1.5, 2.25]
    assert slept[-1] == 60
    assert capsys.readouterr().out == "refused: wrong shared secret; waiting for the next run\n"


def test_wrong_use_ends_it_as_no_waiting_helps(monkeypatch):
    assert stay(monkeypatch, RunEnded("refused: --partition-id 7 is not there", 2)) == []


def test_each_runs_model_has_a_file_of_its_own():
    session = SimpleNamespace(assignment=SimpleNamespace(run_id="0123456789abcdef"))
    assert participation.named_by_run("out/model.safetensors", session) == "out/model-0123456789abcdef.safetensors"
    assert participation.named_by_run(None, session) is None

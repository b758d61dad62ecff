"""The asynchronous mode on a clock of our own: what comes when can be worked out by hand, and takes no time."""

import json
import math
from dataclasses import replace

from federation.aggregation.fedbuff import TrainingJob, replay
from federation.aggregation.validation import Update
from federation.results.history import VersionRecord, read_record
from federation.results.observers import Observers

import numpy as np
import pytest
from helpers.in_process import (
    BUFFERS,
    START,
    Clock,
    Learner,
    federation,
    lost,
    no_disk,  # noqa: F401 (used by every test)
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A server with these clients, and its clock. Here no update waits for others, unless a test says so."""

    def server(*learners, **values):
        usual = {"mode": "async", "rounds": 2, "patience": 0.0, "buffer_size": 2, "round_timeout": 600.0}
        made = federation(tmp_path, list(learners), **{**usual, **values})
        return made, Clock(made, monkeypatch)

    return server


def came(server) -> list[list[tuple[int, int, int]]]:
    """Of each version the updates as they came: partition, number of its training, staleness."""
    versions = [record.updates for record in server.history.rounds]
    return [[(each["partition"], each["number"], each["staleness"]) for each in updates] for updates in versions]


def reasons(server) -> list[tuple[int, int, str]]:
    return [(row["round"], row["partition"], row["reason"]) for row in server.history.rejected]


def two_fast_and_one_slow() -> list[Learner]:
    """Seconds 1 and 2: clients 0 and 1 make a version each. At 2.5 client 2 is back, two versions late, with the
    fifth of six updates; at 3 client 0 brings the sixth, and what client 1 brings in that moment is one too many."""
    return [Learner(1), Learner(1), Learner(1, seconds=2.5)]


# Versions


def test_whoever_is_free_trains_and_a_full_buffer_is_a_version(make):
    server, clock = make(*two_fast_and_one_slow())
    server.federate()
    assert server.exit_code == 0
    assert came(server) == [[], [(0, 1, 0), (1, 1, 0)], [(0, 2, 0), (1, 2, 0)], [(2, 1, 2), (0, 3, 0)]]
    assert [record.time for record in server.history.rounds] == [0, 1, 2, 3]
    assert [record.clients for record in server.history.rounds] == [0, 2, 2, 2]
    assert [record.rounds_worth for record in server.history.rounds] == [0, 2 / 3, 4 / 3, 2]
    # Each moved its own start by 1; what is two versions late counts 1 / sqrt(1 + 2).
    assert server.weights[0] == pytest.approx(1 + 1 + (1 + 1 / math.sqrt(3)) / 2)
    assert clock.now == pytest.approx(3, abs=0.01)


def test_every_version_is_evaluated_by_those_that_are_free_and_the_last_by_all(make):
    learners = two_fast_and_one_slow()
    server, _ = make(*learners)
    server.federate()
    assert [learner.evaluated for learner in learners] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3]]
    assert [record.metrics["accuracy"] for record in server.history.rounds[:3]] == [0, 1, 2]
    assert sorted(server.history.rounds[1].by_client["accuracy"]) == ["0", "1"]
    assert sorted(server.history.rounds[3].by_client["accuracy"]) == ["0", "1", "2"]
    assert server.history.rounds[1].evaluated == 1


def test_a_training_is_told_its_number_its_version_and_its_part_of_the_run(make):
    learners = two_fast_and_one_slow()
    server, _ = make(*learners)
    server.federate()
    first, second, third = learners[0].asked
    assert first == {"server_round": 1, "clients_on_host": 3, "version": 0, "start": 0.0, "end": 0.5}
    assert (second["server_round"], second["version"], second["start"]) == (2, 1, 2 / 6)
    assert (third["server_round"], third["version"], third["end"]) == (3, 2, 1.0)


def test_a_slow_client_gets_no_training_that_would_end_after_the_last_update(make):
    learners = two_fast_and_one_slow()
    server, _ = make(*learners)
    server.federate()
    assert [learner.fitted for learner in learners] == [[1, 2, 3], [1, 2, 3], [1]]


def test_the_run_ends_with_its_last_update_and_says_whose_training_it_did_not_need(make, capsys):
    server, clock = make(Learner(), Learner(), Learner(seconds=3.5))
    server.federate()
    assert server.exit_code == 0
    assert came(server)[1:] == [[(0, n, 0), (1, n, 0)] for n in (1, 2, 3)]
    said = capsys.readouterr().out
    assert "the last update is in; still training, then to evaluate the model: 2\n" in said
    assert clock.now == pytest.approx(3.5, abs=0.01), "the final model is evaluated by all"
    assert sorted(server.history.rounds[3].by_client["accuracy"]) == ["0", "1", "2"]


def test_what_is_left_in_the_buffer_at_the_end_is_a_version_of_that_part(make):
    server, _ = make(Learner(1), rounds=3, buffer_size=2)
    server.federate()
    # One client, always from the newest version: +1 twice, of which the buffer takes the mean; then half of +1.
    assert came(server) == [[], [(0, 1, 0), (0, 2, 0)], [(0, 3, 0)]]
    assert server.weights[0].tolist() == [1.5, 1.5]


def test_too_stale_an_update_is_left_out_and_its_client_goes_on(make, capsys):
    server, _ = make(*two_fast_and_one_slow(), max_staleness=1)
    server.federate()
    assert server.exit_code == 0
    assert reasons(server) == [(2, 2, "its staleness 2 is above --max-staleness 1")]
    assert "version 2: client 2 left out: its staleness 2 is above --max-staleness 1\n" in capsys.readouterr().out
    assert all(partition != 2 for updates in came(server) for partition, _, _ in updates)
    assert len(server.clients.ready()) == 3
    assert server.weights[0].tolist() == [3, 3]


def test_an_update_that_came_in_waits_for_one_about_to_come(make):
    """Seconds 1 and 1.2: from the second time on it is known that client 1 comes 0.2 s later, within a moment."""
    learners = [Learner(seconds=1.0), Learner(seconds=1.2)]
    patient, _ = make(*learners, patience=0.5, rounds=3)
    patient.federate()
    assert came(patient)[2:] == [[(0, n, 0), (1, n, 0)] for n in (2, 3)]
    assert [record.time for record in patient.history.rounds] == pytest.approx([0, 1.2, 2.4, 3.6])


def test_nobody_waits_where_patience_is_0(make):
    learners = [Learner(seconds=1.0), Learner(seconds=1.2)]
    server, _ = make(*learners, buffer_size=1)
    server.federate()
    # At 1, 1.2, 2 and 2.4 s, each one version late but the first.
    assert came(server) == [[], [(0, 1, 0)], [(1, 1, 1)], [(0, 2, 1)], [(1, 2, 1)]]


# What does not count


def test_bad_updates_do_not_count_and_three_in_a_row_cost_the_place(make):
    bad = Learner(fit=lambda n, w, e, m: (w, 10**9, m))
    server, _ = make(Learner(), Learner(), bad, rounds=4)
    server.federate()
    assert server.exit_code == 0
    assert [partition for _, partition, _ in reasons(server)] == [2, 2, 2]
    assert list(server.clients.dropped) == [2]
    assert sum(len(updates) for updates in came(server)) == 12


def test_an_update_out_of_line_with_the_last_ones_is_left_out(make):
    far = Learner(fit=lambda n, w, e, m: ([w[0] + 999, *w[1:]] if n == 2 else w, e, m))
    server, _ = make(Learner(), Learner(), far, rounds=3)
    server.federate()
    ((_, partition, reason),) = reasons(server)
    assert partition == 2
    assert reason == "its step (L2 norm 1.41e+03) is 1000.0 times the median, above --outlier-factor 20"


def test_scores_that_are_no_numbers_do_not_count(make):
    blind = Learner(evaluate=lambda n, loss, e, m: (math.nan if n == 1 else loss, e, m))
    server, _ = make(Learner(), blind)
    server.federate()
    assert server.exit_code == 0
    assert reasons(server) == [(1, 1, "its loss is nan")]
    assert sorted(server.history.rounds[1].by_client["accuracy"]) == ["0"]


def test_the_update_of_a_client_that_left_does_not_count(make):
    server, clock = make(Learner(), Learner(), Learner(5, seconds=2.5))
    clock.at(2.2, lambda: server.clients.unregister(server.clients.participants[2].client))
    server.federate()
    assert server.exit_code == 0
    assert server.weights[0].tolist() == [3, 3]
    assert all(partition != 2 for updates in came(server) for partition, _, _ in updates)


def test_a_client_that_lost_its_connection_trains_the_same_again(make):
    once = []
    shaky = Learner(2, fit=lambda n, *usual: lost() if n == 1 and not once.append(n) and len(once) == 1 else usual)
    server, _ = make(Learner(), shaky, rounds=1)
    server.clients.back = True
    server.federate()
    assert server.exit_code == 0
    assert shaky.fitted[:2] == [1, 1]
    assert shaky.evaluated[:2] == [0, 0], "a new connection is asked to evaluate the model, too"


# Bad versions


def harmful(*numbers: int):
    """An update with which nobody can evaluate the model, in the trainings of these numbers; in all where none is."""
    return lambda n, w, e, m: ([w[0], w[1] - 3, w[2]] if n in numbers or not numbers else w, e, m)


def made(server) -> list[tuple[int | None, bool, list[int]]]:
    """Of each version what it was made from, whether it is taken back, and whose updates are in it."""
    return [
        (record.made_from, record.taken_back, [each["partition"] for each in record.updates])
        for record in server.history.rounds
    ]


def test_a_version_that_most_cant_evaluate_is_made_again_without_the_update_that_is_to_blame(make, capsys):
    server, _ = make(Learner(), Learner(fit=harmful(1)), Learner(), rounds=1, buffer_size=3)
    server.federate()
    assert server.exit_code == 0
    # In place of version 1 there is one without client 1, two thirds of a step; one more update is trained then.
    assert made(server) == [(None, False, []), (None, True, [0, 1, 2]), (0, False, [0, 2]), (None, False, [0])]
    assert server.weights[0] == pytest.approx(1)
    assert server.weights[1] == pytest.approx((2 / 3 * 0.5 + 1 / 3) * (2 / 3 + 1 / 3 * 0.5))
    ((number, partition, reason),) = reasons(server)
    assert (number, partition) == (1, 1)
    assert reason.startswith("with its update most clients can't evaluate the model; its step is ")
    assert [each.strikes for each in server.clients.ready()] == [0, 1, 0]
    words = "version 1: most clients can't evaluate it; looking for the update that is to blame\n"
    assert capsys.readouterr().out.count(words) == 1


def test_the_updates_of_a_version_that_is_taken_back_do_not_count_and_it_has_no_scores(make):
    server, _ = make(Learner(), Learner(fit=harmful(1)), Learner(), rounds=1, buffer_size=3)
    server.federate()
    for history in (server.history, server.folder.load_history()):
        untrained, bad, trial, last = history.rounds
        assert (bad.main(), bad.clients, bad.by_client.get("accuracy")) == (None, 0, None)
        assert (trial.clients, trial.bytes_received, last.clients) == (2, 0, 1)
        assert [record.rounds_worth for record in (untrained, trial, last)] == [0, 2 / 3, 1]
        assert [record.main() for record in history.by_round()] == pytest.approx([0, 1])


def test_a_client_whose_every_update_is_harmful_loses_its_place_and_the_others_go_on(make):
    server, _ = make(Learner(), Learner(), Learner(fit=harmful()), rounds=4, buffer_size=3)
    server.federate()
    assert server.exit_code == 0
    assert list(server.clients.dropped) == [2]
    assert [partition for _, partition, _ in reasons(server)] == [2, 2, 2]
    assert [each.strikes for each in server.clients.ready()] == [0, 0]
    counted = [each for record in server.history.rounds if not record.taken_back for each in record.updates]
    assert [each["partition"] for each in counted] == [0, 1] * 6
    assert (server.weights[1] > 0).all()


def test_where_no_single_update_is_to_blame_the_model_stays_and_nobody_is(make, capsys):
    bad = [Learner(fit=harmful(1)), Learner(fit=harmful(1))]
    server, _ = make(Learner(), *bad, rounds=1, buffer_size=3)
    server.federate()
    assert server.exit_code == 0
    assert made(server)[1:] == [
        (None, True, [0, 1, 2]),
        *((0, True, pair) for pair in ([1, 2], [0, 2], [0, 1])),
        (0, False, []),
        (None, False, [0, 1, 2]),
    ]
    assert reasons(server) == []
    assert [each.strikes for each in server.clients.ready()] == [0, 0, 0]
    assert "version 1: no single update is to blame; the model is version 0 again\n" in capsys.readouterr().out
    assert server.weights[0].tolist() == [1, 1]


def test_of_two_clients_none_is_blamed_but_the_bad_version_is_taken_back(make, capsys):
    server, _ = make(Learner(), Learner(fit=harmful(1)), rounds=1)
    server.federate()
    assert server.exit_code == 0
    assert made(server)[1:] == [(None, True, [0, 1]), (0, False, []), (None, False, [0, 1])]
    assert reasons(server) == []
    assert "version 1: most clients can't evaluate it; it is taken back\n" in capsys.readouterr().out


def test_a_run_in_which_no_new_version_is_good_ends(make, capsys):
    server, _ = make(Learner(fit=harmful()), Learner(fit=harmful()), rounds=2)
    server.federate()
    assert server.exit_code == 1
    said = capsys.readouterr().out
    assert "error: most clients could not evaluate a new version 5 times in a row; look at what the clients" in said
    assert "--resume" not in said


def test_nobody_trains_on_a_version_that_it_cant_evaluate_before_that_is_known_to_be_good(make):
    """Client 0 says that it can evaluate its own bad version. Client 1 can't, and waits for client 2 to say so too."""
    liar = Learner(fit=harmful(1), evaluate=lambda n, loss, e, m: (1.0, e, m))
    honest, slow = Learner(), Learner(seconds=3.5)
    server, clock = make(liar, honest, slow, rounds=3)
    trained = []
    clock.at(3.4, lambda: trained.append((list(liar.fitted), list(honest.fitted))))
    server.federate()
    assert server.exit_code == 0
    assert trained == [([1, 2, 3, 4], [1])]
    assert honest.evaluated[:3] == [0, 1, 2]
    # Versions 1 and 2 are taken back. What client 0 made of version 1 is in no trial; without it alone, as in version
    # 3, the model is as bad; version 4 is without client 0.
    assert made(server)[1:5] == [(None, True, [0, 1]), (None, True, [0, 0]), (0, True, [0, 1]), (0, False, [1])]
    assert reasons(server)[0][:2] == (2, 0)
    assert len(server.clients.ready()) == 3
    assert sum(len(updates) for _, taken_back, updates in made(server) if not taken_back) == 9


def test_what_was_trained_from_a_version_that_is_taken_back_does_not_count_and_costs_no_strike(make):
    """Client 0 has been training on its bad version for a second when that is taken back."""
    liar = Learner(fit=harmful(1), evaluate=lambda n, loss, e, m: (1.0, e, m))
    server, _ = make(liar, Learner(), Learner(seconds=1.5), rounds=2)
    server.federate()
    assert server.exit_code == 0
    assert (2, 0, "it was trained from version 1, which is taken back") in reasons(server)
    assert len(reasons(server)) == 2


def test_one_client_that_cant_evaluate_a_good_version_is_left_out_alone(make):
    odd = Learner(evaluate=lambda n, loss, e, m: (math.nan if n else loss, e, m))
    server, _ = make(Learner(), odd, Learner(), rounds=2, buffer_size=3)
    server.federate()
    assert server.exit_code == 0
    assert reasons(server) == [(1, 1, "its loss is nan"), (2, 1, "its loss is nan")]
    assert made(server)[1:] == [(None, False, [0, 1, 2])] * 2


@pytest.mark.parametrize("version", [1, 2])
def test_killed_before_it_is_known_that_a_version_is_bad_and_resumed_the_model_is_good(make, version):
    """Version 1 is bad; version 2 is made in its place, without client 1, and good."""
    stop = Learner(evaluate=lambda n, *usual: (server._on_signal(15, None) if n == version else None, usual)[1])
    server, _ = make(stop, Learner(fit=harmful(1)), Learner(), buffer_size=3)
    server.federate()
    assert server.exit_code == 143
    stored = server.folder.load_checkpoint()
    assert stored.server_round == version
    assert [array.tolist() for array in stored.strategy_state[1:]] == [array.tolist() for array in START]
    again, _ = make(Learner(), Learner(), Learner(), resume=True, buffer_size=3)
    again.federate()
    assert again.exit_code == 0
    # Whose update was to blame for version 1 is not known any more.
    assert made(again)[1:3] == [(None, True, [0, 1, 2]), (0, False, [] if version == 1 else [0, 2])]
    assert (again.weights[1] > 0).all()
    assert reasons(again) == []
    assert sum(len(updates) for _, taken_back, updates in made(again) if not taken_back) == 6
    assert again.folder.load_checkpoint().strategy_state == []


@pytest.mark.parametrize("numbers", [(1,), (2,), (3, 4), (1, 2, 3, 4, 5)])
def test_with_versions_taken_back_a_replay_gives_the_same_bits(make, numbers):
    steps, seconds = [0.1, 0.7, 1.3], (1, 1.3, 4.1)
    fits = [None, harmful(*numbers), None]
    learners = [Learner(step, seconds=s, fit=fit) for step, s, fit in zip(steps, seconds, fits, strict=True)]
    server, _ = make(*learners, rounds=6)
    server.federate()
    assert server.exit_code == 0
    assert any(taken_back for _, taken_back, _ in made(server))
    assert replayed(server, steps, client_1=harmful(*numbers)) == [array.tobytes() for array in server.weights]


def test_only_the_row_of_a_version_that_was_taken_back_or_made_in_place_of_one_says_so():
    usual = VersionRecord(1, {"accuracy": 0.5}, updates=[{"partition": 0}])
    assert not {"taken_back", "made_from"} & usual.to_json().keys()
    for record in (usual, replace(usual, taken_back=True), replace(usual, made_from=0)):
        assert read_record(json.loads(json.dumps(record.to_json()))) == record


# When it ends


def test_the_target_ends_the_run_once_a_newer_version_than_the_one_that_reaches_it_is_there(make, capsys):
    server, clock = make(Learner(0.3), Learner(0.3), rounds=9, target=0.5)
    server.federate()
    assert server.exit_code == 0
    assert [record.round for record in server.history.rounds] == [0, 1, 2, 3]
    assert clock.now == pytest.approx(3, abs=0.01)
    assert "accuracy 0.5 reached with version 2 (--target)\n" in capsys.readouterr().out


def test_one_client_of_three_can_not_say_that_the_target_is_reached(make):
    optimist = Learner(evaluate=lambda n, loss, e, m: (loss, e, {"accuracy": 1.0}))
    others = [Learner(seconds=6.5), Learner(seconds=6.5)]
    server, _ = make(optimist, *others, rounds=2, buffer_size=1, target=0.9)
    server.federate()
    assert len(server.history.rounds) == 1 + 6


def test_it_waits_for_min_clients_each_time_anew_and_goes_on_when_one_comes(make, capsys):
    server, clock = make(Learner(), Learner(), rounds=8, rejoin_wait=30.0)

    def leave():
        server.clients.unregister(server.clients.participants[1].client)

    for left, back in ((1.5, 20.0), (22.5, 50.0)):
        clock.at(left, leave)
        clock.at(back, lambda: server.clients.join(1, Learner()))
    server.federate()
    assert server.exit_code == 0
    said = capsys.readouterr().out
    assert said.count("1 clients left, --min-clients is 2; waiting up to 30 s for more\n") == 2
    assert sum(len(updates) for updates in came(server)) == 16
    assert server.history.rounds[-1].time > 50


def test_it_ends_when_nobody_comes_for_rejoin_wait_seconds(make, capsys):
    server, clock = make(Learner(), Learner(), rounds=3, rejoin_wait=30.0)
    other = server.clients.participants[1].client
    clock.at(1.5, lambda: server.clients.unregister(other))
    server.federate()
    assert server.exit_code == 1
    assert 31.5 <= clock.now < 33
    words = "error: 1 of 2 clients left after version 1, and --min-clients is 2; the checkpoint is kept"
    assert words in capsys.readouterr().out
    assert server.folder.load_checkpoint().server_round == 1


def test_a_server_without_any_client_waits_too(make):
    server, clock = make(Learner(fit=lost), Learner(fit=lost), rejoin_wait=10.0)
    clock.at(5.0, lambda: [server.clients.join(partition, Learner()) for partition in (0, 1)])
    server.federate()
    assert server.exit_code == 0
    assert server.history.rounds[1].time == pytest.approx(6, abs=0.5)


def test_clients_that_can_not_even_evaluate_the_model_that_they_could_before_fail_the_run(make, capsys):
    blind = [Learner(evaluate=lambda n, loss, e, m: (math.nan if n >= 2 else loss, e, m)) for _ in range(2)]
    server, _ = make(*blind)
    server.federate()
    assert server.exit_code == 1
    words = "error: most clients can't evaluate version 3, which has the weights of version 1; look at what they print"
    assert words in capsys.readouterr().out
    assert not (server.folder.path / "model.npz").exists()


def test_resumed_before_its_final_evaluation_a_run_makes_up_for_it(make):
    stop = Learner(evaluate=lambda n, *usual: (server._on_signal(15, None) if n == 2 else None, usual)[1])
    server, _ = make(stop, Learner())
    server.federate()
    assert server.exit_code == 143
    assert server.history.rounds[-1].main() is None
    again, _ = make(Learner(), Learner(), resume=True)
    again.federate()
    assert again.exit_code == 0
    assert [record.main() for record in again.history.rounds] == [0, 1, 2]


def test_clients_lost_in_the_final_evaluation_are_asked_again_when_they_are_back(make, capsys):
    asked = []

    def last_time(number, *usual):
        if number == 2:
            asked.append(number)
        return lost() if number == 2 and len(asked) <= 2 else usual

    server, _ = make(Learner(evaluate=last_time), Learner(evaluate=last_time), rejoin_wait=5.0)
    learners = [one.client.learner for one in server.clients.ready()]
    real = server.dispatcher.wait_ready

    def come_back(number, timeout):
        for partition, learner in enumerate(learners):
            server.clients.join(partition, learner)
        return real(number, timeout)

    server._gather_first()
    server._gather_first = lambda: setattr(server.dispatcher, "wait_ready", come_back)
    server.federate()
    assert server.exit_code == 0
    assert "version 3: all its clients were lost; it is done again once they are back" in capsys.readouterr().out
    assert sorted(server.history.rounds[2].by_client["accuracy"]) == ["0", "1"]


# Told, resumed, replayed


def replayed(server, steps: list[float], **bad_fit) -> list[bytes]:
    """The final weights, worked out again from history.json; bad_fit: of a client, as `client_1`."""

    def train(job: TrainingJob, base: list[np.ndarray]) -> Update:
        learner = Learner(steps[job.partition], fit=bad_fit.get(f"client_{job.partition}"))
        weights, examples, _ = learner.fit(base, {"server_round": job.number})
        return Update(job.partition, weights, examples, {})

    history = server.folder.load_history()
    versions = [record.updates for record in history.rounds[1:]]
    made_from = {each.round: each.made_from for each in history.rounds if each.made_from is not None}
    rounds = history.config["rounds"]
    weights = replay(versions, START, BUFFERS, server.settings, rounds, train, made_from=made_from)
    return [array.tobytes() for array in weights]


def test_the_order_of_arrival_gives_the_same_bits_again(make):
    steps = [0.1, 0.7, 1.3]
    learners = [Learner(step, seconds=seconds) for step, seconds in zip(steps, (1, 1.3, 4.1), strict=True)]
    server, _ = make(*learners, rounds=6)
    server.federate()
    assert max(staleness for updates in came(server) for *_, staleness in updates) > 1
    assert replayed(server, steps) == [array.tobytes() for array in server.weights]


@pytest.mark.parametrize("moment", [0.5, 1.5, 2.2, 3.6])
def test_stopped_and_resumed_it_ends_with_all_updates_and_a_replay_gives_the_same_bits(make, capsys, moment):
    steps = [0.1, 0.7, 1.3]

    def learners():
        return [Learner(step, seconds=seconds) for step, seconds in zip(steps, (1, 1.3, 4.1), strict=True)]

    server, clock = make(*learners(), rounds=4)
    clock.at(moment, lambda: server._on_signal(15, None))
    server.federate()
    assert server.exit_code == 143
    assert f"stopped by SIGTERM after version {server.rounds_done}; go on with" in capsys.readouterr().out
    again, _ = make(*learners(), rounds=4, resume=True)
    again.federate()
    assert again.exit_code == 0
    assert again.rounds_done > server.rounds_done >= 0
    assert sum(len(updates) for updates in came(again)) == 12
    numbers = [[n for updates in came(again) for p, n, _ in updates if p == partition] for partition in range(3)]
    assert all(sorted(set(each)) == each for each in numbers), "a training that counted is not done twice"
    assert [record.round for record in again.history.rounds] == list(range(again.rounds_done + 1))
    assert [record.time for record in again.history.rounds] == sorted(record.time for record in again.history.rounds)
    assert replayed(again, steps) == [array.tobytes() for array in again.weights]


def test_the_wait_for_late_clients_costs_no_processor_time(make):
    server, clock = make(Learner(1), Learner(1), Learner(1, seconds=9.5), patience=0.25)
    waits = []
    turn = clock.turn
    clock.turn = lambda seconds: (waits.append(seconds), turn(seconds))
    server.federate()
    assert server.exit_code == 0
    assert len([seconds for seconds in waits if seconds == 0]) < 20


def test_observers_hear_of_every_version_once_and_in_order(make):
    class Recorder:
        def __init__(self):
            self.told = []

        def begin(self, history):
            self.told.append("begin")

        def round(self, record):
            self.told.append((record.round, record.main() is not None))

        def end(self, exit_code):
            self.told.append(("end", exit_code))

    recorder = Recorder()
    server, _ = make(*two_fast_and_one_slow(), observers=Observers([recorder]))
    server.federate()
    assert recorder.told == ["begin", (0, True), (1, True), (2, True), (3, True), ("end", 0)]

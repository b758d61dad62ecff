"""Asynchronous aggregation, worked out by hand: no clock, no network, no process."""

import math
from dataclasses import replace

from federation.aggregation.fedbuff import BufferedUpdate, FedBuff, TrainingJob, mean_step, replay
from federation.aggregation.pace import Pace
from federation.aggregation.validation import BadUpdate, Update
from federation.aggregation.verdicts import Trial, Verdicts, Version, trials
from federation.server.settings import ServerSettings

import numpy as np
import pytest
from helpers.updates import strategy, update

SETTINGS = ServerSettings(mode="async", buffer_size=3)
BUFFERS = [1, 2]  # of weights(): BatchNorm's running variance and its counter


def weights(trained=0.0, variance=1.0, counter=0) -> list[np.ndarray]:
    return [np.array([trained], np.float32), np.array([variance], np.float32), np.array(counter)]


def fedbuff(start=None, rounds=10, **settings) -> FedBuff:
    return FedBuff(start or weights(), BUFFERS, replace(SETTINGS, **settings), rounds)


def receive(run: FedBuff, partition: int, trained: float, examples=1, staleness=0) -> bool:
    """An update that changes the trained array by so much, from a model so many versions old."""
    job = TrainingJob(partition, 1, run.version - staleness, 0, 3)
    return run.receive(job, weights(), update(weights(trained), examples, partition))


def test_staleness_0_1_and_3_weigh_1_and_1_over_root_2_and_one_half():
    steps = [(4.0, 1, 0), (8 * math.sqrt(2), 1, 1), (4.0, 2, 3)]  # scaled: 4, 8, 2; examples: 1, 1, 2
    assert mean_step(steps) == pytest.approx((4 + 8 + 2 * 2) / 4)


def test_a_full_buffer_becomes_a_version_by_the_servers_learning_rate():
    run = fedbuff(weights(10.0), server_learning_rate=0.5)
    run.version = 3
    for partition, (change, examples, staleness) in enumerate([(4, 1, 0), (8 * math.sqrt(2), 1, 1), (4, 2, 3)]):
        assert not run.is_due()
        assert receive(run, partition, change, examples, staleness)
    assert run.is_due()
    assert [change.staleness for change in run.apply()] == [0, 1, 3]
    assert run.version == 4
    assert run.weights[0] == pytest.approx(10 + 0.5 * 4)
    assert not run.buffer


def test_alone_in_its_buffer_a_stale_update_still_counts_less():
    run = fedbuff(buffer_size=1)
    run.version = 3
    receive(run, 0, 8.0, staleness=3)
    run.apply()
    assert run.weights[0] == pytest.approx(4.0)


def test_with_equal_speeds_and_a_buffer_of_all_it_is_fedavg_to_the_bit():
    rounds, rng, start = 4, np.random.default_rng(0), weights()
    run, expected = fedbuff(rounds=rounds), start
    fedavg = strategy("fedavg", start, BUFFERS)
    for server_round in range(1, rounds + 1):
        trainings = [run.hand_out(partition) for partition in range(3)]
        base = run.weights
        updates = [
            update(weights(rng.normal(), rng.uniform(1, 2), server_round * 7), 100 * (p + 1), p) for p in range(3)
        ]
        for training, each in zip(trainings, updates, strict=True):
            assert training.number == server_round
            assert training.begins / run.total == (server_round - 1) / rounds
            assert training.ends / run.total == server_round / rounds
            run.came_back(training)
            run.receive(training, base, each)
        assert [change.staleness for change in run.apply()] == [0, 0, 0]
        expected = fedavg.aggregate(expected, updates)
        for ours, theirs in zip(run.weights, expected, strict=True):
            assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes())
    assert run.updates == run.total


def test_the_order_of_arrival_within_a_buffer_makes_no_difference():
    rng = np.random.default_rng(0)
    changes = [(p, rng.normal(), p + 1) for p in range(3)]
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        run = fedbuff()
        for i in order:
            receive(run, *changes[i])
        run.apply()
        results.append(run.weights[0].tobytes())
    assert results[0] == results[1]


def test_an_update_above_max_staleness_neither_counts_nor_moves_the_model():
    run = fedbuff(max_staleness=2)
    run.version = 5
    assert receive(run, 0, 1.0, staleness=2)
    assert not receive(run, 1, 1.0, staleness=3)
    assert (run.updates, len(run.buffer)) == (1, 1)


def test_measured_arrays_move_towards_what_clients_measured_and_never_beyond():
    run = fedbuff(weights(variance=3.0), server_learning_rate=2.0, buffer_size=2)
    run.version = 3
    for partition, staleness in ((0, 0), (1, 3)):
        job = TrainingJob(partition, 1, run.version - staleness, 0, 3)
        run.receive(job, weights(variance=10.0), update(weights(variance=1.0, counter=8), partition=partition))
    run.apply()
    assert run.weights[1] == pytest.approx(3 + (1 + 0.5) / 2 * (1 - 3))
    assert run.weights[2] == 6
    assert run.weights[2].dtype == np.int64


def test_what_is_left_in_the_buffer_at_the_end_moves_the_model_by_its_part():
    run = fedbuff(rounds=1, buffer_size=2)
    for partition in range(3):
        receive(run, partition, 1.0)
        if run.is_due():
            run.apply()
    assert run.version == 2
    assert run.weights[0] == pytest.approx(1 + 0.5)


def test_a_change_is_clipped_against_the_model_that_it_started_from():
    run = fedbuff(weights(100.0), buffer_size=1, max_update_norm=2.0)
    run.version = 3
    receive(run, 0, 50.0, staleness=3)  # from 0 to 50, so to 2, of which staleness leaves half
    run.apply()
    assert run.weights[0] == pytest.approx(101.0)


def test_a_client_that_trains_twice_on_one_version_draws_anew():
    run = fedbuff()
    first = run.hand_out(0)
    run.came_back(first)
    second = run.hand_out(0)
    assert (first.version, second.version) == (0, 0)
    assert (first.number, second.number) == (1, 2)


def test_a_training_that_was_lost_is_handed_out_again():
    run = fedbuff()
    assert run.hand_out(0) == run.hand_out(0)


def test_a_slow_clients_schedule_spans_what_came_in_during_its_last_training():
    run = fedbuff()
    slow = run.hand_out(2)
    assert (slow.begins, slow.ends) == (0, 3)
    run.updates = 11
    run.came_back(slow)
    again = run.hand_out(2)
    assert (again.begins, again.ends) == (11, 22)
    run.updates = 25
    run.came_back(again)
    assert run.hand_out(2).ends == 30


def pace(*durations: float, patience=0.25) -> Pace:
    """Partition i took durations[i] seconds last time."""
    made = Pace(patience)
    for partition, seconds in enumerate(durations):
        made.took(partition, seconds)
    return made


def test_updates_that_can_be_expected():
    assert pace(4).arrivals_within(10, []) == 0
    assert pace(4).arrivals_within(10, [(0, 0)]) == 2  # after 4 and 8 seconds
    assert pace(4).arrivals_within(10, [(0, 3)]) == 3  # after 1, 5 and 9
    assert pace(4, 4).arrivals_within(3, [(0, 0), (1, 2)]) == 1  # the second after 2
    assert pace(4).arrivals_within(10, [(0, 6)]) == 1  # longer than usual already: after 6 more
    assert pace(3, 5).arrivals_within(5, [(2, 0)]) == 1  # a new client: 4, as the others on average
    assert Pace(0.25).arrivals_within(0, [(0, 0)]) == 0


def test_an_update_waits_for_those_that_usually_come_in_the_same_moment():
    fast_and_slow = pace(4, 20)  # a moment is a quarter of 4 seconds
    assert not fast_and_slow.is_more_coming([(0, 2.9), (1, 2.9)])
    assert fast_and_slow.is_more_coming([(0, 3.1)])
    assert fast_and_slow.is_more_coming([(0, 7.9)])  # overdue
    assert not fast_and_slow.is_more_coming([(0, 8.1)])  # after twice its time nothing can be told
    assert not fast_and_slow.is_more_coming([(1, 18.9)])
    assert fast_and_slow.is_more_coming([(1, 19.1)])


def test_without_patience_an_update_waits_for_nobody():
    assert pace(4, 4, patience=0).moment() == 0


def test_a_resumed_run_counts_on():
    run = fedbuff()
    run.restore(1, [{"partition": 0, "number": 1}, {"partition": 0, "number": 2}])
    assert (run.version, run.updates) == (1, 2)
    assert run.hand_out(0).number == 3
    assert run.hand_out(1).number == 1


def test_a_replay_of_any_order_of_arrival_gives_the_same_bits():
    def train(job: TrainingJob, base: list[np.ndarray]) -> Update:
        rng = np.random.default_rng([job.partition, job.number])
        new = [base[0] + np.float32(rng.normal()), base[1] * np.float32(0.9), base[2] + 1]
        return update(new, job.partition + 1, job.partition)

    order, versions = np.random.default_rng(0), []
    run = fedbuff(rounds=5, buffer_size=2)
    working = {p: (run.hand_out(p), run.weights) for p in range(3)}
    while run.updates < run.total:
        partition = int(order.integers(3))
        training, base = working[partition]
        run.came_back(training)
        run.receive(training, base, train(training, base))
        if run.is_due():
            versions.append([each.to_json() for each in run.apply()])
        working[partition] = run.hand_out(partition), run.weights
    assert max(each["staleness"] for version in versions for each in version) > 1
    again = replay(versions, weights(), BUFFERS, run.settings, 5, train)
    assert [array.tobytes() for array in again] == [array.tobytes() for array in run.weights]


# Bad versions


def buffered(partition: int, version: int, change: float, number=1) -> BufferedUpdate:
    return BufferedUpdate(
        TrainingJob(partition, number, version, 0, 3), 0, weights(), update(weights(change), 1, partition)
    )


def test_back_at_a_good_version_only_what_does_not_build_on_a_bad_one_counts():
    """Version 1 is good, 2 bad. The buffer has updates from both; version 3 is made of one from 0 that was in 2."""
    run = fedbuff(buffer_size=1)
    run.version, run.updates = 2, 2
    receive(run, 0, 1.0, staleness=1)
    receive(run, 1, 1.0, staleness=0)
    assert run.updates == 4
    (made_of,) = run.go_back(1, weights(5.0), 1, [buffered(2, 0, 4 * math.sqrt(2))])
    assert made_of.staleness == 1, "from version 0 to version 1"
    assert run.version == 3
    assert run.weights[0] == pytest.approx(5 + 4)
    assert [(each.job.partition, each.staleness) for each in run.buffer] == [(0, 1)], "version 2 is not between 1 and 3"
    assert run.updates == 1 + 1 + 1


def test_without_any_update_the_model_is_the_good_one_again():
    run = fedbuff()
    run.version = 4
    assert run.go_back(2, weights(7.0), 6, []) == []
    assert (run.version, run.updates, run.weights[0].tolist()) == (5, 6, [7.0])
    assert run.staleness(TrainingJob(0, 1, 1, 0, 3)) == 2, "versions 2 and 5"


def test_a_resumed_run_does_not_count_versions_that_were_taken_back():
    run = fedbuff()
    run.restore(4, [{"partition": 0, "number": 1}], [2, 3])
    assert run.updates == 1
    assert run.staleness(TrainingJob(0, 1, 1, 0, 3)) == 1


BAD = BadUpdate("its loss is nan")


def verdicts(*versions: dict[int, bool]) -> Verdicts:
    """After version 0; of each version which clients could evaluate it, and which could not."""
    run = Verdicts(Version(0, weights()))
    for number, says in enumerate(versions, start=1):
        run.add(Version(number, weights()))
        for partition, could in says.items():
            run.undecided[number].note(partition, None if could else BAD)
    return run


@pytest.mark.parametrize(
    ("versions", "good", "bad"),
    [
        ([{0: True}], 0, None),  # one of four
        ([{0: True, 1: True}], 1, None),  # half of them are enough
        ([{0: False, 1: False}], 0, None),  # but not to say that it is bad
        ([{0: False, 1: False, 2: False}], 0, 1),
        ([{0: False, 1: False, 2: True, 3: True}], 1, None),
        ([{0: True}, {1: True}], 1, None),  # who could evaluate version 2 vouches for what it was made of
        ([{0: True}, {0: True, 1: True}], 2, None),
        ([{0: True, 1: True}, {0: False, 1: False, 2: False}], 1, 2),
        ([{0: False}, {1: False}, {2: False}], 0, None),  # each of another version
        ([{0: True, 9: True}], 0, None),  # client 9 is gone
    ],
)
def test_half_of_the_clients_make_a_version_good_and_more_than_half_bad(versions, good, bad):
    run, clients = verdicts(*versions), {0, 1, 2, 3}
    accepted = run.accept(clients)
    assert run.good.number == good
    assert [version.number for version in accepted] == list(range(1, good + 1))
    assert run.find_bad(clients) == bad


def test_without_any_client_nothing_is_known():
    run = verdicts({0: True}, {0: False})
    assert (run.accept(set()), run.find_bad(set())) == ([], None)


def test_who_could_not_evaluate_the_newest_version_waits_until_it_is_decided():
    run = verdicts({0: False}, {1: False, 2: True})
    assert run.waiting() == {1}
    run.undecided[2].note(1, None)
    assert run.waiting() == set()


def test_suspects_are_tried_by_the_size_of_their_steps_and_at_last_none_counts():
    made_of = [buffered(0, 0, 1.0), buffered(1, 0, 3.0), buffered(2, 0, 2.0), buffered(0, 0, 9.0, number=2)]
    tried = trials([Version(1, weights(), made_of[:2]), Version(2, weights(), made_of[2:])], 0, BUFFERS, True)
    assert [trial.suspect for trial in tried] == [0, 1, 2, None]
    assert [trial.excess for trial in tried[:3]] == pytest.approx([3, 1, 1])
    partitions = [[each.job.partition for each in trial.updates] for trial in tried]
    assert partitions == [[1, 2], [0, 2, 0], [0, 1, 0], []]


def test_first_of_all_what_builds_on_a_bad_version_is_left_out_as_it_may_be_to_blame():
    versions = [Version(4, weights(), [buffered(0, 3, 1.0)]), Version(5, weights(), [buffered(1, 4, 9.0)])]
    tried = trials(versions, 3, BUFFERS, True)
    assert [(trial.suspect, [each.job.partition for each in trial.updates]) for trial in tried] == [
        (None, [0]),
        (0, []),
        (None, []),
    ]


def test_of_few_clients_none_is_a_suspect():
    assert trials([Version(1, weights(), [buffered(0, 0, 1.0)])], 0, BUFFERS, False) == [Trial([])]

"""Who is asked for what, and what becomes of those who don't answer; all in this process."""

import concurrent.futures
import threading
import time

from federation.server.dispatch import Request, RoundLost, RunFailed, Stopped

import numpy as np
import pytest
from flwr.common import FitRes, ndarrays_to_parameters
from helpers.in_process import OK, START, Learner, federation, lost, no_disk  # noqa: F401 (used by every test)


@pytest.fixture
def make(tmp_path):
    """A dispatcher with so many clients, or with these."""

    def dispatcher(learners, **values):
        learners = [Learner() for _ in range(learners)] if isinstance(learners, int) else learners
        return federation(tmp_path, learners, **values).dispatcher

    return dispatcher


def partitions(participants) -> list[int]:
    return [one.partition for one in participants]


# Selection


@pytest.mark.parametrize(("fraction", "number"), [(1.0, 10), (0.5, 5), (0.34, 3), (0.01, 1)])
def test_so_many_are_drawn_and_at_least_one(make, fraction, number):
    assert len(make(10, fraction_fit=fraction).select(1)) == number


def test_the_draw_is_a_function_of_seed_and_round_and_sorted(tmp_path):
    draws = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / name).mkdir()
        learners = [Learner() for _ in range(20)]
        dispatcher = federation(tmp_path / name, learners, fraction_fit=0.4, seed=seed).dispatcher
        draws[name] = [partitions(dispatcher.select(number)) for number in (2, 1)]  # in any order of the rounds
    assert draws["a"] == draws["b"] != draws["c"]
    assert draws["a"][0] != draws["a"][1]
    assert all(sorted(set(drawn)) == drawn for two in draws.values() for drawn in two)


def test_missing_clients_are_said_and_waited_for_and_then_it_goes_on_without(make, capsys):
    dispatcher = make(3)
    dispatcher.clients.unregister(dispatcher.clients.ready()[1].client)
    assert partitions(dispatcher.select(1)) == [0, 2]
    assert "1 of 3 clients missing; waiting up to 0 s for the free places\n" in capsys.readouterr().out


def test_fewer_than_min_clients_are_too_few_and_the_words_name_the_last_round_that_is_done(make):
    dispatcher = make(3, min_clients=3)
    dispatcher.clients.unregister(dispatcher.clients.ready()[1].client)
    words = "2 of 3 clients left after round 4, and --min-clients is 3; the checkpoint is kept; start more clients"
    with pytest.raises(RunFailed, match=words) as caught:
        dispatcher.select(5)
    assert caught.value.resumable


# Asking


def test_a_client_is_told_the_round_how_many_train_in_it_and_how_many_share_its_machine(make):
    learners = [Learner() for _ in range(3)]
    dispatcher = make(learners)
    dispatcher.clients.participants[1].host = "elsewhere"
    dispatcher.fit(7, START, dispatcher.clients.ready())
    assert [learner.asked for learner in learners] == [
        [{"server_round": 7, "clients_on_host": number, "participants": 3}] for number in (2, 1, 2)
    ]


def test_answers_are_in_the_order_of_partitions_whoever_is_first(make):
    last_is_done = threading.Event()
    first = Learner(1, fit=lambda n, *usual: (last_is_done.wait(60), usual)[1])
    last = Learner(2, fit=lambda n, *usual: (last_is_done.set(), usual)[1])
    dispatcher = make([first, last])
    answers = dispatcher.fit(1, START, dispatcher.clients.ready())
    assert [one.partition for one, _ in answers] == [0, 1]


def test_only_those_selected_train_and_all_evaluate(make):
    learners = [Learner() for _ in range(3)]
    dispatcher = make(learners)
    dispatcher.fit(1, START, dispatcher.clients.ready()[1:2])
    dispatcher.evaluate(1, START)
    assert [learner.fitted for learner in learners] == [[], [1], []]
    assert [learner.evaluated for learner in learners] == [[1], [1], [1]]


@pytest.mark.parametrize("what", ["fit", "evaluate"])
def test_without_a_single_answer_the_round_is_lost(make, what):
    dispatcher = make([Learner(**{what: lost}) for _ in range(2)])
    asked = {"fit": (1, START, dispatcher.clients.ready()), "evaluate": (1, START)}
    with pytest.raises(RoundLost):
        getattr(dispatcher, what)(*asked[what])
    assert dispatcher.clients.ready() == []


def test_compressed_weights_travel_in_half_the_bytes(make):
    weights = [np.ones(1000, np.float32), np.array(3)]
    sent = make(1, compress="fp16").parameters(weights).parameters.tensors
    assert [len(tensor) - 128 for tensor in sent] == [2 * 1000, 8]


# Those who do not answer


def pending(participant, since: float = 0.0) -> Request:
    return Request(participant, concurrent.futures.Future(), time.monotonic() - since)


def test_the_overdue_and_the_broken_are_given_up_and_left_out(make, capsys):
    dispatcher = make(4, round_timeout=600.0)
    requests = [pending(one) for one in dispatcher.clients.ready()]
    result = FitRes(OK, ndarrays_to_parameters(START), 1, {})
    requests[0].future.set_result(result)
    requests[1].future.set_exception(ConnectionError())
    requests[2].since -= 601
    requests[3].since -= 599
    over = dispatcher.wait(requests, 0)
    assert over == requests[:3]
    assert [dispatcher.answer(each) for each in over] == [result, None, None]
    assert partitions(dispatcher.clients.ready()) == [0, 3]
    assert capsys.readouterr().out.count("client 2 did not answer within 600 s (--round-timeout)\n") == 1


def test_one_that_hangs_does_not_keep_the_others_answers(make):
    dispatcher = make(2)
    requests = [pending(one) for one in dispatcher.clients.ready()]
    requests[0].since -= 601
    requests[1].future.set_result("its answer")
    assert dispatcher._wait_for_all(requests) == [(requests[1].participant, "its answer")]
    assert partitions(dispatcher.clients.ready()) == [1]


def test_every_wait_ends_when_the_server_is_to_stop(make):
    dispatcher = make(1)
    dispatcher.raise_if_stopped()
    dispatcher.stop.set()
    with pytest.raises(Stopped):
        dispatcher.wait_ready(2, 60)
    with pytest.raises(Stopped):
        dispatcher.wait([pending(one) for one in dispatcher.clients.ready()], 0)


# The untrained model


def test_the_untrained_model_is_the_first_clients_that_can_be_read(make, monkeypatch, capsys):
    dispatcher = make(3)
    first, second, _ = dispatcher.clients.ready()
    monkeypatch.setattr(first.client, "get_parameters", lost)
    broken = [np.array([np.nan], np.float32)]
    monkeypatch.setattr(second.client, "get_parameters", lambda *_: FitRes(OK, ndarrays_to_parameters(broken), 1, {}))
    weights = dispatcher.initial_weights()
    assert [array.tolist() for array in weights] == [array.tolist() for array in START]
    words = "can't send the untrained model: array 0 holds NaN or infinite values"
    assert dispatcher.clients.dropped == {1: f"it {words}"}
    assert partitions(dispatcher.clients.ready()) == [2]
    assert f"client 1 {words}\n" in capsys.readouterr().out


def test_buffers_of_the_untrained_model_may_be_infinite(make, monkeypatch):
    monkeypatch.setattr("helpers.in_process.START", [START[0], np.array([np.inf], np.float32), START[2]])
    assert np.isinf(make(1).initial_weights()[1]).all()


def test_the_untrained_model_is_what_float16_leaves_of_it(make, monkeypatch):
    monkeypatch.setattr("helpers.in_process.START", [np.array([1 + 2**-12, 2.0], np.float32)])
    (weights,) = make(1, compress="fp16").initial_weights()
    assert weights.dtype == np.float32
    assert weights.tolist() == [1, 2]  # float16 has steps of 2**-10 above 1


def test_a_model_beyond_float16_can_not_begin_a_compressed_run(make, monkeypatch, capsys):
    monkeypatch.setattr("helpers.in_process.START", [np.array([7e4], np.float32)])
    with pytest.raises(RunFailed, match="no client could send the untrained model; look at what the clients print"):
        make(2, compress="fp16").initial_weights()
    assert capsys.readouterr().out.count("array 0 holds 70000, beyond the 65504") == 2

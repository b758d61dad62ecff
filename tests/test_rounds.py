"""Whole runs in this process, in milliseconds: what counts, what is left out, how a run ends and goes on."""

import dataclasses
import signal
import weakref

from federation import model_file
from federation.compression import TooLarge
from federation.config import Metric
from federation.protocol import TaskSummary
from federation.results.observers import Observers
from federation.results.run_folder import RunFolder
from federation.server.dispatch import Dispatcher

import numpy as np
import pytest
from flwr.common import GetParametersRes, ndarrays_to_parameters
from helpers.in_process import OK, Learner, federation, lost


def finite(weights: list[np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in weights)


def reasons(server) -> list[tuple[int, int, str]]:
    return [(row["round"], row["partition"], row["reason"]) for row in server.history.rejected]


def nan_in(bad_round: int):
    def fit(number, weights, examples, metrics):
        return ([weights[0] * np.nan, *weights[1:]] if number == bad_round else weights), examples, metrics

    return fit


# One round


def test_a_round_selects_fits_validates_aggregates_evaluates_and_records(tmp_path, monkeypatch):
    order = []
    server = federation(tmp_path, [Learner(), Learner()], rounds=1)
    for owner, name in (
        (server.dispatcher, "select"),
        (server.dispatcher, "fit"),
        (server.acceptance, "updates"),
        (server.dispatcher, "evaluate"),
        (server.folder, "save_checkpoint"),
    ):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    real = server._set_global_weights
    server._set_global_weights = lambda weights: (real(weights), spy(server, order))[0]
    server.federate()
    assert server.exit_code == 0
    untrained = ["evaluate", "save_checkpoint"]
    assert order == [*untrained, "select", "fit", "updates", "aggregate", "evaluate", "save_checkpoint"]


@pytest.mark.parametrize("resume", [False, True])
def test_no_model_is_kept_once_the_next_one_counts(tmp_path, resume):
    """A large one's server would otherwise need room for one more, to the end."""
    if resume:
        federation(tmp_path, [Learner()], rounds=1).federate()
    server = federation(tmp_path, [Learner()], rounds=5, resume=resume)
    kept, alive = [], []
    real, set_weights = server.folder.save_checkpoint, server._set_global_weights
    server._set_global_weights = lambda weights: (kept.append(weakref.ref(weights[0])), set_weights(weights))[1]

    def save(checkpoint) -> None:
        real(checkpoint)
        kept.append(weakref.ref(checkpoint.weights[0]))
        alive.append(len({id(ref()) for ref in kept if ref() is not None}))

    server.folder.save_checkpoint = save
    server.federate()
    assert (server.exit_code, len(alive)) == (0, 4 if resume else 6)
    assert alive == [1] * len(alive)


def spy(server, order: list[str]) -> None:
    aggregate = server.aggregator.aggregate
    server.aggregator.aggregate = lambda *a: (order.append("aggregate"), aggregate(*a))[1]


def test_the_model_is_the_mean_by_examples_and_so_are_the_metrics(tmp_path):
    server = federation(tmp_path, [Learner(step=1, examples=10), Learner(step=5, examples=30)], rounds=2)
    server.federate()
    assert server.weights[0].tolist() == [8, 8]  # (1 * 10 + 5 * 30) / 40 = 4 a round
    assert server.weights[1].tolist() == [0.25]
    assert server.weights[2] == 2
    untrained, first, second = server.history.rounds
    assert [each.metrics["accuracy"] for each in (untrained, first, second)] == [0, 4, 8]
    assert first.metrics["f1"] == (10 * 10 + 30 * 30) / 40
    assert (untrained.train_metrics, first.train_metrics) == ({}, {"train_loss": 1.0})
    assert [each.clients for each in (untrained, first, second)] == [2, 2, 2]
    assert first.bytes_received == 2 * (2 * 4 + 4 + 8)
    assert first.by_client["accuracy"] == {"0": 4.0, "1": 4.0}


def test_a_nan_update_is_left_out_and_named_and_the_run_goes_on(tmp_path, capsys):
    server = federation(tmp_path, [Learner(1), Learner(9, fit=nan_in(2)), Learner(2)])
    server.federate()
    assert server.exit_code == 0
    assert [each.clients for each in server.history.rounds] == [3, 3, 2, 3]
    assert reasons(server) == [(2, 1, "array 0 holds NaN or infinite values")]
    assert "round 2: client 1 left out: array 0 holds NaN or infinite values\n" in capsys.readouterr().out
    assert server.weights[0][0] == pytest.approx(4 + 1.5 + 4)


def test_three_bad_updates_in_a_row_cost_the_place_and_a_good_one_in_between_forgives(tmp_path):
    always = Learner(fit=lambda n, w, e, m: (w, 10**9, m))
    now_and_then = Learner(fit=lambda n, w, e, m: (w, 10**9 if n % 3 else e, m))
    server = federation(tmp_path, [Learner(), always, now_and_then], rounds=5, min_clients=1)
    server.federate()
    assert server.exit_code == 0
    assert list(server.clients.dropped) == [1]
    assert server.clients.dropped[1].startswith("3 bad updates in a row, the last: it claims 1000000000 examples")
    assert now_and_then.fitted == [1, 2, 3, 4, 5]


def test_a_client_that_says_it_failed_is_dropped_at_once(tmp_path):
    failing = Learner(fit=lambda n, w, e, m: ([], 0, {"error": "its own code failed"}))
    server = federation(tmp_path, [Learner(), failing])
    server.federate()
    assert server.clients.dropped == {1: "it failed"}
    assert reasons(server)[0] == (1, 1, "it says: its own code failed")


def test_a_client_that_breaks_off_is_left_out_and_may_come_back(tmp_path):
    learners = [Learner(), Learner(9, fit=lambda n, *usual: lost() if n == 1 else usual)]
    server = federation(tmp_path, learners, rounds=1, min_clients=1)
    server.federate()
    assert server.exit_code == 0
    assert [each.clients for each in server.history.rounds] == [2, 1]
    assert server.weights[0].tolist() == [1, 1]
    assert server.clients.dropped == {}, "its place is free, and it isn't dropped"


def test_selection_is_a_sorted_draw_from_seed_and_round(tmp_path):
    learners = [Learner() for _ in range(10)]
    server = federation(tmp_path, learners, fraction_fit=0.3, rounds=4, seed=7)
    server.federate()
    for number in range(1, 5):
        drawn = np.random.default_rng([7, number]).choice(10, 3, replace=False)
        assert [p for p, learner in enumerate(learners) if number in learner.fitted] == sorted(drawn)


# Updates out of line


def test_an_update_scaled_a_hundredfold_is_left_out_with_its_figures(tmp_path):
    server = federation(tmp_path, [Learner(1), Learner(100), Learner(1.5)], rounds=2)
    server.federate()
    assert server.exit_code == 0
    assert [row[:2] for row in reasons(server)] == [(1, 1), (2, 1)]
    words = "its step (L2 norm 141) is 66.7 times the median, above --outlier-factor 20"
    assert reasons(server)[0][2] == words
    assert server.weights[0][0] == pytest.approx(2.5)
    assert server.history.rounds[1].by_client["step_size"] == pytest.approx(
        {"0": 2**0.5, "1": 100 * 2**0.5, "2": 1.5 * 2**0.5}
    )


def test_outliers_count_where_the_check_is_off_or_only_two_can_be_compared(tmp_path):
    for number, (learners, factor) in enumerate([([1, 100, 1], 0.0), ([1, 100], 20.0)]):
        (tmp_path / str(number)).mkdir()
        server = federation(tmp_path / str(number), [Learner(s) for s in learners], rounds=1, outlier_factor=factor)
        server.federate()
        assert reasons(server) == []
        assert server.weights[0][0] == pytest.approx(sum(learners) / len(learners))


def test_a_steps_cosine_is_to_the_mean_of_the_others(tmp_path):
    server = federation(tmp_path, [Learner(1), Learner(2), Learner(-1)], rounds=1)
    server.federate()
    # The others' means: (2 - 1) / 2 > 0, (1 - 1) / 2 = 0, which has no direction, and (1 + 2) / 2 > 0.
    assert server.history.rounds[1].by_client["cosine"] == pytest.approx({"0": 1.0, "2": -1.0})


def negative_variance(number, weights, examples, metrics):
    return [weights[0], -np.ones(1, np.float32) * 9, weights[2]], examples, metrics


def test_the_update_that_makes_the_model_useless_is_found_and_the_round_made_without_it(tmp_path, capsys):
    learners = [Learner(1), Learner(1, fit=negative_variance), Learner(2)]
    server = federation(tmp_path, learners, rounds=1, strategy="fedadam")
    server.federate()
    quiet = federation(tmp_path / "quiet", [Learner(1), Learner(2)], rounds=1, strategy="fedadam")
    quiet.federate()
    assert server.exit_code == 0
    assert [array.tobytes() for array in server.weights] == [array.tobytes() for array in quiet.weights]
    ((number, partition, reason),) = reasons(server)
    assert (number, partition) == (1, 1)
    assert reason.startswith("with its update most clients can't evaluate the model; its step is ")
    assert "looking for the update that is to blame" in capsys.readouterr().out
    assert [each.strikes for each in server.clients.ready()] == [0, 1, 0]


def test_where_no_single_update_is_to_blame_the_model_stays_and_nobody_is(tmp_path, capsys):
    bad = [Learner(1, fit=negative_variance) for _ in range(2)]
    server = federation(tmp_path, [Learner(1), *bad], rounds=2)
    server.federate()
    assert server.exit_code == 1  # no update of any client ever counted
    assert "no single update is to blame; none of the round counts" in capsys.readouterr().out
    assert [each.clients for each in server.history.rounds] == [3, 0, 0]
    assert server.weights[0].tolist() == [0, 0]


def test_one_client_that_cant_evaluate_a_good_model_is_left_out_alone(tmp_path):
    odd = Learner(evaluate=lambda n, loss, e, m: (float("nan"), e, m))
    server = federation(tmp_path, [Learner(), odd, Learner()], rounds=1)
    server.federate()
    assert [row for row in reasons(server) if row[0] == 1] == [(1, 1, "its loss is nan")]
    assert server.history.rounds[1].clients == 3


# How a run ends


def test_a_run_in_which_no_update_ever_counted_has_failed(tmp_path, capsys):
    server = federation(tmp_path, [Learner(fit=lambda n, w, e, m: (w[:1], e, m)) for _ in range(2)], rounds=2)
    server.federate()
    assert server.exit_code == 1
    assert server.clients.told[0] == "failed"
    said = capsys.readouterr().out
    assert "error: no update of any client counted, so the model is the untrained one" in said
    assert "--resume" not in said
    assert not (server.folder.path / "model.safetensors").exists()


def test_the_target_ends_the_run_after_the_round_that_reaches_it(tmp_path, capsys):
    server = federation(tmp_path, [Learner(0.3), Learner(0.3)], rounds=9, target=0.5)
    server.federate()
    assert server.exit_code == 0
    assert [each.round for each in server.history.rounds] == [0, 1, 2]
    assert "accuracy 0.5 reached after round 2 (--target)" in capsys.readouterr().out


def test_the_untrained_model_is_round_0_and_never_reaches_the_target(tmp_path):
    generous = Learner(evaluate=lambda n, loss, e, m: (loss, e, {"accuracy": 0.9}))
    server = federation(tmp_path, [generous], target=0.5)
    server.federate()
    assert generous.evaluated == [0, 1]
    assert generous.fitted == [1]
    untrained = server.history.rounds[0]
    assert (untrained.round, untrained.clients, untrained.bytes_received) == (0, 1, 0)


def regression(server):
    """The clients of a task whose main metric is an error: 8 at first, and less by their step in each round."""
    arrays = [["w", [2], "float32"], ["variance", [1], "float32"], ["count", [], "int64"]]
    recipe = {"model": "mlp", "batch_size": 8, "learning_rate": 0.1, "own": {}}
    metrics = [Metric("mae", higher_is_better=False)]
    task = TaskSummary("regression", arrays, [], "", "", "", metrics, recipe, schema={}, columns=[])
    server.clients.agreed = dataclasses.replace(server.clients.agreed, task=task)
    for one in server.clients.ready():
        one.summary = server.clients.agreed
        one.client.learner.bad_evaluate = lambda n, loss, e, m: (loss, e, {"mae": 8 - m["accuracy"]})
    return server


def test_where_less_is_better_the_target_is_reached_from_above(tmp_path, capsys):
    server = regression(federation(tmp_path, [Learner(3), Learner(3)], rounds=9, target=2.5))
    server.federate()
    assert server.exit_code == 0
    assert [each.main() for each in server.history.rounds] == [8, 5, 2]
    assert "mae 2.5 reached after round 2 (--target)" in capsys.readouterr().out


def test_where_less_is_better_a_target_that_is_equalled_is_reached(tmp_path):
    server = regression(federation(tmp_path, [Learner(3)], rounds=9, target=5))
    server.federate()
    assert server.rounds_done == 1


def test_a_score_without_the_tasks_main_metric_does_not_count(tmp_path):
    server = regression(federation(tmp_path, [Learner(), Learner(), Learner()], rounds=1))
    server.clients.participants[1].client.learner.bad_evaluate = lambda n, loss, e, m: (loss, e, m)
    server.federate()
    assert server.exit_code == 0
    assert reasons(server) == [(0, 1, "its mae is None"), (1, 1, "its mae is None")]
    assert server.history.rounds[1].by_client["mae"] == {"0": 7.0, "2": 7.0}


def test_a_main_metric_that_is_undefined_at_a_client_is_the_others_and_unknown_where_it_is_at_all(tmp_path):
    undefined = lambda n, loss, e, m: (loss, e, {"mae": float("nan") if n == 1 else 4.0})  # noqa: E731
    for name, number in (("one", 1), ("all", 2)):
        server = regression(federation(tmp_path / name, [Learner(), Learner()], rounds=2, target=1))
        metric = Metric("mae", higher_is_better=False, additive=False)
        task = dataclasses.replace(server.clients.agreed.task, metrics=[metric])
        server.clients.agreed = dataclasses.replace(server.clients.agreed, task=task)
        for one in server.clients.ready():
            one.summary = server.clients.agreed
            if one.partition < number:
                one.client.learner.bad_evaluate = undefined
        server.federate()
        assert server.exit_code == 0
        assert reasons(server) == []
        first = server.history.rounds[1]
        assert (first.main(), first.by_client["mae"]) == {"one": (7.0, {"1": 7.0}), "all": (None, {})}[name]
        assert len(server.history.rounds) == 3


def test_too_few_clients_end_the_run_with_1_and_keep_the_checkpoint(tmp_path, capsys):
    gone = [Learner(fit=lambda n, *a: lost() if n == 2 else a) for _ in range(2)]
    server = federation(tmp_path, [Learner(), *gone])
    server.federate()
    assert server.exit_code == 1
    said = capsys.readouterr().out
    assert "1 of 3 clients left after round 2, and --min-clients is 2; the checkpoint is kept; start more" in said
    assert f"then go on with: python server.py --resume {server.folder.path}" in said
    assert server.folder.load_checkpoint().server_round == 2


def test_nobody_comes_and_the_server_does_not_wait_without_end(tmp_path, capsys):
    server = federation(tmp_path, [Learner()])
    server.clients.participants.clear()
    server.federate()
    assert server.exit_code == 1
    assert "0 of 1 clients came within 0.2 s; start more, or raise --join-timeout" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_in_order_and_says_how_to_go_on(tmp_path, capsys, number, code):
    interrupt = Learner(fit=lambda n, *usual: (server._on_signal(number, None), usual)[1] if n == 2 else usual)
    server = federation(tmp_path, [interrupt])
    server.federate()
    assert server.exit_code == code
    assert server.clients.told == ("stopped", f"the server was stopped by {number.name} after round 1")
    assert f"stopped by {number.name} after round 1; go on with: python server.py --resume" in capsys.readouterr().out


def test_a_path_with_a_space_is_quoted_in_the_command_to_go_on_with(tmp_path, capsys):
    (tmp_path / "zweiter Lauf").mkdir()
    server = federation(tmp_path / "zweiter Lauf", [Learner(fit=lost)])
    server.federate()
    assert f"--resume '{server.folder.path}'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "can't be written (No space left on device); free or change the disk"),
        (TooLarge("array 0 holds 7e+04"), "the new model can't be sent: array 0 holds 7e+04; begin a new run"),
    ],
)
def test_what_the_machine_or_the_model_refuses_is_one_line(tmp_path, monkeypatch, capsys, error, words):
    server = federation(tmp_path, [Learner()])

    def fail(*_):
        raise error

    monkeypatch.setattr(server.folder, "save_checkpoint", fail)
    server.federate()
    said = capsys.readouterr()
    assert server.exit_code == 1
    assert words in said.out
    assert said.err == ""
    assert server.clients.told[0] == "failed"


def test_a_model_beyond_float16_ends_a_compressed_run_with_one_line(tmp_path, capsys):
    def packed(number, weights, examples, metrics):
        return [array.astype(np.float16) if array.dtype.kind == "f" else array for array in weights], examples, metrics

    learners = [Learner(fit=packed) for _ in range(2)]
    server = federation(tmp_path, learners, strategy="fedadam", server_learning_rate=1e6, compress="fp16")
    server.federate()
    assert server.exit_code == 1
    said = capsys.readouterr()
    assert "error: the new model can't be sent: array 0 holds " in said.out
    assert "beyond the 65504 that --compress fp16 can carry; begin a new run without it" in said.out
    assert said.err == ""
    assert server.folder.load_checkpoint().server_round == 0


def test_a_fault_of_ours_is_shown_whole_and_nobody_waits(tmp_path, monkeypatch, capsys):
    server = federation(tmp_path, [Learner()])
    monkeypatch.setattr(Dispatcher, "select", lambda self, number: 1 / 0)
    server.federate()
    assert server.exit_code == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert server.clients.told == ("failed", "the server failed (ZeroDivisionError)")


def test_no_client_can_send_the_untrained_model(tmp_path, monkeypatch, capsys):
    server = federation(tmp_path, [Learner()])
    monkeypatch.setattr("helpers.in_process.START", [])
    server.federate()
    assert server.exit_code == 1
    said = capsys.readouterr().out
    assert "client 0 can't send the untrained model: it holds no arrays" in said
    assert "no client could send the untrained model; look at what the clients print" in said


def test_flowers_server_hands_over_and_signals_set_a_flag_only(tmp_path, monkeypatch):
    server, handlers = federation(tmp_path, [Learner()], rounds=1), {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    _, seconds = server.fit(num_rounds=1, timeout=None)
    server.disconnect_all_clients(timeout=None)
    assert server.exit_code == 0
    assert 0 <= seconds < 60
    assert set(handlers) == {signal.SIGINT, signal.SIGTERM}
    assert server.clients.told == ("finished", "the run is done after 1 rounds")
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert server.dispatcher.stop.is_set()


# Lost and resumed


def test_a_round_that_loses_all_its_clients_is_done_again_with_the_same_bits(tmp_path, capsys):
    def once(in_round: int):
        seen = set()

        def fit(number, *usual):
            if number == in_round and number not in seen:
                seen.add(number)
                lost()
            return usual

        return fit

    quiet = federation(tmp_path / "quiet", [Learner(1), Learner(2)], strategy="fedadam")
    quiet.federate()
    learners = [Learner(1, fit=once(2)), Learner(2, fit=once(2))]
    server = federation(tmp_path, learners, strategy="fedadam", rejoin_wait=5.0, back=True)
    server.federate()
    assert server.exit_code == 0
    assert [array.tobytes() for array in server.weights] == [array.tobytes() for array in quiet.weights]
    words = "round 2: all its clients were lost; it is done again once they are back (--rejoin-wait 5 s)"
    assert words in capsys.readouterr().out


def test_a_round_whose_clients_never_come_back_ends_the_run(tmp_path, capsys):
    server = federation(tmp_path, [Learner(evaluate=lambda n, *a: lost() if n == 1 else a) for _ in range(2)])
    server.federate()
    assert server.exit_code == 1
    assert "0 of 2 clients left after round 0, and --min-clients is 2" in capsys.readouterr().out


def test_a_round_that_loses_all_its_clients_five_times_ends_the_run(tmp_path, capsys):
    learners = [Learner(fit=lost), Learner(fit=lost)]
    server = federation(tmp_path, learners, rejoin_wait=5.0, back=True)
    server.federate()
    assert server.exit_code == 1
    assert learners[0].fitted == [1] * 5
    assert "error: round 1 lost all its clients 5 times; then go on with: " in capsys.readouterr().out


def test_a_model_that_nobody_can_evaluate_ends_the_run(tmp_path, capsys):
    blind = Learner(evaluate=lambda n, loss, e, m: (loss, e, {"f1": 1.0}))
    server = federation(tmp_path, [blind])
    server.federate()
    assert server.exit_code == 1
    assert reasons(server) == [(0, 0, "its accuracy is None")]
    assert "error: no client could evaluate the model of round 0" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedavgm"])
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_ends_with_the_bits_of_a_quiet_one(tmp_path, strategy, stop):
    steps = (1, 2, 4)
    quiet = federation(tmp_path / "quiet", [Learner(s) for s in steps], strategy=strategy)
    quiet.federate()
    learners = [Learner(s) for s in steps]
    server = federation(tmp_path, learners, strategy=strategy)
    learners[0].bad_fit = lambda n, *usual: (server._on_signal(15, None), usual)[1] if n == stop + 1 else usual
    server.federate()
    assert server.rounds_done == stop
    again = federation(tmp_path, [Learner(s) for s in steps], strategy=strategy, resume=True)
    again.federate()
    assert again.exit_code == 0
    assert [array.tobytes() for array in again.weights] == [array.tobytes() for array in quiet.weights]
    assert [each.round for each in RunFolder(again.folder.path).load_history().rounds] == [0, 1, 2, 3]


class Recorder:
    def __init__(self):
        self.told = []

    def begin(self, history):
        self.told.append("begin")

    def round(self, record):
        self.told.append(record.round)

    def end(self, exit_code):
        self.told.append(("end", exit_code))


def test_observers_hear_of_the_beginning_every_round_and_the_end(tmp_path):
    one, two = Recorder(), Recorder()
    federation(tmp_path, [Learner()], rounds=2, observers=Observers([one, two])).federate()
    assert one.told == two.told == ["begin", 0, 1, 2, ("end", 0)]


def test_an_observer_that_raises_is_left_out_and_the_run_goes_on(tmp_path, capsys):
    class Away(Recorder):
        def round(self, record):
            super().round(record)
            raise ConnectionError("no route")

    away, there = Away(), Recorder()
    server = federation(tmp_path, [Learner()], rounds=2, observers=Observers([away, there]))
    server.federate()
    assert server.exit_code == 0
    assert away.told == ["begin", 0]
    assert there.told == ["begin", 0, 1, 2, ("end", 0)]
    assert "Away failed (ConnectionError: no route); the run goes on without it" in capsys.readouterr().out


# Who may begin


def test_clients_of_one_class_are_too_few_classes(tmp_path, capsys):
    server = federation(tmp_path, [Learner()])
    server.clients.participants[0].classes = ["cat"]
    server.federate()
    assert server.exit_code == 1
    assert "the clients have 1 class; a classifier needs two at least" in capsys.readouterr().out


def test_a_client_with_other_classes_makes_way_before_the_first_round(tmp_path, capsys):
    server = federation(tmp_path, [Learner(), Learner(), Learner()])
    server.clients.participants[0].classes = ["cow", "dog"]
    server.federate()
    assert server.clients.dropped == {0: "its classes [cow, dog] are not the federation's [cat, dog]"}
    assert "2 of 3 clients came within 0.2 s" in capsys.readouterr().out


def test_with_data_of_their_own_a_client_that_lacks_a_class_is_told_all(tmp_path, monkeypatch, capsys):
    server = federation(tmp_path, [Learner(), Learner()], partitioner="local", rounds=1)
    server.clients.participants[1].classes = ["dog"]
    monkeypatch.setattr(server.clients, "reassign", lambda one: setattr(one, "told_classes", True))
    server.federate()
    assert server.exit_code == 0
    assert "client 1 has no cat, which others have; it is told all classes\n" in capsys.readouterr().out
    assert server.history.config["classes"] == ["cat", "dog"]


def test_a_client_of_another_task_makes_way_before_the_first_round_with_both_sides_values(tmp_path, capsys):
    server = federation(tmp_path, [Learner(), Learner(), Learner()])
    server.clients.agreed = None  # nothing is fixed before all are there
    for partition, side in enumerate([64, 32, 32]):
        one = server.clients.participants[partition]
        one.summary = dataclasses.replace(one.summary, input_shape=[3, side, side])
    server.federate()
    words = "it has inputs of shape [3, 64, 64], the others [3, 32, 32]; use one data.py"
    assert server.clients.dropped == {0: words}
    assert "2 of 3 clients came within 0.2 s" in capsys.readouterr().out


def test_clients_of_a_task_without_classes_may_begin(tmp_path):
    server = federation(tmp_path, [Learner(), Learner()], rounds=1)
    for one in server.clients.ready():
        one.classes = []
    server.federate()
    assert server.exit_code == 0
    assert server.folder.load_config()["classes"] == []


# Frozen layers, and weights to begin with

FROZEN = {"base.weight": np.full((2, 2), 7, np.float32), "base.running_mean": np.array([np.inf], np.float32)}
NAMES = ["w", "variance", "count"]


def partly_frozen(server, initial: dict[str, np.ndarray] | None = None):
    """The clients of a task with frozen weights, which they can send."""
    described = [[name, list(array.shape), str(array.dtype)] for name, array in FROZEN.items()]
    server = regression(server)
    task = dataclasses.replace(
        server.clients.agreed.task, frozen_arrays=described, frozen=model_file.hash_of(FROZEN), name="own"
    )
    server.clients.agreed = dataclasses.replace(server.clients.agreed, task=task)
    server.clients.initial = initial or {}
    for one in server.clients.ready():
        one.summary = server.clients.agreed
        plain = one.client.get_parameters
        one.client.get_parameters = lambda ins, timeout, group_id, plain=plain: (
            GetParametersRes(OK, ndarrays_to_parameters(list(FROZEN.values())))
            if "frozen" in ins.config
            else plain(ins, timeout, group_id)
        )
    return server


def test_frozen_weights_are_asked_for_once_and_are_in_the_final_model(tmp_path):
    server = partly_frozen(federation(tmp_path, [Learner(), Learner()], rounds=2))
    server.federate()
    assert server.exit_code == 0
    arrays, about = model_file.read(server.folder.path / "model.safetensors")
    assert sorted(arrays) == sorted([*FROZEN, *NAMES])
    assert arrays["base.weight"].tolist() == [[7, 7], [7, 7]]
    assert arrays["w"].tolist() == [2, 2]
    assert about["task"] == "own"


def test_a_resumed_run_still_has_the_frozen_weights(tmp_path):
    partly_frozen(federation(tmp_path, [Learner(), Learner()], rounds=1)).federate()
    (tmp_path / "run" / "model.safetensors").unlink()
    server = partly_frozen(federation(tmp_path, [Learner(), Learner()], rounds=2, resume=True))
    server.federate()
    assert server.exit_code == 0
    arrays, _ = model_file.read(server.folder.path / "model.safetensors")
    assert arrays["base.weight"].tolist() == [[7, 7], [7, 7]]
    assert arrays["w"].tolist() == [2, 2]


def test_who_sends_other_frozen_weights_than_it_told_of_is_dropped_in_words(tmp_path, capsys):
    server = partly_frozen(federation(tmp_path, [Learner()], rounds=1))
    task = dataclasses.replace(server.clients.agreed.task, frozen="0" * 64)
    server.clients.agreed = server.clients.ready()[0].summary = dataclasses.replace(server.clients.agreed, task=task)
    server.federate()
    assert server.exit_code == 1
    said = capsys.readouterr().out
    assert "client 0 can't send the untrained model: its frozen weights are not those that it told of" in said
    assert "error: no client could send the untrained model" in said


def test_weights_that_the_server_is_given_are_begun_with_and_no_client_is_asked(tmp_path):
    given = {"w": np.array([5, 6], np.float32), "variance": np.ones(1, np.float32), "count": np.array(3), **FROZEN}
    server = partly_frozen(federation(tmp_path, [Learner(), Learner()], rounds=1), given)
    for one in server.clients.ready():
        one.client.get_parameters = lost
    server.federate()
    assert server.exit_code == 0
    assert server.weights[0].tolist() == [6, 7]
    assert server.weights[2] == 4
    arrays, _ = model_file.read(server.folder.path / "model.safetensors")
    assert arrays["base.weight"].tolist() == [[7, 7], [7, 7]]


def test_without_a_word_about_its_arrays_the_final_models_are_named_by_position(tmp_path):
    server = federation(tmp_path, [Learner()], rounds=1)
    server.federate()
    arrays, about = model_file.read(server.folder.path / "model.safetensors")
    assert (sorted(arrays), list(about)) == (["w00000", "w00001", "w00002"], ["provenance"])


def test_what_clients_hold_by_class_is_kept_for_the_picture(tmp_path):
    server = federation(tmp_path, [Learner(), Learner()], rounds=1)
    server.clients.participants[1].class_counts = [400, 600]
    server.federate()
    assert server.folder.load_config()["class_counts"] == {"1": [400, 600]}


def test_a_client_with_many_more_examples_takes_longer_steps_and_is_no_outlier(tmp_path):
    learners = [Learner(1, examples=10), Learner(1, examples=10), Learner(29, examples=290)]
    server = federation(tmp_path, learners, rounds=1)
    server.federate()
    assert reasons(server) == []

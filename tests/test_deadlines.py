"""What is asked over a stream has a deadline, and one thread sees to all of them."""

import threading

from federation.server.grpc_server import Deadlines


class Stream:
    def __init__(self, breaks: bool = False) -> None:
        self.breaks, self.closed = breaks, threading.Event()

    def close(self) -> None:
        self.closed.set()
        if self.breaks:
            raise ValueError("it ended by itself")


def test_a_stream_whose_answer_is_overdue_is_closed_and_no_other():
    deadlines, overdue, patient = Deadlines(), Stream(), Stream()
    with deadlines.of(patient, 1000), deadlines.of(overdue, 0):
        assert overdue.closed.wait(10)
    assert not patient.closed.is_set()


def test_a_stream_that_is_answered_in_time_is_never_closed():
    deadlines, answered, later = Deadlines(), Stream(), Stream()
    with deadlines.of(answered, 0.5):
        pass
    with deadlines.of(later, 0.6):
        assert later.closed.wait(10)
    assert not answered.closed.is_set()


def test_a_stream_that_breaks_as_it_is_closed_does_not_end_the_watch_over_the_others():
    deadlines, broken, other = Deadlines(), Stream(breaks=True), Stream()
    with deadlines.of(broken, 0):
        assert broken.closed.wait(10)
    with deadlines.of(other, 0):
        assert other.closed.wait(10)


def test_a_thousand_deadlines_take_one_thread():
    deadlines, before = Deadlines(), threading.active_count()
    for _ in range(1000):
        with deadlines.of(Stream(), 1000):
            assert threading.active_count() <= before + 1

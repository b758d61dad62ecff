"""A client's stream at the server: an answer for each question, each with a deadline."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

from federation.server.grpc_server import Deadlines, GrpcBridgeClosed, InsWrapper, Servicer


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


# One stream


class Clients:
    """A client manager that asks whoever comes these questions, one after the other, and then ends the stream."""

    def __init__(self, *questions: bytes) -> None:
        self.questions, self.answers, self.there = questions, [], []

    def register(self, proxy) -> bool:
        self.there.append(proxy)
        threading.Thread(target=self._ask, args=[proxy.bridge], daemon=True).start()
        return bool(self.questions)

    def unregister(self, proxy) -> None:
        self.there.remove(proxy)

    def _ask(self, bridge) -> None:
        with suppress(GrpcBridgeClosed):
            for question in self.questions:
                self.answers.append(bridge.ask(InsWrapper(question, None)))
            bridge.close()


class Context:
    """gRPC's, of a stream that goes on, or has ended already."""

    def __init__(self, ended: bool = False) -> None:
        self.ended, self.cancelled = ended, False

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.callback = callback
        return not self.ended

    def cancel(self) -> None:
        self.cancelled = True


def test_one_answer_is_taken_for_each_question_and_the_rest_stays_with_the_sender():
    clients, context, taken = Clients(b"a", b"b"), Context(), []

    def sent() -> Iterator[str]:
        for answer in "1234":
            taken.append(answer)
            yield answer

    assert list(Servicer(clients).join(sent(), context)) == [b"a", b"b"]
    assert clients.answers == taken == ["1", "2"]
    assert context.cancelled


def test_a_client_whose_answers_end_is_asked_no_more_and_is_gone_with_its_stream():
    clients, context = Clients(b"a", b"b"), Context()
    assert list(Servicer(clients).join(iter([]), context)) == [b"a"]
    assert len(clients.there) == 1
    context.callback()  # as gRPC calls it at the end of the stream
    assert (clients.there, clients.answers) == ([], [])


def test_a_stream_that_has_ended_before_it_is_registered_leaves_nobody_behind():
    clients = Clients(b"a")
    assert list(Servicer(clients).join(iter([]), Context(ended=True))) == []
    assert clients.there == []


def test_a_client_that_is_not_taken_is_asked_nothing():
    assert list(Servicer(Clients()).join(iter("1"), Context())) == []

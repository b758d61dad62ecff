"""Who is told how a run goes on, such as TensorBoard. Add your own here: any object with these three functions."""

from typing import Protocol

from federation.console import clean, say
from federation.results.history import History, RoundRecord


class Observer(Protocol):
    """May be slow or fail: it is told after the round is on disk, and left out from then on if it raises."""

    def begin(self, history: History) -> None: ...

    def round(self, record: RoundRecord) -> None: ...

    def end(self, exit_code: int) -> None: ...


class Observers:
    """All observers of a run as one."""

    def __init__(self, observers: list[Observer]) -> None:
        self._observers = list(observers)

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def begin(self, history: History) -> None:
        self._tell("begin", history)

    def round(self, record: RoundRecord) -> None:
        self._tell("round", record)

    def end(self, exit_code: int) -> None:
        self._tell("end", exit_code)

    def _tell(self, what: str, value: object) -> None:
        for observer in list(self._observers):
            try:
                getattr(observer, what)(value)
            except Exception as error:  # a tracking server that is away must not end the run
                self._observers.remove(observer)
                name = type(observer).__name__
                say(f"{name} failed ({type(error).__name__}: {clean(error)}); the run goes on without it")


def open_observers(tensorboard: str | None) -> Observers:
    """Those that the flags ask for. Exits with 1 and one line where one can't be had."""
    from federation.results.tensorboard import TensorBoard

    return Observers([TensorBoard(tensorboard)] if tensorboard else [])

"""A client that stays: it takes part in one run after the other, and comes back when the server does."""

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from federation.client.connection import attempt, prepare
from federation.client.policy import AgainstPolicy, OutsideHours
from federation.client.session import RunEnded, Session
from federation.console import clean, say, show_fault

SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts; each twice the last


@dataclass
class Outcome:
    """How an attempt of a client that stays ended."""

    words: str
    away: bool = False  # whether there was nobody to take part with
    # Of a session that is over, the run that the next one must not come back to, or ""; None where this one goes on.
    left_run: str | None = None


def stay(
    new_session: Callable[[str], Session],
    read_again: Callable[[Session], None],
    finished: Callable[[Session], str],
    address: str,
    root_certificates: bytes | None = None,
    fatal: tuple[type[Exception], ...] = (),
) -> NoReturn:
    """Take part in one run after the other, for days; says a line for each. Raises RunEnded where `fatal` ended one.

    new_session: given the id of a run that it must not come back to, or "". read_again: called before each attempt,
    for files that may have changed. finished: what to do with a final model; returns what is said of it. Nothing that
    the other side says ends it: who poses as the server must not be able to end a hospital's client.
    """
    prepare(address)
    session, pause, said = new_session(""), SHORTEST_PAUSE, ("", "")
    while True:
        read_again(session)
        joined = session.joined
        outcome = _once(session, finished, address, root_certificates, fatal)
        line = session.run_id, outcome.words
        if session.joined > joined:
            say(f"run {session.run_id or 'without an id'}: {outcome.words}")
            say(f"waiting for the next run at {address}")
            pause, said = SHORTEST_PAUSE, line
        elif line != said and not (outcome.away and said[1]):
            say(f"{outcome.words}; asking again, in the end once a minute")
            said = line
        if outcome.left_run is not None:
            session.audit.close()
            session = new_session(outcome.left_run)
            gc.collect()  # an exception and its traceback may still hold the last run's network and examples
        time.sleep(pause * random.uniform(0.5, 1))  # not all at once, where many have lost the same server
        pause = min(2 * pause, LONGEST_PAUSE)


def _once(
    session: Session,
    finished: Callable[[Session], str],
    address: str,
    root_certificates: bytes | None,
    fatal: tuple[type[Exception], ...],
) -> Outcome:
    if not session.policy.is_open():
        return Outcome(f"it works at {session.policy.words_for_hours()} only (hours)", away=True)
    try:
        why = attempt(session, address, root_certificates)
        if why is not None:
            return Outcome(why, away=True)
        done = session.close_reason.words if session.close_reason else "the server said no more"
        return Outcome(f"{done}; {finished(session)}" if session.metrics else done, left_run="")
    except RunEnded as end:
        error = end.__cause__
        if isinstance(error, fatal):
            raise
        if isinstance(error, OutsideHours):  # the same run may go on at other hours
            session.failure = session.error = None
            return Outcome(str(end))
        if isinstance(error, AgainstPolicy) and not session.joined:  # the file may change while the run waits
            return Outcome(str(end), left_run="")
        over = error or (session.close_reason and session.close_reason.kind == "dropped")
        return Outcome(str(end), left_run=session.run_id if over else None)
    except Exception as error:  # what the server said made no sense, or a fault of ours: show where
        show_fault(error)
        return Outcome(f"{type(error).__name__}: {clean(error)}", left_run=session.run_id)

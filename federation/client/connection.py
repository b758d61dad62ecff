"""The client's way to the server: wait for it, keep the stream, come back when it breaks, say what is wrong."""

import gc
import inspect
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Full
from typing import Any, NoReturn

from federation.client.policy import AgainstPolicy, OutsideHours
from federation.client.proxy import passed_over, proxy_for, try_proxy
from federation.client.session import RunEnded, Session
from federation.console import clean, say, show_fault
from federation.net import bypass_proxy, is_loopback, join, keep_client_connection, parse_address
from federation.security.tls import PROBE_SECONDS, tls_mismatch

import grpc
from flwr.client import Client

# All of Flower's private names that the client needs are imported here; Flower 1.43 keeps them under flwr.compat.
try:
    from flwr.client.message_handler.message_handler import (
        handle_control_message,
        handle_legacy_message_from_msgtype,
    )
except ImportError:
    from flwr.compat.client.message_handler.message_handler import (  # type: ignore[no-redef]
        handle_control_message,
        handle_legacy_message_from_msgtype,
    )
from flwr.compat.client.grpc_client.connection import grpc_connection

SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts of a client that stays; each twice the last


def connect(session: Session, address: str, *, wait: float, root_certificates: bytes | None = None) -> None:
    """Take part until the run is done, asking again for `wait` seconds whenever the server is not there.

    Raises RunEnded when the run ends otherwise, the server stays away, or TLS on the two sides does not fit.
    """
    prepare(address)
    away_since, announced, heard = time.monotonic(), False, 0
    while True:
        words = attempt(session, address, root_certificates)
        if words is None:
            return
        if session.heard > heard:
            away_since, announced, heard = time.monotonic(), False, session.heard
        if not announced:
            say(f"{words}; asking again for {wait:g} s")
            announced = True
        if time.monotonic() - away_since >= wait:
            remedy = "; start `python server.py`, or name it with --server" if words.startswith("no server") else ""
            raise RunEnded(f"{words} after {wait:g} s{remedy}" if remedy else f"{words}; gave up after {wait:g} s")
        time.sleep(min(1.0, wait / 10))


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


def prepare(address: str) -> None:
    """What holds for all connections of this process; before the first."""
    host, _ = parse_address(address)
    if is_loopback(host):
        bypass_proxy(host)
    keep_client_connection()
    threading.excepthook = _hush


def attempt(session: Session, address: str, root_certificates: bytes | None = None) -> str | None:
    """Take part until the stream ends. None where the run is done, else why to ask again. Raises RunEnded."""
    try:
        answer(session.to_client(), address, root_certificates)
        if session.close_reason and session.close_reason.kind == "stopped" and not session.failure:
            return session.close_reason.words
        session.raise_for_end()
        return None
    except (grpc.RpcError, StopIteration) as error:
        if session.failure:
            session.raise_for_end()
        return _explain(error, *parse_address(address), root_certificates)


def answer(client: Client, address: str, root_certificates: bytes | None) -> None:
    """Answer the server's messages until it ends the stream for good; raises grpc.RpcError or StopIteration otherwise.

    The stream and the handlers are those of flwr.client.start_client, which does the same, but imports all of
    Flower's programs with their database and web server for it: a fifth of a client's start.
    """
    nothing: Any = None  # for what Flower's functions take and don't use here
    pause = 1
    while pause:
        with stream(address, root_certificates) as (receive, send):
            goodbye = None
            while not goodbye:
                message: Any = receive()
                goodbye, pause = handle_control_message(message)
                send(goodbye or handle_legacy_message_from_msgtype(lambda _: client, message, nothing))
        time.sleep(pause)  # seconds after which the server wants to be asked again, or 0


@contextmanager
def stream(address: str, root_certificates: bytes | None) -> Iterator[tuple[Callable, Callable]]:
    """Flower's connection, as functions to receive and to send; ends the thread that it leaves behind each time.

    There gRPC waits for Flower's queue to bring the next message, or None, long after the channel is closed.
    """
    queue = None
    nothing: Any = None
    try:
        with grpc_connection(
            address, root_certificates is None, nothing, root_certificates=root_certificates
        ) as connection:
            receive, send, *_ = connection
            queue = inspect.getclosurevars(send).nonlocals.get("queue")
            yield receive, send
    finally:
        if queue is not None:
            with suppress(Full):  # then the thread is on its way, and sees that the channel is closed
                queue.put(None, block=False)


def _hush(broken: threading.ExceptHookArgs) -> None:
    """Threads' exceptions as ever, but for one: gRPC's watcher of a channel is at times surprised by the end of it."""
    if "Channel closed" not in str(broken.exc_value):
        show_fault(broken.exc_value or broken.exc_type())


def _explain(error: Exception, host: str, port: int, root_certificates: bytes | None) -> str:
    """What a broken stream means. Raises RunEnded where asking again can't help."""
    code, details = (error.code(), error.details() or "") if isinstance(error, grpc.Call) else (None, "")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        words = f"a message is larger than the server takes ({clean(details, 100)})"
        raise RunEnded(f"{words}; raise the server's --max-message-mb")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return f"the server at {join(host, port)} has too many connections"
    if code == grpc.StatusCode.UNAVAILABLE:
        mismatch = None
        if not proxy_for(host):
            with suppress(UnicodeError):  # no name that a host can have
                mismatch = tls_mismatch(host, port, root_certificates)
        if mismatch:
            raise RunEnded(mismatch)
        return out_of_reach(host, port)
    return f"the server at {join(host, port)} ended the connection"


def out_of_reach(host: str, port: int) -> str:
    """Why nobody answers there: an unknown name, a proxy in the way, nobody listening, or silence."""
    proxy, place = proxy_for(host), join(host, port)
    if proxy and not proxy.host:
        return f"{proxy.variable} is no http://HOST:PORT (in a login, / ? # @ are %2F %3F %23 %40)"
    if proxy:
        found = try_proxy(proxy, place)
        return f"the proxy {join(proxy.host, proxy.port)} {found}; no_grpc_proxy={host} goes without it"
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except (socket.gaierror, UnicodeError):
        return f"no host named {host} is known here; check --server{passed_over(host)}"
    except TimeoutError:
        return f"no answer from {place}; a firewall may be in the way{passed_over(host)}"
    except OSError as error:
        if not isinstance(error, ConnectionRefusedError):
            return f"no way to {place} ({error.strerror}){passed_over(host)}"
    return f"no server at {place}"

"""The client's way to the server: wait for it, keep the stream, come back when it breaks, say what is wrong."""

import inspect
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Full
from typing import Any

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

"""The client's way to the server: wait for it, keep the stream, come back when it breaks, say what is wrong."""

import os
import threading
import time

from federation.address import is_loopback, parse_server_address
from federation.keepalive import guard_client_lines
from federation.member import Member
from federation.tls import tls_mismatch
from federation.words import clean, fail, say

import grpc
from flwr.client import Client
from flwr.client.message_handler.message_handler import handle_control_message, handle_legacy_message_from_msgtype
from flwr.compat.client.grpc_client.connection import grpc_connection


def stay_connected(
    member: Member,
    address: str,
    *,
    wait: float,
    root_certificates: bytes | None = None,
) -> None:
    """Take part until the server says that it is over, asking again for `wait` seconds whenever it is not there.

    Exits with 1 and one line when the server stays away, or when TLS on the two sides does not fit.
    """
    host, port = parse_server_address(address)
    if is_loopback(host):  # gRPC would otherwise ask the proxy of http_proxy for our own machine
        spared = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))  # noqa: SIM112 (gRPC's own names)
        os.environ["no_grpc_proxy"] = f"{spared},{host}"  # noqa: SIM112
    guard_client_lines()
    threading.excepthook = _hush
    away_since, announced, heard = time.monotonic(), False, 0
    while True:
        try:
            answer(member.to_client(), address, root_certificates)
            if member.farewell is None or member.farewell.kind != "stopped" or member.failure:
                return
            words = member.farewell.words
        except (grpc.RpcError, StopIteration) as error:
            if member.failure:
                return
            words = _explain(error, host, port, root_certificates)
        if member.heard > heard:
            away_since, announced, heard = time.monotonic(), False, member.heard
        if not announced:
            say(f"{words}; asking again for {wait:g} s")
            announced = True
        if time.monotonic() - away_since >= wait:
            fail(f"no server at {address} after {wait:g} s; start `python server.py`, or name it with --server")
        time.sleep(min(1.0, wait / 10))


def answer(client: Client, address: str, root_certificates: bytes | None) -> None:
    """Answer the server's messages until it ends the stream for good; raises grpc.RpcError or StopIteration otherwise.

    The stream and the handlers are those of flwr.client.start_client, which does the same, but imports all of
    Flower's programs with their database and web server for it: a fifth of a client's start.
    """
    pause = True
    while pause:
        with grpc_connection(address, root_certificates is None, None, root_certificates=root_certificates) as line:
            receive, send, *_ = line
            goodbye = None
            while not goodbye:
                message = receive()
                goodbye, pause = handle_control_message(message)
                send(goodbye or handle_legacy_message_from_msgtype(lambda _: client, message, None))
        time.sleep(pause)  # seconds after which the server wants to be asked again, or 0


def _hush(broken: threading.ExceptHookArgs) -> None:
    """Threads' exceptions as ever, but for one: gRPC's watcher of a channel is at times surprised by the end of it."""
    if "Channel closed" not in str(broken.exc_value):
        threading.__excepthook__(broken)


def _explain(error: Exception, host: str, port: int, root_certificates: bytes | None) -> str:
    """What a broken stream means. Exits with 1 and one line where asking again can't help."""
    code = error.code() if isinstance(error, grpc.RpcError) else None
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or ""):
        words = f"a message is larger than the server takes ({clean(error.details(), 100)})"
        fail(f"{words}; raise the server's --max-message-mb")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return f"the server at {host}:{port} has too many connections"
    if code == grpc.StatusCode.UNAVAILABLE:
        mismatch = tls_mismatch(host, port, root_certificates)
        if mismatch:
            fail(mismatch)
    if code == grpc.StatusCode.UNAVAILABLE:
        return f"no server at {host}:{port}"
    return f"the server at {host}:{port} ended the connection"

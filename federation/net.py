"""Addresses as HOST:PORT, a port that is free, and how long both ends of a connection wait through silence.

As Flower ships it, the server gives a connection up when 20 s pass without a sign of life, and the client never
asks for one: disconnected while it waits for the server's next message, it would wait without end.
"""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

from federation.console import fail

import grpc

PING_SECONDS = (
    30  # of silence, after which a client pings the server; also keeps middleboxes from closing the connection
)
PATIENCE_SECONDS = 60  # without an answer, after which either end gives the connection up
CLIENT = [
    ("grpc.keepalive_time_ms", PING_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", PATIENCE_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),  # as many as a long training takes
]
SERVER = [
    ("grpc.keepalive_timeout_ms", PATIENCE_SECONDS * 1000),  # of Flower's own pings, and of TCP
    ("grpc.http2.min_ping_interval_without_data_ms", PING_SECONDS * 1000 // 3),  # else gRPC allows one in 5 minutes
]
SPARE = 1_000  # streams for whoever has no place: who waits for one, or is not verified yet
PLAIN = {name: getattr(grpc, name) for name in ("server", "insecure_channel", "secure_channel")}


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets. Raises ValueError with one line where it can't be parsed."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    is_port = port.isascii() and port.isdigit() and int(port) <= 65535
    if not host or not is_port or "/" in host or (":" in host) != bracketed:
        raise ValueError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080")
    return host, int(port)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_port(address: str) -> None:
    """Exits with 1 and one line where the machine doesn't let us listen; gRPC itself would share a port in silence."""
    problem = port_problem(address)
    if problem:
        remedy = "end the program that has the port, or give another --address"
        fail(f"can't listen on {address} ({problem}); {remedy}")


def port_problem(address: str) -> str:
    """Why the machine doesn't let us listen there; "" where it does."""
    host, port = parse_address(address)
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
        return ""
    except OSError as error:
        return error.strerror or str(error)


def own_address() -> str:
    """This machine's address on the way to others; its name where it has none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect(("192.0.2.1", 9))  # RFC 5737's, to nobody; UDP connects without sending anything
            return way.getsockname()[0]
    except OSError:
        return socket.gethostname()


def bypass_proxy(host: str) -> None:
    """Have gRPC connect to this host directly; it would otherwise ask the proxy of http_proxy."""
    excepted = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))  # noqa: SIM112 (gRPC's own names)
    os.environ["no_grpc_proxy"] = f"{excepted},{host}"  # noqa: SIM112


def keep_server_connections(clients: int) -> None:
    """Have flwr.server.start_server, which takes no options for gRPC, listen with SERVER, and serve so many clients.

    A stream keeps a thread for as long as it lasts, and Flower's server has 1,000 of them at most.
    """
    streams = 2 * clients + SPARE  # all may come at once, and come back while the streams they had still end

    def make(_: object, *, options: list[tuple[str, object]], **rest: object) -> grpc.Server:
        pool = ThreadPoolExecutor(streams)  # which starts a thread only where none is free
        rest["maximum_concurrent_rpcs"] = streams
        return PLAIN["server"](pool, options=[*options, *SERVER], **rest)

    setattr(grpc, "server", make)  # noqa: B010 (as in _add)


def keep_client_connection() -> None:
    """Have Flower's grpc_connection, which takes no options for gRPC, connect with CLIENT."""
    _add("insecure_channel", CLIENT)
    _add("secure_channel", CLIENT)


def _add(name: str, ours: list[tuple[str, int]]) -> None:
    def make(*args: object, options: list[tuple[str, object]] | None = None, **rest: object) -> object:
        return PLAIN[name](*args, options=[*(options or []), *ours], **rest)

    setattr(grpc, name, make)


def join(host: str, port: int) -> str:
    """The inverse of parse_address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

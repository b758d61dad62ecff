"""How long both ends of a client's line bear with silence: longer than a cut of half a minute, but not for ever.

As Flower ships it, the server gives a line up when 20 s pass without a sign of life, and the client never asks
for one: cut off while it waits for the server's next question, it would wait for ever.
"""

import grpc

PING_SECONDS = 30  # of silence, after which a client pings the server; also keeps middleboxes from cutting the line
PATIENCE_SECONDS = 60  # without an answer, after which either end gives the line up
CLIENT = [
    ("grpc.keepalive_time_ms", PING_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", PATIENCE_SECONDS * 1000),
    ("grpc.http2.max_pings_without_data", 0),  # as many as a long training takes
]
SERVER = [
    ("grpc.keepalive_timeout_ms", PATIENCE_SECONDS * 1000),  # of Flower's own pings, and of TCP
    ("grpc.http2.min_ping_interval_without_data_ms", PING_SECONDS * 1000 // 3),  # else gRPC allows one in 5 minutes
]
PLAIN = {name: getattr(grpc, name) for name in ("server", "insecure_channel", "secure_channel")}


def guard_server_lines() -> None:
    """Have flwr.server.start_server, which takes no options for gRPC, listen with SERVER."""
    _add("server", SERVER)


def guard_client_lines() -> None:
    """Have Flower's grpc_connection, which takes no options for gRPC, connect with CLIENT."""
    _add("insecure_channel", CLIENT)
    _add("secure_channel", CLIENT)


def _add(name: str, ours: list[tuple[str, int]]) -> None:
    def make(*args: object, options: list[tuple[str, object]] | None = None, **rest: object) -> object:
        return PLAIN[name](*args, options=[*(options or []), *ours], **rest)

    setattr(grpc, name, make)

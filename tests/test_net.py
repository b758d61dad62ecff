"""A quiet connection is neither given up nor punished for its pings: the options themselves, thirty times faster."""

import time
from concurrent.futures import ThreadPoolExecutor

from federation import net

import grpc
import pytest

FASTER = 30  # gRPC pings once a second at most


def faster(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(name, value // FASTER if name.endswith("_ms") else value) for name, value in options]


def quiet_call(seconds: float) -> str:
    """The answer to a call on which nothing travels for so long, over channel and server as Flower would make them."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        time.sleep(seconds)
        return b"still here"

    handler = grpc.unary_unary_rpc_method_handler(answer)
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, options=[("grpc.max_receive_message_length", 1000)])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Quiet": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}", options=[]) as channel:
                return channel.unary_unary("/test/Quiet")(b"").decode()
        finally:
            server.stop(None).wait()


@pytest.fixture
def fast(monkeypatch):
    for name, plain in net.PLAIN.items():
        monkeypatch.setattr(grpc, name, plain)  # afterwards as before
    monkeypatch.setattr(net, "CLIENT", faster(net.CLIENT))
    monkeypatch.setattr(net, "SERVER", faster(net.SERVER))


def test_the_server_has_two_streams_for_each_client_and_a_thousand_more_for_whoever_knocks(monkeypatch):
    made = {}
    monkeypatch.setattr(grpc, "server", grpc.server)  # afterwards as before
    monkeypatch.setitem(net.PLAIN, "server", lambda pool, **rest: made.update(rest, threads=pool._max_workers))
    net.keep_server_connections(5000)
    # As Flower's generic_create_grpc_server calls it.
    grpc.server(ThreadPoolExecutor(1000), maximum_concurrent_rpcs=1000, options=[("a", 1)], interceptors=None)
    assert (made["threads"], made["maximum_concurrent_rpcs"]) == (11_000, 11_000)
    assert made["options"] == [("a", 1), *net.SERVER]


@pytest.mark.processes  # no process, but five seconds on a real connection
def test_a_client_may_ping_through_a_long_training(fast):
    net.keep_server_connections(1)
    net.keep_client_connection()
    assert (
        quiet_call(150 / FASTER) == "still here"
    )  # without our options the server ends the connection at the fourth ping

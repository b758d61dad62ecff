"""Raw connections for tests: client ends of Flower's gRPC stream that answer nothing, or anything."""

import queue
import socket

from federation.protocol import PROTOCOL

import grpc
from flwr.proto.transport_pb2 import ClientMessage, ServerMessage

JOIN = "/flwr.proto.FlowerService/Join"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
HEADERS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": JOIN,
    ":authority": "localhost",
    "te": "trailers",
    "content-type": "application/grpc",
}


def open_channel(address: str) -> grpc.Channel:
    """A connection of its own; gRPC would otherwise share one among all channels to an address."""
    return grpc.insecure_channel(address, options=[*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)])


class RawConnection:
    """One stream, question by question; whatever it waits for, it gives up after a minute."""

    def __init__(self, channel: grpc.Channel):
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.heard: list[bytes] = []
        self.call = channel.stream_stream(JOIN)(iter(self._answers.get, None), timeout=60)

    def hear(self) -> ServerMessage:
        """The server's next message. Raises grpc.RpcError or StopIteration where the stream ends instead."""
        self.heard.append(next(self.call))
        return ServerMessage.FromString(self.heard[-1])

    def say(self, answer: bytes) -> None:
        self._answers.put(answer)

    def hear_the_end(self) -> grpc.StatusCode:
        """Listen without a word until the stream ends."""
        try:
            while True:
                self.hear()
        except (grpc.RpcError, StopIteration):
            return self.call.code()

    def hang_up(self) -> None:
        self._answers.put(None)
        self.call.cancel()


def properties(**values: str | int | float | bool | bytes) -> bytes:
    """A get_properties answer, as it goes over the wire."""
    kinds = {str: "string", bool: "bool", int: "sint64", float: "double", bytes: "bytes"}
    answer = ClientMessage()
    for key, value in values.items():
        setattr(answer.get_properties_res.properties[key], kinds[type(value)], value)
    return answer.SerializeToString()


def hello(**changes: str | int | float | bool | bytes) -> bytes:
    """A correct answer to the challenge of a server without a secret, but for these changes."""
    usual = {"protocol": PROTOCOL, "proof": "", "classes": '["cat", "dog"]', "instance": "0" * 32}
    return properties(**{**usual, "host": "there", "wanted": -1, "held": -1, **changes})


class Http2:
    """HTTP/2 (RFC 9113) by hand: a client whose streams take in nothing, for their windows are of zero bytes."""

    def __init__(self, address: str):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)))
        initial_window_size = b"\0\4" + (0).to_bytes(4)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, initial_window_size))
        self._streams = 0

    def open_streams(self, number: int) -> None:
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in HEADERS.items())
        for _ in range(number):
            self.socket.sendall(_frame(1, 0x4, 2 * self._streams + 1, block))  # 0x4: END_HEADERS
            self._streams += 1

    def close(self) -> None:
        self.socket.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _text(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()

"""Flower's end of a client's gRPC stream, made to bear strangers.

As Flower ships it, one stream that nobody has admitted can fill the server's memory, for a thread reads
ahead of the questions without end (1.8 GB in eight seconds, measured), and a client that doesn't read its
questions keeps its stream for ever, for the timeout begins only once the question has left.
"""

import threading
from collections.abc import Callable, Iterator

from federation.messages import Answer, Proxy, as_bytes

import grpc
from flwr.proto.transport_pb2 import ServerMessage
from flwr.server.superlink.fleet.grpc_bidi import grpc_server
from flwr.server.superlink.fleet.grpc_bidi.flower_service_servicer import FlowerServiceServicer
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridge, GrpcBridgeClosed, InsWrapper, ResWrapper

SERVICE = "flwr.proto.FlowerService"
GRACE = 1.0  # after the timeout, for Flower to end the stream by its own means


class Bridge(GrpcBridge):
    """The questions and answers of one stream; closing it ends the stream at once."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        super().__init__()
        self._cancel = cancel

    def request(self, ins_wrapper: InsWrapper) -> ResWrapper:
        """Ask, and wait for the answer. Raises GrpcBridgeClosed at the latest soon after the timeout."""
        return ResWrapper(self.ask(ins_wrapper).take())

    def ask(self, ins_wrapper: InsWrapper) -> Answer:
        """The same, the answer as it came."""
        if ins_wrapper.timeout is None:
            return super().request(ins_wrapper).client_message
        timer = threading.Timer(ins_wrapper.timeout + GRACE, self.close)
        timer.daemon = True
        timer.start()
        try:
            return super().request(ins_wrapper).client_message
        finally:
            timer.cancel()

    def close(self) -> None:
        super().close()
        self._cancel()


class PatientServicer(FlowerServiceServicer):
    """Takes one answer off the wire for each question; gRPC's flow control holds the rest back at the sender."""

    def Join(
        self, request_iterator: Iterator[Answer], context: grpc.ServicerContext
    ) -> Iterator[ServerMessage | bytes]:
        asked = threading.Semaphore(0)
        if not context.add_callback(asked.release):  # else the reading thread would outlive the stream
            return
        flower = FlowerServiceServicer(self.client_manager, lambda: Bridge(context.cancel), Proxy)
        try:
            for question in flower.Join(_one_each(request_iterator, asked), context):
                asked.release()
                yield question
        except GrpcBridgeClosed:  # we ended the stream ourselves
            return


def _one_each(answers: Iterator[Answer], asked: threading.Semaphore) -> Iterator[Answer]:
    asked.acquire()
    for answer in answers:
        yield answer
        asked.acquire()


def guard_streams() -> None:
    """Have flwr.server.start_server, which takes no servicer, serve PatientServicer in the place of Flower's own.

    What comes is not read before somebody asks for it: gRPC would keep 11 kB for ever for each message that its
    deserializer refuses (grpcio 1.85, measured).
    """

    def add(flower: FlowerServiceServicer, server: grpc.Server) -> None:
        join = grpc.stream_stream_rpc_method_handler(PatientServicer(flower.client_manager).Join, Answer, as_bytes)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Join": join}),))

    grpc_server.add_FlowerServiceServicer_to_server = add

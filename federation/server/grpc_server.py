"""Flower's end of a client's gRPC stream, hardened: no copy of the model for each client, no limitless reading.

As Flower ships it, one stream that nobody has admitted can fill the server's memory, for a second thread reads ahead
of the questions without end (1.8 GB in eight seconds, measured), and a client that doesn't read its questions keeps its
stream for ever, for the timeout begins only once the question has left. And it makes a message anew for each client,
keeps it twice until it is answered, and an answer until the next one comes: 300 clients took 2.3 GB at the server
(benchmarks/scale.py), most of it the same model.

All of Flower's private names that the server needs are imported here.
"""

import functools
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from federation.compression import num_bytes
from federation.pieces import InPieces, Store, cut

import grpc
from flwr.common import EvaluateIns, EvaluateRes, FitIns, FitRes, GetPropertiesIns, Parameters, serde
from flwr.proto.transport_pb2 import ClientMessage, ServerMessage
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

try:
    from flwr.server.superlink.fleet.grpc_bidi import grpc_server
    from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridge, GrpcBridgeClosed, InsWrapper, ResWrapper
    from flwr.server.superlink.fleet.grpc_bidi.grpc_client_proxy import GrpcClientProxy
except ImportError:  # Flower 1.43 keeps what is left of gRPC under flwr.compat
    from flwr.compat.server.grpc_bidi import grpc_server  # type: ignore[no-redef]
    from flwr.compat.server.grpc_bidi.grpc_bridge import (  # type: ignore[no-redef]
        GrpcBridge,
        GrpcBridgeClosed,
        InsWrapper,
        ResWrapper,
    )
    from flwr.compat.server.grpc_bidi.grpc_client_proxy import GrpcClientProxy  # type: ignore[no-redef]

SERVICE = "flwr.proto.FlowerService"
TICK = 0.2  # seconds between two looks at what is overdue


def harden() -> None:
    """Have flwr.server.start_server, which takes no servicer, serve Servicer instead of Flower's own.

    A message is not parsed before somebody asks for it: gRPC would keep 11 kB for ever for each message that its
    deserializer refuses (grpcio 1.85, measured).
    """

    def add(flower: Any, server: grpc.Server) -> None:
        join = grpc.stream_stream_rpc_method_handler(Servicer(flower.client_manager).join, Answer, as_bytes)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Join": join}),))
        health_pb2_grpc.add_HealthServicer_to_server(Health(flower.client_manager), server)

    grpc_server.add_FlowerServiceServicer_to_server = add  # type: ignore[assignment]


class Health(health_pb2_grpc.HealthServicer):
    """gRPC's standard health service (grpc.health.v1), for whoever watches the server; says nothing of the run.

    Only Check: a Watch would keep a thread, of which each client needs one.
    """

    def __init__(self, clients: Any) -> None:
        self._clients = clients

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.service not in ("", SERVICE):
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        status = health_pb2.HealthCheckResponse
        return status(status=status.NOT_SERVING if self._clients.closed else status.SERVING)


class Answer:
    """A client's message as it came; once it is taken, whoever else still holds on to it holds nothing."""

    def __init__(self, message: bytes) -> None:
        self._message = message

    def take(self) -> ClientMessage:
        """The message; of bytes that are none, or taken before, an empty one, which answers no question."""
        message, self._message = self._message, b""
        try:
            return ClientMessage.FromString(message)
        except DecodeError:
            return ClientMessage()


class Deadlines:
    """Closes what is overdue, all from one thread: a timer for each of a thousand clients would be as many threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[Any, float] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def of(self, bridge: Any, seconds: float) -> Iterator[None]:
        """Within it bridge.close() is called soon after so many seconds."""
        with self._changed:
            self._due[bridge] = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._due.pop(bridge, None)

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due)
                now = time.monotonic()
                overdue = [bridge for bridge, due in self._due.items() if due <= now]
                for bridge in overdue:
                    del self._due[bridge]
            for bridge in overdue:
                with suppress(Exception):  # of a stream that just ended; the others still need this thread
                    bridge.close()
            time.sleep(TICK)


class Bridge(GrpcBridge):
    """The questions and answers of one stream; closing it ends the stream at once."""

    deadlines = Deadlines()  # one for all

    def __init__(self, cancel: Callable[[], object]) -> None:
        super().__init__()
        self._cancel = cancel

    def request(self, ins_wrapper: InsWrapper) -> ResWrapper:
        """Ask, and wait for the answer. Raises GrpcBridgeClosed at the latest soon after the timeout."""
        return ResWrapper(self.ask(ins_wrapper).take())

    def ask(self, ins_wrapper: InsWrapper) -> Any:
        """The same, the answer as it came."""
        if ins_wrapper.timeout is None:
            return super().request(ins_wrapper).client_message
        with self.deadlines.of(self, ins_wrapper.timeout):
            return super().request(ins_wrapper).client_message

    def close(self) -> None:
        super().close()
        self._cancel()


class Proxy(GrpcClientProxy):
    """Flower's proxy of a client, which asks the questions that all get alike with the same bytes."""

    unpacking = threading.Lock()  # one at a time: an update takes three times its room meanwhile
    pieces = threading.Semaphore(4)  # exchanges at a time, of all clients

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        if isinstance(ins.parameters, InPieces):
            return self._in_pieces(ins, timeout)
        answer = self._ask(ins, timeout)
        with self.unpacking:
            return serde.fit_res_from_proto(answer.take().fit_res)

    def evaluate(self, ins: EvaluateIns, timeout: float | None, group_id: int | None) -> EvaluateRes:
        if isinstance(ins.parameters, InPieces):
            return self._in_pieces(ins, timeout)
        return serde.evaluate_res_from_proto(self._ask(ins, timeout).take().evaluate_res)

    def _in_pieces(self, ins: Any, timeout: float | None) -> Any:
        """The same with a large model, that is sent before the question, and, of a training, fetched after it."""
        model, deadline = ins.parameters, time.monotonic() + (timeout or math.inf)
        size = num_bytes(model.arrays, "none")
        for start in range(0, size, model.piece):
            content = cut(model.arrays, start, start + model.piece)
            if "error" in self._properties({"ask": "store", "start": start, "content": content}, deadline):
                break  # the question that follows is refused, in words
        empty = Parameters([], model.tensor_type)
        question, left = type(ins)(empty, {**ins.config, "in_pieces": True}), max(1.0, deadline - time.monotonic())
        if isinstance(ins, EvaluateIns):
            return self.evaluate(question, left, None)
        answer = self.fit(question, left, None)
        if "measure" in ins.config:  # BatchNorm's statistics, which are small
            return answer
        if not answer.num_examples or "error" in answer.metrics or "identity" in answer.metrics:
            return answer  # the last with secure aggregation: the update comes later, masked
        like = [(array.shape, array.dtype) for array in model.arrays]
        return replace(answer, parameters=self.fetch("update", like, model, deadline))

    def fetch(self, what: str, like: list, model: InPieces, deadline: float) -> InPieces:
        """Arrays of these shapes and dtypes, which the client keeps under that name, into a file. Raises ValueError."""
        store = Store(model.folder, [(shape, dtype, dtype) for shape, dtype in like])
        for start in range(0, store.size, model.piece):
            wanted = min(model.piece, store.size - start)
            told = self._properties({"ask": "fetch", "what": what, "start": start, "stop": start + wanted}, deadline)
            content = told.get("content")
            if not isinstance(content, bytes) or len(content) != wanted:
                store.file.close()
                raise ValueError(f"a piece of {wanted} bytes was asked for, and not given")
            store.add(content)
        return replace(model, arrays=store.arrays, sha256=store.sha256())

    def _properties(self, question: dict, deadline: float) -> dict:
        with self.pieces:
            return self.get_properties(
                GetPropertiesIns(question), max(1.0, deadline - time.monotonic()), None
            ).properties

    def _ask(self, ins: Any, timeout: float | None) -> Answer:
        tensors, config = tuple(ins.parameters.tensors), tuple(sorted(ins.config.items()))
        kind: Any = type(ins)
        question = _question(kind, tensors, ins.parameters.tensor_type, config)
        return self.bridge.ask(InsWrapper(question, timeout))  # type: ignore[attr-defined, arg-type]


class Servicer:
    """Takes one answer off the connection for each question; gRPC's flow control holds the rest back at the sender."""

    def __init__(self, clients: Any) -> None:
        self._clients = clients

    def join(self, answers: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """The questions of one stream, for as long as it lasts."""
        bridge = Bridge(context.cancel)
        proxy = Proxy(uuid.uuid4().hex, bridge)
        if not self._clients.register(proxy):
            return

        def ended() -> None:
            bridge.close()
            self._clients.unregister(proxy)

        if not context.add_callback(ended):  # it has ended already
            ended()
            return
        with suppress(GrpcBridgeClosed):
            for question in bridge.ins_wrapper_iterator():
                yield question.server_message
                answer = next(answers, None)
                if answer is None:
                    return
                bridge.set_res_wrapper(ResWrapper(answer))


@functools.lru_cache(maxsize=4)  # a round's, which differ at most in how many clients share a machine
def _question(kind: type, tensors: tuple[bytes, ...], tensor_type: str, config: tuple) -> bytes:
    ins = kind(Parameters(list(tensors), tensor_type), dict(config))
    if kind is FitIns:
        return ServerMessage(fit_ins=serde.fit_ins_to_proto(ins)).SerializeToString()
    return ServerMessage(evaluate_ins=serde.evaluate_ins_to_proto(ins)).SerializeToString()


def as_bytes(question: ServerMessage | bytes) -> bytes:
    """What is sent: a Proxy's questions are bytes already."""
    return question if isinstance(question, bytes) else question.SerializeToString()

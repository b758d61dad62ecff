"""Questions and answers that hold a whole model, without a copy of it for every client.

Flower makes a question anew for each client and keeps it, twice, until it is answered, and an answer until the next
one comes. With these copies, and those that strategy.py spares, 300 clients took 2.3 GB at the server
(benchmarks/scale.py), most of it the same model.
"""

import functools
import threading

from flwr.common import EvaluateIns, EvaluateRes, FitIns, FitRes, Parameters, serde
from flwr.proto.transport_pb2 import ClientMessage, ServerMessage
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import InsWrapper
from flwr.server.superlink.fleet.grpc_bidi.grpc_client_proxy import GrpcClientProxy
from google.protobuf.message import DecodeError


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


class Proxy(GrpcClientProxy):
    """Flower's proxy of a client, which asks the questions that all get alike with the same bytes."""

    unpacking = threading.Lock()  # one at a time: an update takes three times its room meanwhile

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        answer = self._ask(ins, timeout)
        with self.unpacking:
            return serde.fit_res_from_proto(answer.take().fit_res)

    def evaluate(self, ins: EvaluateIns, timeout: float | None, group_id: int | None) -> EvaluateRes:
        return serde.evaluate_res_from_proto(self._ask(ins, timeout).take().evaluate_res)

    def _ask(self, ins: FitIns | EvaluateIns, timeout: float | None) -> Answer:
        tensors, config = tuple(ins.parameters.tensors), tuple(sorted(ins.config.items()))
        question = _question(type(ins), tensors, ins.parameters.tensor_type, config)
        return self.bridge.ask(InsWrapper(question, timeout))


@functools.lru_cache(maxsize=4)  # a round's, which differ at most in how many clients share a machine
def _question(kind: type, tensors: tuple[bytes, ...], tensor_type: str, config: tuple) -> bytes:
    ins = kind(Parameters(list(tensors), tensor_type), dict(config))
    if kind is FitIns:
        return ServerMessage(fit_ins=serde.fit_ins_to_proto(ins)).SerializeToString()
    return ServerMessage(evaluate_ins=serde.evaluate_ins_to_proto(ins)).SerializeToString()


def as_bytes(question: ServerMessage | bytes) -> bytes:
    """What goes over the wire: a Proxy's questions are bytes already."""
    return question if isinstance(question, bytes) else question.SerializeToString()

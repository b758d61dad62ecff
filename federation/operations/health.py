"""Whether a server takes part in a run, by gRPC's standard health service: python -m federation.health."""

from typing import Any

from federation.console import Parser, fail, say
from federation.net import bypass_proxy, is_loopback, parse_address
from federation.security.tls import read_authority, tls_mismatch

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

DESCRIPTION = "Whether a server is there and takes part in a run: for containers and whatever else watches services."
EPILOG = """\
exit code: 0 SERVING, 1 NOT_SERVING (its run is over) or no answer, 2 wrong use
examples:
  python -m federation.health
  python -m federation.health --server fl.example.org:8080 --ca-certificate ca.pem
"""
SECONDS = 5.0  # for an answer


def ask(address: str, authority: bytes | None, seconds: float = SECONDS) -> str:
    """SERVING or NOT_SERVING; authority: see tls.read_authority. Raises grpc.RpcError where nobody answers so."""
    if authority is None:
        channel = grpc.insecure_channel(address)
    else:
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority))
    with channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def main() -> int:
    parser = Parser(DESCRIPTION, prog="python -m federation.health", epilog=EPILOG)
    parser.add_argument("--server", default="127.0.0.1:8080", metavar="HOST:PORT", help="where the server listens")
    parser.add_argument("--ca-certificate", metavar="FILE", help="the authority of its TLS certificate; turns TLS on")
    args = parser.parse_args()
    try:
        host, port = parse_address(args.server)
    except ValueError as error:
        parser.error(f"--server {error}")
    if is_loopback(host):
        bypass_proxy(host)
    authority = read_authority(args.ca_certificate)
    try:
        status = ask(args.server, authority)
    except grpc.RpcError as error:
        fail(tls_mismatch(host, port, authority) or f"no answer from {args.server} ({error.code().name})")
    say(status)
    return 0 if status == "SERVING" else 1

"""The client's way to the server: wait for it, keep the stream, come back when it breaks, say what is wrong."""

import os
import socket
import ssl
import time
from ipaddress import ip_address

from federation.member import Member
from federation.words import fail, say

import grpc
from flwr.client import start_client
from flwr.supercore.address import parse_address

PROBE_SECONDS = 5
EXPIRED, OTHER_HOST, OTHER_ADDRESS = 10, 62, 64  # OpenSSL's X509_V_ERR_ codes
NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF_WHILE_READING")


def parse_server_address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets. Raises ValueError with one line where it can't be parsed."""
    parsed = parse_address(text)
    if not parsed or not parsed[0] or (":" in parsed[0] and not text.startswith("[")):
        raise ValueError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080")
    return parsed[0], parsed[1]


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    away_since, announced, heard = time.monotonic(), False, 0
    while True:
        try:
            start_client(
                server_address=address,
                client=member.to_client(),
                root_certificates=root_certificates,
                insecure=root_certificates is None,
            )
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


def _explain(error: Exception, host: str, port: int, root_certificates: bytes | None) -> str:
    """What a broken stream means. Exits with 1 and one line where asking again can't help."""
    code = error.code() if isinstance(error, grpc.RpcError) else None
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or ""):
        fail(f"a message is larger than the server takes ({error.details()}); raise the server's --max-message-mb")
    if code == grpc.StatusCode.UNAVAILABLE:
        mismatch = tls_mismatch(host, port, root_certificates)
        if mismatch:
            fail(mismatch)
    if code == grpc.StatusCode.UNAVAILABLE:
        return f"no server at {host}:{port}"
    return f"the server at {host}:{port} ended the connection"


def tls_mismatch(host: str, port: int, root_certificates: bytes | None) -> str | None:
    """Which of TLS's ways to fail it is, in one line; None where TLS is not to blame (or nobody listens)."""
    if root_certificates is None:
        try:
            _handshake(host, port, ssl._create_unverified_context())
        except OSError:
            return None
        return f"the server at {host}:{port} speaks TLS; give its authority with --ca-certificate"
    try:
        _handshake(host, port, ssl.create_default_context(cadata=root_certificates.decode()))
    except ssl.SSLCertVerificationError as error:
        what = {
            EXPIRED: "has expired; make a new one with python -m federation.certificates",
            OTHER_HOST: f"is for another host than {host}; make it with --host {host}",
            OTHER_ADDRESS: f"is for another address than {host}; make it with --host {host}",
        }.get(error.verify_code, "is not from the authority in --ca-certificate")
        return f"the server's certificate {what} ({error.verify_message})"
    except ssl.SSLError as error:
        if isinstance(error, ssl.SSLEOFError) or error.reason in NOT_TLS:
            return (
                f"the server at {host}:{port} does not speak TLS; "
                "leave out --ca-certificate, or give the server its --certificate"
            )
        return f"TLS with {host}:{port} failed: {error.reason}"
    except OSError:
        return None
    return None


def _handshake(host: str, port: int, context: ssl.SSLContext) -> None:
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=PROBE_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host),
    ):
        pass

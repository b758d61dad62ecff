"""The proxy that gRPC takes to the server, by the variables that it reads, and what that proxy makes of it."""

import base64
import os
import re
import socket
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

from federation.security.tls import PROBE_SECONDS

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # environment variables
PROXY_PORT = 443  # gRPC's, where a proxy's address names none


class Proxy(NamedTuple):
    """A proxy as gRPC reads it from the environment; without a host where its address is a wrong one.

    Never to be shown: login and address, whatever state they are in, hold a password.
    """

    variable: str
    host: str
    port: int
    login: str


def proxy_for(host: str) -> Proxy | None:
    """The proxy that gRPC takes for this host, if any; by the variables that it reads, in its order."""
    variable = _proxy_variable()
    address = os.environ.get(variable, "").rstrip()
    if not re.match("http://[^/?#]", address, re.IGNORECASE) or _is_exempt(host):
        return None
    try:
        url = urlsplit(address)
        login, at, _ = url.netloc.rpartition("@")
        if "@" in address and not at:  # a password with / ? or # in it: what seems the host is a part of the login
            return Proxy(variable, "", 0, "")
        return Proxy(variable, url.hostname or "", PROXY_PORT if url.port is None else url.port, login)
    except ValueError:  # no number for a port, or half a bracket
        return Proxy(variable, "", 0, "")


def _proxy_variable() -> str:
    """The one that gRPC goes by: the first that is set, be it empty, which means no proxy."""
    return next((name for name in PROXIES if name in os.environ), "")


def _is_exempt(host: str) -> bool:
    """Whether gRPC goes to this host without a proxy: by its name, a domain that it is in, or a network."""
    exempt = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))  # noqa: SIM112 (gRPC's own names)
    for entry in exempt.split(","):
        name = entry.strip().lower().removeprefix(".")
        if name and f".{host.lower()}".endswith(f".{name}"):
            return True
        with suppress(ValueError):  # either of them is a name
            if "/" in name and ip_address(host) in ip_network(name, strict=False):
                return True
    return False


def passed_over(host: str) -> str:
    """A hint at a proxy that other programs would take, and gRPC doesn't."""
    variable = _proxy_variable()
    if _is_exempt(host):
        return ""
    if os.environ.get(variable):
        return f"; {variable} is passed over, for it does not begin with http://"
    other = next((name for name in PROXIES if name.upper() in os.environ), "")
    return f"; gRPC reads {other}, not {other.upper()}" if other and not variable else ""


def try_proxy(proxy: Proxy, place: str) -> str:
    """What the proxy makes of a connection to the server."""
    pair = base64.b64encode(unquote_to_bytes(os.fsencode(proxy.login))).decode()
    login = f"Proxy-Authorization: Basic {pair}\r\n" if pair else ""
    answer = b""
    try:
        with (
            socket.create_connection((proxy.host, proxy.port), timeout=PROBE_SECONDS) as line,
            suppress(ConnectionError),  # it may hang up on us
            line.makefile("rb") as answers,
        ):
            line.sendall(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{login}\r\n".encode())
            answer = answers.readline(64)
    except TimeoutError:
        return "gives no answer"
    except (OSError, UnicodeError):
        return "can't be reached"
    found = re.match(rb"HTTP/\S+ +(\d{3})\b", answer)
    if not found:
        return "is no HTTP proxy by its answer" if answer else "hangs up without an answer"
    status = found[1].decode()
    if status == "407" and login:
        return "does not take the login in its address"
    if status == "407":
        return "wants a login; put it into the proxy's address: http://USER:PASSWORD@HOST:PORT"
    if status.startswith("2"):
        return f"reaches {place}, where the connection breaks off; TLS must be on at both ends or at neither"
    if status.startswith("4") and status != "404":
        return f"refuses connections to {place} (it answers {status})"
    return f"finds no server at {place} (it answers {status})"

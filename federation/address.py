"""HOST:PORT. Apart from connection.py, as that costs the server 55 MB and a second of imports which it never uses."""

from ipaddress import ip_address

from flwr.supercore.address import parse_address


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

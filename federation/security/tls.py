"""TLS's files, read with care, and its ways to fail, told apart: gRPC calls all of them UNAVAILABLE."""

import codecs
import socket
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from federation.console import fail, read_text

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

PROBE_SECONDS = 5
SOON = timedelta(days=30)
BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NOT_YET_VALID, EXPIRED, OTHER_HOST, OTHER_ADDRESS = 9, 10, 62, 64  # OpenSSL's X509_V_ERR_ codes
MAKE = "python -m federation.certificates"


def read_authority(path: str | None) -> bytes | None:
    """The client's --ca-certificate, or None without TLS. Exits with 2 and one line where it holds no certificate."""
    if path is None:
        return None
    content = _read("--ca-certificate", path)
    try:
        x509.load_pem_x509_certificates(content)
    except ValueError:
        fail(f"--ca-certificate {path} is no certificate in PEM; give the ca.pem that {MAKE} made for the server", 2)
    return content


def read_server_files(
    ca_certificate: str | None, certificate: str | None, private_key: str | None
) -> tuple[bytes, bytes, bytes] | None:
    """Authority, certificate and key as PEM, or None without TLS; all three are given, or none.

    Exits with 2 and one line where no client could accept them: gRPC itself would start, and every client would fail.
    """
    if not (ca_certificate and certificate and private_key):
        return None
    authority = read_authority(ca_certificate) or b""
    chain, key = _read("--certificate", certificate), _read("--private-key", private_key)
    try:
        x509.load_pem_x509_certificates(chain)
    except ValueError:
        fail(f"--certificate {certificate} is no certificate in PEM; make one with {MAKE}", 2)
    try:
        load_pem_private_key(key, password=None)
    except TypeError:
        fail(f"--private-key {private_key} is locked with a password, which gRPC can't take; make one with {MAKE}", 2)
    except ValueError:
        fail(f"--private-key {private_key} is no private key in PEM; make one with {MAKE}", 2)
    try:
        _try_handshake(authority, chain, key)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == EXPIRED:
            fail(f"--certificate {certificate} has expired; make a new one with {MAKE} --renew", 2)
        fail(
            f"--certificate {certificate} is not from the authority in --ca-certificate {ca_certificate} "
            f"({error.verify_message}); use files of one run of {MAKE}",
            2,
        )
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            fail(f"--private-key {private_key} is not the key of --certificate {certificate}; give both of one pair", 2)
        fail(f"--certificate {certificate} and --private-key {private_key} can't be used ({error.reason})", 2)
    return authority, chain, key


def ends_soon(pem: bytes) -> datetime | None:
    """When the first certificate of these ends, if that is within SOON; None else."""
    end = min(each.not_valid_after_utc for each in x509.load_pem_x509_certificates(pem))
    return end if end - datetime.now(UTC) < SOON else None


def hosts_of(pem: bytes) -> set[str]:
    """The names and addresses that a server's certificate is for, in lower case."""
    try:
        extension = x509.load_pem_x509_certificates(pem)[0].extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except x509.ExtensionNotFound:
        return set()
    names = extension.value.get_values_for_type(x509.DNSName)
    return {*(name.lower() for name in names), *map(str, extension.value.get_values_for_type(x509.IPAddress))}


def tls_mismatch(host: str, port: int, root_certificates: bytes | None) -> str | None:
    """Which of TLS's ways to fail it is, in one line; None where TLS is not to blame (or nobody listens)."""
    if root_certificates is None:
        try:
            _handshake(host, port, ssl._create_unverified_context())
        except OSError:
            return None
        return f"the server at {host}:{port} speaks TLS; give its authority with --ca-certificate"
    try:
        _handshake(host, port, _verifying(root_certificates))
    except ssl.SSLCertVerificationError as error:
        what = {
            NOT_YET_VALID: "is not valid yet; set this machine's clock right, or the one where it was made",
            EXPIRED: f"has expired; make a new one with {MAKE} --renew",
            OTHER_HOST: f"is for another host than {host}; make it with --host {host}",
            OTHER_ADDRESS: f"is for another address than {host}; make it with --host {host}",
        }.get(error.verify_code, "is not from the authority in --ca-certificate; give the server's own ca.pem")
        return f"the server's certificate {what} ({error.verify_message})"
    except OSError as error:
        if _speaks_plain(host, port):
            return (
                f"the server at {host}:{port} does not speak TLS; "
                "leave out --ca-certificate, or give the server its --certificate"
            )
        return f"TLS with {host}:{port} failed: {error.reason}" if isinstance(error, ssl.SSLError) else None
    return None


def _read(flag: str, path: str) -> bytes:
    try:
        content = Path(path).read_bytes()
        return read_text(content).encode() if content.startswith(BYTE_ORDER_MARKS) else content
    except OSError as error:
        fail(f"{flag} {path} can't be read ({error.strerror}); make it with {MAKE}", 2)


def _verifying(root_certificates: bytes) -> ssl.SSLContext:
    """Checks as gRPC does: Python 3.13's own default is stricter than it."""
    context = ssl.create_default_context(cadata=root_certificates.decode("ascii", "ignore"))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _try_handshake(authority: bytes, chain: bytes, key: bytes) -> None:
    """A handshake with ourselves in memory. Raises ssl.SSLError for what a client would find wrong."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:  # ssl takes files only; these without a byte-order mark
        files = [Path(folder) / name for name in ("chain", "key")]
        for path, content in zip(files, (chain, key), strict=True):
            path.write_bytes(content)
        serving.load_cert_chain(files[0], files[1])
    asking = _verifying(authority)
    asking.check_hostname = False  # the server can't know by which of its names clients call it
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = asking.wrap_bio(back, there), serving.wrap_bio(there, back, server_side=True)
    for side in (client, server, client):  # hello; its answer with the certificate; the verdict on it
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue


def _handshake(host: str, port: int, context: ssl.SSLContext) -> None:
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=PROBE_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host),
    ):
        pass


def _speaks_plain(host: str, port: int) -> bool:
    """Whether someone there greets us with HTTP/2's SETTINGS frame in the clear, as gRPC without TLS does."""
    try:
        with socket.create_connection((host, port), timeout=PROBE_SECONDS) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            return plain.recv(9)[3:4] == b"\x04"
    except OSError:
        return False

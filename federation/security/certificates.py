"""A private authority for TLS, and a server certificate signed by it.

An authority that --out already holds signs again, so that a renewed server certificate asks nothing
new of the clients: they keep their ca.pem.
"""

import argparse
import os
import re
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from federation.console import Parser, fail, say

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

EXAMPLES = """\
examples:
  python -m federation.certificates --host fl.example.org 192.0.2.7
  python -m federation.certificates --host fl.example.org --renew
"""
AUTHORITY_DAYS = 3650
SKEW = timedelta(days=1)  # valid from yesterday on: a client's clock may be behind
LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.IGNORECASE)  # what stands between the dots of a host name


class CertificateError(Exception):
    """No certificate can be made; the text is one line with the way out."""


class Pair(NamedTuple):
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_authority(lifetime: timedelta = timedelta(days=AUTHORITY_DAYS + 1)) -> Pair:
    """A new authority, which can sign server certificates but no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Every authority has a name of its own: of two with one name OpenSSL calls the wrong one a bad signature.
    name = _name(f"federation authority {os.urandom(4).hex()}")
    builder = _builder(name, key.public_key(), lifetime).issuer_name(name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False)
    return Pair(builder.sign(key, hashes.SHA256()), key)


def issue(authority: Pair, hosts: list[x509.GeneralName], lifetime: timedelta) -> Pair:
    """A server certificate for these names and addresses. Raises CertificateError if it would outlive the authority."""
    ends = authority.certificate.not_valid_after_utc
    left = ends - datetime.now(UTC)
    if lifetime > left:
        raise CertificateError(
            f"the authority ends on {ends:%Y-%m-%d}; --days {max(left.days, 0)} at most, "
            "or name another --out for a new authority, whose ca.pem every client then needs"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name("federation server"), key.public_key(), lifetime)
    builder = builder.issuer_name(authority.certificate.subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    builder = builder.add_extension(x509.SubjectAlternativeName(hosts), False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return Pair(builder.add_extension(issuer, False).sign(authority.key, hashes.SHA256()), key)


def parse_host(text: str) -> x509.GeneralName:
    """A host name or an IP address as certificates spell it. Raises CertificateError where it is neither."""
    try:
        address = ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = None
    if address is not None:
        if address.is_unspecified:
            raise CertificateError(f"--host {text} is no address that clients connect to; give the machine's own")
        return x509.IPAddress(address)
    try:
        name = text if text.isascii() else text.encode("idna").decode()
    except UnicodeError:
        name = ""
    labels = name.removeprefix("*.").split(".")
    numeric = all(label.isdecimal() for label in labels)  # a mistyped address would else become a name
    if numeric or len(name) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        remedy = "give what clients connect to, without port, such as fl.example.org or 192.168.1.20"
        raise CertificateError(f"--host {text!r} is neither a host name nor an IP address; {remedy}")
    return x509.DNSName(name.lower())


def load_authority(folder: Path) -> Pair | None:
    """The authority that the folder holds, or None. Raises CertificateError where it can't sign."""
    certificate_file, key_file = folder / "ca.pem", folder / "ca.key"
    if not certificate_file.exists() and not key_file.exists():
        return None
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise CertificateError(f"{error.filename} is missing; put it back, or name another --out") from None
    except OSError as error:
        raise CertificateError(f"{error.filename} can't be read ({error.strerror})") from None
    except (ValueError, TypeError):  # TypeError: the key is encrypted
        raise CertificateError(f"ca.pem and ca.key in {folder} are no authority of ours; name another --out") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CertificateError(f"{key_file} is not the key of {certificate_file}; name another --out")
    return Pair(certificate, key)


def write_pair(folder: Path, name: str, pair: Pair) -> None:
    """NAME.pem and NAME.key, readable by the owner only from the moment they exist."""
    encoding = serialization.Encoding.PEM
    key = pair.key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for path, content in (
        (folder / f"{name}.key", key),
        (folder / f"{name}.pem", pair.certificate.public_bytes(encoding)),
    ):
        temporary = path.with_name(f".{path.name}.part")
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        os.replace(temporary, path)


def instructions(folder: Path, hosts: list[str]) -> str:
    """Who needs which file, and the commands to copy."""
    listen = "[::]" if ":" in hosts[0] else "0.0.0.0"
    connect = f"[{hosts[0].strip('[]')}]" if ":" in hosts[0] else hosts[0]
    return f"""
The server's machine needs server.pem, server.key and ca.pem; every client needs ca.pem, which is no secret.
ca.key signs: whoever has it can pose as the server. Nobody else needs it; best keep it off the network.
Server and clients also share a secret, in a file that you write once:

  (umask 077; openssl rand -hex 32 > secret.txt)

  python server.py --address {listen}:8080 --certificate {folder}/server.pem --private-key {folder}/server.key \\
      --ca-certificate {folder}/ca.pem --secret-file secret.txt
  python client.py --server {connect}:8080 --ca-certificate ca.pem --secret-file secret.txt"""


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).public_key(key).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - SKEW).not_valid_after(now + lifetime)
    # Python 3.13's ssl insists on key identifiers, and on which other extensions are critical.
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_usage(**uses: bool) -> x509.KeyUsage:
    names = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    names += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{name: uses.get(name, False) for name in names})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        __doc__,
        prog="python -m federation.certificates",
        usage="%(prog)s --host NAME-OR-IP ... [options]",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--host",
        required=True,
        nargs="+",
        action="extend",
        metavar="NAME-OR-IP",
        help="host names and IP addresses, every one that clients use for this server",
    )
    add("--out", type=Path, default=Path("certificates"), metavar="DIR", help="the folder")
    add("--days", type=int, default=365, metavar="N", help="the server certificate's lifetime")
    add(
        "--renew",
        action="store_true",
        help="replace the server certificate and its key in --out; without it, nothing is ever overwritten",
    )
    args = parser.parse_args(argv)
    if not 1 <= args.days <= AUTHORITY_DAYS:
        parser.error(f"--days must be between 1 and {AUTHORITY_DAYS}, got {args.days}")
    return args


def main() -> None:
    args = parse_args()
    folder = args.out
    try:
        hosts = [parse_host(text) for text in args.host]
        for path in (folder / "server.pem", folder / "server.key"):
            if path.exists() and not args.renew:
                raise CertificateError(f"{path} is there already; --renew replaces it, --out takes another folder")
        authority = load_authority(folder)
        known = authority is not None
        authority = authority or make_authority()
        server = issue(authority, hosts, timedelta(days=args.days))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not known:
            write_pair(folder, "ca", authority)
        write_pair(folder, "server", server)
    except CertificateError as error:
        fail(str(error), 2)
    except OSError as error:
        fail(f"--out {folder} can't be written ({error.strerror}); name another", 2)
    say(f"{folder}/ca.pem, ca.key: {'kept as they were; clients need no new ca.pem' if known else 'a new authority'}")
    ends = server.certificate.not_valid_after_utc
    say(f"{folder}/server.pem, server.key: for {', '.join(args.host)}, until {ends:%Y-%m-%d}")
    say(instructions(folder, args.host))

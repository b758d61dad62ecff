"""TLS between real processes: it carries a run, and every way in which it can fail is one line that says which."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from federation.security.certificates import issue, make_authority, parse_host, write_pair
from federation.security.tls import read_server_files

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from helpers.processes import Federation

HERE = ["127.0.0.1", "localhost"]
FILES = ["ca.pem", "server.pem", "server.key"]


def make(folder: Path, hosts: list[str], lifetime: timedelta = timedelta(days=1)) -> Path:
    folder.mkdir()
    authority = make_authority()
    write_pair(folder, "ca", authority)
    write_pair(folder, "server", issue(authority, [parse_host(host) for host in hosts], lifetime))
    return folder


def tls(folder: Path) -> list:
    return ["--certificate", folder / "server.pem", "--private-key", folder / "server.key", *ca(folder)]


def ca(folder: Path) -> list:
    return ["--ca-certificate", folder / "ca.pem"]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("good") / "certificates", HERE)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("other") / "certificates", HERE)


@pytest.fixture(scope="module")
def tls_server(good, tmp_path_factory):
    with Federation(tmp_path_factory.mktemp("tls")) as federation:
        federation.server(*tls(good)).says("waiting for 3 clients")
        yield federation


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory):
    with Federation(tmp_path_factory.mktemp("plain")) as federation:
        federation.server().says("waiting for 3 clients")
        yield federation


def only_line(client) -> str:
    """What the client says: one line, with exit code 1 at once, though it was told to ask for 300 s."""
    (line,) = client.ends(1, seconds=60).splitlines()
    return line


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_certificates_are_read_with_a_byte_order_mark_too(good, tmp_path, encoding):
    files = []
    for name in ("ca.pem", "server.pem", "server.key"):
        files.append(tmp_path / name)
        files[-1].write_bytes((good / name).read_text().replace("\n", "\r\n").encode(encoding))
    given = read_server_files(*map(str, files))
    assert all(each.startswith(b"-----BEGIN ") for each in given)


def test_a_run_over_tls_by_address_and_by_name(federation, good):
    secret = federation.folder / "secret.txt"
    secret.write_text("for certain\n")
    server = federation.server("--rounds", 1, "--secret-file", secret, *tls(good))
    port = federation.address.rpartition(":")[2]
    clients = [
        federation.tiny("--secret-file", secret, *ca(good), "--server", f"{host}:{port}")
        for host in ("127.0.0.1", "localhost", "127.0.0.1")
    ]
    for process in [server, *clients]:
        process.ends(0)
    assert f"server on {federation.address} with TLS" in server.output


def test_a_plain_client_is_told_that_the_server_speaks_tls(tls_server):
    line = only_line(tls_server.tiny("--wait", 300))
    assert line.endswith("speaks TLS; give its authority with --ca-certificate")


def test_a_tls_client_is_told_that_the_server_does_not_speak_it(plain_server, good):
    line = only_line(plain_server.tiny("--wait", 300, *ca(good)))
    assert "does not speak TLS; leave out --ca-certificate" in line


def test_a_wrong_authority_is_named(tls_server, other):
    line = only_line(tls_server.tiny("--wait", 300, *ca(other)))
    assert "the server's certificate is not from the authority in --ca-certificate" in line


def test_a_certificate_for_another_host_is_named(federation, tmp_path):
    elsewhere = make(tmp_path / "elsewhere", ["fl.example.org", "192.0.2.1"])
    federation.server(*tls(elsewhere)).says("waiting for 3 clients")
    port = federation.address.rpartition(":")[2]
    for host, what in (("127.0.0.1", "address"), ("localhost", "host")):
        line = only_line(federation.tiny("--wait", 300, "--server", f"{host}:{port}", *ca(elsewhere)))
        assert f"the server's certificate is for another {what} than {host}; make it with --host {host}" in line


def test_an_expired_certificate_is_named_by_the_client(federation, tmp_path):
    late = make(tmp_path / "late", HERE, timedelta(seconds=-1))
    # Not server.py, which wouldn't start.
    server = grpc.server(ThreadPoolExecutor(1))
    files = (late / "server.key").read_bytes(), (late / "server.pem").read_bytes()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([files]))
    server.start()
    line = only_line(federation.tiny("--wait", 300, "--server", f"127.0.0.1:{port}", *ca(late)))
    assert "the server's certificate has expired; make a new one" in line
    server.stop(None).wait()


def test_a_server_whose_key_does_not_fit_says_so_before_anything_else(federation, good, other):
    server = federation.server(*tls(good)[:2], "--private-key", other / "server.key", *ca(good))
    (line,) = server.ends(2).splitlines()
    assert f"{other}/server.key is not the key of --certificate {good}/server.pem" in line
    assert not federation.run_dir.exists()


def refusal(capsys, ca_certificate: Path, certificate: Path, private_key: Path) -> str:
    """What read_server_files says of these: one line, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        read_server_files(str(ca_certificate), str(certificate), str(private_key))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_server_refuses_files_that_no_client_could_accept(capsys, good, other, tmp_path):
    late = make(tmp_path / "late", HERE, timedelta(seconds=-1))
    assert "server.pem has expired" in refusal(capsys, *(late / name for name in FILES))
    unsigned = refusal(capsys, other / "ca.pem", good / "server.pem", good / "server.key")
    assert "is not from the authority in --ca-certificate" in unsigned


@pytest.mark.parametrize(
    "content",
    [b"", b"\0junk", b"-----BEGIN CERTIFICATE-----\n\xff\n-----END CERTIFICATE-----\n"],
    ids=["empty", "binary", "frame"],
)
def test_files_that_are_not_pem_are_named(capsys, good, tmp_path, content):
    junk = tmp_path / "junk.pem"
    junk.write_bytes(content)
    authority, certificate, key = (good / name for name in FILES)
    assert f"--ca-certificate {junk} is no certificate in PEM" in refusal(capsys, junk, certificate, key)
    assert f"--certificate {junk} is no certificate in PEM" in refusal(capsys, authority, junk, key)
    assert f"--private-key {junk} is no private key in PEM" in refusal(capsys, authority, certificate, junk)


def test_a_key_with_a_password_is_refused_without_asking_for_it(capsys, good, tmp_path):
    key = load_pem_private_key((good / "server.key").read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open")))
    assert "locked with a password" in refusal(capsys, good / "ca.pem", good / "server.pem", locked)


def test_a_client_names_an_authority_that_is_not_pem(federation, tmp_path):
    (tmp_path / "junk.pem").write_bytes(b"\0junk")
    (line,) = federation.tiny("--ca-certificate", tmp_path / "junk.pem").ends(2).splitlines()
    assert "junk.pem is no certificate in PEM" in line

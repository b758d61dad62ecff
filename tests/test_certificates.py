"""The private authority: OpenSSL and Python's strictest mode accept it, and nothing gets lost or public."""

import os
import re
import ssl
import stat
import subprocess
import sys
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

from federation.security.certificates import CertificateError, issue, main, make_authority, parse_host, write_pair

import pytest
from cryptography import x509
from helpers.processes import CLEAN, ROOT, quick_python

NAMES = ["ca.key", "ca.pem", "server.key", "server.pem"]


@pytest.fixture
def certificates(tmp_path, capsys, monkeypatch):
    """certificates(*flags) runs the command on tmp_path/out, here and now, and returns what it says."""

    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["certificates", "--out", str(tmp_path / "out"), *flags])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(certificates, capsys):
    """Like certificates, for flags that won't do: returns the line that says so."""

    def run(*flags: str) -> str:
        with pytest.raises(SystemExit) as end:
            certificates(*flags)
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> None:
    """A TLS handshake in memory; raises ssl.SSLError as a client of that host would."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = client.wrap_bio(back, there, server_hostname=host), server.wrap_bio(there, back, server_side=True)
    for side in (*sides, *sides):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert sides[0].version() == "TLSv1.3"


def test_names_and_addresses_alike_pass_pythons_strictest_checks(certificates, tmp_path):
    hosts = ["fl.example.org", "192.168.1.20", "2001:db8::7", "localhost"]
    certificates("--host", *hosts)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "out/server.pem", tmp_path / "out/server.key")
    client = ssl.create_default_context(cafile=tmp_path / "out/ca.pem")
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    for host in hosts:
        shake_hands(client, server, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(client, server, "example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake_hands(client, server, "192.168.1.21")


def test_only_the_owner_can_read_what_was_written_whatever_the_umask(certificates, tmp_path):
    old = os.umask(0)
    try:
        certificates("--host", "localhost")
        certificates("--host", "localhost", "--renew")
    finally:
        os.umask(old)
    assert sorted(contents(tmp_path / "out")) == NAMES
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_nothing_is_overwritten_unless_told(certificates, refused, tmp_path):
    certificates("--host", "localhost")
    before = contents(tmp_path / "out")
    assert "server.pem is there already; --renew replaces it" in refused("--host", "localhost")
    assert contents(tmp_path / "out") == before


def test_a_renewed_certificate_keeps_the_authority_that_clients_have(certificates, tmp_path):
    assert "ca.key: a new authority" in certificates("--host", "localhost")
    before = contents(tmp_path / "out")
    said = certificates("--host", "localhost", "192.168.1.20", "--renew")
    after = contents(tmp_path / "out")
    assert "clients need no new ca.pem" in said
    assert {name for name in NAMES if before[name] != after[name]} == {"server.key", "server.pem"}
    client = ssl.create_default_context(cadata=before["ca.pem"].decode())
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "out/server.pem", tmp_path / "out/server.key")
    shake_hands(client, server, "192.168.1.20")


def test_a_torn_authority_is_not_replaced_behind_the_users_back(certificates, refused, tmp_path):
    certificates("--host", "localhost")
    key = (tmp_path / "out/ca.key").read_bytes()
    (tmp_path / "out/ca.key").unlink()
    assert "ca.key is missing; put it back" in refused("--host", "localhost", "--renew")
    (tmp_path / "out/ca.key").write_bytes(b"junk")
    assert "no authority of ours" in refused("--host", "localhost", "--renew")
    (tmp_path / "out/ca.key").write_bytes((tmp_path / "out/server.key").read_bytes())
    assert "is not the key of" in refused("--host", "localhost", "--renew")
    (tmp_path / "out/ca.key").write_bytes(key)
    certificates("--host", "localhost", "--renew")


def test_no_certificate_outlives_its_authority(certificates, refused, tmp_path):
    certificates("--host", "localhost", "--days", "3650")
    write_pair(tmp_path / "out", "ca", make_authority(timedelta(days=30, hours=1)))
    assert "--days 30 at most" in refused("--host", "localhost", "--renew", "--days", "31")
    certificates("--host", "localhost", "--renew", "--days", "30")


def test_the_server_certificate_can_sign_nothing(tmp_path):
    authority = make_authority()
    server = issue(authority, [parse_host("localhost")], timedelta(days=1)).certificate
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_hosts_are_spelled_as_certificates_want_them():
    assert parse_host("FL.Example.org") == x509.DNSName("fl.example.org")
    assert parse_host("*.example.org") == x509.DNSName("*.example.org")
    assert parse_host("bücher.example") == x509.DNSName("xn--bcher-kva.example")
    for text in ("::1", "[::1]"):
        assert parse_host(text) == x509.IPAddress(ip_address("::1"))


@pytest.mark.parametrize(
    "host", ["", "localhost:8080", "https://fl.example.org", "192.168.1", "192.168.1.256", "a..b", "-a", "a b", "\n"]
)
def test_what_is_no_host_is_refused(host):
    with pytest.raises(CertificateError, match="is neither a host name nor an IP address"):
        parse_host(host)


def test_the_address_of_all_interfaces_is_refused():
    for host in ("0.0.0.0", "::"):
        with pytest.raises(CertificateError, match="is no address that clients connect to"):
            parse_host(host)


def test_wrong_use_is_one_line(refused):
    assert "--days must be between 1 and 3650, got 0" in refused("--host", "localhost", "--days", "0")
    assert "required: --host" in refused()
    assert "--host 'a b' is neither" in refused("--host", "a b")
    assert "--out /dev/null/x can't be written" in refused("--host", "localhost", "--out", "/dev/null/x")


def test_the_command_prints_commands_that_the_programs_take(tmp_path):
    run = [quick_python(), "-m", "federation.certificates", "--host", "::1", "localhost", "--out", "out"]
    said = subprocess.run(
        run, cwd=tmp_path, env={**CLEAN, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    ).stdout
    server, client = (line for line in said.replace("\\\n", "").splitlines() if line.startswith("  python "))
    assert "--address [::]:8080" in server
    assert "--server [::1]:8080" in client
    for program, command in (("federation/server/options.py", server), ("federation/client/options.py", client)):
        source = (ROOT / program).read_text()
        assert all(f'"{flag}"' in source for flag in re.findall(r"--[a-z-]+", command))
    for path in re.findall(r"out/\S+", server):
        assert (tmp_path / path).exists()


def test_openssl_verifies_the_chain_strictly(certificates, tmp_path):
    certificates("--host", "localhost")
    command = ["openssl", "verify", "-x509_strict", "-CAfile", tmp_path / "out/ca.pem", tmp_path / "out/server.pem"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no openssl on this machine")
    assert done.returncode == 0, done.stderr

"""Key pairs in OpenSSH's files: made, read, and refused in one line."""

import base64
import os

from federation.security import identity
from federation.security.identity import Identity, fingerprint, load_public, public_line, verify

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# RFC 8032, section 7.1, test 2.
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
OPENSSH, NO_PASSWORD = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()


def pem(key, format=OPENSSH, password=NO_PASSWORD) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, format, password)


def refused(capsys, load, *args: object) -> str:
    with pytest.raises(SystemExit) as end:
        load(*args)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].partition("error: ")[2]


def test_signatures_are_ed25519s_of_rfc_8032():
    one = Identity(Ed25519PrivateKey.from_private_bytes(SECRET))
    assert (one.public, one.sign(b"\x72")) == (PUBLIC, SIGNATURE)
    assert verify(PUBLIC, SIGNATURE, b"\x72")


@pytest.mark.parametrize(
    ("public", "signature", "message"),
    [
        (PUBLIC, SIGNATURE, b"\x73"),
        (PUBLIC, SIGNATURE[:-2] + "01", b"\x72"),
        (PUBLIC, SIGNATURE[:-2], b"\x72"),
        (PUBLIC, "no hex", b"\x72"),
        (PUBLIC, None, b"\x72"),
        ("11" * 32, SIGNATURE, b"\x72"),
        (PUBLIC[:-2], SIGNATURE, b"\x72"),
        ("", "", b""),
    ],
)
def test_nothing_else_verifies_whatever_it_is(public, signature, message):
    assert not verify(public, signature, message)


def test_the_fingerprint_is_the_one_that_openssh_prints():
    # Of `ssh-keygen -lf` on the line that public_line gives.
    assert public_line(PUBLIC) == "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAID1AF8PoQ4lakrcKp00bfrycmCzPLsSWjMDNVfEq9GYM"
    assert fingerprint(PUBLIC) == "SHA256:F34nin7tcaYH6WR5LSWSfj6weFBPfBpuyUUoPFP9YjA"


def test_a_written_key_is_read_again_and_only_its_owner_may_read_it(tmp_path):
    one = Identity.new()
    one.write(tmp_path / "key", "hospital-a")
    assert Identity.load(str(tmp_path / "key")).public == one.public
    assert load_public(str(tmp_path / "key.pub"), "--server-key") == one.public
    assert os.name != "posix" or (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        one.write(tmp_path / "key", "hospital-a")


@pytest.mark.parametrize(
    "change", [lambda c: c.replace(b"\n", b"\r\n"), lambda c: b"\xef\xbb\xbf" + c, lambda c: b"\n" + c]
)
def test_a_key_is_read_as_windows_editors_leave_it(change, tmp_path):
    one = Identity.new()
    (tmp_path / "key").write_bytes(change(pem(one.key)))
    (tmp_path / "key").chmod(0o600)
    assert Identity.load(str(tmp_path / "key")).public == one.public


def test_a_key_that_openssl_made_is_read_too(tmp_path):
    one = Identity.new()
    (tmp_path / "key").write_bytes(pem(one.key, serialization.PrivateFormat.PKCS8))
    assert Identity.load(str(tmp_path / "key")).public == one.public


def with_passphrase() -> bytes:
    """As `ssh-keygen -N secret` writes it: PROTOCOL.key of OpenSSH, here with zeros for what is encrypted."""

    def text(content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + content

    parts = [b"aes256-ctr", b"bcrypt", text(bytes(16)) + bytes([0, 0, 0, 16])]
    public = text(b"ssh-ed25519") + text(bytes.fromhex(PUBLIC))
    blob = b"openssh-key-v1\0" + b"".join(map(text, parts)) + bytes([0, 0, 0, 1]) + text(public) + text(bytes(144))
    name = b"OPENSSH PRIVATE KEY-----"
    return b"-----BEGIN " + name + b"\n" + base64.encodebytes(blob) + b"-----END " + name + b"\n"


KEY = Ed25519PrivateKey.generate()
PASSWORD = serialization.BestAvailableEncryption(b"secret")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; make one with python -m federation.identity"),
        (b"\xff\xfe\x00\xd8", "is not text; make one with python -m federation.identity"),
        (b"x" * 200_000, "is too large for a key; make one with python -m federation.identity"),
        (b"hello", "holds no private key; make one with python -m federation.identity"),
        (pem(KEY)[:120], "holds no private key; make one with python -m federation.identity"),
        (with_passphrase(), "needs a passphrase, which nobody could enter here; make one with -N ''"),
        (
            pem(KEY, serialization.PrivateFormat.PKCS8, PASSWORD),
            "needs a passphrase, which nobody could enter here; make one with -N ''",
        ),
        (
            pem(rsa.generate_private_key(65537, 1024)),
            "holds a key of another kind than Ed25519; make one with python -m federation.identity",
        ),
        (public_line(PUBLIC).encode(), "holds a public key; give the private one, the file without .pub"),
    ],
    ids=["empty", "no text", "large", "no key", "cut", "passphrase", "passphrase in PEM", "RSA", "public"],
)
def test_a_file_that_is_no_private_key_is_one_line(content, words, tmp_path, capsys):
    (tmp_path / "key").write_bytes(content)
    assert refused(capsys, Identity.load, str(tmp_path / "key")) == f"--identity {tmp_path}/key {words}"


def test_a_missing_key_is_one_line(tmp_path, capsys):
    words = f"--identity {tmp_path}/none can't be read (No such file or directory)"
    assert refused(capsys, Identity.load, f"{tmp_path}/none") == words


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pem(KEY), "holds a private key, which must not leave its owner; give its .pub file"),
        (
            b"ssh-rsa AAAA me",
            "holds a key of the kind ssh-rsa, not ssh-ed25519; make one with python -m federation.identity",
        ),
        (public_line(PUBLIC).encode()[:-9], "holds no whole key; copy the line of the .pub file anew"),
        (b"hello", "holds no public key; make one with python -m federation.identity"),
    ],
    ids=["private", "RSA", "cut", "none"],
)
def test_a_file_that_is_no_public_key_is_one_line(content, words, tmp_path, capsys):
    (tmp_path / "key").write_bytes(content)
    assert refused(capsys, load_public, str(tmp_path / "key"), "--server-key") == f"--server-key {tmp_path}/key {words}"


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such permissions")
def test_a_private_key_that_others_may_read_is_warned_of(tmp_path, capsys):
    Identity.new().write(tmp_path / "key", "a")
    (tmp_path / "key").chmod(0o644)
    Identity.load(str(tmp_path / "key"))
    said = capsys.readouterr().out
    assert said == f"warning: others on this machine may read {tmp_path}/key; forbid it: chmod 600 {tmp_path}/key\n"


def test_the_command_makes_a_pair_and_names_its_fingerprint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["identity", "--name", "hospital-a", "--out", f"{tmp_path}/keys/a"])
    identity.main()
    one = Identity.load(f"{tmp_path}/keys/a")
    assert capsys.readouterr().out.splitlines()[1].endswith(one.fingerprint)
    assert (tmp_path / "keys/a.pub").read_text() == f"{public_line(one.public)} hospital-a\n"
    words = f"--out {tmp_path}/keys/a is there already; a new key would make you somebody else: name another file"
    assert refused(capsys, identity.main) == words


@pytest.mark.parametrize("name", ["two words", "a,b", "a=b", "#a", "x" * 41, ""])
def test_a_name_that_a_members_file_could_not_hold_is_refused(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["identity", "--name", name])
    words = f"--name must be one word of at most 40 characters, without , = # and quotes, got {name!r}"
    assert refused(capsys, identity.main) == words

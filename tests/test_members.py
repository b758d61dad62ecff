"""The members' file: who it names, and its mistakes in one line each."""

import os
from datetime import UTC, datetime

from federation.security.identity import Identity, public_line
from federation.security.members import Member, Members, MembersError, read_member, read_members

import pytest

NO_OPTION = "which is no option here; there are partition=N and expiry-time=TIME"
A, B = (public_line(bytes([number] * 32).hex()) for number in (1, 2))


def write(folder, *lines: str):
    path = folder / "members"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_line_is_a_key_and_a_name_with_options_in_front():
    one = Identity.new()
    line = f'partition=1,expiry-time="20271231235959Z" {public_line(one.public)} hospital b'
    assert read_member(line) == Member("hospital b", one.public, 1, datetime(2027, 12, 31, 23, 59, 59, tzinfo=UTC))
    assert read_member(f"{public_line(one.public)} a") == Member("a", one.public)


def test_the_end_is_a_moment_of_this_machines_day_unless_z_is_behind_it():
    assert read_member(f"expiry-time=20271231 {A} a").expires == datetime(2027, 12, 31).astimezone(UTC)
    assert read_member(f"expiry-time=202712311200Z {A} a").expires == datetime(2027, 12, 31, 12, tzinfo=UTC)


def test_from_its_end_on_a_member_is_none():
    member = read_member(f"expiry-time=20271231Z {A} a")
    end = datetime(2027, 12, 31, tzinfo=UTC)
    assert (member.expired(datetime(2027, 12, 30, tzinfo=UTC)), member.expired(end)) == (False, True)


def test_empty_lines_and_comments_do_not_count_and_windows_writes_it_too(tmp_path):
    path = tmp_path / "members"
    path.write_bytes(b"\xef\xbb\xbf# hospitals\r\n\r\n" + f"{A} a\r\n  {B} b  \r\n".encode())
    assert [each.name for each in read_members(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "names nobody; give a line of each member's .pub file"),
        (["# nobody"], "names nobody; give a line of each member's .pub file"),
        ([A], "line 1: has no name; write it behind the key"),
        (["hello"], f"line 1: has hello, {NO_OPTION}"),
        ([f"command=x {A} a"], f"line 1: has command, {NO_OPTION}"),
        ([f"partition {A} a"], f"line 1: has partition, {NO_OPTION}"),
        ([f"partition=1,partition=2 {A} a"], "line 1: has partition twice"),
        ([f"partition=x {A} a"], "line 1: partition must be a whole number from 0 on, got x"),
        ([f"partition=-1 {A} a"], "line 1: partition must be a whole number from 0 on, got -1"),
        ([f"expiry-time=soon {A} a"], "line 1: expiry-time must be YYYYMMDD or YYYYMMDDHHMM, got soon"),
        ([f"expiry-time=20271301 {A} a"], "line 1: expiry-time must be YYYYMMDD or YYYYMMDDHHMM, got 20271301"),
        ([f"{A} a", "", f"{A} b"], "line 3: has the key of a, above; a key is one member's"),
        ([f"{A} a", f"{B} a"], "line 2: has the name a, as one above; give each its own"),
        ([f"partition=1 {A} a", f"partition=1 {B} b"], "line 2: has partition 1, which a has, above"),
        (
            ["-----BEGIN OPENSSH PRIVATE KEY-----"],
            "line 1: holds a private key, which must not leave its owner; give the line of its .pub file",
        ),
        (
            ["ssh-rsa AAAA a"],
            "line 1: holds a key of the kind ssh-rsa, not ssh-ed25519; make one with python -m federation.identity",
        ),
        (["ssh-ed25519 AAAA a"], "line 1: holds no whole key; copy the line of the .pub file anew"),
        (["ssh-ed25519"], "line 1: has no key; a line is ssh-ed25519 KEY NAME"),
        (["partition=1"], "line 1: has no key; a line is ssh-ed25519 KEY NAME"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_number(lines, words, tmp_path, capsys):
    path = write(tmp_path, *lines)
    with pytest.raises(SystemExit) as end:
        Members.load(str(path))
    assert end.value.code == 2
    assert capsys.readouterr().err.partition("error: ")[2] == f"--members {path} {words}\n"


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        Members.load(f"{tmp_path}/none", "--peers")
    assert capsys.readouterr().err.endswith(f"--peers {tmp_path}/none can't be read (No such file or directory)\n")


def test_a_name_is_shown_on_one_line_whatever_it_holds():
    assert read_member(f"{A} a\tb\x1b[31m " + "x" * 100).name == ("a b[31m " + "x" * 100)[:39] + "…"


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path, capsys):
    path = write(tmp_path, f"{A} a", f"{B} b")
    members = Members.load(str(path))
    write(tmp_path, f"{B} b")
    os.utime(path, ns=(1, 1))  # however coarse the file system's clock is
    members.refresh()
    assert [each.name for each in members] == ["b"]
    write(tmp_path, "hello")
    os.utime(path, ns=(2, 2))
    members.refresh()
    members.refresh()
    assert [each.name for each in members] == ["b"]
    said = capsys.readouterr().out.splitlines()
    words = f"has hello, {NO_OPTION}; the members stay as they were"
    assert said == [f"warning: --members {path} line 1: {words}"]
    path.unlink()
    members.refresh()
    assert [each.name for each in members] == ["b"]


def test_only_a_member_that_has_not_expired_is_found(tmp_path):
    one, other = Identity.new(), Identity.new()
    path = write(tmp_path, f"{public_line(one.public)} a", f"expiry-time=20200101 {public_line(other.public)} b")
    members = Members.load(str(path))
    assert members.find(one.public).name == "a"
    assert members.find(other.public) is None
    assert members.find("00" * 32) is None
    assert [each.name for each in members] == ["a"]
    with pytest.raises(MembersError):
        read_member("")

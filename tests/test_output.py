"""Output is no lifeline: where it goes away, is full, or can't show a character, the work is done all the same."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from federation.client.options import parse_args
from federation.console import _Output, command_line, read_text

import pytest
from helpers.processes import CLEAN, ROOT, Federation, wait_for

FULL = Path("/dev/full")
QUICK = ["--clients", "1", "--rounds", "2"]


def start(federation: Federation, *words: object, **where: object) -> subprocess.Popen:
    """A program of ours whose output goes somewhere special."""
    usual = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": federation.folder, "env": CLEAN}
    return subprocess.Popen([sys.executable, *map(str, words)], **{**usual, **where})


def server_words(federation: Federation) -> list[object]:
    return [ROOT / "server.py", "--address", federation.address, "--run-dir", federation.run_dir, *QUICK]


def test_a_server_whose_reader_has_seen_enough_ends_its_run(federation):
    server = start(federation, *server_words(federation), stdout=subprocess.PIPE)
    server.stdout.readline()
    server.stdout.close()
    federation.tiny().ends(0)
    assert server.wait(60) == 0
    assert len(federation.weights()) == 3


def test_a_server_without_any_output_ends_its_run(federation):
    def close() -> None:
        os.close(1)
        os.close(2)

    server = start(federation, *server_words(federation), preexec_fn=close)
    federation.tiny().ends(0)
    assert server.wait(60) == 0
    assert len(federation.weights()) == 3


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")
def test_a_server_whose_log_disk_is_full_ends_its_run(federation):
    with open(FULL, "w") as full:
        server = start(federation, *server_words(federation), stdout=full, stderr=full)
        federation.tiny().ends(0)
        assert server.wait(60) == 0
    assert len(federation.weights()) == 3


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="only POSIX has terminals that hang up")
def test_a_server_whose_terminal_is_closed_ends_its_run(federation):
    server = federation.server(*QUICK)
    server.says("waiting for 1 clients")
    server.send(signal.SIGHUP)
    federation.tiny().ends(0)
    server.ends(0)


def test_a_client_whose_reader_has_seen_enough_trains_on(federation):
    server = federation.server(*QUICK, "--model", "lenet")
    words = [ROOT / "client.py", "--server", federation.address, "--dataset", "synthetic", "--threads", 1]
    client = start(federation, *words, stdout=subprocess.PIPE)
    client.stdout.readline()
    client.stdout.close()
    assert "left out" not in server.ends(0)
    assert client.wait(60) == 0


def test_characters_that_a_terminal_lacks_end_no_program(federation):
    server = federation.server(*QUICK, "--model", "lenet", env={**CLEAN, "PYTHONIOENCODING": "ascii"})
    client = federation.client("--threads", 1, env={**CLEAN, "PYTHONIOENCODING": "cp1252"})
    client.ends(0)
    server.ends(0)
    assert " ? " in client.output  # the arrow, which cp1252 has not


class Gone:
    """A stream that fails in some way, and keeps count."""

    def __init__(self, error: Exception):
        self.error, self.tries = error, 0

    def write(self, text: str) -> None:
        self.tries += 1
        raise self.error

    flush = fileno = lambda self: self.write("")


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "full"), OSError(5, "I/O"), ValueError("closed"), BlockingIOError()]
)
def test_a_stream_that_fails_is_written_to_in_vain(error):
    stream = _Output(Gone(error))
    print("a line", file=stream, flush=True)
    assert stream._stream.tries > 0


def test_a_stream_that_python_does_not_have_takes_everything():
    stream = _Output(None)
    print("a line", file=stream, flush=True)
    stream.close()


# Ctrl-C


@pytest.mark.parametrize("program", ["client.py", "server.py", "evaluate.py"])
@pytest.mark.parametrize("after", [0.3, 0.6, 1.2])
def test_ctrl_c_in_the_first_seconds_ends_with_130_and_without_a_traceback(federation, program, after):
    words = {"evaluate.py": ["--run", "none"], "client.py": ["--dataset", "synthetic", "--wait", 30]}
    flags = words.get(program, ["--address", federation.address])
    process = start(federation, ROOT / program, *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(after)  # the moment itself is what is tested
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode in ((130,) if program != "evaluate.py" else (130, 2))  # it may have ended by itself
    assert "Traceback" not in error.decode()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc, which only Linux has")
def test_ctrl_c_twice_leaves_no_orphan_of_the_demo(federation):
    mark = uuid.uuid4().hex
    words = [ROOT / "demo.py", "--dataset", "synthetic", "--run-dir", federation.run_dir, "--", "--rounds", 50]
    demo = federation.start("demo", *words, env={**CLEAN, "TEST_MARK": mark})
    demo.says("waiting for 3 clients")
    demo.send(signal.SIGINT)
    demo.send(signal.SIGINT)
    demo.ends(130)
    wait_for(lambda: not alive(mark), "the end of all its processes", 10)


def alive(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes() and (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found


def test_a_demo_whose_clients_cant_start_ends_and_says_why(federation):
    from helpers.example_runs import make_images

    images = make_images(federation.folder / "images", train=6, test=2)
    for path in (images / "train/red").iterdir():
        path.write_bytes(b"damaged")
    words = [ROOT / "demo.py", "--dataset", images, "--run-dir", federation.run_dir, "--", "--model", "lenet"]
    output = federation.start("demo", *words).ends(1, 60)
    assert "demo: the run can't begin without client" in output
    assert "images can't be read" in output
    told = [line for line in output.splitlines() if line.startswith("server")]
    assert not [line for line in told if str(images) in line]  # the path stays with the clients


# Commands to paste


@pytest.mark.skipif(os.name == "nt", reason="cmd.exe quotes otherwise")
def test_a_command_to_paste_is_quoted_for_the_shell():
    assert command_line("python", "server.py", "--resume", Path("runs/zweiter Lauf")) == (
        "python server.py --resume 'runs/zweiter Lauf'"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_with_and_without_a_byte_order_mark(encoding):
    assert read_text("geheim \u00fc\r\n".encode(encoding)) == "geheim \u00fc\r\n"


def test_damaged_images_may_be_skipped_by_every_program_that_reads_them():
    assert parse_args("", ["--skip-damaged"]).skip_damaged

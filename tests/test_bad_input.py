"""Wrong use and what the machine refuses: one line with the value and the remedy, the right exit code, nothing made."""

import dataclasses
import os
import socket
import subprocess
from pathlib import Path

from federation.client import options as client_options
from federation.config import Recipe
from federation.results.history import History
from federation.results.run_folder import RunFolder
from federation.security.secret import load_secret
from federation.server.options import parse_args
from federation.server.settings import ServerSettings
from federation.task.compute import find_device

import pytest
from helpers.processes import CLEAN, ROOT, free_port, quick_python

import demo

WRONG_USE, REFUSED = 2, 1


def error_of(output: str) -> str:
    """The one line of error."""
    lines = output.splitlines()
    assert len(lines) == 1, output
    assert " error: " in lines[0]
    return lines[0]


# The server's flags


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("FEDERATION_SECRET", raising=False)


SERVER = {
    "--rounds 0": "--rounds must be at least 1, got 0",
    "--rounds -3": "--rounds must be at least 1, got -3",
    "--rounds three": "argument --rounds: invalid int value: 'three'",
    "--local-epochs 0": "--local-epochs must be at least 1, got 0",
    "--batch-size 0": "--batch-size must be at least 1, got 0",
    "--learning-rate 0": "--learning-rate must be above 0, got 0.0",
    "--learning-rate -0.1": "--learning-rate must be above 0, got -0.1",
    "--learning-rate nan": "--learning-rate must be above 0, got nan",
    "--learning-rate inf": "--learning-rate must be above 0, got inf",
    "--alpha 0": "--alpha must be above 0, got 0.0",
    "--alpha -1": "--alpha must be above 0, got -1.0",
    "--alpha nan": "--alpha must be above 0, got nan",
    "--seed -1": "--seed must be between 0 and 4294967295, got -1",
    "--set hidden": "--set needs NAME=VALUE, got 'hidden'",
    "--set a-b=1": "--set 'a-b' is no name of a setting; use letters, digits and _",
    "--compress fp8": "--compress must be one of none, fp16, got 'fp8'",
    "--partitioner fair": "--partitioner must be one of iid, dirichlet, shards, quantity-skew, local, got 'fair'",
    "--strategy fedsgd": "--strategy must be one of fedavg, ",
    "--clients 0": "--clients must be at least 1, got 0",
    "--clients -1": "--clients must be at least 1, got -1",
    "--min-clients 0": "--min-clients must be between 1 and --clients (3), got 0",
    "--min-clients 4": "--min-clients must be between 1 and --clients (3), got 4",
    "--fraction-fit 0": "--fraction-fit must be above 0 and at most 1, got 0.0",
    "--fraction-fit 1.1": "--fraction-fit must be above 0 and at most 1, got 1.1",
    "--fraction-fit nan": "--fraction-fit must be above 0 and at most 1, got nan",
    "--target nan": "--target must be ",
    "--target inf": "--target must be ",
    "--target-accuracy nan": "--target must be ",
    "--outlier-factor -1": "--outlier-factor must be at least 0, got -1.0",
    "--proximal-mu -1": "--proximal-mu must be at least 0, got -1.0",
    "--malicious-clients 1": "--malicious-clients is for --strategy krum; give both or none",
    "--trimmed-fraction 0.5 --strategy fedtrimmedavg": "--trimmed-fraction must be at least 0 and below 0.5, got 0.5",
    "--server-momentum 0.5": "--server-momentum is for --strategy fedavgm; give both or none",
    "--server-learning-rate 1": "--server-learning-rate is for --mode async or --strategy fedavgm or --strategy",
    "--max-update-norm -1": "--max-update-norm must be above 0, got -1.0",
    "--join-timeout 0": "--join-timeout must be above 0, got 0.0",
    "--rejoin-wait -1": "--rejoin-wait must be at least 0, got -1.0",
    "--rejoin-wait nan": "--rejoin-wait must be at least 0, got nan",
    "--round-timeout inf": "--round-timeout must be above 0, got inf",
    "--max-message-mb 0": "--max-message-mb must be above 0, got 0.0",
    "--max-message-mb 4000": "--max-message-mb can be 2047 at most (gRPC's limit), got 4000.0",
    "--address foo": "--address 'foo' is not HOST:PORT, such as 127.0.0.1:8080",
    "--address 127.0.0.1:http": "--address '127.0.0.1:http' is not HOST:PORT, such as",
    "--address http://x:1": "--address 'http://x:1' is not HOST:PORT, such as",
    "--address :8080": "--address ':8080' is not HOST:PORT, such as",
    "--address 127.0.0.1:99999": "--address '127.0.0.1:99999' is not HOST:PORT, such as",
    "--address 127.0.0.1:0": "--address needs a port from 1 to 65535, got 0",
    "--address ::1:8080": "--address '::1:8080' is not HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080",
    "--address 0.0.0.0:8080": "--address 0.0.0.0:8080 is open to other machines; give --members or --secret-file",
    "--address 10.0.0.1:8080 --secret-file s": "--address 10.0.0.1:8080 is open to other machines; give",
    "--certificate c.pem": "TLS needs all of --certificate, --private-key and --ca-certificate; make them with",
    "--private-key k.pem --ca-certificate a.pem": "TLS needs all of --certificate, --private-key and",
    "--resume runs/none": "--resume runs/none holds no run (no readable history.json)",
    "--frobnicate": "unrecognized arguments: --frobnicate",
}


@pytest.mark.parametrize(("flags", "expected"), SERVER.items(), ids=SERVER)
def test_wrong_use_of_the_server_is_one_line_with_the_value(flags, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        parse_args("A server.", flags.split())
    assert caught.value.code == WRONG_USE
    assert f" error: {expected}" in error_of(capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


def test_the_server_listens_beyond_loopback_when_told_to_or_when_it_is_safe():
    assert parse_args("", ["--address", "0.0.0.0:8080", "--insecure"]).address == "0.0.0.0:8080"
    tls = "--certificate c --private-key k --ca-certificate a"
    assert parse_args("", f"--address [::]:8080 --secret-file s {tls}".split()).certificate == "c"
    for loopback in ("127.0.0.1:1", "127.9.9.9:80", "[::1]:8080", "localhost:65535"):
        assert parse_args("", ["--address", loopback]).address == loopback


# Going on with a run


COMPLETED = Recipe(model="cnn", batch_size=64, learning_rate=0.15, own={"hidden": 3})  # by the clients' task


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has just begun."""
    config = {**dataclasses.asdict(COMPLETED), **dataclasses.asdict(ServerSettings())}
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.save_history(History(config))
    return folder.path


RESUME = {
    "--rounds 5": "--resume keeps the run's own recipe (rounds is 3); leave out --rounds 5",
    "--model lenet": "--resume keeps the run's own recipe (model is cnn); leave out --model lenet",
    "--compress fp16": "--resume keeps the run's own recipe (compress is none); leave out --compress fp16",
    "--set hidden=2": "--resume keeps the run's own settings (hidden is 3); leave out --set hidden=2",
    "--batch-size 32": "--resume keeps the run's own recipe (batch_size is 64); leave out --batch-size 32",
    "--seed 1": "--resume keeps the run's own recipe (seed is 0); leave out --seed 1",
    "--partitioner shards": "--resume keeps the run's own recipe (partitioner is iid); leave out --partitioner shards",
    "--clients 4": "--resume keeps the run's own 3 clients; leave out --clients 4",
    "--run-dir other": "names the run folder; leave out --run-dir other",
}


@pytest.mark.parametrize(("flags", "expected"), RESUME.items(), ids=RESUME)
def test_a_run_goes_on_with_its_own_recipe(flags, expected, run, capsys):
    before = (run / "history.json").read_bytes()
    with pytest.raises(SystemExit) as caught:
        parse_args("", ["--resume", str(run), *flags.split()])
    assert caught.value.code == WRONG_USE
    assert expected in error_of(capsys.readouterr().err)
    assert (run / "history.json").read_bytes() == before


def test_a_run_from_before_compression_goes_on_uncompressed(run):
    config = RunFolder(run).load_config()
    del config["compress"]
    RunFolder(run).save_history(History(config))
    assert parse_args("", ["--resume", str(run)]).recipe == COMPLETED


def test_what_the_run_has_already_may_be_given_again(run):
    flags = ["--model", "cnn", "--set", "hidden=3", "--target", "0.9"]
    args = parse_args("", ["--resume", str(run), *flags])
    assert (args.recipe, args.recipe.own, args.settings.target) == (COMPLETED, {"hidden": 3}, 0.9)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": {}}', '{"config": 3}', '{"config": null}'])
def test_a_folder_whose_history_cant_be_read_holds_no_run(content, run, capsys):
    (run / "history.json").write_text(content)
    with pytest.raises(SystemExit) as caught:
        parse_args("", ["--resume", str(run)])
    assert caught.value.code == WRONG_USE
    assert f"--resume {run} holds no run (no readable history.json)" in error_of(capsys.readouterr().err)


# Real command lines


def command(*words: object, cwd: Path, **environment: str) -> tuple[int, str]:
    """Exit code, and the one line of error; what it printed besides would be too much."""
    done = subprocess.run(
        [quick_python(), str(ROOT / str(words[0])), *map(str, words[1:])],
        cwd=cwd,
        env={**CLEAN, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == ""
    return done.returncode, error_of(done.stderr)


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """An empty folder to start programs in; it is still empty at the end."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    yield folder
    assert os.listdir(folder) == []


def test_wrong_use_ends_the_process_with_2(nowhere):
    code, error = command("server.py", "--rounds", 0, cwd=nowhere)
    assert (code, error) == (WRONG_USE, "server: error: --rounds must be at least 1, got 0")


def test_a_port_in_use_is_refused(nowhere):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        code, error = command("server.py", "--address", address, cwd=nowhere)
    assert code == REFUSED
    assert error == (
        f"server: error: can't listen on {address} (Address already in use); "
        "end the program that has the port, or give another --address"
    )


def test_an_address_of_another_machine_is_refused(nowhere):
    address = "192.0.2.1:8080"  # of TEST-NET-1, which no machine has (RFC 5737)
    code, error = command("server.py", "--address", address, "--insecure", cwd=nowhere)
    assert code == REFUSED
    assert f"can't listen on {address} (Cannot assign requested address)" in error


def test_a_folder_that_holds_a_run_is_not_written_over(nowhere, run):
    before = (run / "history.json").read_bytes()
    code, error = command("server.py", "--address", f"127.0.0.1:{free_port()}", "--run-dir", run, cwd=nowhere)
    assert code == WRONG_USE
    assert f"--run-dir {run} already holds a run, or is a file; name another, or go on with --resume {run}" in error
    assert (run / "history.json").read_bytes() == before


def test_a_run_folder_that_cant_be_written_is_refused(nowhere):
    code, error = command("server.py", "--address", f"127.0.0.1:{free_port()}", "--run-dir", "/dev/null/x", cwd=nowhere)
    assert code == REFUSED
    assert "--run-dir /dev/null/x can't be written (Not a directory); name another" in error


def test_a_secret_file_that_is_missing_or_empty_is_wrong_use(nowhere, tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.write_text(" \n")
    empty.chmod(0o600)
    address = f"127.0.0.1:{free_port()}"
    for program in (["server.py", "--address", address], ["client.py", "--server", address]):
        code, error = command(*program, "--secret-file", missing, cwd=nowhere)
        assert code == WRONG_USE
        assert f"error: --secret-file {missing} can't be read (No such file or directory)" in error
    code, error = command("server.py", "--address", address, "--secret-file", empty, cwd=nowhere)
    assert code == WRONG_USE
    assert f"the shared secret in {empty} is empty; write one with `openssl rand -hex 32`" in error


@pytest.mark.skipif(os.name != "posix", reason="the rights of files are POSIX's")
def test_a_secret_that_others_may_read_is_named_with_the_remedy(tmp_path, capsys):
    path = tmp_path / "my secret.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("horse\r\n".encode(encoding))
        path.chmod(0o644)
        assert load_secret(str(path)) == b"horse"
        said = capsys.readouterr().out
        assert said == f"warning: others on this machine may read {path}; forbid it: chmod 600 '{path}'\n"
    path.chmod(0o600)
    assert load_secret(str(path)) == b"horse"
    assert capsys.readouterr().out == ""


def test_an_empty_secret_in_the_environment_is_wrong_use(nowhere):
    code, error = command("server.py", "--address", f"127.0.0.1:{free_port()}", cwd=nowhere, FEDERATION_SECRET="")
    assert code == WRONG_USE
    assert "the shared secret in FEDERATION_SECRET is empty; write one with" in error


def test_certificates_that_cant_be_read_are_wrong_use(nowhere):
    files = ["--certificate", "c.pem", "--private-key", "k.pem", "--ca-certificate", "a.pem"]
    code, error = command("server.py", "--address", f"127.0.0.1:{free_port()}", *files, cwd=nowhere)
    assert code == WRONG_USE
    assert "a.pem can't be read (No such file or directory); make it with python -m federation.certificates" in error


# The client's and the demo's flags

CLIENT = {
    "--server foo": "--server 'foo' is not HOST:PORT, such as 127.0.0.1:8080",
    "--server http://x:1": "--server 'http://x:1' is not HOST:PORT, such as",
    "--partition-id -1": "--partition-id must be at least 0, got -1",
    "--partition-id two": "argument --partition-id: invalid int value: 'two'",
    "--threads 0": "--threads must be at least 1, got 0",
    "--wait -1": "--wait must be at least 0, got -1",
    "--wait nan": "--wait must be at least 0, got nan",
    "--device tpu": "argument --device: invalid choice: 'tpu' (choose from ",
    "--save /no/such/folder/model.pt": "--save /no/such/folder/model.pt: its folder does not exist",
}


@pytest.mark.parametrize(("flags", "expected"), CLIENT.items(), ids=CLIENT)
def test_wrong_use_of_the_client_is_one_line_with_the_value(flags, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        client_options.parse_args("A client.", flags.split())
    assert caught.value.code == WRONG_USE
    assert f" error: {expected}" in error_of(capsys.readouterr().err)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_wrong_use(device, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        find_device(device)
    assert caught.value.code == WRONG_USE
    words = f"--device {device} is not there on this machine; use --device auto"
    assert words in error_of(capsys.readouterr().err)


def test_a_data_set_that_is_not_there_is_refused_by_client_and_demo(nowhere):
    for program in ("client.py", "demo.py"):
        code, error = command(program, "--dataset", "cifra10", cwd=nowhere)
        assert code == REFUSED
        assert "--dataset 'cifra10' is neither cifar10, nor synthetic, nor a folder that exists" in error


DEMO = {
    "--clients 0": "--clients must be at least 1, got 0",
    "--rounds 0": "--rounds must be at least 1, got 0",
    "--rounds nan": "argument --rounds: invalid int value: 'nan'",
    "--alpha 0.1": "unrecognized arguments: --alpha 0.1",
    "-- --mode async --run-dir x": "--run-dir behind the -- would reach the server alone; give it before the --",
    "-- --run x": "--run-dir behind the -- would reach the server alone; give it before the --",
    "-- --clients=5": "--clients behind the -- would reach the server alone; give it before the --",
    "-- --address :80": "--address behind the -- would reach the server alone; start server.py and client.py yourself",
}


@pytest.mark.parametrize(("flags", "expected"), DEMO.items(), ids=DEMO)
def test_wrong_use_of_the_demo_is_one_line_with_the_value(flags, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.parse_args(flags.split())
    assert caught.value.code == WRONG_USE
    assert f" error: {expected}" in error_of(capsys.readouterr().err)


def test_the_demo_passes_on_what_follows_two_dashes():
    args, server = demo.parse_args(["--rounds", "2", "--", "--model", "lenet", "--", "x"])
    assert args.rounds == 2
    assert server == ["--model", "lenet", "--", "x"]

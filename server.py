"""The FedAvg server: waits for its clients, then averages what they learn, round by round."""

import argparse
import dataclasses
import os
import socket
import sys
import time
from pathlib import Path

from federation import report
from federation.address import parse_server_address
from federation.admission import Admission
from federation.buffered import BufferedServer
from federation.handshake import load_secret
from federation.options import parse_args
from federation.rounds import FederatedServer
from federation.run_folder import Checkpoint, History, RunFolder
from federation.scalars import open_scalars
from federation.streams import guard_streams
from federation.tls import read_server_files
from federation.words import fail, say

from flwr.server import ServerConfig, start_server


def main() -> None:
    args = parse_args(__doc__)
    recipe, terms = args.recipe, args.terms
    secret = load_secret(args.secret_file)
    files = (args.ca_certificate, args.certificate, args.private_key)
    certificates = read_server_files(*files) if args.certificate else None
    check_port(args.address)
    on_round = open_scalars(args.tensorboard) if args.tensorboard else None
    folder, history, checkpoint = open_run(args)
    allow_many_connections()

    def notify(event: str, partition: int | None, words: str) -> None:
        history.events.append({"time": round(time.time(), 3), "event": event, "partition": partition, "words": words})
        say(words)

    admission = Admission(
        terms.clients,
        recipe,
        notify,
        secret=secret,
        waiting_list=not args.no_waiting_list,
        load_timeout=terms.round_timeout,
    )
    if checkpoint:
        admission.begin(history.config["classes"], history.config["statistics"])
    loop, task = FederatedServer, f"{terms.strategy} of {recipe.model}, {recipe.rounds} rounds"
    if terms.mode == "async":
        loop, task = BufferedServer, f"fedbuff of {recipe.model}, {recipe.rounds * terms.clients} updates"
    server = loop(admission, terms, folder, history, checkpoint)
    server.on_round = on_round or server.on_round
    tls = " with TLS" if certificates else ""
    say(f"server on {args.address}{tls}: {task}; results in {folder.path}")
    guard_streams()
    start_server(
        server_address=args.address,
        server=server,
        config=ServerConfig(num_rounds=recipe.rounds),
        grpc_max_message_length=int(args.max_message_mb * 1_000_000),
        certificates=certificates,
    )
    if server.exit_code == 0:
        finish(folder)
    sys.stdout.flush()
    os._exit(server.exit_code)  # a thread may still wait for a client that is stopped: it must not keep us


def finish(folder: RunFolder) -> None:
    """Draw what there is to see. The clients have gone on by now, and a run that can't be drawn is still done."""
    try:
        report.write(folder)
        pictures = ", accuracy.png and report.html"
    except Exception as error:  # matplotlib's installation or its cache, the disk: many kinds
        say(f"no pictures ({type(error).__name__}: {error}); try again with: python -m federation.report {folder.path}")
        pictures = ""
    say(f"done: model.npz (final weights), history.json{pictures} are in {folder.path}")


def open_run(args: argparse.Namespace) -> tuple[RunFolder, History, Checkpoint | None]:
    """The run's folder, its history so far, and the checkpoint to go on after, if any."""
    if args.resume:
        folder = RunFolder(Path(args.resume))
        checkpoint = folder.load_checkpoint()
        unit = BufferedServer.unit if args.terms.mode == "async" else FederatedServer.unit
        since = f"after {unit} {checkpoint.server_round}" if checkpoint else "from the start: it holds no checkpoint"
        say(f"resuming {folder.path} {since}")
        return folder, checkpoint.history if checkpoint else History(args.config), checkpoint
    folder = RunFolder(Path(args.run_dir or time.strftime("runs/%Y-%m-%d-%H%M%S")))
    history = History({**dataclasses.asdict(args.recipe), **dataclasses.asdict(args.terms)})
    try:
        folder.create()
        folder.save_history(history)
    except FileExistsError:
        remedy = f"name another, or go on with --resume {folder.path}"
        fail(f"--run-dir {folder.path} already holds a run, or is a file; {remedy}", 2)
    except OSError as error:
        fail(f"--run-dir {folder.path} can't be written ({error.strerror}); name another")
    return folder, history, None


def check_port(address: str) -> None:
    """Fails where the machine won't let us listen; gRPC itself would share a port in silence."""
    host, port = parse_server_address(address)
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        remedy = "end the program that has the port, or give another --address"
        fail(f"can't listen on {address} ({error.strerror}); {remedy}")


def allow_many_connections() -> None:
    """As many open files as the system grants: a thousand idle strangers must not keep clients out."""
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit, and some systems grant no more


if __name__ == "__main__":
    main()

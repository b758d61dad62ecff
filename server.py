"""The FedAvg server: waits for its clients, then averages what they learn, round by round."""

import os
import socket
import sys

from federation import engine
from federation.address import parse_server_address
from federation.admission import Admission
from federation.handshake import load_secret
from federation.keepalive import guard_server_lines
from federation.memory import give_memory_back
from federation.options import parse_args
from federation.run import finish, loop_of, open_run, recorder, task_of
from federation.scalars import open_scalars
from federation.streams import guard_streams
from federation.tls import read_server_files
from federation.words import fail, say

from flwr.server import ServerApp, ServerConfig, start_server

app = ServerApp(server_fn=engine.components)  # for `flwr run`; the rest is for `python server.py`


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
    give_memory_back()
    admission = Admission(
        terms.clients,
        recipe,
        recorder(history.events),
        secret=secret,
        waiting_list=not args.no_waiting_list,
        load_timeout=terms.round_timeout,
    )
    if checkpoint:
        admission.begin(history.config["classes"], history.config["statistics"])
    server = loop_of(args)(admission, terms, folder, history, checkpoint)
    server.on_round = on_round or server.on_round
    tls = " with TLS" if certificates else ""
    say(f"server on {args.address}{tls}: {task_of(args)}; results in {folder.path}")
    guard_streams()
    guard_server_lines()
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

"""The FedAvg server: waits for its clients, then averages what they learn, round by round."""

import argparse

from federation.aggregation.strategy import STRATEGIES
from federation.console import say
from federation.net import check_port, keep_server_connections
from federation.operations.introduction import introduce
from federation.operations.monitoring import Monitoring
from federation.operations.sweep import sweep
from federation.process import allow_many_connections, exit_now, give_memory_back
from federation.results.report import finish
from federation.results.run_folder import open_run, recorder
from federation.security.credentials import ServerCredentials
from federation.server import engine_app
from federation.server.admission import Admission
from federation.server.async_server import SERVERS
from federation.server.grpc_server import harden
from federation.server.options import parse_args

from flwr.server import Server, ServerConfig, start_server

app = engine_app.make_app(Monitoring)  # for `flwr run`; the rest is for `python server.py`


def main() -> None:
    args = parse_args(__doc__)
    if args.sweep:
        sweep(args)
    credentials = ServerCredentials.load(args)
    check_port(args.address)
    monitoring = Monitoring(args)
    run = open_run(args)

    clients = Admission(  # first come, first served
        args.partitions,
        args.recipe,
        recorder(run.history.events),
        credentials=credentials,
        waiting_list=not args.no_waiting_list,
        load_timeout=args.settings.round_timeout,
        classes=args.classes,
        max_message_bytes=args.max_message_bytes,
    )
    strategy = STRATEGIES[args.settings.strategy]  # Flower's FedAvg unless --strategy names another
    server = SERVERS[args.settings.mode](clients, strategy, args.settings, run, monitoring.observe(run))
    say(introduce(args, run.folder.path, credentials.hosts))
    serve(server, args, credentials.certificates)
    if server.exit_code == 0:
        finish(run.folder)
    exit_now(server.exit_code)  # a thread may still be waiting for a frozen client


def serve(server: Server, args: argparse.Namespace, certificates: tuple[bytes, bytes, bytes] | None) -> None:
    """Run all rounds over gRPC: Flower's start_server, hardened against whoever else connects."""
    allow_many_connections()
    give_memory_back()
    harden()
    keep_server_connections(args.partitions)
    start_server(
        server_address=args.address,
        server=server,
        config=ServerConfig(num_rounds=args.recipe.rounds),
        grpc_max_message_length=args.max_message_bytes,
        certificates=certificates,
    )


if __name__ == "__main__":
    main()

"""Every way to use the server's flags wrongly, in one line each: what is wrong, the value, the remedy."""

import argparse
import os
from collections.abc import Iterator

from federation.address import is_loopback, parse_server_address
from federation.partition import PARTITIONERS
from federation.recipe import flag
from federation.strategy import STRATEGIES

MODES = ("sync", "async")


def wrong_use(args: argparse.Namespace) -> Iterator[str]:
    """Yields a line for every value that can't be used."""
    try:
        host, port = parse_server_address(args.address)
    except ValueError as error:
        yield f"--address {error}"
    if port == 0:
        yield "--address needs a port from 1 to 65535, got 0"
    for name, choices in (("mode", MODES), ("partitioner", PARTITIONERS), ("strategy", STRATEGIES)):
        if getattr(args, name) not in choices:
            yield f"--{name} must be one of {', '.join(choices)}, got {getattr(args, name)!r}"
    if args.clients < 1:
        yield f"--clients must be at least 1, got {args.clients}"
    if not 1 <= args.min_clients <= args.clients:
        yield f"--min-clients must be between 1 and --clients ({args.clients}), got {args.min_clients}"
    for name in ("fraction_fit", "target_accuracy"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            yield f"{flag(name)} must be above 0 and at most 1, got {value}"
    for name in ("join_timeout", "round_timeout", "max_update_norm", "max_message_mb", "server_learning_rate"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            yield f"{flag(name)} must be above 0, got {value}"
    if args.mode == "async":
        yield from wrong_use_of_async(args)
    if not 0 <= args.rejoin_wait < float("inf"):
        yield f"--rejoin-wait must be at least 0, got {args.rejoin_wait}"
    if args.max_message_mb > 2047:
        yield f"--max-message-mb can be 2047 at most (gRPC's limit), got {args.max_message_mb}"
    tls = [args.certificate, args.private_key, args.ca_certificate]
    if any(tls) and not all(tls):
        yield (
            "TLS needs all of --certificate, --private-key and --ca-certificate; "
            "make them with python -m federation.certificates"
        )
    secret = args.secret_file or os.environ.get("FEDERATION_SECRET")
    if not is_loopback(host) and not args.insecure and not (all(tls) and secret):
        yield (
            f"--address {args.address} is open to other machines; give --secret-file and TLS "
            "(--certificate, --private-key, --ca-certificate), or say --insecure"
        )


def wrong_use_of_async(args: argparse.Namespace) -> Iterator[str]:
    if args.strategy != "fedavg" or args.fraction_fit != 1:
        what = "--fraction-fit" if args.strategy == "fedavg" else f"--strategy {args.strategy}"
        yield f"--mode async has its own aggregation (fedbuff), and all clients train; leave out {what}"
    if not 1 <= args.buffer_size <= args.rounds * args.clients:
        updates = f"the run's {args.rounds * args.clients} updates"
        yield f"--buffer-size must be between 1 and {updates} (rounds x clients), got {args.buffer_size}"
    if not 0 <= args.patience <= 1:
        yield f"--patience must be between 0 and 1, got {args.patience}"
    if args.max_staleness < 0:
        yield f"--max-staleness must be at least 0, got {args.max_staleness}"

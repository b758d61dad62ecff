"""What the server says when it starts: what it does, where, and what its clients enter."""

import argparse
import os
from pathlib import Path

from federation.console import command_line
from federation.net import is_loopback, join, own_address, parse_address
from federation.server.options import describe


def introduce(args: argparse.Namespace, folder: Path, hosts: list[str]) -> str:
    """What the server does, where, and what its clients enter."""
    place = args.address + (" with TLS" if args.certificate else "")
    return f"server on {place}: {describe(args)}; results in {folder}\nclients enter: {entered(args, hosts)}"


def entered(args: argparse.Namespace, hosts: list[str]) -> str:
    """The command that a client enters, with an address by which others reach this machine.

    hosts: the names and addresses in the server's certificate, if it has one; clients must call it by one of them.
    """
    host, port = parse_address(args.address)
    everywhere = host in ("0.0.0.0", "::")
    if hosts and host.lower() not in hosts:
        host = next((one for one in hosts if everywhere and not is_loopback(one)), hosts[0])
    elif everywhere:
        host = own_address()
    flags = ["--server", join(host, port)]
    flags += ["--dataset", "FOLDER"] if args.recipe.partitioner == "local" else []
    flags += ["--ca-certificate", Path(args.ca_certificate).name] if args.ca_certificate else []
    flags += ["--secret-file", Path(args.secret_file).name] if args.secret_file else []
    flags += ["--identity", "FILE"] if args.members else []
    flags += ["--peers", "FILE"] if args.members and args.recipe.secure_aggregation else []
    flags += ["--dp-epsilon", "E"] if args.recipe.private_training else []
    secret = not args.secret_file and not args.members and os.environ.get("FEDERATION_SECRET")
    return command_line("python", "client.py", *flags) + (", with the server's FEDERATION_SECRET" if secret else "")

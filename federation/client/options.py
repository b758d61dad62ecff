"""The client's command line; read before torch is imported, which takes a second."""

import argparse
from pathlib import Path
from typing import Any

from federation.console import Parser, add_log_flags, start_log
from federation.net import parse_address
from federation.privacy.budget import Budget, add_budget_flags

DEVICES = ["auto", "cpu", "cuda", "mps"]
DATASETS = "cifar10, synthetic (generated), or a FOLDER of train|test/<class>/*"
EXAMPLES = """\
examples:
  python client.py                                    CIFAR-10, with the server on this machine
  python client.py --dataset synthetic                without any download
  python client.py --server fl.example.org:8080 --dataset my-images --ca-certificate ca.pem --secret-file secret.txt
"""


def add_task_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", metavar="FOLDER", help="model.py and data.py of your own: docs/own-federation.md")


def add_data_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """several: whether --dataset may name one for each client."""
    add_task_flag(parser)
    add_dataset_flags(parser, several)


def add_dataset_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    more: dict[str, Any] = {"nargs": "+", "metavar": "DATASET"} if several else {}
    own = "; of several, each client gets its own" if several else ""
    parser.add_argument("--dataset", help=f"{DATASETS}{own} (default: the task's)", **more)
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is kept, or downloaded to once")
    parser.add_argument("--skip-damaged", action="store_true", help="go on without image files that can't be read")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to train")


def parse_args(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Exits with 2 and one line on wrong use."""
    parser = Parser(description, epilog=EXAMPLES)
    add = parser.add_argument
    add("--server", default="127.0.0.1:8080", metavar="HOST:PORT", help="where the server listens")
    add_data_flags(parser)
    add("--partition-id", type=int, metavar="N", help="ask for a certain partition (default: the first free)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: a share of the cores)")
    add_device_flag(parser)
    add("--slowdown", type=float, default=1, metavar="F", help="sleep to be F times slower: for experiments")
    add(
        "--save",
        metavar="FILE",
        help="keep the final global model, as safetensors; with --stay its name has the run's id",
    )
    add("--stay", action="store_true", help="after each run wait for the next one, for days, whatever --wait says")
    add("--policy", metavar="FILE", help="what to take part in, whatever the server asks for: see deploy/policy.toml")
    add(
        "--audit",
        default="audit",
        metavar="FOLDER",
        help="keep a record of what goes out and comes in: ID-client-N.jsonl",
    )
    add("--wait", type=float, default=300, metavar="SECONDS", help="how long to ask for a server that is not there")
    add("--secret-file", metavar="FILE", help="the shared secret that the server asks for (or FEDERATION_SECRET)")
    add("--identity", metavar="FILE", help="this client's own key, where the server admits members; see deploy.md")
    add(
        "--peers",
        metavar="FILE",
        help="the other clients' keys: take part in secure aggregation among them, and nothing else",
    )
    add("--server-key", metavar="FILE", help="the server's .pub file: take part in no other server's runs")
    add("--ca-certificate", metavar="FILE", help="the authority of the server's TLS certificate; turns TLS on")
    add_log_flags(parser)
    add_budget_flags(parser)
    args = parser.parse_args(argv)
    try:
        parse_address(args.server)
    except ValueError as error:
        parser.error(f"--server {error}")
    try:
        args.budget = Budget.from_args(args)
    except ValueError as error:
        parser.error(str(error))
    if args.peers and not args.identity:
        parser.error(f"--peers {args.peers} needs --identity, the key by which the others know this client")
    if args.partition_id is not None and args.partition_id < 0:
        parser.error(f"--partition-id must be at least 0, got {args.partition_id}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if not 1 <= args.slowdown < float("inf"):
        parser.error(f"--slowdown must be at least 1, got {args.slowdown:g}")
    if not args.wait >= 0:  # NaN too: it would wait for ever
        parser.error(f"--wait must be at least 0, got {args.wait:g}")
    if args.save and not Path(args.save).absolute().parent.is_dir():
        parser.error(f"--save {args.save}: its folder does not exist")
    start_log(args.log_file, args.log_format)
    return args

"""The server's command line: a flag for every setting, and what is about this machine alone."""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from federation.config import RUN, Recipe
from federation.console import Parser, add_log_flags, say, start_log
from federation.net import is_loopback, parse_address
from federation.results.run_folder import RunFolder
from federation.security.masks import LEAST
from federation.server.settings import ServerSettings
from federation.server.stored_run import repeated, resumed
from federation.setting import add_flags, flag

JOIN = "who may join"
EXAMPLES = """\
examples:
  python server.py                                          three clients on this machine, three rounds
  python server.py --partitioner dirichlet --alpha 0.1      clients that hold few of the classes
  python server.py --strategy fedadam --rounds 10           another aggregation
  python server.py --resume runs/2026-11-22-140000          go on after a stop or a crash
  python server.py --sweep sweep.toml --rounds 10           one run for each of its settings, with client.py --stay
"""


def build_parser(description: str | None) -> Parser:
    parser = Parser(description, epilog=EXAMPLES)
    add = parser.add_argument_group(RUN).add_argument
    add("--address", default="127.0.0.1:8080", metavar="HOST:PORT", help="where to listen")
    add("--run-dir", metavar="DIR", help="where results go (default: runs/<date-time>)")
    add("--initial-weights", metavar="FILE", help="begin with these weights, safetensors by PyTorch's names")
    add("--resume", metavar="RUN_DIR", help="go on with a run after its last whole round")
    add(
        "--auto-resume",
        action="store_true",
        help="go on with the run that --run-dir holds, if any: for services, which are started again as they were",
    )
    add(
        "--again", metavar="RUN_DIR", help="repeat a run from its folder; with the same clients and data: the same bits"
    )
    add("--sweep", metavar="FILE", help="runs over a grid of settings and seeds: see docs/many-runs.md")
    add("--tensorboard", metavar="DIR", help="also write scalars there (needs: pip install tensorboard)")
    add("--page", type=int, metavar="PORT", help="serve the run's page at http://127.0.0.1:PORT/ while it goes on")
    add(
        "--metrics",
        type=int,
        metavar="PORT",
        help="numbers for Prometheus there (needs: pip install prometheus-client)",
    )
    add_log_flags(parser)
    add_flags(parser, [Recipe, ServerSettings])
    add = parser.add_argument_group(JOIN).add_argument
    add("--classes", nargs="+", metavar="NAME", help="classes of the federation (default: those of the clients)")
    add("--no-waiting-list", action="store_true", help="refuse clients that find no free place")
    add("--secret-file", metavar="FILE", help="the shared secret that clients must prove (or FEDERATION_SECRET)")
    add(
        "--members",
        metavar="FILE",
        help="admit these alone: a line of each one's .pub file, may change meanwhile",
    )
    add("--identity", metavar="FILE", help="the server's own key, for clients that pin it with --server-key")
    add("--certificate", metavar="FILE", help="the server's TLS certificate")
    add("--private-key", metavar="FILE", help="its key")
    add("--ca-certificate", metavar="FILE", help="the authority that signed it; clients get this file too")
    add("--max-message-mb", type=float, default=64, metavar="MB", help="refuse larger messages")
    add("--insecure", action="store_true", help="listen beyond this machine without TLS, members and secret")
    return parser


def parse_args(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with `recipe`, `settings`, and `config`: both as a run stores them. Exits with 2 and one line if wrong."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    if args.auto_resume:
        _auto_resume(parser, args)
    if args.sweep:  # which checks the settings of each of its runs
        for name, value in (("--resume", args.resume), ("--again", args.again)):
            if value:
                parser.error(f"--sweep goes on by itself; leave out {name} {value}")
        return args
    given = {name: value for name, value in vars(args).items() if value is not None}
    try:
        if args.resume:
            args.recipe, args.settings, args.config = resumed(args, given)
        elif args.again:
            args.recipe, args.settings, args.config = repeated(args, given)
        else:
            args.recipe = Recipe.among(given)
            args.settings = ServerSettings.among({**_usual(args.recipe), **given})
            args.config = {**dataclasses.asdict(args.recipe), **dataclasses.asdict(args.settings)}
        args.partitions = max(args.settings.clients, args.config["clients"])  # of a resumed run, those that it had
        updates = args.recipe.rounds * args.settings.clients
        if args.settings.mode == "async" and args.settings.buffer_size > updates:
            what = f"the run's {updates} updates (rounds x clients)"
            raise ValueError(f"--buffer-size must be between 1 and {what}, got {args.settings.buffer_size}")
        if args.recipe.private_training and args.settings.mode == "async":
            words = "--private-training plans the noise of each client for a number of rounds"
            raise ValueError(f"{words}; leave out --mode async")
        for problem in itertools.chain(_unfit_for_sums(args, given), _problems(args)):
            raise ValueError(problem)
    except ValueError as error:
        parser.error(str(error))
    start_log(args.log_file, args.log_format)
    return args


def _auto_resume(parser: Parser, args: argparse.Namespace) -> None:
    """Make --run-dir a --resume where it holds a run. Ends the program where that run is done."""
    if args.sweep or args.resume or not args.run_dir:
        parser.error("--auto-resume goes with --run-dir, which names the run; --sweep and --resume go on by themselves")
    folder = RunFolder(Path(args.run_dir))
    if folder.is_done():
        say(f"the run in {folder.path} is done already; name another --run-dir for another run")
        raise SystemExit(0)
    if folder.is_begun():
        args.resume, args.run_dir, args.again = args.run_dir, None, None
    else:
        folder.clear()


def describe(args: argparse.Namespace) -> str:
    """What the run will do, in a few words."""
    recipe, settings = args.recipe, args.settings
    model = f" of {recipe.model}" if recipe.model else ""  # else the task's, which the clients know
    if settings.mode == "async":
        return f"fedbuff{model}, {recipe.rounds * settings.clients} updates"
    secure = ", secure aggregation" if recipe.secure_aggregation else ""
    private = ", private training" if recipe.private_training else ""
    return f"{settings.strategy}{model}, {recipe.rounds} rounds{secure}{private}"


def _usual(recipe: Recipe) -> dict:
    """Of settings that depend on the recipe, what they are where nothing else is given.

    An update of private training is mostly noise, whose size is the client's own affair.
    """
    usual: dict = {"min_clients": LEAST} if recipe.secure_aggregation else {}
    return {**usual, "outlier_factor": 0.0} if recipe.secure_aggregation or recipe.private_training else usual


def _unfit_for_sums(args: argparse.Namespace, given: dict) -> Iterator[str]:
    """A line for everything that can't be had with secure aggregation, with the reason."""
    recipe, settings = args.recipe, args.settings
    if not recipe.secure_aggregation:
        return
    single = "which needs single updates, and the server gets their sum alone"
    if settings.mode == "async":
        yield "--secure-aggregation needs rounds, in which many updates make one sum; leave out --mode async"
    if settings.strategy in ("fedmedian", "fedtrimmedavg", "krum"):
        yield f"--secure-aggregation can't be had with --strategy {settings.strategy}, {single}; use fedavg"
    if given.get("outlier_factor"):
        words = f"--secure-aggregation can't be had with --outlier-factor, {single}"
        yield f"{words}; --max-update-norm is kept by the clients themselves"
    if recipe.compress != "none":
        yield f"--secure-aggregation has its own number format; leave out --compress {recipe.compress}"
    for name in ("clients", "min_clients"):
        if getattr(settings, name) < LEAST:
            words = f"--secure-aggregation takes {LEAST} clients at least, as of two each knows the other's part"
            yield f"{words}; got {flag(name)} {getattr(settings, name)}"
    if round(settings.fraction_fit * settings.clients) < LEAST:
        yield f"--fraction-fit {settings.fraction_fit:g} leaves fewer than the {LEAST} clients that a sum takes"


def _problems(args: argparse.Namespace) -> Iterator[str]:
    """A line for every flag about this machine that can't be used."""
    try:
        host, port = parse_address(args.address)
    except ValueError as error:
        yield f"--address {error}"
    if port == 0:
        yield "--address needs a port from 1 to 65535, got 0"
    if not 0 < args.max_message_mb < float("inf"):
        yield f"--max-message-mb must be above 0, got {args.max_message_mb}"
    if args.max_message_mb > 2047:
        yield f"--max-message-mb can be 2047 at most (gRPC's limit), got {args.max_message_mb}"
    args.max_message_bytes = int(args.max_message_mb * 1_000_000)
    taken = {port: "--address"}
    for name, wanted in (("--page", args.page), ("--metrics", args.metrics)):
        if wanted is None:
            continue
        if not 1 <= wanted <= 65535:
            yield f"{name} needs a port from 1 to 65535, got {wanted}"
        if wanted in taken:
            yield f"{name} {wanted} is the port of {taken[wanted]}; give each its own"
        taken[wanted] = name
    tls = [args.certificate, args.private_key, args.ca_certificate]
    if any(tls) and not all(tls):
        yield (
            "TLS needs all of --certificate, --private-key and --ca-certificate; "
            "make them with python -m federation.certificates"
        )
    secret = args.secret_file or os.environ.get("FEDERATION_SECRET") or args.members
    if not is_loopback(host) and not args.insecure and not (all(tls) and secret):
        yield (
            f"--address {args.address} is open to other machines; give --members or --secret-file, and TLS "
            "(--certificate, --private-key, --ca-certificate), or say --insecure"
        )

"""The server's command line: its flags, and the recipe and the terms made of them."""

import argparse
from pathlib import Path

from federation.partition import PARTITIONERS
from federation.recipe import EARLIER, MODELS, RECIPE_FIELDS, TERMS_FIELDS, Recipe, Terms, flag
from federation.run_folder import RunFolder
from federation.strategy import STRATEGIES
from federation.wire import COMPRESS
from federation.wrong_use import MODES, wrong_use

ASYNC_FIELDS = ("buffer_size", "server_learning_rate", "max_staleness", "patience")


def build_parser(description: str) -> argparse.ArgumentParser:
    recipe, terms = Recipe(), Terms()
    parser = argparse.ArgumentParser(description=description, usage="%(prog)s [options]; --help lists them")
    default = "(default: %(default)s)"

    add = parser.add_argument_group("the run").add_argument
    add("--address", default="127.0.0.1:8080", metavar="HOST:PORT", help=f"where to listen {default}")
    add("--rounds", type=int, default=recipe.rounds, metavar="N", help=f"server rounds {default}")
    add("--clients", type=int, default=terms.clients, metavar="N", help=f"places; round 1 waits for all {default}")
    add(
        "--fraction-fit",
        type=float,
        default=1.0,
        metavar="F",
        help=f"part of the clients that train {default}",
    )
    add("--mode", default=terms.mode, metavar="|".join(MODES), help=f"wait for all in rounds, or for nobody {default}")
    add("--target-accuracy", type=float, metavar="A", help="end the run after the first round that reaches it")
    add("--run-dir", metavar="DIR", help="where results go (default: runs/<date-time>)")
    add("--tensorboard", metavar="DIR", help="also write scalars there (needs: pip install tensorboard)")
    add("--resume", metavar="RUN_DIR", help="go on with a run after its last whole round")

    add = parser.add_argument_group("the recipe, which every client gets").add_argument
    add("--model", default=recipe.model, metavar="|".join(MODELS), help=f"network of model.py {default}")
    add(
        "--local-epochs",
        type=int,
        default=recipe.local_epochs,
        metavar="N",
        help=f"passes over its images {default}",
    )
    add("--batch-size", type=int, metavar="N", help=f"images in a step (default: {by_model(0)})")
    add("--learning-rate", type=float, metavar="R", help=f"peak of its schedule (default: {by_model(1)})")
    add(
        "--partitioner",
        default=recipe.partitioner,
        metavar="|".join(PARTITIONERS),
        help=f"who holds what; whole: all of one's own {default}",
    )
    add(
        "--alpha",
        type=float,
        default=recipe.alpha,
        metavar="A",
        help=f"of dirichlet; smaller is more skewed {default}",
    )
    add("--seed", type=int, default=recipe.seed, metavar="N", help=f"same seed, same bits {default}")
    add(
        "--compress",
        default=recipe.compress,
        metavar="|".join(COMPRESS),
        help=f"how weights travel; fp16: in half the bytes {default}",
    )

    add = parser.add_argument_group("aggregation").add_argument
    add("--strategy", default=terms.strategy, metavar="|".join(STRATEGIES), help=f"one of Flower's {default}")
    add("--max-update-norm", type=float, metavar="N", help="clip what a client changes to this L2 norm (default: off)")

    add = parser.add_argument_group("--mode async, where N rounds mean N x clients updates").add_argument
    add("--buffer-size", type=int, metavar="K", help="updates that make a version (default: 2 for 3 clients)")
    add(
        "--server-learning-rate",
        type=float,
        metavar="R",
        help=f"share of their mean that is applied (default: {terms.server_learning_rate:g})",
    )
    add(
        "--max-staleness",
        type=int,
        metavar="N",
        help=f"drop updates of clients whose model is more versions old (default: {terms.max_staleness})",
    )

    add(
        "--patience",
        type=float,
        metavar="F",
        help="wait for updates about to come, for this part of the fastest client's training time "
        f"(default: {terms.patience:g})",
    )

    add = parser.add_argument_group("when clients come late, or go; times in seconds").add_argument
    add("--min-clients", type=int, metavar="N", help=f"go on with so many (default: {terms.min_clients})")
    add(
        "--join-timeout",
        type=float,
        default=terms.join_timeout,
        metavar="S",
        help=f"for the first clients to come {default}",
    )
    add(
        "--rejoin-wait",
        type=float,
        default=terms.rejoin_wait,
        metavar="S",
        help=f"for a free place to be taken {default}",
    )
    add(
        "--round-timeout",
        type=float,
        default=terms.round_timeout,
        metavar="S",
        help=f"for a client to answer {default}",
    )
    add(
        "--no-waiting-list",
        action="store_true",
        help="refuse clients that find no free place",
    )

    add = parser.add_argument_group("who may join").add_argument
    add("--secret-file", metavar="FILE", help="the shared secret that clients must prove (or FEDERATION_SECRET)")
    add("--certificate", metavar="FILE", help="the server's TLS certificate")
    add("--private-key", metavar="FILE", help="its key")
    add("--ca-certificate", metavar="FILE", help="the authority that signed it; clients get this file too")
    add(
        "--max-message-mb",
        type=float,
        default=64,
        metavar="MB",
        help=f"refuse larger messages {default}",
    )
    add("--insecure", action="store_true", help="listen beyond this machine without TLS and secret")
    return parser


def by_model(column: int) -> str:
    return ", ".join(f"{values[column]} for {name}" for name, values in MODELS.items())


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with the recipe and the terms made of them. Exits with 2 and one line on wrong use."""
    parser = build_parser(description)
    args = parser.parse_args(argv)
    args.config = None
    if args.resume:
        args.config = stored_config(parser, args)
        stored = {key: value for key, value in args.config.items() if key in RECIPE_FIELDS or key in TERMS_FIELDS}
        parser.set_defaults(**stored, config=args.config)
        args = parser.parse_args(argv)
        for key in RECIPE_FIELDS:
            if getattr(args, key) != stored[key]:
                theirs = f"{flag(key)} {getattr(args, key)}"
                parser.error(f"--resume keeps the run's own recipe ({key} is {stored[key]}); leave out {theirs}")
        if args.clients != stored["clients"]:
            parser.error(
                f"--resume keeps the run's own {stored['clients']} clients; leave out --clients {args.clients}"
            )
        if args.mode != stored["mode"]:
            parser.error(f"--resume keeps the run's own mode, {stored['mode']}; leave out --mode {args.mode}")
    elif args.mode != "async":
        for name in ASYNC_FIELDS:
            if getattr(args, name) is not None:
                parser.error(f"{flag(name)} is for --mode async; give both or none")
    batch_size, learning_rate = MODELS.get(args.model, (1, 1.0))
    args.batch_size = batch_size if args.batch_size is None else args.batch_size
    args.learning_rate = learning_rate if args.learning_rate is None else args.learning_rate
    args.buffer_size = -(-2 * args.clients // 3) if args.buffer_size is None else args.buffer_size
    for name in ASYNC_FIELDS[1:]:
        if getattr(args, name) is None:
            setattr(args, name, getattr(Terms, name))
    args.min_clients = min(Terms.min_clients, args.clients) if args.min_clients is None else args.min_clients
    try:
        args.recipe = Recipe(**{key: getattr(args, key) for key in RECIPE_FIELDS})
    except ValueError as error:
        parser.error(str(error))
    for problem in wrong_use(args):
        parser.error(problem)
    args.terms = Terms(**{key: getattr(args, key) for key in TERMS_FIELDS})
    return args


def stored_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    if args.run_dir:
        parser.error(f"--resume {args.resume} names the run folder; leave out --run-dir {args.run_dir}")
    try:
        config = {**EARLIER, **RunFolder(Path(args.resume)).load_config()}
        if not {*RECIPE_FIELDS, *TERMS_FIELDS} <= set(config):
            raise KeyError
        return config
    except (OSError, ValueError, KeyError, TypeError):  # no such file, no JSON, or not what we wrote
        parser.error(f"--resume {args.resume} holds no run (no readable history.json)")

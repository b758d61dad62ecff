"""What a hospital allows: how much all runs together may tell of one of its training examples."""

import argparse
import math
from dataclasses import dataclass
from typing import Any, Self

from federation.config import Recipe
from federation.console import PublicError
from federation.privacy.accounting import LEAST_DELTA

FLAGS = ("dp_epsilon_per_run", "dp_delta", "dp_clip", "dp_seed", "ledger")  # that say nothing without --dp-epsilon


@dataclass(frozen=True)
class Budget:
    """A client's own flags; no server can change them."""

    epsilon: float  # of all updates in the ledger together
    epsilon_per_run: float | None = None  # the most of it that one run may spend; None: all that is left
    delta: float = 1e-5
    clip: float = 1.0  # L2 norm of one example's gradient
    ledger: str | None = None  # path; None: named by the examples
    seed: int | None = None  # of noise that anybody can make again

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self | None:
        """None without --dp-epsilon. Raises ValueError, one line, where a value can't be used."""
        given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
        if args.dp_epsilon is None:
            for name in given:
                raise ValueError(f"--{name.replace('_', '-')} needs --dp-epsilon, which turns private training on")
            return None
        budget = cls(args.dp_epsilon, **{name.removeprefix("dp_"): value for name, value in given.items()})
        for name in ("epsilon", "epsilon_per_run", "clip"):
            value = getattr(budget, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--dp-{name.replace('_', '-')} must be above 0 and finite, got {value:g}")
        if not LEAST_DELTA <= budget.delta < 1:
            between = f"from {LEAST_DELTA:g} to 1, below 1 in the number of examples"
            raise ValueError(f"--dp-delta must be {between}; got {budget.delta:g}")
        if budget.seed is not None and budget.seed < 0:
            raise ValueError(f"--dp-seed must be at least 0, got {budget.seed}")
        if budget.ledger == "":
            raise ValueError("--ledger needs the name of a file, got an empty one")
        return budget


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    add: Any = parser.add_argument_group("private training: how much may leave, in all runs together").add_argument
    add("--dp-epsilon", type=float, metavar="E", help="train with differential privacy, to this epsilon and no further")
    add(
        "--dp-epsilon-per-run",
        type=float,
        metavar="E",
        help="the most by which one run may raise what is spent (default: all that is left)",
    )
    add("--dp-delta", type=float, metavar="D", help=f"its delta (default: {Budget.delta:g})")
    add(
        "--dp-clip", type=float, metavar="C", help=f"shorten each example's gradient to this (default: {Budget.clip:g})"
    )
    add("--ledger", metavar="FILE", help="what was spent on these examples (default: in privacy/, named by them)")
    add("--dp-seed", type=int, metavar="N", help="noise from a seed, for tests and lectures: epsilon is void")


def check_budget(budget: Budget | None, recipe: Recipe) -> None:
    """Whether a client with this budget takes part in runs of this recipe. Raises PublicError."""
    if budget and not recipe.private_training:
        raise PublicError(
            "it takes part in private training only (--dp-epsilon); start the server with --private-training"
        )
    if recipe.private_training and not budget:
        raise PublicError("this run trains privately; start the client with --dp-epsilon, how much may leave it")

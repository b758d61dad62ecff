"""A client that starts in half a second, for tests of the machinery: the project's own session and connection
around a model of six weights and a counter, and, on demand, every way to misbehave."""

import argparse
import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from federation.client.connection import connect
from federation.client.policy import Policy
from federation.client.session import RunEnded, Session
from federation.client.staying import stay
from federation.console import fail, say
from federation.protocol import Assignment
from federation.security.audit import AuditLog, audit_folder, open_audit
from federation.security.credentials import ClientCredentials

import numpy as np
from flwr.client import NumPyClient

CLASSES = ["cat", "dog"]
WEIGHTS = [np.zeros((2, 2), np.float32), np.zeros(2, np.float32), np.array(0)]  # the last counts, like BatchNorm's


class TinyClient(NumPyClient):
    """Adds a draw from (seed, partition, round) to the weights: the right answer can be worked out."""

    num_test = 10
    buffer_positions = [2]  # noqa: RUF012

    def __init__(
        self,
        assignment: Assignment,
        behave: str = "",
        in_round: int = 0,
        seconds: float = 0.0,
        until: Path | None = None,
    ):
        self.assignment = assignment
        self.behave, self.in_round, self.seconds, self.until = behave, in_round, seconds, until
        self.num_train = 100 * (assignment.partition + 1)

    def get_parameters(self, config: dict) -> list:
        return WEIGHTS

    def fit(self, parameters: list, config: dict) -> tuple:
        server_round = config["server_round"]
        rng = np.random.default_rng([self.assignment.recipe.seed, self.assignment.partition, server_round])
        new = [(a + rng.normal(size=a.shape)).astype(a.dtype) for a in parameters[:2]] + [parameters[2] + 1]
        examples, metrics = self.num_train, {"train_loss": 1.0 / server_round}
        say(f"fit {server_round}")
        time.sleep(self.seconds)
        while self.until and server_round == self.in_round and not self.until.exists():
            time.sleep(0.02)
        if self.behave and (server_round == self.in_round or self.in_round == 0):
            new, examples, metrics = misbehave(self.behave, new, examples, metrics)
        return new, examples, metrics

    def evaluate(self, parameters: list, config: dict) -> tuple:
        scores = {"loss": 1.0, "accuracy": 0.5}
        if self.behave in scores:
            scores[self.behave] = float("nan")
        return scores.pop("loss"), self.num_test, scores


class HeldSession(Session):
    """Waits for a file before it masks its update in one round, as a test may want to kill somebody just then."""

    in_round, until = 0, Path()

    def _mask(self, config: dict) -> dict:
        if self.masking and self.masking.round == self.in_round:
            say(f"mask {self.in_round}")
            while not self.until.exists():
                time.sleep(0.02)
        return super()._mask(config)


def misbehave(how: str, new: list, examples: int, metrics: dict) -> tuple:
    match how:
        case "nan":
            new[0] = new[0] * np.nan
        case "shape":
            new[0] = new[0].reshape(4)
        case "dtype":
            new[1] = new[1].astype(np.float64)
        case "fewer":
            new = new[:2]
        case "claim":
            examples = 2**60
        case "none":
            examples = 0
        case "train-loss":
            metrics = {"train_loss": float("inf")}
        case "huge":
            new[0] = np.zeros((1000, 1000), np.float32)
        case "raise":
            raise RuntimeError("the disk of this hospital is on fire")
        case "far":
            new[0] = new[0] + 1e6
        case "loss" | "accuracy":
            pass
        case _:
            raise SystemExit(f"tiny_client: no such behaviour: {how}")
    return new, examples, metrics


def no_audit(assignment: Assignment) -> AuditLog:
    return AuditLog()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--classes", default=",".join(CLASSES))
    parser.add_argument("--partition-id", type=int)
    parser.add_argument("--behave", default="", help="how to misbehave")
    parser.add_argument("--in-round", type=int, default=0, help="in which round (0: in all)")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long local training takes")
    parser.add_argument("--until", type=Path, metavar="FILE", help="train in round --in-round until there is this file")
    parser.add_argument("--hold-mask", type=Path, metavar="FILE", help="mask in round --in-round once it is there")
    parser.add_argument("--wait", type=float, default=30)
    for flag in ("--secret-file", "--identity", "--server-key", "--peers"):
        parser.add_argument(flag)
    parser.add_argument("--ca-certificate")
    parser.add_argument("--audit", metavar="FOLDER", help="keep a record there (default: none)")
    parser.add_argument("--stay", action="store_true")
    parser.add_argument("--policy")
    args = parser.parse_args()
    credentials = ClientCredentials.load(args)
    HeldSession.in_round, HeldSession.until = (args.in_round, args.hold_mask) if args.hold_mask else (0, Path())

    def new_session(left_run: str = "") -> Session:
        return HeldSession(
            lambda assignment: TinyClient(assignment, args.behave, args.in_round, args.seconds, args.until),
            args.classes.split(","),
            credentials=credentials,
            policy=Policy.load(args.policy),
            left_run=left_run,
            wanted_partition=args.partition_id,
            open_audit=functools.partial(open_audit, audit_folder(args.audit), credentials.identity)
            if args.audit
            else no_audit,
        )

    try:
        if args.stay:
            score = lambda session: f"accuracy {session.metrics['accuracy']}"  # noqa: E731
            stay(new_session, lambda session: None, score, args.server, credentials.authority)
        connect(new_session(), args.server, wait=args.wait, root_certificates=credentials.authority)
    except RunEnded as end:
        fail(str(end), end.code)
    say("finished")


if __name__ == "__main__":
    main()

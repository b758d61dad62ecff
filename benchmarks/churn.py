"""100 clients, of which 10 die in each of 20 rounds, and 10 others take their places.

All on one machine, with the default network on 20 generated images a client, as in scale.py. Ten processes play ten
clients each; in each round, at a moment drawn from the seed, one is killed, and a new one is started at once. Time of
the rounds beside those of a quiet run, and what of the run was lost.
"""

import argparse
import itertools
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from common import machine, save
from helpers.processes import Federation, wait_for
from scale import Few, play

QUIET_ROUNDS = 5
GOAL = 2  # times a quiet round, at most


def play_some(address: str, here: int, clients: int) -> None:
    """In a process of its own."""
    sys.exit(play(address, here, Few(clients)))


class Players:
    """Processes of so many clients each. They are forks of one that has imported PyTorch, as to start it takes seconds
    of a core, which on other machines than the server's would not matter to it."""

    def __init__(self, address: str, here: int, clients: int) -> None:
        self.arguments = (address, here, clients)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["scale"])
        self.playing: list[multiprocessing.process.BaseProcess] = []
        for _ in range(0, clients, here):
            self.add()

    def add(self) -> None:
        self.playing.append(self.context.Process(target=play_some, args=self.arguments, daemon=True))
        self.playing[-1].start()

    def kill_one(self, rng: random.Random) -> None:
        process = self.playing.pop(rng.randrange(len(self.playing)))
        process.kill()
        process.join()
        self.add()

    def end(self) -> None:
        for process in self.playing:
            process.join(30)
            process.kill()


def run(clients: int, dying: int, rounds: int, quiet_seconds: float | None) -> dict:
    """Rounds of history.json, and the seconds from the end of each to the end of the next one, waiting and all.

    quiet_seconds: of a round, within which one process is killed in each; None: nobody dies.
    """
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        server = federation.server("--clients", clients, "--rounds", rounds)
        server.says("waiting for")
        players, ends = Players(federation.address, dying, clients), []
        for number in range(rounds + 1):
            wait_for(lambda: done(federation) > number or server.popen.poll() is not None, f"round {number}", 600)  # noqa: B023
            ends.append(time.monotonic())
            if quiet_seconds and number < rounds:
                time.sleep(rng.uniform(0.05, 0.95) * quiet_seconds)
                players.kill_one(rng)
        output = server.ends(0)
        players.end()
        history = federation.history()
    assert (len(history["rounds"]), history["rejected"]) == (rounds + 1, []), output
    return {
        "seconds": [row["seconds"] for row in history["rounds"][1:]],
        "with_waiting": [later - earlier for earlier, later in itertools.pairwise(ends)],
        "updates": [row["clients"] for row in history["rounds"][1:]],
    }


def done(federation: Federation) -> int:
    """How many rounds, the untrained model's among them, are on disk."""
    try:
        return len(federation.history()["rounds"])
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100, metavar="N", help="(100)")
    parser.add_argument("--dying", type=int, default=10, metavar="N", help="of them in each round (10)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="(20)")
    args = parser.parse_args()
    where = machine()
    quiet = run(args.clients, args.dying, QUIET_ROUNDS, None)
    usual = statistics.median(quiet["seconds"])
    print(f"quiet: {usual:.2f} s a round, {max(quiet['seconds']):.2f} s the longest", flush=True)
    churn = run(args.clients, args.dying, args.rounds, usual)
    longest, waited = max(churn["seconds"]), max(churn["with_waiting"])
    print(
        f"{args.dying} of {args.clients} die in each of {args.rounds} rounds: "
        f"{statistics.median(churn['seconds']):.2f} s a round, {longest:.2f} s the longest "
        f"({longest / usual:.2f} quiet ones; goal: {GOAL} at most), "
        f"{waited:.2f} s with the waiting for those who take the places; "
        f"{min(churn['updates'])} to {max(churn['updates'])} updates counted"
    )
    result = {"machine": where, "seed": 0, "clients": args.clients, "dying": args.dying, "quiet": quiet}
    save("churn", {**result, "churn": churn, "longest_in_quiet_rounds": longest / usual, "goal": GOAL})


if __name__ == "__main__":
    main()

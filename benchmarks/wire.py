"""Bytes on the wire of a round against the bytes of its weights, and what --compress fp16 saves and costs.

Counted on the TCP lines between real processes: all that HTTP/2, gRPC and Flower add to the weights, but not the
headers of TCP and IP, which depend on the network. A round is what travels from one moment in which all clients
train to the next: three updates up, the new model down to be evaluated, and down again to be trained.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.compression import COMPRESS, num_bytes

from common import ROOT, add_images, machine, plot, save
from helpers.processes import Federation, NetworkLink

GOALS = {"overhead": 0.01, "ratio": 0.51, "accuracy_lost": 0.005}  # at most; half, and 1 % for what is not weights
QUIET = 1.0  # seconds without a byte: all clients train
CLIENTS = 3
TRIPS = 3  # of the weights to or from each client in a round


def run(images: str, compress: str, seed: int) -> dict:
    """A whole run of the default recipe with its clients behind a line that counts."""
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        link = NetworkLink(federation.address)
        server = federation.server("--compress", compress, "--seed", seed)
        server.says("waiting for")
        for partition in range(CLIENTS):
            flags = ("--server", link.address, "--dataset", images, "--partition-id", partition)
            federation.start(f"client {partition}", ROOT / "client.py", *flags)
        carried = []
        for server_round in range(3):
            server.says(rf"\n +{server_round}  ", 600)
            carried.append(bytes_once_quiet(link))
        for process in federation.processes:
            process.ends(0, 600)
        link.close()
        weights = CLIENTS * TRIPS * num_bytes(federation.weights(), compress)
        accuracy = federation.history()["rounds"][-1]["accuracy"]
    wire = statistics.mean(b - a for a, b in itertools.pairwise(carried))
    return {"seed": seed, "accuracy": accuracy, "wire": wire, "weights": weights, "overhead": wire / weights - 1}


def bytes_once_quiet(link: NetworkLink) -> int:
    """What the link has carried when nothing more has come for a while."""
    before, since = link.carried, time.monotonic()
    while time.monotonic() - since < QUIET:
        time.sleep(0.05)
        if link.carried != before:
            before, since = link.carried, time.monotonic()
    return before


def draw(runs: dict[str, list[dict]]) -> None:
    def panel(axes, theme) -> None:
        for what, height, alpha in (("wire", 0.7, 0.4), ("weights", 0.35, 1.0)):
            megabytes = [runs[compress][0][what] / 1e6 for compress in runs]
            label = {"wire": "on the wire", "weights": "weights"}[what]
            axes.barh(list(runs), megabytes, height=height, color=theme.federated, alpha=alpha, label=label)
        for row, compress in enumerate(runs):
            words = f"accuracy {statistics.mean(run['accuracy'] for run in runs[compress]):.4f}"
            axes.text(0.3, row, words, color=theme.paper, va="center")
        axes.invert_yaxis()
        axes.set(xlabel="MB a round; cnn, three clients", ylabel="--compress")
        axes.legend(frameon=False, loc="lower right")

    plot("wire", panel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_images(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the recipe (0 1 2)")
    args = parser.parse_args()
    where, images = machine(), str(Path(args.images).resolve())
    runs: dict[str, list[dict]] = {compress: [] for compress in COMPRESS}
    for seed in args.seeds:
        for compress in COMPRESS:
            runs[compress].append(run(images, compress, seed))
            words = "{wire:,.0f} bytes a round, weights {weights:,} ({overhead:+.2%}), accuracy {accuracy:.4f}"
            print(f"seed {seed}, {compress}: {words.format(**runs[compress][-1])}", flush=True)
    mean = {
        compress: {what: statistics.mean(run[what] for run in runs[compress]) for what in ("wire", "accuracy")}
        for compress in COMPRESS
    }
    result = {
        "overhead": max(run["overhead"] for each in runs.values() for run in each),
        "ratio": mean["fp16"]["wire"] / mean["none"]["wire"],
        "accuracy_lost": mean["none"]["accuracy"] - mean["fp16"]["accuracy"],
    }
    print(f"overhead {result['overhead']:.2%} at most (goal: {GOALS['overhead']:.0%} at most)")
    print(f"fp16 takes {result['ratio']:.4f} of the bytes (goal: half)")
    print(f"fp16 costs {result['accuracy_lost']:+.4f} of accuracy (goal: {GOALS['accuracy_lost']} at most)")
    save("wire", {"machine": where, **result, "goal": GOALS, "runs": runs})
    draw(runs)


if __name__ == "__main__":
    main()

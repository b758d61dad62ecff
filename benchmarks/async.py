"""Asynchronous against synchronous rounds: when does each know a model as accurate as the rounds' last one?

As accurate: at most a standard error of the test set below it, sqrt(p (1 - p) / n); 0.0044 for p = 0.74, n = 10,000.
Two runs that differ in rounding alone end that far apart. The strict reading is printed and kept too.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

from common import RESULTS, ROOT, add_images, machine, plot, save

sys.path.insert(0, str(ROOT / "tests"))

from helpers.processes import Federation

from data import open_dataset

ROUNDS = 3  # of the synchronous mode
CASES = {  # name: slowdowns of the three clients, the server's flags, the asynchronous mode's --rounds, and the goal
    # for synchronous / asynchronous seconds. Five rounds' updates of two fast clients take less time than three
    # rounds of one that is five times slower.
    "straggler": ((1, 1, 5), [], 5, 2.0),
    "equal speeds": ((1, 1, 1), [], ROUNDS, 1 / 1.1),
    "straggler, Dirichlet 0.5": ((1, 1, 5), ["--partitioner", "dirichlet", "--alpha", 0.5], 5, None),
}
CLIENTS = 3


def run(images: str, mode: str, slowdowns: tuple, flags: list, seed: int) -> list[dict]:
    """A whole run of real processes, partition p slowed down by slowdowns[p]; points of its accuracy over time.

    seconds: since the first model was sent out; when the accuracy was known to the server, not when the
    model was made. images: how many of the test images that accuracy is from, as the asynchronous mode
    has a version evaluated by those who are free.
    """
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        server = federation.server("--mode", mode, "--seed", seed, *flags)
        server.says("waiting for")
        for partition, slowdown in enumerate(slowdowns):
            which = ("--partition-id", partition, "--slowdown", slowdown)
            where = ("--server", federation.address, "--dataset", images)
            federation.start(f"client {partition}", ROOT / "client.py", *where, *which)
        server.ends(0, seconds=3600)
        history = federation.history()
    points, passed = [], 0.0
    for row in history["rounds"]:
        passed += row["seconds"]
        seconds = row["evaluated"] if mode == "async" else passed
        if row["accuracy"] is not None:
            clients = sorted(map(int, row["accuracy_by_client"]))
            made_by = [update["partition"] for update in row.get("updates", ())]
            points.append({"seconds": seconds, "accuracy": row["accuracy"], "scored_by": clients, "made_by": made_by})
    return points


def time_to(points: list[dict], accuracy: float) -> float | None:
    """When a model was first known to be that accurate on the whole test set; None where none was."""
    whole = (point for point in points if len(point["scored_by"]) == CLIENTS)
    return next((point["seconds"] for point in whole if point["accuracy"] >= accuracy), None)


def compare(images: str, name: str, seed: int) -> dict:
    """Both modes in turn."""
    slowdowns, flags, rounds, _ = CASES[name]
    curves = {
        "sync": run(images, "sync", slowdowns, [*flags, "--rounds", ROUNDS], seed),
        "async": run(images, "async", slowdowns, [*flags, "--rounds", rounds], seed),
    }
    first, last = curves["sync"][-1], curves["async"][-1]
    error = math.sqrt(first["accuracy"] * (1 - first["accuracy"]) / num_test_images(images))
    seconds = {"sync": first["seconds"]}
    seconds |= {"async": time_to(curves["async"], first["accuracy"] - error)}
    seconds |= {"async, strictly": time_to(curves["async"], first["accuracy"])}
    ratio, strictly = (first["seconds"] / s if (s := seconds[name]) else None for name in ("async", "async, strictly"))
    print(
        f"{name:<25} seed {seed}: sync {first['accuracy']:.4f} after {first['seconds']:.1f} s; "
        f"async {last['accuracy']:.4f} after {last['seconds']:.1f} s, as accurate {sooner(ratio)}, "
        f"strictly {sooner(strictly)}",
        flush=True,
    )
    result = {"seed": seed, "accuracy": {"sync": first["accuracy"], "async": last["accuracy"]}, "standard_error": error}
    return {**result, "seconds": seconds, "ratio": ratio, "ratio_strictly": strictly, "curves": curves}


def sooner(ratio: float | None) -> str:
    return f"{ratio:.2f} times sooner" if ratio else "never"


def num_test_images(images: str) -> int:
    return len(open_dataset(images, "").labels("test", 0))


def draw(results: dict[str, list[dict]]) -> None:
    """Accuracy over time, a panel a case, a pair of lines a seed."""

    def panel(axes, theme, name: str) -> None:
        for number, result in enumerate(results[name]):
            for mode, colour in (("sync", theme.centralised), ("async", theme.federated)):
                points = result["curves"][mode]
                label = {"sync": "in rounds", "async": "asynchronous"}[mode] if number == 0 else None
                x, y = [point["seconds"] for point in points], [point["accuracy"] for point in points]
                axes.plot(x, y, color=colour, marker="o", markersize=3, label=label)
        axes.set(title=name, xlabel="seconds", ylabel="accuracy")
        axes.legend(frameon=False, loc="lower right")

    plot("async", *(functools.partial(panel, name=name) for name in results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_images(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="of the recipe (0 1)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which to run (all)")
    args = parser.parse_args()
    results = {name: [] if name in args.cases else runs for name, runs in earlier().items()}
    where = machine()
    for seed in args.seeds:
        for name in args.cases:
            results[name].append({"machine": where, **compare(args.images, name, seed)})
            write(results)  # an hour's work: keep what is there


def earlier() -> dict[str, list[dict]]:
    """What the last runs of each case gave: a case that is not run again keeps its figures."""
    path = RESULTS / "async.json"
    kept = json.loads(path.read_text())["runs"] if path.exists() else {}
    return {name: kept.get(name, []) for name in CASES}


def write(results: dict[str, list[dict]]) -> None:
    medians = {}
    for name, runs in results.items():
        for reading in ("ratio", "ratio_strictly"):
            ratios = [run[reading] for run in runs]
            medians[f"{name}, {reading}"] = statistics.median(ratios) if ratios and all(ratios) else None
        goal = f" (goal: {CASES[name][3]:.2f})" if CASES[name][3] else ""
        strictly = sooner(medians[f"{name}, ratio_strictly"])
        print(f"{name:<25} medians: {sooner(medians[f'{name}, ratio'])}, strictly {strictly}{goal}")
    rounds = {"sync": ROUNDS, "async": {name: CASES[name][2] for name in results}}
    save("async", {"rounds": rounds, "medians": medians, "runs": results})
    draw({name: runs for name, runs in results.items() if runs})


if __name__ == "__main__":
    main()

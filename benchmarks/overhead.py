"""The whole demo.py command against its floor: the same training and evaluation in one process, images in memory."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.config import Recipe

from common import ROOT, InMemory, add_images, federate, machine, save

GOAL = 1.3


def demo_seconds(images: str) -> float:
    """Wall time of the default recipe from one command: starting, reading images, training, picture and all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "demo.py", "--dataset", images, "--run-dir", f"{folder}/run"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"overhead: demo.py ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds


def floor_seconds(images: str) -> float:
    """Wall time of the nine local epochs and the four evaluations alone, in a fresh process on all cores."""
    command = [sys.executable, __file__, "--images", images, "--floor"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_images(parser)
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each, taking turns (3)")
    parser.add_argument("--floor", action="store_true", help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()
    if args.floor:
        print(sum(step.seconds for step in federate(InMemory(args.images), Recipe())))
        return
    where = machine()
    times: dict[str, list[float]] = {"floor": [], "demo": []}
    for number in range(args.repeat):
        for name, measure in (("floor", floor_seconds), ("demo", demo_seconds)):  # the floor warms the disk's cache
            times[name].append(measure(args.images))
            print(f"run {number + 1} of {args.repeat}: {name:<5} {times[name][-1]:6.1f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["demo"] / medians["floor"]
    print(f"\nmedian: floor {medians['floor']:.1f} s, demo {medians['demo']:.1f} s")
    print(f"demo / floor: {ratio:.2f} (goal: {GOAL} at most)")
    save("overhead", {"machine": where, "seed": 0, "seconds": times, "median": medians, "ratio": ratio, "goal": GOAL})


if __name__ == "__main__":
    main()

"""The whole demo.py command against two floors: what its processors work at least, and the same work in one process.

The first floor is the processor time of all of its processes, shared by all cores: what is above it is waiting. The
second is the time that the same training and evaluation take in one process on all cores, with the images in memory.
"""

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

from common import ROOT, InMemory, add_images, federate, machine, processor_seconds, save

GOALS = {"cnn": 1.05, "lenet": 1.15}  # times the first floor, at most


def demo(images: str, network: str) -> dict[str, float]:
    """The default recipe from one command, starting, reading images, training, picture and all."""
    with tempfile.TemporaryDirectory() as folder:
        where = ["--dataset", images, "--run-dir", f"{folder}/run"]
        command = [sys.executable, ROOT / "demo.py", *where, "--", "--model", network]
        began, used = time.perf_counter(), processor_seconds()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds, used = time.perf_counter() - began, processor_seconds() - used
    if done.returncode:
        sys.exit(f"overhead: demo.py ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return {"demo": seconds, "processor": used}


def one_process(images: str, network: str) -> float:
    """Wall time of the nine local epochs and the four evaluations alone, in a fresh process on all cores."""
    command = [sys.executable, __file__, "--images", images, "--networks", network, "--one-process"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_images(parser)
    parser.add_argument("--networks", nargs="+", choices=GOALS, default=list(GOALS), help="(all)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each, taking turns (3)")
    parser.add_argument("--one-process", action="store_true", help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()
    if args.one_process:
        print(sum(step.seconds for step in federate(InMemory(args.images), Recipe(model=args.networks[0]))))
        return
    where, results = machine(), {}
    for network in args.networks:
        runs = []
        for number in range(args.repeat):
            alone = one_process(args.images, network)  # first: it warms the disk's cache
            runs.append({"one_process": alone, **demo(args.images, network)})
            words = "demo {demo:.1f} s, {processor:.1f} s of processor time; in one process {one_process:.1f} s"
            print(f"{network}, run {number + 1} of {args.repeat}: {words.format(**runs[-1])}", flush=True)
        medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        ratio = statistics.median(run["demo"] / (run["processor"] / where["cores"]) for run in runs)
        ratio_to_one = medians["demo"] / medians["one_process"]
        print(
            f"{network}: {ratio:.3f} times its processor time over {where['cores']} cores (goal: {GOALS[network]} "
            f"at most), {ratio_to_one:.2f} times the same in one process\n"
        )
        results[network] = {"runs": runs, "median": medians, "ratio": ratio, "ratio_to_one_process": ratio_to_one}
    save("overhead", {"machine": where, "seed": 0, "goals": GOALS, "networks": results})


if __name__ == "__main__":
    main()

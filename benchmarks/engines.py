"""The same work as whole commands: the scripts, Flower's simulation engine, and its deployment engine."""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, add_images, machine, plot, save

sys.path.insert(0, str(ROOT / "tests"))

from helpers.engines import Engine
from helpers.processes import Federation

GOALS = {"simulation": 2.5, "deployment": 4.5}  # times as fast as these the scripts shall be
CONFIG = "model='lenet' dataset='{images}' run-dir='run'"
NODES = "num-supernodes=3"


def scripts(folder: Path, images: str) -> Federation:
    federation = Federation(folder)
    with federation:
        flags = ["--dataset", images, "--run-dir", federation.run_dir, "--", "--model", "lenet"]
        federation.start("demo.py", ROOT / "demo.py", *flags).ends(0, 900)
    return federation


def simulation(folder: Path, images: str, nodes: str = NODES) -> Federation:
    """From starting the SuperLink, as the first `flwr run` does, to the end of the run; 2 cores a node, its default.

    A client trains on one of them, as it does in the scripts, so that the bits are the same.
    """
    with Engine(folder, "local") as engine:
        engine.configure("insecure = true")
        engine.command("flower-superlink --insecure --simulation --port 9092").says("startup complete")
        engine.run(
            f'flwr run . --stream --federation-config "{nodes}" --run-config "{CONFIG.format(images=images)}"', 900
        )
    return engine


def simulation_tuned(folder: Path, images: str) -> Federation:
    """The same with a core a node, so that two train at a time on two cores, as the scripts do."""
    return simulation(folder, images, f"{NODES} client-resources-num-cpus=1")


def deployment(folder: Path, images: str) -> Federation:
    """From starting SuperLink and SuperNodes, without TLS and keys, which would only cost it time."""
    with Engine(folder, "local") as engine:
        engine.configure("insecure = true")
        engine.command("flower-superlink --insecure --port 9092").says("startup complete")
        for partition in range(3):
            node = f'"partition-id={partition} num-partitions=3"'
            engine.command(f"flower-supernode --insecure --superlink 127.0.0.1:9092 --port 9094 --node-config {node}")
        engine.run(f'flwr run . --stream --run-config "{CONFIG.format(images=images)}"', 900)
    return engine


ENGINES = {
    "scripts": scripts,
    "simulation": simulation,
    "simulation, a core a node": simulation_tuned,
    "deployment": deployment,
}


def measure(name: str, images: str) -> dict:
    """Seconds of the whole command, and of its rounds alone, as the server counts them."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run = ENGINES[name](Path(folder), images)
        seconds = time.perf_counter() - began
        rounds = run.history()["rounds"]
    return {"command": seconds, "rounds": sum(row["seconds"] for row in rounds), "accuracy": rounds[-1]["accuracy"]}


def draw(medians: dict[str, float], rounds: dict[str, float]) -> None:
    def panel(axes, theme) -> None:
        names = list(medians)
        axes.barh(names, [medians[name] for name in names], color=theme.federated, alpha=0.4, label="whole command")
        axes.barh(names, [rounds[name] for name in names], color=theme.federated, height=0.4, label="rounds")
        axes.invert_yaxis()
        axes.set(xlabel="seconds")
        axes.legend(frameon=False)

    plot("engines", panel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_images(parser)
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each, taking turns (3)")
    args = parser.parse_args()
    where, images = machine(), str(Path(args.images).resolve())
    runs: dict[str, list[dict]] = {name: [] for name in ENGINES}
    for number in range(args.repeat):
        for name in ENGINES:
            runs[name].append(measure(name, images))
            words = "command {command:6.1f} s, rounds {rounds:6.1f} s, accuracy {accuracy:.4f}".format(**runs[name][-1])
            print(f"run {number + 1} of {args.repeat}: {name:<25} {words}", flush=True)
    medians = {name: statistics.median(run["command"] for run in runs[name]) for name in ENGINES}
    rounds = {name: statistics.median(run["rounds"] for run in runs[name]) for name in ENGINES}
    ratios = {name: medians[name] / medians["scripts"] for name in ENGINES if name != "scripts"}
    for name, ratio in ratios.items():
        goal = f" (goal: {GOALS[name]} at least)" if name in GOALS else ""
        print(f"the scripts are {ratio:.2f} times as fast as the engine for {name}{goal}")
    result = {"machine": where, "seed": 0, "runs": runs, "median": medians, "median_rounds": rounds, "ratio": ratios}
    save("engines", {**result, "goal": GOALS})
    draw(medians, rounds)


if __name__ == "__main__":
    main()

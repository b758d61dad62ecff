"""What a round costs beyond training: the scripts, Flower's simulation engine, and its deployment engine.

A network of 18 weights and a few examples for each client: training and evaluating it takes a client a millisecond or
two, which is measured too, so that nearly all of a round's seconds are the federation's.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine, plot, save

sys.path.insert(0, str(ROOT / "tests"))

from federation.config import Recipe
from federation.task.task import open_task

import numpy as np
from helpers.engines import Engine
from helpers.processes import Federation

NUMBERS = [3, 10, 30]  # clients
DEPLOYED = [3]  # the deployment engine's: a round of 10 takes it most of a minute
ROUNDS = 5
CHEAPER = {"simulation": 20, "deployment": 100}  # times as cheap as these the scripts' round shall be
GOAL_MS = 50  # with three clients
MODEL = '''"""A network of 18 weights."""

from federation.task.classification import evaluate as evaluate
from federation.task.classification import train_round as train_round

from torch import nn


def build(schema: dict, recipe) -> nn.Module:
    return nn.Linear(8, 2)
'''


def write_task(folder: Path) -> None:
    """model.py and data.py of the tiny task."""
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(MODEL)
    shutil.copy(ROOT / "benchmarks/large_task/data.py", folder)


def scripts(folder: Path, clients: int) -> list[float]:
    write_task(folder / "task")
    with Federation(folder) as federation:
        server = federation.server("--clients", clients, "--rounds", ROUNDS)
        flags = ["--server", federation.address, "--task", folder / "task", "--wait", 600]
        for number in range(clients):
            federation.start(f"client {number}", ROOT / "client.py", *flags)
        server.ends(0, 900)
    return seconds_of(federation)


def simulation(folder: Path, clients: int) -> list[float]:
    """A core a node, so that as many work at a time as the machine has cores, as the scripts' clients do."""
    with app(folder) as engine:
        engine.configure("insecure = true")
        engine.command("flower-superlink --insecure --simulation --port 9092").says("startup complete")
        nodes = f"num-supernodes={clients} client-resources-num-cpus=1"
        engine.run(f'flwr run app --stream --federation-config "{nodes}" --run-config "{CONFIG}"', 900)
    return seconds_of(engine)


def deployment(folder: Path, clients: int) -> list[float]:
    with app(folder) as engine:
        engine.configure("insecure = true")
        engine.command("flower-superlink --insecure --port 9092").says("startup complete")
        for partition in range(clients):
            node = f'"partition-id={partition} num-partitions={clients}"'
            engine.command(f"flower-supernode --insecure --superlink 127.0.0.1:9092 --port 9094 --node-config {node}")
        engine.run(f'flwr run app --stream --run-config "{CONFIG}"', 3000)
    return seconds_of(engine)


CONFIG = f"rounds={ROUNDS} dataset='noise' run-dir='run'"
KINDS = {"scripts": scripts, "simulation": simulation, "deployment": deployment}


def app(folder: Path) -> Engine:
    """An engine, and in its folder this project with the tiny task for its own, as `flwr run` takes no other."""
    files = shutil.ignore_patterns(
        ".git", ".venv", "tests", "benchmarks", "docs", "examples", "runs", "data", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "app", ignore=files)
    write_task(folder / "app")
    engine = Engine(folder, "local")
    engine.env["PYTHONPATH"] = str(folder / "app")
    return engine


def seconds_of(run: Federation) -> list[float]:
    """Of each round after the untrained model's, as the server counts them."""
    rows = run.history()["rounds"]
    assert [row["clients"] for row in rows] == [rows[0]["clients"]] * (ROUNDS + 1), rows
    return [row["seconds"] for row in rows[1:]]


def training_seconds() -> float:
    """What one client's training and evaluation take within a round: the median of many."""
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder) / "task")
        task = open_task(str(Path(folder) / "task"))
    recipe, dataset = task.complete(Recipe()), "noise"
    train, test = (task.load(dataset, split, np.arange(n), 0) for split, n in (("train", 100), ("test", 50)))
    network, times = task.build(task.schema(dataset), recipe), []
    for number in range(1, 22):
        began = time.perf_counter()
        task.train_round(network, train, recipe, recipe.part(0, number))
        task.evaluate(network, test, recipe)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def draw(numbers: list[int], medians: dict[str, dict[int, float]]) -> None:
    def panel(axes, theme) -> None:
        styles = zip(medians.items(), ("federated", "centralised", "alone"), strict=False)
        for (kind, values), colour in styles:
            axes.plot(values.keys(), values.values(), "o-", color=getattr(theme, colour), label=kind)
        axes.set(xscale="log", yscale="log", xlabel="clients", ylabel="seconds a round")
        axes.set_xticks(numbers, map(str, numbers))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False)

    plot("round_cost", panel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = f"({NUMBERS}; the deployment engine {DEPLOYED})"
    parser.add_argument("--clients", type=int, nargs="+", metavar="N", help=usual)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="(all)")
    args = parser.parse_args()
    where, training = machine(), training_seconds()
    print(f"training and evaluation of one client: {training * 1000:.1f} ms", flush=True)
    rounds: dict[str, dict[int, list[float]]] = {kind: {} for kind in args.kinds}
    numbers = args.clients or NUMBERS
    for clients in numbers:
        for kind in args.kinds:
            if kind == "deployment" and clients not in (args.clients or DEPLOYED):
                continue
            with tempfile.TemporaryDirectory() as folder:
                rounds[kind][clients] = KINDS[kind](Path(folder), clients)
            median = statistics.median(rounds[kind][clients])
            print(f"{clients:>3} clients, {kind:<11} {median * 1000:10.1f} ms a round", flush=True)
    medians = {kind: {n: statistics.median(each) for n, each in of.items()} for kind, of in rounds.items()}
    ratios = {
        kind: {n: other / medians["scripts"][n] for n, other in medians[kind].items()}
        for kind in CHEAPER
        if {kind, "scripts"} <= set(medians)
    }
    for kind, values in ratios.items():
        words = ", ".join(f"{value:.1f} with {n}" for n, value in values.items())
        print(f"times as cheap as a round of the {kind} engine: {words} (goal: {CHEAPER[kind]} at least)")
    result = {"machine": where, "seed": 0, "rounds": ROUNDS, "clients": numbers, "training_seconds": training}
    save("round_cost", {**result, "seconds": rounds, "median": medians, "ratio": ratios, "goal": CHEAPER})
    draw(numbers, medians)


if __name__ == "__main__":
    main()

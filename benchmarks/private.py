"""Private training: accuracy by epsilon, what an epoch costs, and the accountant against a closed form."""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.config import Recipe
from federation.partition import shares
from federation.privacy.accounting import Accountant, Steps, noise_for
from federation.privacy.dp_sgd import Plan, draws, train
from federation.task.task import open_task
from federation.task.training import Examples, Loss

import numpy as np
import torch
from common import RESULTS, InMemory, add_images, machine, plot, save
from torch import nn

CLIENTS, DELTA = 3, 1e-5
EPSILONS = (8.0, 3.0, 1.0, None)  # None: without noise and clipping, and otherwise the same
CASES = [("scattering", 3), ("scattering", 10)]  # network, rounds
GOALS = {("scattering", 3): (0.54, 0.53, 0.50), ("scattering", 10): (0.59, 0.55, 0.52)}
SLOWDOWN = 2.2  # of lenet's epoch, at most
GAUSSIAN = 4.37718  # epsilon of one step, all drawn, noise 1, delta 1e-5: Balle and Wang 2018, arXiv:1805.06530
PER_CHOICE = 5  # --held-out leaves out one in so many training images, and chooses on them
TASK = open_task()
Parts = tuple[nn.Module, Examples, Loss]


def made_for(name: str, **values: object) -> tuple[Recipe, nn.Module]:
    recipe = TASK.complete(Recipe(model=name, private_training=True, **values))
    return recipe, TASK.build({"classes": [str(i) for i in range(10)]}, recipe)


def read(dataset: InMemory, split: str) -> Examples:
    labels = dataset.labels(split, 0)
    images = dataset.images(split, np.arange(len(labels)), 0)
    return torch.from_numpy(images), torch.from_numpy(labels)


def plan_of(recipe: Recipe, size: int, epsilon: float | None, server_round: int) -> Plan:
    rate, steps = draws(recipe, size)
    noise = noise_for(epsilon, DELTA, rate, steps * recipe.rounds) if epsilon else 0.0
    return Plan.of(recipe, recipe.part(0, server_round), size, noise, 1.0 if epsilon else 1e9)


def federate(parts: Parts, test: Examples, recipe: Recipe, epsilon: float | None) -> list[float]:
    """Accuracy on the test examples after each round; noise and draws are the system's."""
    module, (inputs, labels), loss = parts
    rows, _ = shares(labels.numpy(), labels.numpy(), CLIENTS, "iid", 0.5, recipe.seed)
    accuracies = []
    for server_round in range(1, recipe.rounds + 1):
        updates = []
        for mine in rows:
            plan = plan_of(recipe, len(mine), epsilon, server_round)
            updates.append(train(module, (inputs[mine], labels[mine]), loss, plan, os.urandom))
        sizes = [len(mine) / len(labels) for mine in rows]
        means = {name: sum(w * u[name] for w, u in zip(sizes, updates, strict=True)) for name in updates[0]}
        module.load_state_dict(means)
        accuracies.append(accuracy(module, test))
    return accuracies


@torch.inference_mode()
def accuracy(module: nn.Module, examples: Examples) -> float:
    batches = zip(*(each.split(500) for each in examples), strict=True)
    right = sum((module(x.float()).argmax(1) == y).sum().item() for x, y in batches)
    return right / len(examples[0])


def accuracies(name: str, rounds: int, train_set: Examples, test_set: Examples, args: argparse.Namespace) -> list[dict]:
    """By epsilon: after each round of each seed, and the mean of the last ones."""
    _, network = made_for(name)
    module, train_parts, loss = TASK.private_training(network, train_set)
    test_parts = TASK.private_training(network, test_set)[1]
    start, rows = {key: value.clone() for key, value in module.state_dict().items()}, []
    for epsilon in EPSILONS:
        by_seed = {}
        for seed in args.seeds:
            recipe, _ = made_for(name, rounds=rounds, seed=seed, **args.changes)
            module.load_state_dict(start)
            began = time.process_time()
            by_seed[seed] = federate((module, train_parts, loss), test_parts, recipe, epsilon)
            seconds = time.process_time() - began
        mean = statistics.mean(values[-1] for values in by_seed.values())
        sizes = len(train_set[0]) // CLIENTS
        row = {"network": name, "rounds": rounds, "epsilon": epsilon, "mean": mean, "by_seed": by_seed}
        rows.append(row | {"noise": plan_of(recipe, sizes, epsilon, 1).noise, "processor_seconds": seconds})
        print(f"{name:<11} {rounds:>6} {epsilon or 'none':>8} {mean:.4f}  {seconds:.0f} s a run", flush=True)
    return rows


def slowdown(train_set: Examples, repeat: int) -> dict:
    """Processor seconds of an epoch of lenet by turns: by its ordinary recipe, with private batches, and privately.

    Medians; the first private one, which imports parts of torch, is left out.
    """
    recipe, network = made_for("lenet")
    mine = tuple(each[: len(each) // CLIENTS] for each in train_set)
    ordinary = TASK.complete(Recipe(model="lenet"))
    large = TASK.complete(Recipe(model="lenet", batch_size=recipe.batch_size, learning_rate=0.02))
    module, examples, loss = TASK.private_training(network, mine)
    plan_of(recipe, len(mine[0]), 8.0, 1)  # calibrated now, and not while it is timed
    times: dict[str, list[float]] = {"ordinary": [], "private_batches": [], "private": []}
    for turn in range(repeat + 1):
        marks = [time.process_time()]
        for each in (ordinary, large):
            TASK.train_round(TASK.build({"classes": ["a"] * 10}, each), mine, each, each.part(0, 1))
            marks.append(time.process_time())
        train(module, examples, loss, plan_of(recipe, len(mine[0]), 8.0, 1), os.urandom)
        marks.append(time.process_time())
        for name, began, ended in zip(times, marks, marks[1:], strict=False):
            times[name] += [ended - began] if turn else []
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: seconds["private"] / seconds[name] for name in ("ordinary", "private_batches")}
    return {"epoch_seconds": seconds, "ratio": ratios, "goal": SLOWDOWN}


def draw(rows: list[dict]):
    def panel(axes, theme) -> None:
        at = {epsilon: i for i, epsilon in enumerate(reversed(EPSILONS[:-1]))} | {None: len(EPSILONS) - 1}
        for name, rounds in CASES:
            line = [row for row in rows if (row["network"], row["rounds"]) == (name, rounds)]
            axes.plot([at[row["epsilon"]] for row in line], [row["mean"] for row in line], "o-",
                      label=f"{name}, {rounds} rounds")  # fmt: skip
        axes.set_xticks(list(at.values()), [f"epsilon {each:g}" if each else "not private" for each in at])
        axes.set_ylabel("accuracy")
        axes.legend()

    return panel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_images(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of the split (0 1 2)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of the time measurement (3); 0: none")
    parser.add_argument("--held-out", action="store_true", help="choose: train on 4/5 of the training images, score on "
                        "the rest, and save nothing")  # fmt: skip
    parser.add_argument("--recipe", nargs="*", default=[], metavar="NAME=VALUE", help="other than the network's own")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), metavar="N", help="of CASES alone")
    args = parser.parse_args()
    kinds = {"batch_size": int, "local_epochs": int, "learning_rate": float}
    args.changes = {key: kinds[key](value) for key, value in (pair.split("=") for pair in args.recipe)}
    torch.set_num_threads(1)
    where, dataset = machine(), InMemory(args.images)
    train_set, test_set = read(dataset, "train"), read(dataset, "test")
    if args.held_out:
        order = torch.randperm(len(train_set[0]), generator=torch.Generator().manual_seed(0))
        held, rest = order[: len(order) // PER_CHOICE], order[len(order) // PER_CHOICE :]
        test_set = tuple(each[held] for each in train_set)
        train_set = tuple(each[rest] for each in train_set)
    epsilon = Accountant([Steps(1.0, 1.0, 1)]).epsilon(DELTA)
    print(f"accountant: epsilon {epsilon:.5f}, closed form {GAUSSIAN}")
    print(f"{'network':<11} {'rounds':>6} {'epsilon':>8} accuracy on {len(test_set[0]):,} images")
    rows = [row for i in args.cases for row in accuracies(*CASES[i], train_set, test_set, args)]
    if args.held_out:
        return
    path = RESULTS / "private.json"
    results = json.loads(path.read_text()) if path.exists() else {"accuracy": []}
    results |= {
        "clients": CLIENTS,
        "delta": DELTA,
        "goals": {f"{name}, {n} rounds": g for (name, n), g in GOALS.items()},
    }
    results["gaussian"] = {"accountant": epsilon, "closed_form": GAUSSIAN, "off": math.fabs(epsilon - GAUSSIAN)}
    if args.repeat:
        results["slowdown"] = {"machine": where, **slowdown(train_set, args.repeat)}
        print(f"lenet, an epoch: private to {results['slowdown']['ratio']} ({SLOWDOWN})")
    made = {(row["network"], row["rounds"]) for row in rows}
    others = [row for row in results["accuracy"] if (row["network"], row["rounds"]) not in made]
    machines = [{"machine": where, "recipe": made_for(row["network"])[0].of_task(), **row} for row in rows]
    results["accuracy"] = sorted(
        others + machines, key=lambda row: (row["network"], row["rounds"], -(row["epsilon"] or 99))
    )
    save("private", results)
    plot("private", draw(results["accuracy"]))


if __name__ == "__main__":
    main()

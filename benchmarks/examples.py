"""What federation reaches in the examples, against the same model trained on all the clients' data in one place.

Each run is demo.py's, with real clients; its final model and the pooled one are scored on the same test rows.
Of the x-ray films xray.py measures the same.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from federation.config import Recipe
from federation.results.history import History
from federation.task import saved_model
from federation.task.task import Task, open_task
from federation.task.weights import keep_frozen

import numpy as np
import torch
from common import ROOT, machine, save

HOSPITALS = [f"hospital-{name}.csv" for name in "abc"]


def federate(task: Task, folder: Path, seed: int, rounds: int, datasets: list[str]) -> tuple[History, Path]:
    """A run of demo.py: its history and its final model."""
    given = ["--dataset", *datasets] if datasets else []
    command = ["demo.py", "--task", str(task.folder), "--run-dir", str(folder), "--rounds", str(rounds), *given]
    subprocess.run([sys.executable, *command, "--", "--seed", str(seed)], cwd=ROOT, check=True, capture_output=True)
    return History.from_json((folder / "history.json").read_text()), folder / "model.safetensors"


def pooled_examples(task: Task, history: History, datasets: list[str], seed: int) -> dict[str, tuple]:
    """The training and the test rows of all clients together, scaled as in the run."""
    parts: dict[str, list[tuple]] = {"train": [], "test": []}
    for name in datasets or [task.default_dataset]:
        dataset = task.open_dataset(name)
        if history.config.get("columns"):
            task.data.scale(dataset, history.config["columns"])
        for split, found in parts.items():
            found.append(task.load(dataset, split, np.arange(task.size(dataset, split, seed)), seed))
    return {split: tuple(map(torch.cat, zip(*found, strict=True))) for split, found in parts.items()}


def measure(example: str, seed: int, rounds: int, datasets: list[str]) -> dict[str, dict[str, float]]:
    """Metrics of the federated and of the pooled model."""
    task = open_task(str(ROOT / "examples" / example))
    with tempfile.TemporaryDirectory() as folder:
        history, path = federate(task, Path(folder) / "run", seed, rounds, datasets)
        saved = saved_model.load(str(path), task)
    recipe = task.complete(Recipe(rounds=rounds, seed=seed))
    examples = pooled_examples(task, history, datasets, seed)
    network = keep_frozen(task.build(saved.schema, recipe))
    for number in range(1, rounds + 1):
        task.train_round(network, examples["train"], recipe, recipe.part(history.config["clients"], number))
    models = {"federated": saved.network, "pooled": network}
    return {name: task.evaluate(each, examples["test"], recipe) for name, each in models.items()}


def summarise(runs: list[dict]) -> dict[str, dict[str, float]]:
    """By metric: the means over the seeds, and how far apart the two are at most."""
    names = runs[0]["federated"]
    found = {}
    for name in names:
        pairs = [(run["federated"][name], run["pooled"][name]) for run in runs]
        federated, pooled = (statistics.mean(values) for values in zip(*pairs, strict=True))
        most = max(abs(one - other) for one, other in pairs)
        found[name] = {"federated": federated, "pooled": pooled, "apart": federated - pooled, "most": most}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="of each, from 0 on (default: 20)")
    args = parser.parse_args()
    where, results = machine(), {}
    print(f"{where}\n")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write = [sys.executable, "examples/tabular/data.py", folder]
        subprocess.run(write, cwd=ROOT, check=True, capture_output=True)
        files = [str(Path(folder) / name) for name in HOSPITALS]
        cases = [("tabular", 10, files), ("tabular", 10, []), ("regression", 3, []), ("text", 3, [])]
        for example, rounds, datasets in cases:
            how = f"{example}, {'a file each' if datasets else 'shared out evenly'}, {rounds} rounds"
            runs = [measure(example, seed, rounds, datasets) for seed in range(args.seeds)]
            found = summarise(runs)
            results[how] = {"seeds": len(runs), "runs": runs, "summary": found}
            for name, value in found.items():
                words = "federated {federated:.4f}, pooled {pooled:.4f}, {apart:+.4f}; at most {most:.4f}".format(
                    **value
                )
                print(f"{how}, seeds 0 to {len(runs) - 1}: {name} {words}", flush=True)
    save("examples", {"machine": where, "examples": results})


if __name__ == "__main__":
    main()

"""What secure aggregation costs: the time of masking, and whole runs beside plain ones.

masking   processor time of one client, from its trained weights to the masked words, with so many on the roster
programs  real programs on CIFAR-10, three clients, three rounds: accuracy, bytes on the wire both ways, processor time
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, machine, save

sys.path.insert(0, str(ROOT / "tests"))

from federation.config import Recipe
from federation.privacy.masking import Masking
from federation.protocol import Assignment
from federation.security.masks import decode

from helpers.processes import Federation, NetworkLink

NUMBERS = 243_136  # of the default network's trained weights
ROSTERS = [3, 100]  # clients
GOALS = {"milliseconds": {"3": 20, "100": 150}, "accuracy": 0.003, "bytes": 1.01, "processor": 1.05}
CLIENTS = 3


def masking() -> dict:
    """Of the first client and of the server, in milliseconds; and how far the mean is from the one in float64."""
    found = {}
    rng = np.random.default_rng(0)
    for number in ROSTERS:
        recipe = Recipe(secure_aggregation=True)
        clients = [Masking(Assignment(i, number, recipe, run_id="0123456789abcdef")) for i in range(number)]
        updates = [[rng.normal(0, 0.1, NUMBERS).astype(np.float32)] for _ in clients]
        start, entries, spent = [np.zeros(NUMBERS, np.float32)], [], 0.0
        for i, (client, update) in enumerate(zip(clients, updates, strict=True)):
            began = time.process_time()
            client.begin("update", start, ["cat", "dog"], {"server_round": 1})
            entries.append(client.seal_update(update, 1.0, 100 + i))
            spent += time.process_time() - began if i == 0 else 0.0
        roster, masked = json.dumps(entries), []
        for i, client in enumerate(clients):
            began = time.process_time()
            masked.append(client.mask(roster))
            spent += time.process_time() - began if i == 0 else 0.0
        began = time.process_time()
        total = np.zeros_like(masked[0])
        for words in masked:
            total += words
        (mean,), _ = decode(total, start, 1)
        server = time.process_time() - began
        examples = [100 + i for i in range(number)]
        exact = np.average([update[0] for update in updates], axis=0, weights=examples)
        found[str(number)] = {
            "client_ms": spent * 1000,
            "server_ms": server * 1000,
            "largest_error": float(np.abs(mean - exact).max()),
            "bytes_up": masked[0].nbytes,
        }
        words = "{client_ms:.1f} ms at the client, {server_ms:.1f} ms at the server, largest error {largest_error:.1e}"
        print(f"{number:>3} clients: {words.format(**found[str(number)])}", flush=True)
    return found


def program(images: str, seed: int, *flags: object) -> dict:
    """One run by real programs, its clients behind a line that counts."""
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        link, before = NetworkLink(federation.address), resource.getrusage(resource.RUSAGE_CHILDREN)
        server = federation.server("--seed", seed, *flags)
        server.says("waiting for")
        for partition in range(CLIENTS):
            own = ("--server", link.address, "--dataset", images, "--partition-id", partition)
            federation.start(f"client {partition}", ROOT / "client.py", *own, "--audit", Path(folder) / "audit")
        for process in federation.processes:
            process.ends(0, 900)
        link.close()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        accuracy = [row["accuracy"] for row in federation.history()["rounds"]]
    return {"seed": seed, "accuracy": accuracy, "bytes": link.carried, "processor_seconds": spent}


def programs(images: str, seeds: list[int]) -> dict:
    runs: dict[str, list[dict]] = {"plain": [], "secure": []}
    for seed in seeds:
        for kind, flags in (("plain", ()), ("secure", ("--secure-aggregation",))):
            runs[kind].append(program(images, seed, *flags))
            shown = "accuracy {accuracy[3]:.4f}, {bytes:,} bytes, {processor_seconds:.1f} s of processor time"
            print(f"seed {seed}, {kind:<6} {shown.format(**runs[kind][-1])}", flush=True)
    last = {kind: statistics.mean(run["accuracy"][-1] for run in each) for kind, each in runs.items()}
    ratios = {
        what: statistics.mean(s[what] / p[what] for s, p in zip(runs["secure"], runs["plain"], strict=True))
        for what in ("bytes", "processor_seconds")
    }
    result = {"runs": runs, "accuracy_difference": last["secure"] - last["plain"], "ratio": ratios}
    print(f"accuracy {result['accuracy_difference']:+.4f}; bytes {ratios['bytes']:.4f} times", end=", ")
    print(f"processor time {ratios['processor_seconds']:.3f} times (goals {GOALS['bytes']}, {GOALS['processor']})")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["masking", "programs"])
    parser.add_argument("--images", metavar="FOLDER", help="CIFAR-10 as train|test/<class>/* images, for programs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of programs (0 1 2)")
    args = parser.parse_args()
    if "programs" in args.parts and not args.images:
        parser.error("programs needs --images FOLDER")
    path = RESULTS / "secure.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        where = machine()
        found = masking() if part == "masking" else programs(str(Path(args.images).resolve()), args.seeds)
        results[part] = {"machine": where, **found}
    save("secure", {**results, "goal": GOALS})


if __name__ == "__main__":
    main()

"""What secure aggregation costs: the time of masking, and whole runs beside plain ones.

masking   processor time of one client, from its trained weights to the masked words, with so many on the roster
large     the same for 100 MB of weights, the memory that it takes, and that of whole programs
programs  real programs on CIFAR-10, three clients, three rounds: accuracy, bytes on the wire both ways, processor time
many      the same with 30 clients on generated images, two rounds
secagg    Flower's SecAgg+ beside it: bytes, seconds, error of the mean (needs flwr[simulation])
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

from common import RESULTS, ROOT, machine, plot, processor_seconds, save

sys.path.insert(0, str(ROOT / "tests"))

import masking
from helpers.processes import Federation, NetworkLink

GOALS = {"milliseconds": {"3": 20, "100": 150}, "accuracy": 0.003, "bytes": 1.01, "processor": 1.05}
CLIENTS, MANY = 3, 30


def program(clients: int, dataset: str, *flags: object) -> dict:
    """One run by real programs, its clients behind a line that counts."""
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        link, before = NetworkLink(federation.address), processor_seconds()
        server = federation.server("--clients", clients, *flags)
        server.says("waiting for")
        for partition in range(clients):
            own = ("--server", link.address, "--dataset", dataset, "--partition-id", partition, "--wait", 600)
            federation.start(f"client {partition}", ROOT / "client.py", *own, "--audit", Path(folder) / "audit")
        for process in federation.processes:
            process.ends(0, 900)
        link.close()
        spent = processor_seconds() - before
        rows = federation.history()["rounds"]
    said = re.search("secure aggregation: (in .*)", server.output)
    return {
        "accuracy": [row["accuracy"] for row in rows],
        "clients": [row["clients"] for row in rows],
        "round_seconds": statistics.median(row["seconds"] for row in rows[1:]),
        "bytes": link.carried,
        "processor_seconds": spent,
        "said": said.group(1) if said else "",
    }


def programs(clients: int, dataset: str, seeds: list[int], *flags: object) -> dict:
    """Plain and secure runs by turns."""
    runs: dict[str, list[dict]] = {"plain": [], "secure": []}
    for seed in seeds:
        for kind, more in (("plain", ()), ("secure", ("--secure-aggregation",))):
            run = program(clients, dataset, "--seed", seed, *flags, *more)
            runs[kind].append({"seed": seed, **run})
            shown = "{bytes:,} bytes, {processor_seconds:.1f} s of processor time {said}".format(**run)
            print(f"{clients} clients, seed {seed}, {kind:<6} accuracy {run['accuracy'][-1]:.4f}, {shown}", flush=True)
    pairs = list(zip(runs["plain"], runs["secure"], strict=True))
    ratios = {
        what: statistics.mean(secure[what] / plain[what] for plain, secure in pairs)
        for what in ("bytes", "processor_seconds")
    }
    difference = statistics.mean(secure["accuracy"][-1] - plain["accuracy"][-1] for plain, secure in pairs)
    print(f"accuracy {difference:+.4f} (goal: {GOALS['accuracy']} at most); bytes {ratios['bytes']:.4f}", end=", ")
    print(f"processor time {ratios['processor_seconds']:.3f} times (goals {GOALS['bytes']}, {GOALS['processor']})")
    return {"runs": runs, "accuracy_difference": difference, "ratio": ratios}


def secagg() -> dict:
    import secagg  # Ray, which nothing else here needs

    ours = masking.cost(CLIENTS, masking.NUMBERS, masking.ROSTERS[CLIENTS])
    return secagg.beside({name: ours[name] for name in ("client_ms", "server_ms")})


def draw(results: dict) -> None:
    """Runs beside plain ones, against what they may cost; and SecAgg+'s messages and time beside ours."""

    def ratios(axes, theme) -> None:
        names = [("programs", "CIFAR-10, 3 clients"), ("many", "generated images, 30 clients")]
        kinds = {"bytes": "bytes on the wire", "processor_seconds": "processor time"}
        rows = [(f"{label}:\n{kinds[kind]}", results[part]["ratio"][kind]) for part, label in names for kind in kinds]
        axes.barh([label for label, _ in rows], [value for _, value in rows], color=theme.federated, height=0.5)
        axes.axvline(1, color=theme.faint)
        for row, (_, value) in enumerate(rows):
            axes.text(0.03, row, f"{value:.4f}", color=theme.paper, va="center")
        axes.set(xlabel="times a plain run", xlim=(0, 1.3))
        axes.invert_yaxis()

    def flower(axes, theme) -> None:
        names = [name for name in results["secagg"] if "engine" in name or "project" in name]
        for what, height, alpha in (("bytes_down", 0.7, 0.4), ("bytes_up", 0.35, 1.0)):
            label = what.replace("bytes_", "")
            megabytes = [results["secagg"][name][what] / 1e6 for name in names]
            axes.barh(names, megabytes, height=height, color=theme.federated, alpha=alpha, label=label)
        axes.set(xlabel="MB a client and round")
        axes.invert_yaxis()
        axes.legend(frameon=False)

    plot("secure", ratios, flower)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "masking": masking.rosters,
        "large": masking.large,
        "programs": lambda: programs(CLIENTS, str(Path(args.images).resolve()), args.seeds),
        "many": lambda: programs(MANY, "synthetic", args.seeds[:1], "--rounds", 2),
        "secagg": secagg,
    }
    parser.add_argument("parts", nargs="+", choices=[*parts, "draw"], help="draw: only the picture, again")
    parser.add_argument("--images", metavar="FOLDER", help="CIFAR-10 as train|test/<class>/* images, for programs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of programs (0 1 2)")
    args = parser.parse_args()
    if "programs" in args.parts and not args.images:
        parser.error("programs needs --images FOLDER")
    path = RESULTS / "secure.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in [part for part in args.parts if part != "draw"]:
        where = machine()
        results[part] = {"machine": where, **parts[part]()}
        save("secure", {**results, "goal": GOALS})
    if results.keys() >= parts.keys():
        draw(results)


if __name__ == "__main__":
    main()

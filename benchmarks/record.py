"""What the record of a run costs a round: each party's hashes, lines and waits for the disk, done once more.

Beside the shipped network, a model of --megabytes that trains in no time: there the record costs most.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine, save

sys.path.insert(0, str(ROOT / "tests"))

from federation.pieces import hash_arrays
from federation.security.audit import AuditLog
from federation.security.audit_check import Record, read_record

import numpy as np
from helpers.processes import Federation

LARGE = ROOT / "benchmarks/large_task"
ROUNDS = 3
MOST = 0.01  # part of a round that the record may take


def measure(images: str | None, megabytes: float | None) -> dict:
    """A run of three clients; its records, written again a round at a time."""
    large = ["--task", LARGE, "--dataset", "noise"]
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        settings = ["--set", f"megabytes={megabytes}"] if megabytes else []
        server = federation.server("--rounds", ROUNDS, "--round-timeout", 3000, *settings)
        flags = large if megabytes else ["--dataset", images] if images else []
        clients = [federation.client("--wait", 900, *flags) for _ in range(3)]
        for process in (server, *clients):
            process.ends(0, 3000)
        seconds = [row["seconds"] for row in federation.history()["rounds"][1:]]
        files = [federation.run_dir / "audit.jsonl", *sorted((federation.folder / "audit").iterdir())]
        costs = [[once_more(read_record(path), number, federation.folder) for number in (1, 2, 3)] for path in files]
    server_cost, *others = [statistics.median(each) for each in costs]
    share = max(server_cost, *others) / statistics.median(seconds)
    print(
        f"{f'{megabytes:g} MB' if megabytes else 'shipped network':>16}: round {statistics.median(seconds):.2f} s, "
        f"server's record {1000 * server_cost:.1f} ms, clients' {1000 * max(others):.1f} ms: {share:.2%} of a round"
    )
    rows = {"seconds": seconds, "server": costs[0], "clients": costs[1:]}
    return {"megabytes": megabytes, "images": images and "FOLDER", **rows, "share": share}


def once_more(record: Record, number: int, folder: Path) -> float:
    """Seconds of the record's work of a round: a model that goes to several is hashed once, one disk wait."""
    lines = [line for line in record.lines if line.get("round") == number]
    arrays = {line["bytes"]: [np.ones(line["bytes"], np.uint8)] for line in lines if "bytes" in line}
    log = AuditLog(folder / f"again-{time.monotonic_ns()}", record.run)
    hashed = {line["sha256"] for line in record.lines if line["kind"] == "model" and line["round"] < number}
    began = time.perf_counter()
    for line in lines:
        if "bytes" in line and (
            line["from"] != record.party or record.party != "server" or line["sha256"] not in hashed
        ):
            hash_arrays(arrays[line["bytes"]])
            hashed.add(line["sha256"])
        more = {name: line[name] for name in ("session", "sha256", "bytes", "head", "signature") if name in line}
        log.write(line["kind"], number, sender=line["from"], receiver=line.get("to", ""), **more)
    log.sync()
    spent = time.perf_counter() - began
    log.close()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", metavar="FOLDER", help="of train|test/<class>/* (default: generated images)")
    parser.add_argument("--megabytes", type=float, nargs="*", default=[45.0], help="sizes of the model beside it")
    args = parser.parse_args()
    rows = [measure(args.images, None), *(measure(None, size) for size in args.megabytes)]
    save("record", {"machine": machine(), "most": MOST, "rows": rows})


if __name__ == "__main__":
    main()

"""Whether a model is the one that a run made: python -m federation.verify MODEL [RUN_DIR]."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federation import model_file
from federation.compression import pack
from federation.console import Parser, clean, fail, say
from federation.pieces import hash_arrays
from federation.results.history import History
from federation.results.report import open_finished
from federation.results.run_folder import RunFolder
from federation.security.audit import FILE
from federation.security.audit_check import read_record

import numpy as np

DESCRIPTION = "Whether a model is the one that a run made."
EPILOG = """\
exit code: 0 it is, 1 it is not, or can't be told, 2 wrong use
examples:
  python -m federation.verify model.safetensors              what the file says of its run, and whether it is whole
  python -m federation.verify model.safetensors RUN_DIR      whether it is the model of that run
"""


@dataclass
class Model:
    """A safetensors file: its arrays by name, and what it says of where it comes from."""

    path: Path
    arrays: dict[str, np.ndarray]
    origin: dict[str, Any]
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        self.sha256 = model_file.hash_sorted(self.arrays)

    @classmethod
    def read(cls, path: Path) -> "Model":
        """Exits with 2 and one line where it is no such file."""
        try:
            arrays, about = model_file.read(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            fail(f"{path} can't be read ({why}); give a model.safetensors, or what client.py --save wrote", 2)
        origin = about.get("provenance") if isinstance(about, dict) else None
        return cls(path, arrays, origin if isinstance(origin, dict) else {})


def describe(model: Model) -> Iterator[str]:
    """Its provenance, in words."""
    origin = model.origin
    yield f"{model.path}: {len(model.arrays)} arrays, SHA-256 {model.sha256}"
    if not origin:
        return
    task, newest = origin.get("task") or {}, (origin.get("software") or [{}])[-1]
    yield f"  run {clean(origin.get('run_id'), 20)}, ended {clean(origin.get('time'), 30)}"
    yield f"  task {clean(task.get('name', 'not told'), 40)}, its code's hash {clean(task.get('code', 'not told'), 64)}"
    names = [
        f"{name} {clean(newest[name], 40)}" for name in ("federation", "python", "flwr", "numpy") if name in newest
    ]
    dirty = " with changes" if newest.get("dirty") else ""
    commit = f", commit {clean(newest['commit'], 40)}{dirty}" if newest.get("commit") else ""
    yield f"  {', '.join(names)}{commit}"
    for span in origin.get("took_part", []):
        weights = ", ".join(f"{_title(origin, one)} {weight:.4f}" for one, weight in sorted(span["weights"].items()))
        first, last = span["first"], span["last"]
        yield f"  round {first}: {weights}" if first == last else f"  rounds {first} to {last}: {weights}"


def _title(origin: dict, partition: str) -> str:
    return clean(origin.get("members", {}).get(partition, {}).get("name", f"client {partition}"), 80)


def problems_alone(model: Model) -> Iterator[str]:
    if not model.origin:
        yield f"{model.path} says nothing of its run: it is of an earlier version, or of another program"
    elif model.origin.get("arrays") != model.sha256:
        yield f"its arrays are not those that it was saved with (SHA-256 {clean(model.origin.get('arrays'), 64)})"


def problems_in_run(model: Model, folder: RunFolder, history: History) -> Iterator[str]:
    """What keeps this from being the final model of that run."""
    config, record = history.config, history.rounds[-1]
    origin, own = config.get("provenance"), config.get("run_id")
    if model.origin and model.origin.get("run_id") != own:
        yield f"it says that it is of run {clean(model.origin.get('run_id'), 20)}, and this is run {own}"
    if origin is None:
        yield f"{folder.path} holds no finished run of this version: its history.json names no final model"
        return
    if origin["arrays"] != model.sha256:
        yield f"its arrays are not the final model's of that run (SHA-256 {origin['arrays']})"
    if model.origin and model.origin != origin:
        yield "what it says of its run is not what history.json says"
    server = folder.path / "model.safetensors"
    if server.exists() and Model.read(server).sha256 != model.sha256:
        yield f"the server's own {server} has other arrays"
    travelled = travelling(model.arrays, config)
    if record.weights_sha256 and travelled != record.weights_sha256:
        yield f"its arrays are not those of the last {record.unit} in history.json (SHA-256 {record.weights_sha256})"
    yield from _audit_problems(folder.path / FILE, origin["audit_head"], travelled)


def travelling(arrays: dict[str, np.ndarray], config: dict) -> str:
    """The hash of those that travelled, as they did."""
    told = config.get("task")
    names = [name for name, *_ in told["arrays"]] if told else sorted(arrays)
    if set(names) - set(arrays):
        return ""
    return hash_arrays(pack([arrays[name] for name in names], config["compress"]))


def _audit_problems(path: Path, head: str, travelled: str) -> Iterator[str]:
    try:
        record = read_record(path)
    except OSError as error:
        yield f"{path} can't be read ({error.strerror})"
        return
    yield from (f"{path}: {problem}" for problem in record.problems)
    if head not in record.hashes:
        yield f"{path} lacks the line that was its newest when the model was saved"
    models = [line["sha256"] for line in record.lines if line.get("kind") == "model"]
    if models and models[-1] != travelled:
        yield f"{path} has another model as the last"


def main() -> int:
    parser = Parser(DESCRIPTION, usage="%(prog)s MODEL [RUN_DIR]", epilog=EPILOG, prog="python -m federation.verify")
    parser.add_argument("model", metavar="MODEL", help="model.safetensors of a run folder, or what a client saved")
    parser.add_argument("run", metavar="RUN_DIR", nargs="?", help="the folder of the run that it should be of")
    args = parser.parse_args()
    model = Model.read(Path(args.model))
    try:
        say("\n".join(describe(model)))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        fail(f"what {args.model} says of its run is not what a run writes")
    if args.run is None:
        problems = list(problems_alone(model))
        good = (
            "its arrays are those that it was saved with; that its words are true only its run's folder can show: "
            "give RUN_DIR, too"
        )
    else:
        folder, history = open_finished(args.run)
        problems = list(problems_in_run(model, folder, history))
        good = f"it is the final model of run {history.config.get('run_id')}, the same at server and client"
    for problem in problems:
        say(f"WRONG: {problem}")
    if not problems:
        say(good)
    return int(bool(problems))

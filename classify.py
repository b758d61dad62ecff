"""Classify images with a trained model: the three likeliest classes of each, with their probabilities."""

import argparse
import json
import sys

from federation.client.options import add_task_flag
from federation.console import Parser, fail
from federation.task import saved_model
from federation.task.saved_model import SavedModel
from federation.task.task import DataError, Task, TaskError, open_task

EPILOG = """\
examples:
  python classify.py --model runs/2026-11-22-140000/model.safetensors photo.jpg
  python classify.py --model final.safetensors --json *.png | jq -r .classes[0].class
  python classify.py --model final.safetensors --onnx final.onnx

Images may be of any size, grey, or transparent: they are cropped to a square and shrunk to what the network was
trained on. A file that can't be read is named, and the others still done; the exit code is then 1.
"""
SHOWN = 3  # classes an image


def likeliest(probabilities: list[float], classes: list[str]) -> list[tuple[str, float]]:
    """The first three, or as many as there are."""
    by_probability = sorted(zip(classes, probabilities, strict=True), key=lambda pair: -pair[1])
    return by_probability[:SHOWN]


def classify(task: Task, saved: SavedModel, path: str) -> list[tuple[str, float]]:
    """Raises DataError where the file is no readable example."""
    example = task.data.read_example(path, {**saved.schema, "statistics": saved.statistics})
    return likeliest(task.model.predict(saved.network, example)[0].tolist(), saved.classes)


def as_json(path: str, found: list[tuple[str, float]]) -> str:
    return json.dumps({"image": path, "classes": [{"class": name, "probability": p} for name, p in found]})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s --model FILE [options] [IMAGE ...]", epilog=EPILOG)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="image files, or whatever files the task reads")
    add("--model", required=True, metavar="FILE", help="a server's model.safetensors, or what a client's --save wrote")
    add_task_flag(parser)
    add("--json", action="store_true", help="one JSON object a line, for scripts")
    add("--onnx", metavar="FILE", help="export the model to run without PyTorch (needs: pip install onnx onnxscript)")
    args = parser.parse_args(argv)
    if not args.images and not args.onnx:
        parser.error("nothing to do; name at least one IMAGE, or --onnx FILE")
    return args


def export(task: Task, saved: SavedModel, path: str) -> None:
    if not (task.has("to_input") and saved.schema.get("input_shape")):
        fail(f"--onnx is for tasks of images; {task.name} has no to_input(examples, device) and no input_shape", 2)
    try:
        saved_model.export_onnx(path, task, saved)
    except ImportError:
        fail("--onnx needs the packages onnx and onnxscript; install them: pip install onnx onnxscript")
    except OSError as error:
        fail(f"--onnx {path} can't be written ({error.strerror})")
    shape = ", ".join(map(str, saved.schema["input_shape"]))
    print(f"exported {path}: images (n, {shape}) uint8 in, logits and probabilities (n, {len(saved.classes)}) out")


def main() -> int:
    args = parse_args()
    try:
        task = open_task(args.task)
        saved = saved_model.load(args.model, task)
    except TaskError as error:
        fail(str(error))
    except saved_model.ModelFileError as error:
        fail(f"--model {error}")
    if args.onnx:
        export(task, saved, args.onnx)
    if args.images and not (task.has("read_example") and task.has("predict") and saved.classes):
        fail(f"the task {task.name} classifies no single files: that needs classes, read_example and predict", 2)
    unreadable = 0
    for path in args.images:
        try:
            found = classify(task, saved, path)
        except DataError as error:
            unreadable += 1
            if args.json:
                print(json.dumps({"image": path, "error": str(error)}), flush=True)
            print(f"classify: {error}", file=sys.stderr, flush=True)
            continue
        words = ", ".join(f"{name} {p:.2f}" for name, p in found)
        print(as_json(path, found) if args.json else f"{path}: {words}", flush=True)
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())

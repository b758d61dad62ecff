"""Classify images with a trained model: the three likeliest classes of each, with their probabilities."""

import argparse
import json
import sys

from federation.client import model_file
from federation.console import Parser, fail

import torch

import model
from data import INPUT_SHAPE, SIDE, DataError, read_image

EPILOG = """\
examples:
  python classify.py --model runs/2026-11-22-140000/model.npz photo.jpg
  python classify.py --model final.pt --json *.png | jq -r .classes[0].class
  python classify.py --model final.pt --onnx final.onnx

Images may be of any size, grey, or transparent: they are cropped to a square and shrunk to 32 × 32 pixels,
which is what the network was trained on. An image that can't be read is named, and the others still done;
the exit code is then 1.
"""
SHOWN = 3  # classes an image


def likeliest(probabilities: torch.Tensor, classes: list[str]) -> list[tuple[str, float]]:
    """The first three, or as many as there are."""
    top = probabilities.topk(min(SHOWN, len(classes)))
    return [(classes[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


def classify(network: torch.nn.Module, classes: list[str], path: str) -> list[tuple[str, float]]:
    """Raises DataError where the file is no readable image."""
    return likeliest(model.predict(network, torch.from_numpy(read_image(path).copy())[None])[0], classes)


def as_json(path: str, found: list[tuple[str, float]]) -> str:
    return json.dumps({"image": path, "classes": [{"class": name, "probability": p} for name, p in found]})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, usage="%(prog)s --model FILE [options] [IMAGE ...]", epilog=EPILOG)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="image files")
    add("--model", required=True, metavar="FILE", help="a server's model.npz, or what a client's --save wrote")
    add("--json", action="store_true", help="one JSON object a line, for scripts")
    add("--onnx", metavar="FILE", help="export the model to run without PyTorch (needs: pip install onnx onnxscript)")
    args = parser.parse_args(argv)
    if not args.images and not args.onnx:
        parser.error("nothing to do; name at least one IMAGE, or --onnx FILE")
    return args


def export(network: torch.nn.Module, classes: list[str], path: str) -> None:
    try:
        model_file.export_onnx(path, model, network, classes)
    except ImportError:
        fail("--onnx needs the packages onnx and onnxscript; install them: pip install onnx onnxscript")
    except OSError as error:
        fail(f"--onnx {path} can't be written ({error.strerror})")
    print(f"exported {path}: images (n, 3, {SIDE}, {SIDE}) uint8 in, logits and probabilities (n, {len(classes)}) out")


def main() -> int:
    args = parse_args()
    try:
        network, classes = model_file.load(args.model, model, INPUT_SHAPE)
    except model_file.ModelFileError as error:
        fail(f"--model {error}")
    if args.onnx:
        export(network, classes, args.onnx)
    unreadable = 0
    for path in args.images:
        try:
            found = classify(network, classes, path)
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

"""Classifies images: prints the likeliest classes of each, with probabilities.

python tools/predict.py WEIGHTS IMAGE [IMAGE ...] [--top 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.errors import UserError
from pretrain.models.formats import check_weights

if TYPE_CHECKING:
    from pretrain.evaluation.predictions import Prediction


def _arguments() -> argparse.Namespace:
    parser = cli.parser(
        "Prints the likeliest classes of each image, with the weights' own evaluation transform; probabilities are\n"
        "softmax or sigmoid as in training, softmax with a word where that is not known. An image that cannot be used\n"
        "is named, the others go on, and the exit code is 2.",
        "python tools/predict.py runs/NAME photo.jpg other.png",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="run, checkpoint, folder, .npz, or timm:NAME ...")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, GIF, TIFF ...")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image (default 5)")
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels of the model's input (default: trained)")
    parser.add_argument("--json", action="store_true", help="one line of JSON per image")
    arguments = parser.parse_args()
    cli.check_least(arguments, top=1)
    check_weights(arguments.weights)
    if not arguments.json and len(arguments.images) == 1:  # of several, those that exist are classified
        cli.check_found(arguments.images[0], "the file of a photo")
    return arguments


def main() -> int:
    arguments = _arguments()
    with cli.loading():
        import torch

        from pretrain.cluster import ranks
        from pretrain.data.reader import BadSample
        from pretrain.evaluation.predictions import assumed_names, likeliest
        from pretrain.evaluation.subject import fitting
        from pretrain.log import warn
        from pretrain.models.weights import model_of, read_weights
        from pretrain.shards.pictures import read_picture

    weights = read_weights(arguments.weights, arguments.image_size)
    if not weights.num_classes:
        raise UserError(f"{arguments.weights}: has no head, so it tells features, not classes")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks.keep_float32()  # as in evaluation: the same logits
    with fitting(1):
        model = model_of(weights).to(device)
    if weights.loss is None:
        warn(f"{arguments.weights}: probabilities are softmax; the loss that it was trained with is not known")
    if not weights.class_names and (names := assumed_names(arguments.weights, weights.num_classes)):
        warn(f"{arguments.weights}: has no class names; its {len(names):,} classes are taken for ImageNet's")
        weights = replace(weights, class_names=names)
    if not weights.class_names:
        warn(f"{arguments.weights}: has no class names, so classes are told by their numbers")
    num_bad = 0
    for path in arguments.images:
        damage: list[str] = []
        try:
            with fitting(1):
                predictions = likeliest(
                    model, weights, read_picture(path, Counter()), arguments.top, device, damage.append
                )
        except (OSError, BadSample) as error:
            num_bad += 1
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if isinstance(error, IsADirectoryError):
                reason = f"is a folder; give its images, as {path}/*.jpg"
            cli.tell(f"{path}: cannot be used ({reason})", sys.stderr)
            if arguments.json:
                print(json.dumps({"image": str(path), "error": reason}), flush=True)
            continue
        for complaint in damage:
            warn(f"{path}: is damaged ({complaint})")
        _print(path, predictions, as_json=arguments.json)
    if num_bad:
        print(f"error: {num_bad} of {len(arguments.images)} images cannot be used", file=sys.stderr)
    return 2 if num_bad else 0


def _print(path: Path, predictions: list[Prediction], *, as_json: bool) -> None:
    if as_json:
        rows = [{"class": p.number, "name": p.name, "probability": p.probability} for p in predictions]
        print(json.dumps({"image": str(path), "predictions": rows}), flush=True)
        return
    cli.tell(path)
    for prediction in predictions:
        cli.tell(f"  {prediction.probability:7.2%}  {prediction.name}")


if __name__ == "__main__":
    cli.run(main)

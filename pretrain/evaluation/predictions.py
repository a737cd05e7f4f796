"""Predictions as output: a line for each image, pictures of the most confident mistakes, one image's classes."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from pretrain.data.images import decode, decode_upright, eval_image
from pretrain.data.manifest import Manifest
from pretrain.data.reader import read_sample
from pretrain.evaluation.classification import Predictions, logits_of
from pretrain.evaluation.subject import eval_config
from pretrain.models.by_name import is_name
from pretrain.models.weights import Weights
from pretrain.shards.examples import sample_names
from pretrain.shards.pictures import png_of

MAX_WRONG = 24  # pictures; a page shows them all
MAX_PAIRS = 200_000  # of (true class, predicted class): ImageNet's 50,000 images have fewer
THUMBNAIL = 96  # pixels of a picture's longer side


class Prediction(NamedTuple):
    """One class of one image."""

    number: int
    name: str  # the number, when the weights know no names
    probability: float


def lines(found: Predictions, manifest: Manifest, task: str) -> Iterator[str]:
    """Yields a line of JSON for each scored image, in order of the index: its name, label and five best classes."""
    names = sample_names(manifest, found.index.tolist())
    for row, (index, name) in enumerate(zip(found.index.tolist(), names)):
        values = {
            "task": task,
            "index": index,
            "name": name,
            "label": _label(found.labels[row]),
            "prediction": int(found.classes[row, 0]),
            "top5": found.classes[row].tolist(),
            "probabilities": [float(f"{share:.6g}") for share in found.probabilities[row].tolist()],
        }
        yield json.dumps(values, ensure_ascii=False) + "\n"


def _label(labels: np.ndarray) -> int | list[int]:
    """Returns an image's class, or the list of its classes where the set has several per image."""
    present = labels[labels >= 0].tolist()
    return present[0] if len(labels) == 1 else present


def wrong_items(found: Predictions, manifest: Manifest) -> list[dict[str, Any]]:
    """Returns the wrong predictions of highest probability, at most 24, for the report page.

    Each has name, label, predicted, probability and png_base64, a picture of at most 96 x 96 pixels.
    """
    wrong = np.flatnonzero(~found.correct(1))
    chosen = wrong[np.argsort(-found.probabilities[wrong, 0], kind="stable")][:MAX_WRONG]
    indices = found.index[chosen].tolist()
    return [
        {
            "name": name,
            "label": ", ".join(_class_name(manifest, number) for number in found.labels[row] if number >= 0),
            "predicted": _class_name(manifest, found.classes[row, 0]),
            "probability": float(found.probabilities[row, 0]),
            "png_base64": base64.b64encode(_thumbnail(read_sample(manifest, index).image)).decode(),
        }
        for row, index, name in zip(chosen, indices, sample_names(manifest, indices))
    ]


def confusion(found: Predictions, manifest: Manifest) -> dict[str, Any]:
    """Returns the confusion matrix for the report page; {} where images have several labels or the pairs are too many.

    "confusion": rows [class, prediction, images] of all pairs that occur; "classes": their names, by number.
    """
    if found.labels.shape[1] > 1:
        return {}
    pairs, numbers = np.unique(np.stack([found.labels[:, 0], found.classes[:, 0]], axis=1), axis=0, return_counts=True)
    if len(pairs) > MAX_PAIRS:
        return {}
    rows = np.column_stack([pairs, numbers]).tolist()
    return {"classes": [_class_name(manifest, number) for number in range(int(pairs.max()) + 1)], "confusion": rows}


def _class_name(manifest: Manifest, number: int) -> str:
    return manifest.class_names[number] if number < len(manifest.class_names) else str(number)


def _thumbnail(data: bytes) -> bytes:
    picture = Image.fromarray(decode(data).permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return png_of(np.asarray(picture))


_IMAGENETS = {1000: "imagenet-1k", 21_843: "imagenet-21k-goog"}  # by number of classes, as timm calls the lists


def assumed_names(weights: Path, num_classes: int) -> tuple[str, ...]:
    """Returns ImageNet's class names for published weights with ImageNet's number of classes, () for all others.

    Google's files, and most of timm's, have no class names; their classes are in the order of timm's lists.
    """
    is_published = is_name(weights) and str(weights).startswith(("timm:", "google:"))
    if not is_published or num_classes not in _IMAGENETS:
        return ()
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo(_IMAGENETS[num_classes]).label_descriptions())


def likeliest(
    model: nn.Module,
    weights: Weights,
    data: bytes,
    top: int,
    device: torch.device,
    told: Callable[[str], None] = lambda _: None,
) -> list[Prediction]:
    """Returns the `top` likeliest classes of one encoded image, best first, by the weights' own transform and loss.

    A photo is turned as its EXIF says. told: called with a description of damage in it. Raises BadSample when the image
    cannot be decoded.
    """
    image = eval_image(decode_upright(data, told), weights.model.image_size, eval_config(weights))  # uint8 [3, S, S]
    logits = logits_of(model, weights.normalisation)(image[None].to(device))[0]  # [classes]
    probabilities = logits.sigmoid() if weights.loss == "sigmoid" else logits.softmax(0)
    values, numbers = probabilities.topk(min(top, len(probabilities)))
    names = weights.class_names or [str(number) for number in range(weights.num_classes)]
    return [Prediction(n, names[n], value) for n, value in zip(numbers.tolist(), values.tolist())]

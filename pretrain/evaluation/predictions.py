"""What becomes of a model's predictions: a line for each image, and pictures of the most confident mistakes."""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pretrain.data.examples import FILE, load_examples
from pretrain.data.images import decode
from pretrain.data.manifest import Manifest
from pretrain.data.reader import BadSample, read_sample
from pretrain.evaluation.classification import Predictions

MAX_WRONG = 24  # pictures; a page shows them all
THUMBNAIL = 96  # pixels of a picture's longer side


def names_of(manifest: Manifest, indices: Sequence[int]) -> list[str]:
    """Returns the original names of samples, without folder and ending: ILSVRC2012_val_00000001.

    From examples.jsonl beside the manifest; without it, from the keys of the shards, which are names where existing
    tars were indexed. "" where a sample's key cannot be read.
    """
    if (manifest.path.parent / FILE).exists():
        examples = load_examples(manifest)
        return [_stem(examples[index].id) for index in indices]
    return [_key(manifest, index) for index in indices]


def _key(manifest: Manifest, index: int) -> str:
    try:
        return _stem(read_sample(manifest, index).key)
    except BadSample:
        return ""


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


def lines(found: Predictions, manifest: Manifest, task: str) -> Iterator[str]:
    """Yields a line of JSON for each scored image, in order of the index: what it is, and the five best classes."""
    names = names_of(manifest, found.index.tolist())
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
    """An image's class, or where the set has several for an image, the list of them."""
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
        for row, index, name in zip(chosen, indices, names_of(manifest, indices))
    ]


def _class_name(manifest: Manifest, number: int) -> str:
    return manifest.class_names[number] if number < len(manifest.class_names) else str(number)


def _thumbnail(data: bytes) -> bytes:
    picture = Image.fromarray(decode(data).permute(1, 2, 0).numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()

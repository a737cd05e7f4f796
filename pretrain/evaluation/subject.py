"""The model under test: all that evaluators know of it, whether it was read from disk or is being trained."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from pretrain import cli
from pretrain.config import DataConfig
from pretrain.data.loader import Batch, eval_batches
from pretrain.data.manifest import Manifest
from pretrain.errors import DeviceMemoryError
from pretrain.evaluation import fewshot
from pretrain.evaluation.classification import MAX_LOGIT_BYTES, Predict, logits_of
from pretrain.evaluation.features import MAX_PIXEL_BYTES, Extract, Features, extract_features, pre_logits, raw_pixels
from pretrain.log import warn
from pretrain.models.build import build_model
from pretrain.models.weights import Weights, model_of

TRAINED, RANDOM, PIXELS = "trained", "random weights", "raw pixels"

_BESIDE_IMAGES = ("labels", "label_weights", "valid", "epoch", "index")  # a batch's other tensors

Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]  # title, total, unit


class Images(NamedTuple):
    """Images of a data set: those that are scored, or learnt from."""

    manifest: Manifest
    indices: np.ndarray  # int64, ascending


class Reading(NamedTuple):
    """How an evaluator sees images."""

    config: DataConfig  # transform, crop, interpolation; loader processes
    max_train: int | None = None  # at most so many training images, evenly spaced; None: all


def all_images(manifest: Manifest) -> Images:
    """Returns all images of a data set."""
    return Images(manifest, np.arange(manifest.num_samples))


@contextmanager
def no_progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows nothing, in place of `cli.progress`."""
    yield lambda _: None


@contextmanager
def fitting(num_images: int) -> Iterator[None]:
    """Turns torch's out-of-memory error into one line: the batch, or with one image the model, does not fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = f"--batch-size: {num_images} images at a time are too many for this GPU; try {num_images // 2}"
        if num_images == 1:
            told = "this GPU has no memory for the model, beside what else it does; CUDA_VISIBLE_DEVICES= takes the CPU"
        raise DeviceMemoryError(told) from error


@dataclass
class Subject:
    """A model under test, and the settings of the test."""

    predict: Predict
    extract: Extract  # the features: the head's input
    num_classes: int  # of its head
    image_size: int  # pixels of its input
    loss: str
    device: torch.device
    batch_size: int  # images per rank and forward pass
    own: DataConfig  # the model's own transform
    readings: Mapping[str, Reading]  # for the kinds of evaluation with another transform
    shots: Sequence[int]  # few-shot's images per class
    max_logit_bytes: int  # as float32 on rank 0; above this, no mean average precision
    baselines: Mapping[str, Callable[[], Extract]] = field(default_factory=dict)  # for few-shot to compare with
    shared: Collection[Path] = ()  # data sets that the head is scored on more than once
    stop_agreed: Callable[[], bool] = lambda: False
    progress: Progress = no_progress
    tell: Callable[[str], None] = lambda _: None  # notes on the scores; a run prints them at its start
    _answers: dict[Path, list[Batch]] = field(default_factory=dict)  # this rank's logits for shared sets
    _kept: dict[tuple, Features | None] = field(default_factory=dict)  # of the last data sets, for the next evaluator

    def reading(self, kind: str) -> Reading:
        """Returns how a kind of evaluation sees images: as `readings` says, else as the model itself does."""
        return self.readings.get(kind, Reading(self.own))

    def head(self, images: Images) -> tuple[Predict, Iterable[Batch]]:
        """Returns the function from a batch's images to logits [B, classes], and this rank's batches.

        A shared set has one forward pass only: on later calls, its batches hold logits in place of images.
        """
        path = images.manifest.path
        if path in self._answers:
            return nn.Identity(), self._answers[path]
        options = {"batch_size": self.batch_size, "image_size": self.image_size, "config": self.own}
        batches = eval_batches(images.manifest, images.indices, **options)
        return self._remembered(batches, path) if path in self.shared else (self.predict, batches)

    def _remembered(self, batches: Iterator[Batch], path: Path) -> tuple[Predict, Iterator[Batch]]:
        last: list[torch.Tensor] = []

        def predict(images: torch.Tensor) -> torch.Tensor:
            last[:] = [self.predict(images)]
            return last[0]

        def noted() -> Iterator[Batch]:
            done = []
            for batch in batches:
                yield batch
                # Cloned: tensors from a loader process are in shared memory, with five open files for each batch kept.
                labels = {name: getattr(batch, name).clone() for name in _BESIDE_IMAGES}
                done.append(batch._replace(images=last[0].cpu(), **labels))
            self._answers[path] = done  # only once it is complete

        return predict, noted()

    def features(self, name: str, extract: Extract, sets: dict[str, Images], kind: str) -> list[Features | None]:
        """Returns the features of a training and a test set, on rank 0. Those of the last call are cached."""
        config, max_train = self.reading(kind)
        sets = {role: _spread(images, max_train) if role == "train" else images for role, images in sets.items()}
        seen_as = config.eval_transform, config.eval_crop, config.interpolation
        keys = {  # one set may be both: `max_train` images of it to learn from, all of them to test
            role: (name, images.manifest.path, images.manifest.label_map, len(images.indices), *seen_as)
            for role, images in sets.items()
        }
        self._kept = {key: found for key, found in self._kept.items() if key in keys.values()}
        for role, images in sets.items():
            if keys[role] not in self._kept:
                self._kept[keys[role]] = self._extracted(name, extract, images, config)
        return [self._kept[key] for key in keys.values()]

    def _extracted(self, name: str, extract: Extract, images: Images, config: DataConfig) -> Features | None:
        with self.progress(f"features, {name}", len(images.indices), "images") as advance:
            return extract_features(
                extract,
                *images,
                image_size=self.image_size,
                batch_size=self.batch_size,
                config=config,
                device=self.device,
                max_bytes=MAX_PIXEL_BYTES if extract is raw_pixels else None,
                progress=advance,
                stop_agreed=self.stop_agreed,
            )


def _spread(images: Images, most: int | None) -> Images:
    """Returns at most `most` of the images, evenly spaced; None: all."""
    if most is None:
        return images
    return images._replace(indices=images.indices[fewshot.spread_indices(len(images.indices), most)])


def transform_of(config: DataConfig) -> dict[str, Any]:
    """Returns the transform of images, as results.json records it."""
    return {"name": config.eval_transform, "crop": config.eval_crop, "interpolation": config.interpolation}


def eval_config(weights: Weights, workers: int = 0) -> DataConfig:
    """Returns the data config with the evaluation transform that the weights carry."""
    return DataConfig(
        eval_transform=cast(Any, weights.eval_transform),  # literals, as the config wrote them
        eval_crop=weights.eval_crop,
        interpolation=cast(Any, weights.interpolation),
        mean=cast(Any, weights.mean),
        std=cast(Any, weights.std),
        workers=workers,
    )


def subject_of(
    weights: Weights,
    device: torch.device,
    *,
    loss: str | None,
    batch_size: int,
    workers: int,
    shots: Sequence[int],
    fewshot_transform: str,
    baselines: bool,
    shared: Collection[Path],
) -> Subject:
    """Returns weights as a model under test.

    loss: None for the one that they were trained with, or softmax where that is unknown. fewshot_transform: as in
    DataConfig. baselines: also score few-shot with random weights and with raw pixels. shared: see Subject.
    """
    with fitting(1):
        model = model_of(weights).to(device)
    own = eval_config(weights, workers)
    crop = fewshot.CROP if fewshot_transform == fewshot.TRANSFORM else own.eval_crop
    few = replace(own, eval_transform=cast(Any, fewshot_transform), eval_crop=crop)
    others: dict[str, Callable[[], Extract]] = {
        RANDOM: lambda: pre_logits(
            build_model(weights.model, weights.num_classes).to(device).eval(), weights.normalisation
        ),
        PIXELS: lambda: raw_pixels,
    }
    return Subject(
        predict=logits_of(model, weights.normalisation),
        extract=pre_logits(model, weights.normalisation),
        num_classes=weights.num_classes,
        image_size=weights.model.image_size,
        loss=loss or weights.loss or "softmax",
        device=device,
        batch_size=batch_size,
        own=own,
        readings={"fewshot": Reading(few, fewshot.MAX_TRAIN)},
        shots=shots,
        max_logit_bytes=MAX_LOGIT_BYTES,
        baselines=others if baselines else {},
        shared=shared,
        progress=cli.progress,
        tell=warn,
    )

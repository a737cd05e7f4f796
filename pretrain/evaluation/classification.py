"""A model's predictions and their scores (loss, top-1, top-5 ...), each image exactly once on any number of ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pretrain.cluster import agreement, ranks, watchdog
from pretrain.config import MINUS_ONE_TO_ONE, Normalisation
from pretrain.data.images import to_float
from pretrain.data.loader import REASONS, Batch, count_reasons
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.log import warn
from pretrain.losses import per_image_loss

Predict = Callable[[torch.Tensor], torch.Tensor]  # uint8 images [B, 3, H, W] -> logits [B, classes]

TOP = 5
# Mean average precision ranks all images by their logits, so rank 0 holds the logits of all images, as float32.
MAX_LOGIT_BYTES = 4 << 30  # where the model is alone in memory: 50,000 images of 21k classes
MAX_LOGIT_BYTES_IN_TRAINING = 1 << 30  # beside a run's own memory: 40,000 images of 6,700 classes
_UNSCORED = -1e30  # a logit that never wins; finite, since infinity times a weight of 0 is NaN


class Score(NamedTuple):
    """One figure of an evaluation."""

    metric: str
    value: float
    n: int  # images it was measured on


class Predictions(NamedTuple):
    """Predictions for the scored images, in order of their index: the same on any number of ranks."""

    index: np.ndarray  # int64 [images]
    labels: np.ndarray  # int64 [images, L], padded with -1
    classes: np.ndarray  # int64 [images, 5 or the number of classes], best first
    probabilities: np.ndarray  # float32, of `classes`: softmax, or each class's own sigmoid
    losses: np.ndarray  # float32 [images]
    logits: np.ndarray | None  # float32 [images, classes]; None unless requested

    def correct(self, top: int) -> np.ndarray:
        """Returns whether one of an image's labels is among its `top` best classes, bool [images]."""
        return (self.classes[:, :top, None] == self.labels[:, None, :]).any(axis=(1, 2))


class EvaluationStopped(Exception):
    """The evaluation was given up because the run was asked to stop."""


def logits_of(model: nn.Module, normalisation: Normalisation = MINUS_ONE_TO_ONE) -> Predict:
    """Returns the function uint8 images [B, 3, H, W] -> the model's logits [B, classes], in float32.

    normalisation: the one that the model was trained with.
    """

    @torch.no_grad()
    def predict(images: torch.Tensor) -> torch.Tensor:
        return model(to_float(images, torch.float32, normalisation))

    return predict


@torch.no_grad()
def predict_all(
    predict: Predict,
    batches: Iterable[Batch],
    *,
    loss: str,
    device: torch.device,
    stop_agreed: Callable[[], bool] = lambda: False,
    keep_logits: bool = False,
) -> Predictions | None:
    """Returns the predictions of all ranks on rank 0, None on the others. Called by all ranks.

    Images that could not be read are left out, with a warning. Every rank must pass the same number of batches. Raises,
    on all ranks, EvaluationStopped when `stop_agreed` returns True between two batches, UserError when none is left.
    """
    parts: list[list[np.ndarray]] = []
    bad, damaged = torch.zeros(len(REASONS), dtype=torch.float64), torch.zeros(1)
    for batch in batches:
        agreement.raise_together(batch.error)
        if stop_agreed():
            raise EvaluationStopped
        bad += count_reasons(batch.bad)
        damaged += len(batch.damaged)
        answers = _answered(predict, batch, loss, device, keep_logits)
        valid = batch.valid.numpy()  # masked on the host: on a GPU, a mask costs a host sync per column
        parts.append([column.numpy()[valid] for column in (batch.index, batch.labels, *answers)])
    scored = torch.tensor([float(sum(len(part[0]) for part in parts))])
    *counts, num_damaged, num_scored = agreement.add_up(torch.cat([bad, damaged.double(), scored.double()])).tolist()
    _warn_of_bad(counts, num_damaged)
    if not num_scored:
        raise UserError("no image of the validation set can be scored: none could be read, or none has a label")
    mine = [np.concatenate(_same_width(column)) for column in zip(*parts)]
    columns = [np.concatenate(_same_width(column)) for column in zip(*agreement.to_main(mine))]
    if not columns:
        return None
    order = np.argsort(columns[0])
    index, labels, classes, probabilities, losses, *logits = (column[order] for column in columns)
    return Predictions(index, labels, classes, probabilities, losses, logits[0] if logits else None)


def _answered(predict: Predict, batch: Batch, loss: str, device: torch.device, keep_logits: bool) -> list[torch.Tensor]:
    """Returns per slot, on the host: top classes [B, 5], their probabilities [B, 5], losses [B]; logits if kept."""
    batch = batch.to(device)
    logits = predict(batch.images).float()
    losses = per_image_loss(logits, batch.labels, batch.label_weights, loss)
    shares = logits.softmax(dim=-1) if loss == "softmax" else logits.sigmoid()
    classes = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
    answers = classes, shares.gather(1, classes), losses, *([logits] if keep_logits else [])
    return watchdog.from_device(lambda: [answer.cpu() for answer in answers])


def _same_width(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pads 2-D arrays with -1 to one width: labels are only as wide as the most that an image of their batch has."""
    if arrays[0].ndim == 1:
        return list(arrays)
    widest = max(array.shape[1] for array in arrays)
    return [np.pad(array, ((0, 0), (0, widest - array.shape[1])), constant_values=-1) for array in arrays]


def _warn_of_bad(counts: list[float], num_damaged: float) -> None:
    if num_damaged and ranks.is_main():
        warn(
            f"validation: {num_damaged:.0f} damaged images are scored as they are decoded; "
            "tools/make_shards.py --verify names them"
        )
    if any(counts) and ranks.is_main():
        told = ", ".join(f"{count:.0f} {reason}" for reason, count in zip(REASONS, counts) if count)
        warn(f"validation: {sum(counts):.0f} images could not be used and are not scored ({told})")


# --- fewer classes, other labels -------------------------------------------------------------------------------------


def among(predict: Predict, classes: Sequence[int]) -> Predict:
    """Returns `predict` restricted to some classes: ImageNet-A and -R are scored among 200 of the 1000.

    Their authors' rule (hendrycks/natural-adv-examples, imagenet-r): argmax and softmax ignore the other logits.
    Classes keep their numbers.
    """

    def restricted(images: torch.Tensor) -> torch.Tensor:
        logits = predict(images)
        kept = torch.full_like(logits, _UNSCORED)
        kept[:, list(classes)] = logits[:, list(classes)]
        return kept

    return restricted


def relabelled(batches: Iterable[Batch], labels: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """Yields the batches with each image's labels replaced by labels[index]; an image with an empty list is not scored.

    This is how ReaL is scored, as in big_vision: the target is multi-hot over all labels; images without a label count
    in neither numerator nor denominator.
    """
    for batch in batches:
        wanted = [list(labels[i]) if i >= 0 else [] for i in batch.index.tolist()]
        width = max(1, *map(len, wanted))
        padded = torch.tensor([row + [-1] * (width - len(row)) for row in wanted])  # [slots, L]
        valid = batch.valid & (padded >= 0).any(dim=1)
        yield batch._replace(labels=padded, label_weights=(padded >= 0).float(), valid=valid)


# --- figures ---------------------------------------------------------------------------------------------------------


def scores_of(found: Predictions) -> list[Score]:
    """Returns mean loss, top-1 and top-5; with logits, mean average precision too.

    Where an image has several labels, any of them counts as correct: top1 is then accuracy-any.
    """
    n = len(found.index)
    values = {"loss": found.losses, "top1": found.correct(1), "top5": found.correct(TOP)}
    scores = [Score(metric, float(value.mean(dtype=np.float64)), n) for metric, value in values.items()]
    if found.logits is not None:
        scores.append(Score("mean_average_precision", mean_average_precision(found.logits, found.labels), n))
    return scores


def has_average_precision(manifest: Manifest, num_images: int, num_classes: int, max_logit_bytes: int) -> bool:
    """Returns whether to compute mean average precision: images have several labels, and the logits are few enough."""
    return manifest.multi_label and logit_bytes(num_images, num_classes) <= max_logit_bytes


def logit_bytes(num_images: int, num_classes: int) -> int:
    """Returns the bytes that the logits of all images take on rank 0, in float32."""
    return 4 * num_images * num_classes


def mean_per_class(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Returns the mean of each class's accuracy, over the classes that have images. labels, predicted: [images]."""
    counts = np.bincount(labels)
    correct = np.bincount(labels[labels == predicted], minlength=len(counts))
    return float((correct[counts > 0] / counts[counts > 0]).mean())


def quadratic_kappa(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Returns Cohen's kappa with quadratic weights: the metric of diabetic retinopathy's grades, 1 at best."""
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(labels, predicted, weights="quadratic"))


OFFICIAL: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mean_per_class": mean_per_class,
    "quadratic_kappa": quadratic_kappa,
}


def mean_average_precision(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean over classes of average precision, for images with several labels.

    For a class's average precision, all images are ranked by its logit: the mean, over the images of the class, of the
    precision among the images ranked as high or higher (scikit-learn's definition, without interpolation). Classes
    without an image are left out. logits: [images, classes]. labels: [images, L], padded with -1.
    """
    from sklearn.metrics import average_precision_score

    classes = np.unique(labels[labels >= 0])
    return float(np.mean([average_precision_score((labels == c).any(axis=1), logits[:, c]) for c in classes]))

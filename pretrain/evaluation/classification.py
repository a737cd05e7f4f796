"""Loss, top-1 and top-5 of a model on a set of images, each scored exactly once on any number of ranks."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from pretrain import distributed
from pretrain.data.loader import REASONS, Batch, count_reasons
from pretrain.errors import UserError
from pretrain.log import warn
from pretrain.losses import num_correct, per_image_loss


class Score(NamedTuple):
    """One figure of an evaluation."""

    metric: str
    value: float
    n: int  # images it was measured on


def _warn_of_bad(counts: list[float]) -> None:
    if any(counts) and distributed.is_main():
        told = ", ".join(f"{count:.0f} {reason}" for reason, count in zip(REASONS, counts) if count)
        warn(f"validation: {sum(counts):.0f} images could not be used and are not scored ({told})")


class EvaluationStopped(Exception):
    """The evaluation was given up because the run was asked to stop."""


def classification_scores(
    predict: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[Batch],
    *,
    loss: str,
    device: torch.device,
    stop_agreed: Callable[[], bool] = lambda: False,
) -> list[Score]:
    """Returns loss, top-1 and top-5 over all ranks; images that could not be read are not scored, which n tells.

    predict: uint8 images [B, 3, H, W] -> logits [B, classes]. Every rank brings the same number of batches.
    Raises EvaluationStopped on all ranks when `stop_agreed` says so between two batches, UserError when no image can be
    read.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    bad = torch.zeros(len(REASONS), dtype=torch.float64)
    for batch in batches:
        distributed.raise_together(batch.error)
        if stop_agreed():
            raise EvaluationStopped
        bad += count_reasons(batch.bad)
        batch = batch.to(device)
        logits = predict(batch.images)
        target = batch.labels, batch.label_weights
        losses = torch.where(batch.valid, per_image_loss(logits, *target, loss), 0.0)
        top = [num_correct(logits, *target, batch.valid, top=k) for k in (1, 5)]
        sums += torch.stack([losses.sum(), *top, batch.valid.sum()])
    _warn_of_bad(distributed.add_up(bad).tolist())
    total_loss, top1, top5, n = distributed.add_up(sums).tolist()
    if not n:
        raise UserError("no image of the validation set could be read")
    return [Score("loss", total_loss / n, int(n)), Score("top1", top1 / n, int(n)), Score("top5", top5 / n, int(n))]

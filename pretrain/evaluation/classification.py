"""Loss, top-1 and top-5 of a model on a set of images, each scored exactly once on any number of ranks."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from pretrain import distributed
from pretrain.data.loader import Batch
from pretrain.errors import UserError
from pretrain.losses import num_correct, per_image_loss


class Score(NamedTuple):
    """One figure of an evaluation."""

    metric: str
    value: float
    n: int  # images it was measured on


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
    for batch in batches:
        if stop_agreed():
            raise EvaluationStopped
        batch = batch.to(device)
        logits = predict(batch.images)
        losses = torch.where(batch.valid, per_image_loss(logits, batch.labels, loss), 0.0)
        top = [num_correct(logits, batch.labels, batch.valid, top=k) for k in (1, 5)]
        sums += torch.stack([losses.sum(), *top, batch.valid.sum()])
    total_loss, top1, top5, n = distributed.add_up(sums).tolist()
    if not n:
        raise UserError("no image of the validation set could be read")
    return [Score("loss", total_loss / n, int(n)), Score("top1", top1 / n, int(n)), Score("top5", top5 / n, int(n))]

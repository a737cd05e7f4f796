"""The scores of a model's head in one call."""

from collections.abc import Callable, Iterable

import torch

from pretrain.data.loader import Batch
from pretrain.evaluation.classification import Predict, Score, predict_all, scores_of


def classification_scores(
    predict: Predict,
    batches: Iterable[Batch],
    *,
    loss: str,
    device: torch.device,
    stop_agreed: Callable[[], bool] = lambda: False,
    keep_logits: bool = False,
) -> list[Score]:
    """Returns the scores over all ranks; see `scores_of`, and `predict_all` for arguments and errors."""
    options = {"loss": loss, "device": device, "stop_agreed": stop_agreed, "keep_logits": keep_logits}
    return scores_of(predict_all(predict, batches, **options))

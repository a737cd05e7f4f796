"""The scores of a model's head in one call."""

from collections.abc import Iterable
from typing import Any

from pretrain.data.loader import Batch
from pretrain.evaluation.classification import Predict, Score, predict_all, scores_of


def classification_scores(predict: Predict, batches: Iterable[Batch], **options: Any) -> list[Score]:
    """Returns the scores over all ranks; see `scores_of`, and `predict_all` for options and errors."""
    return scores_of(predict_all(predict, batches, **options))

"""The scores of a model's head in one call."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from pretrain.cluster import agreement
from pretrain.data.loader import Batch
from pretrain.evaluation.classification import Predict, Score, predict_all, scores_of


def classification_scores(predict: Predict, batches: Iterable[Batch], **options: Any) -> list[Score]:
    """Returns the scores over all ranks; see `scores_of`, and `predict_all` for options and errors."""
    found = predict_all(predict, batches, **options)
    if not dist.is_initialized():  # one rank, or a part of several that a test goes through one by one
        assert found is not None
        return scores_of(found)
    assert (found is not None) == (dist.get_rank() == 0)
    return agreement.from_main(lambda: found and scores_of(found))

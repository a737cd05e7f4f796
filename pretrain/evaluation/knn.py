"""Nearest neighbours: an image takes the class of the training images whose features point the same way.

The protocol of Wu et al. (arXiv 1805.01978, section 3.4) and DINO (arXiv 2104.14294, appendix): cosine similarity, the
k = 20 nearest vote with weight exp(similarity / 0.07). Also k = 1, which has no hyperparameter.
"""

from collections.abc import Callable

import numpy as np
import torch

from pretrain.errors import UserError
from pretrain.evaluation.classification import Score
from pretrain.evaluation.fewshot import check_finite

NEIGHBOURS = (1, 20)
TEMPERATURE = 0.07
_CHUNK = 1024  # test images at a time: 5 GB of similarities to ImageNet's 1.28M training images


@torch.no_grad()
def nearest(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    k: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosine similarity and class of the k nearest training images, nearest first, [test images, k] each.

    All training images where there are fewer than k. progress: called with the number of test images just done.
    """
    values, labels = _unit(train_features, device), torch.from_numpy(train_labels).to(device)
    similarities, classes = [], []
    for start in range(0, len(test_features), _CHUNK):
        part = _unit(test_features[start : start + _CHUNK], device)
        best = (part @ values.T).topk(min(k, len(values)), dim=1)  # [chunk, k]
        similarities.append(best.values.cpu())
        classes.append(labels[best.indices].cpu())
        progress(len(part))
    return torch.cat(similarities), torch.cat(classes)


def _unit(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(values).to(device, torch.float32), dim=1)


def vote(similarities: torch.Tensor, classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Returns each class's sum of exp(similarity / temperature), float64 [test images, num_classes]."""
    weights = (similarities.double() / TEMPERATURE).exp()
    return torch.zeros(len(classes), num_classes, dtype=torch.float64).scatter_add_(1, classes, weights)


def knn(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    device: torch.device,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """Returns for each k of NEIGHBOURS the accuracy "k-nn" on all test images.

    features: [images, D]; labels: [images] integers. progress: called with the number of test images just done. Raises
    UserError when features are not finite, or do not fit beside what a GPU holds.
    """
    check_finite("nearest neighbours", train_features, test_features)
    num_classes = 1 + int(max(train_labels.max(), test_labels.max()))
    arrays = train_features, train_labels, test_features
    try:
        similarities, classes = nearest(*arrays, k=max(NEIGHBOURS), device=device, progress=progress)
    except torch.OutOfMemoryError:  # beside a training
        needed = 4 * len(train_features) * (2 * train_features.shape[1] + _CHUNK)
        raise UserError(
            f"nearest neighbours: the features of {len(train_features):,} images, and their similarities to {_CHUNK} "
            f"others, take {needed / 1e9:.1f} GB, which the GPU has not free; take fewer training images, or "
            "leave this evaluation out (evaluation.knn=false in a training)"
        ) from None
    rows = []
    for k in NEIGHBOURS:
        predicted = vote(similarities[:, :k], classes[:, :k], num_classes).argmax(dim=1).numpy()
        rows.append(Score(f"{k}-nn", float((predicted == test_labels).mean()), len(test_labels)))
    return rows

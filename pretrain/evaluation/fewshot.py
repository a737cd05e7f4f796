"""Few-shot linear evaluation in closed form: how good are features when each class has 1, 5, 10 or 25 labelled images.

big_vision's protocol (evaluators/fewshot_lsr.py) in float64; the images it is measured on are the caller's choice.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from pretrain.errors import UserError
from pretrain.evaluation.classification import Score
from pretrain.log import warn

SHOTS = (1, 5, 10, 25)
TRANSFORM, CROP = "fewshot", 0.875  # data.eval_transform and eval_crop of its protocol: squashed to 256, cropped to 224
MAX_TRAIN = 65_000  # training images that shots are drawn from: big_vision takes as many of ImageNet's
SEEDS = (0, 1, 2)
L2 = 2.0**10
CONSTANT = 100.0  # the appended feature: so large that its weight, the bias, is hardly regularised
_CHUNK = 4096  # test images whitened at a time: float64 copies of raw pixels would not fit otherwise


def spread_indices(num_samples: int, most: int = MAX_TRAIN) -> np.ndarray:
    """Returns the training samples that shots are drawn from, ascending: all, or `most` of them, evenly spaced.

    big_vision takes the first of ImageNet's shuffled records; ours may lie class after class.
    """
    return np.linspace(0, num_samples - 1, min(num_samples, most)).round().astype(np.int64)


def choose_indices(labels: np.ndarray, shots: int, num_classes: int, seed: int) -> np.ndarray:
    """Returns which training images a seed takes, int64 [at most shots * num_classes], class after class.

    Fewer shots of the same seed are a subset. A class with fewer than `shots` images gives all it has.
    """
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == c))[:shots] for c in range(num_classes)]
    return np.concatenate(chosen)


def fewshot_scores(
    train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, num_classes: int, l2: float = L2
) -> np.ndarray:
    """Returns the scores of a ridge regression to targets -1 and 1, float64 [test images, num_classes].

    train_features: [N, D], of the chosen images only; whitening uses their mean and standard deviation. In float32 the
    solution would be up to 0.4 % off: the constant feature makes the Gram matrix ill-conditioned.
    """
    mean = train_features.mean(axis=0, dtype=np.float64)
    deviation = train_features.std(axis=0, dtype=np.float64) + 1e-5  # of the population
    x = _whitened(train_features, mean, deviation)  # [N, D + 1]
    targets = 2.0 * np.eye(num_classes)[train_labels] - 1.0  # [N, classes]
    if x.shape[0] >= x.shape[1]:
        weights = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ targets)
    else:  # the same weights from the smaller matrix
        weights = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(x.shape[0]), targets)
    parts = (test_features[start : start + _CHUNK] for start in range(0, len(test_features), _CHUNK))
    return np.concatenate([_whitened(part, mean, deviation) @ weights for part in parts])


def _whitened(features: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    result = np.full((len(features), features.shape[1] + 1), CONSTANT)  # float64 [N, D + 1]
    result[:, :-1] = (features - mean) / deviation
    return result


def fewshot(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """Returns, for every k of `shots`, the accuracy on all test images: "k-shot", its mean over the seeds, and
    "k-shot-std", its population standard deviation over them. n is the number of test images.

    features: [images, D] of any float type; labels: [images] integers. progress: called after each regression.
    Warns once when a class has fewer than k training images, all of which are then used. Raises UserError when features
    are not finite.
    """
    check_finite("few-shot", train_features, test_features)
    num_classes = 1 + int(max(train_labels.max(), test_labels.max()))
    _warn_of_small_classes(np.bincount(train_labels, minlength=num_classes), max(shots))
    rows = []
    for k in shots:
        accuracies = []
        for seed in seeds:
            chosen = choose_indices(train_labels, k, num_classes, seed)
            scores = fewshot_scores(train_features[chosen], train_labels[chosen], test_features, num_classes)
            accuracies.append(float((scores.argmax(axis=1) == test_labels).mean()))
            progress(1)
        rows.append(Score(f"{k}-shot", float(np.mean(accuracies)), len(test_labels)))
        rows.append(Score(f"{k}-shot-std", float(np.std(accuracies)), len(test_labels)))
    return rows


def check_finite(evaluation: str, train_features: np.ndarray, test_features: np.ndarray) -> None:
    """Raises UserError unless all features are finite: broken weights would score like a weak model."""
    for name, features in (("training", train_features), ("test", test_features)):
        if not np.isfinite(features).all():
            raise UserError(f"{evaluation}: {name} features are not finite (NaN or infinite): the weights are broken")


def _warn_of_small_classes(counts: np.ndarray, shots: int) -> None:
    small = np.flatnonzero(counts < shots)
    if len(small):
        _warn_once(
            f"few-shot: {len(small)} of {len(counts)} classes have fewer than {shots} training images "
            f"(class {small[0]} has {counts[small[0]]}); all they have are used. Where classes have unequal numbers of "
            f"few images, the ridge (l2 {L2:g}) weighs more than they do and the largest class wins: trust the shots "
            f"that every class has, up to {counts.min()}"
        )


@cache  # a table compares several kinds of features of the same images
def _warn_once(message: str) -> None:
    warn(message)

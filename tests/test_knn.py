"""Nearest neighbours: scikit-learn's votes, and by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from pretrain.errors import UserError
from pretrain.evaluation.knn import NEIGHBOURS, TEMPERATURE, knn, nearest, vote

CPU = torch.device("cpu")


def clusters(count: int, seed: int, classes: int = 6, features: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes, so that the 20 nearest disagree; lengths differ by a factor of 100."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, features))
    labels = random.integers(0, classes, count)
    values = centers[labels] + 1.5 * random.normal(size=(count, features))
    return (values * 10 ** random.uniform(-1, 1, (count, 1))).astype(np.float32), labels


@pytest.mark.parametrize("k", NEIGHBOURS)
def test_accuracy_equals_scikit_learns(k: int) -> None:
    """Brute force in float64 with the same weights: every test image (2,500, more than two chunks) gets the same class.

    Euclidean distance, or equal votes, give other accuracies.
    """
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (test, labels) = clusters(900, 0), clusters(2500, 1)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / TEMPERATURE)

    options: Any = {
        "metric": "cosine",
        "weights": weights,
        "algorithm": "brute",
    }  # its types know names of weights only
    reference = KNeighborsClassifier(k, **options)
    predicted = reference.fit(x.astype(np.float64), y).predict(test.astype(np.float64))
    found = vote(*nearest(x, y, test, k=k, device=CPU), 6).argmax(dim=1).numpy()
    np.testing.assert_array_equal(found, predicted)
    rows = {row.metric: row for row in knn(x, y, test, labels, device=CPU)}
    assert rows[f"{k}-nn"].value == np.mean(predicted == labels) and rows[f"{k}-nn"].n == 2500
    plain = [KNeighborsClassifier(k, metric=metric).fit(x, y).predict(test) for metric in ("euclidean", "cosine")]
    for others in plain[: 1 if k == 1 else 2]:  # a single vote has no weight
        assert np.mean(others == labels) != rows[f"{k}-nn"].value


def test_a_near_one_outvotes_two_far_ones() -> None:
    """Similarities 1, 0.9, 0.9: exp(1 / 0.07) > 2 exp(0.9 / 0.07); with 0.97 the two win."""
    for similarity, expected in ((0.9, 0), (0.97, 1)):
        shares = vote(torch.tensor([[1.0, similarity, similarity]]), torch.tensor([[0, 1, 1]]), 2)
        assert int(shares.argmax()) == expected


def test_fewer_images_than_neighbours_all_vote() -> None:
    """A training set of 3; and every test image is told to the progress bar once."""
    x, y = clusters(3, 0)
    told: list[int] = []
    rows = knn(x, y, x, y, device=CPU, progress=told.append)
    assert [row.metric for row in rows] == ["1-nn", "20-nn"] and rows[0].value == 1.0 and sum(told) == 3


def test_broken_features_are_refused() -> None:
    """A NaN is as far from all as from none."""
    x, y = clusters(30, 0)
    with pytest.raises(UserError, match="nearest neighbours: training features are not finite"):
        knn(np.full_like(x, np.inf), y, x, y, device=CPU)

"""Linear probe: multinomial logistic regression on frozen features, scikit-learn's, by L-BFGS.

As Kornblith et al. (arXiv 1805.08974, A.4) and CLIP (arXiv 2103.00020, A.3): the strength of the L2 penalty is chosen
on held-out training images, then the model is fitted on all of them. Features are standardised. The grid has one point
per decade; theirs is finer.
"""

import warnings
from collections.abc import Callable

import numpy as np

from pretrain.errors import UserError
from pretrain.evaluation.classification import Score, mean_per_class
from pretrain.evaluation.fewshot import check_finite
from pretrain.log import warn

GRID = tuple(10.0**power for power in range(-6, 6))  # of C, the inverse of the penalty, over Kornblith's range
HELD_OUT = 0.2  # share of each class's training images on which C is chosen
MAX_ITERATIONS = 1000  # CLIP's


def held_out_split(labels: np.ndarray) -> np.ndarray:
    """Returns which training images are held out to choose C, bool [images]: a fifth of each class, drawn at random.

    A class with a single image keeps it.
    """
    generator = np.random.default_rng(0)
    held_out = np.zeros(len(labels), dtype=bool)
    for number in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == number))
        held_out[members[: min(round(HELD_OUT * len(members)) or 1, len(members) - 1)]] = True
    return held_out


def choose_c(
    features: np.ndarray,
    labels: np.ndarray,
    progress: Callable[[int], None] = lambda _: None,
) -> float:
    """Returns the C of GRID with the best accuracy on held-out training images; of equals, the smallest."""
    held_out = held_out_split(labels)
    if not held_out.any():
        raise UserError("linear probe: no class has two training images, so none can be held out to choose C")
    accuracies = []
    for c in GRID:
        predicted = predict(features[~held_out], labels[~held_out], features[held_out], c)
        accuracies.append(float((predicted == labels[held_out]).mean()))
        progress(1)
    return GRID[int(np.argmax(accuracies))]


def predict(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, c: float) -> np.ndarray:
    """Returns the class of each test image by a regression fitted to these training images, int64 [test images].

    Warns when L-BFGS has not converged in MAX_ITERATIONS.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train_features, train_labels)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in met):
        warn(f"linear probe: C = {c:g} has not converged in {MAX_ITERATIONS} iterations")
    return model.predict(test_features)


def probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[list[Score], float]:
    """Returns "top1" and "mean_per_class" on all test images, and the C that was chosen.

    features: [images, D]; labels: [images] integers. progress: called after each of the len(GRID) + 1 regressions.
    Raises UserError when features are not finite or there is only one class.
    """
    check_finite("linear probe", train_features, test_features)
    if len(np.unique(train_labels)) < 2:
        raise UserError("linear probe: the training images are all of one class")
    c = choose_c(train_features, train_labels, progress)
    predicted = predict(train_features, train_labels, test_features, c)
    progress(1)
    top1, per_class = float((predicted == test_labels).mean()), mean_per_class(test_labels, predicted)
    return [Score("top1", top1, len(test_labels)), Score("mean_per_class", per_class, len(test_labels))], c

"""Few-shot evaluation: big_vision's choice of images and its scores, from its own numbers and from a direct oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.errors import UserError
from pretrain.evaluation.fewshot import SHOTS, choose_indices, fewshot, fewshot_scores


@pytest.fixture(scope="module")
def reference(test_fixtures: Path) -> dict[str, Any]:
    folder = test_fixtures / "fewshot_lsr"
    with np.load(folder / "data.npz") as data, np.load(folder / "scores.npz") as scores:
        return {**data, **scores, **json.loads((folder / "config.json").read_text())}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shots", SHOTS)
def test_the_same_images_as_big_vision_are_chosen(shots: int, seed: int, reference: dict[str, Any]) -> None:
    """Index for index, in its order: 12 draws recorded from its own code."""
    found = choose_indices(reference["y_train"], shots, reference["num_classes"], seed)
    np.testing.assert_array_equal(found, reference[f"idx_seed{seed}_shots{shots}"])


@pytest.mark.parametrize("shots", SHOTS)
def test_scores_equal_big_visions(shots: int, reference: dict[str, Any]) -> None:
    """Raw scores of seed 0 within 2e-4 on both branches: fewer images than features (1, 5 shots), and more."""
    chosen = reference[f"idx_seed0_shots{shots}"]
    x, y = reference["x_train"][chosen], reference["y_train"][chosen]
    scores = fewshot_scores(x, y, reference["x_test"], reference["num_classes"])
    np.testing.assert_allclose(scores, reference[f"scores_shots{shots}_l2_1024"], rtol=0, atol=2e-4)
    weak = fewshot_scores(x, y, reference["x_test"], reference["num_classes"], l2=2**-5)
    accuracy = (weak.argmax(axis=1) == reference["y_test"]).mean()  # its fp32 solver is ill-conditioned here
    assert accuracy == pytest.approx(reference["accuracy"][f"seed0_shots{shots}_l2_0.03125"], abs=0.005)


def test_accuracies_equal_big_visions(reference: dict[str, Any]) -> None:
    """The mean and the spread over seeds 0, 1, 2 are those of its 12 accuracies, to 1e-6."""
    arrays = (reference[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    rows = {row.metric: row for row in fewshot(*arrays)}
    assert list(rows) == [f"{k}-shot{end}" for k in SHOTS for end in ("", "-std")]
    for k in SHOTS:
        expected = [reference["accuracy"][str(seed)][str(k)] for seed in (0, 1, 2)]
        assert rows[f"{k}-shot"].value == pytest.approx(np.mean(expected), abs=1e-6)
        assert rows[f"{k}-shot-std"].value == pytest.approx(np.std(expected), abs=1e-6)
        assert rows[f"{k}-shot"].n == 500


def clusters(count: int, *, features: int = 12, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, features))
    labels = random.integers(0, classes, count)
    scale = 10.0 ** np.arange(-3, features - 3)  # what whitening is for
    return ((centers[labels] + random.normal(size=(count, features))) * scale).astype(np.float32), labels


def slow_scores(x: np.ndarray, y: np.ndarray, test: np.ndarray, classes: int) -> np.ndarray:
    """The regularised least squares problem as it is defined, solved as a plain one with l2 as extra rows."""
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0) + 1e-5
    a, b = (np.hstack([(part - mean) / std, np.full((len(part), 1), 100.0)]) for part in (x, test))
    rows = np.vstack([a, np.sqrt(1024.0) * np.eye(a.shape[1])])
    targets = np.vstack([np.where(y[:, None] == np.arange(classes), 1.0, -1.0), np.zeros((a.shape[1], classes))])
    return b @ np.linalg.lstsq(rows, targets, rcond=None)[0]


@pytest.mark.parametrize("count", [5, 12, 13, 14, 200])
def test_scores_solve_the_least_squares_problem(count: int) -> None:
    """Both branches, and their boundary (12 features + 1), give the minimum that a general solver finds."""
    x, y = clusters(count)
    test, _ = clusters(5000, seed=1)  # more than one chunk
    np.testing.assert_allclose(fewshot_scores(x, y, test, 3), slow_scores(x, y, test, 3), rtol=0, atol=1e-8)


def test_a_class_with_too_few_images_uses_all_it_has_and_says_so_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Class 1 has 3 images: 25 shots take each once, and two evaluations warn in one line."""
    labels = np.array([0] * 30 + [1] * 3)
    chosen = choose_indices(labels, 25, 2, seed=0)
    assert sorted(chosen[25:]) == [30, 31, 32] and len(set(chosen)) == 28
    x, _ = clusters(33)
    for _ in range(2):
        fewshot(x, labels, x, labels, shots=[1, 25], seeds=[0])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "1 of 2 classes have fewer than 25 training images (class 1 has 3)" in lines[0]
    assert "the ridge (l2 1024)" in lines[0] and "up to 3" in lines[0]


def test_few_images_of_unequal_classes_are_the_ridges() -> None:
    """What the warning says: of one image, two and four the largest class wins; with one of each they are apart."""
    labels, tests = np.repeat([0, 1, 2], [1, 2, 4]), np.repeat([0, 1, 2], 10)
    random = np.random.default_rng(0)
    x, test_x = (np.eye(3)[of] * 9 + random.normal(size=(len(of), 3)) for of in (labels, tests))
    found = {row.metric: row.value for row in fewshot(x, labels, test_x, tests, shots=[1, 5])}
    assert found["1-shot"] > 0.9 and found["5-shot"] < 0.4


def test_more_shots_of_a_seed_contain_the_fewer() -> None:
    """Accuracy over shots is a curve of growing sets; another seed takes other images."""
    _, labels = clusters(300)
    few, many = (set(choose_indices(labels, shots, 3, seed=1).tolist()) for shots in (5, 25))
    assert few < many and len(many) == 75
    assert many != set(choose_indices(labels, 25, 3, seed=2).tolist())


def test_broken_features_are_refused() -> None:
    """NaN features would give every image class 0: an accuracy that looks like a weak model's."""
    x, y = clusters(30)
    with pytest.raises(UserError, match="test features are not finite"):
        fewshot(x, y, np.full_like(x, np.nan), y)

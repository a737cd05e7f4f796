"""Linear probe: scikit-learn's solution against one of our own, the choice of C, and what is held out for it."""

import numpy as np
import pytest
import torch

from pretrain.errors import UserError
from pretrain.evaluation.probe import GRID, choose_c, held_out_split, predict, probe


def clusters(count: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """4 classes in 8 features whose scales differ by 10,000: what standardising is for."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    centers = np.random.default_rng(7).normal(size=(4, 8))
    values = centers[labels] + noise * random.normal(size=(count, 8))
    return (values * np.logspace(-2, 2, 8)).astype(np.float32), labels


def own_regression(x: np.ndarray, y: np.ndarray, test: np.ndarray, c: float) -> np.ndarray:
    """The same objective, |w|^2 / 2 + C * sum of cross-entropies, minimised by torch in float64."""
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    inputs, tests = (torch.from_numpy((part - mean) / std) for part in (x, test))
    weight, bias = torch.zeros(8, 4, dtype=torch.float64, requires_grad=True), torch.zeros(4, dtype=torch.float64)
    bias.requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        entropies = torch.nn.functional.cross_entropy(inputs @ weight + bias, torch.from_numpy(y), reduction="sum")
        loss = weight.square().sum() / 2 + c * entropies
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return (tests @ weight + bias).argmax(dim=1).numpy()


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_predictions_are_those_of_the_objective(c: float) -> None:
    """At least 799 of 800 test images agree with torch's minimum of the same function."""
    (x, y), (test, _) = clusters(300, 0), clusters(800, 1)
    assert np.sum(predict(x, y, test, c) != own_regression(x, y, test, c)) <= 1


def test_c_is_chosen_on_held_out_images_and_all_are_used() -> None:
    """The best C of a slow loop over the grid; top-1 is that of the regression on every training image."""
    (x, y), (test, labels) = clusters(60, 0, noise=2.5), clusters(500, 1, noise=2.5)
    held = held_out_split(y)
    reached = [np.mean(predict(x[~held], y[~held], x[held], c) == y[held]) for c in GRID]
    assert min(reached) < max(reached)  # else any C would do
    told: list[int] = []
    scores, c = probe(x, y, test, labels, progress=told.append)
    assert c == choose_c(x, y) == GRID[int(np.argmax(reached))] and len(told) == len(GRID) + 1
    predicted = predict(x, y, test, c)
    assert scores[0] == ("top1", np.mean(predicted == labels), 500)
    per_class = [np.mean(predicted[labels == k] == k) for k in range(4)]
    assert scores[1].metric == "mean_per_class" and scores[1].value == pytest.approx(np.mean(per_class))
    assert scores[1].value != scores[0].value
    assert np.any(predicted != predict(x[~held], y[~held], test, c))  # all images, not the rest of the split


def test_what_is_held_out() -> None:
    """A fifth of each class, at least one where there are two; the same ones each time; a lone image is kept."""
    labels = np.array([0] * 20 + [1] * 4 + [2] * 2 + [3])
    held = held_out_split(labels)
    assert [int(held[labels == k].sum()) for k in range(4)] == [4, 1, 1, 0]
    np.testing.assert_array_equal(held, held_out_split(labels))


def test_what_cannot_be_learnt_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """One class; a class of one image each; features that are not finite. Too few iterations are told."""
    x, y = clusters(30, 0)
    with pytest.raises(UserError, match="all of one class"):
        probe(x, np.zeros_like(y), x, y)
    with pytest.raises(UserError, match="no class has two training images"):
        probe(x[:4], np.arange(4), x, y)
    with pytest.raises(UserError, match="linear probe: test features are not finite"):
        probe(x, y, np.full_like(x, np.nan), y)


def test_a_regression_that_has_not_converged_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line with its C, instead of scikit-learn's paragraph."""
    monkeypatch.setattr("pretrain.evaluation.probe.MAX_ITERATIONS", 2)
    predict(*clusters(100, 0), clusters(10, 1)[0], 1e5)
    (line,) = capfd.readouterr().err.splitlines()
    assert "C = 100000 has not converged in 2 iterations" in line

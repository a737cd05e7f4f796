"""ReaL against the numbers of its authors' code and of big_vision; metrics of tasks against plain loops."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scores import classification_scores

from pretrain.data.loader import Batch, single_labels
from pretrain.errors import UserError
from pretrain.evaluation.classification import (
    Predictions,
    mean_average_precision,
    mean_per_class,
    predict_all,
    relabelled,
    scores_of,
)
from pretrain.tasks.imagenet_labels import real_labels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference(test_fixtures: Path) -> tuple[Path, dict[str, Any]]:
    folder = test_fixtures / "real_accuracy"
    return folder, json.loads((folder / "config.json").read_text())


def batch_of(labels: list[int], indices: list[int], images: torch.Tensor) -> Batch:
    """Images that are their own logits."""
    slots = len(labels)
    valid = torch.tensor([index >= 0 for index in indices])
    zeros = torch.zeros(slots, dtype=torch.int64)
    return Batch(images, *single_labels(torch.tensor(labels)), valid, zeros, torch.tensor(indices), [])


def batches_of(logits: torch.Tensor, batch_size: int) -> list[Batch]:
    """The last batch filled up with masked slots."""
    order = list(range(len(logits))) + [-1] * (-len(logits) % batch_size)
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batch_of([0] * len(part), part, logits[[max(0, i) for i in part]]) for part in parts]


def real_accuracy(predicted: np.ndarray, labels: list[list[int]]) -> tuple[float, int]:
    """By the path of the tool: batches relabelled by index, the prediction as a one-hot logit."""
    logits = torch.nn.functional.one_hot(torch.from_numpy(predicted).long(), 1000).float()
    batches = relabelled(batches_of(logits, 999), labels)
    _, top1, _ = classification_scores(lambda images: images, batches, loss="softmax", device=CPU)
    return top1.value, top1.n


def test_real_accuracy_is_the_authors(reference: tuple[Path, dict[str, Any]]) -> None:
    """50,000 recorded predictions: 46,837 scored, 0.618570788; names shifted by one give another figure."""
    folder, expected = reference
    predicted = np.load(folder / "predictions_50000.npy", allow_pickle=False)
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, 50_001)]
    value, n = real_accuracy(predicted, real_labels(names))
    assert n == expected["n_counted"] == 46_837 and value == pytest.approx(expected["accuracy_50000"], abs=1e-6)
    shifted, _ = real_accuracy(predicted, real_labels(names[1:] + names[:1]))
    assert abs(shifted - expected["accuracy_50000"]) > 0.5
    mistyped = [f"ILSVRC2012_val_{2 * number:08d}" for number in range(50_000)]  # i + i for i + 1, as published
    with pytest.raises(UserError, match="ILSVRC2012_val_00000000.* is not an ImageNet validation image"):
        real_labels(mistyped)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("batch_size", [300, 7])
def test_losses_and_accuracy_are_big_visions(
    loss: str, batch_size: int, reference: tuple[Path, dict[str, Any]]
) -> None:
    """Its evaluator on 300 images of 12 classes, 224 of them labelled: prec1, loss to a multi-hot target, nseen."""
    folder, expected = reference
    labels = json.loads((folder / "small_real_labels.json").read_text())
    with np.load(folder / "small.npz", allow_pickle=False) as arrays:
        logits = torch.from_numpy(arrays[next(name for name in arrays if "logit" in name)]).float()
    batches = relabelled(batches_of(logits, batch_size), labels)
    found = classification_scores(lambda images: images, batches, loss=loss, device=CPU)
    theirs = expected["big_vision_evaluator"][f"{loss}_xent"]
    assert {score.n for score in found} == {int(theirs["nseen"])} == {224}
    assert found[0].value == pytest.approx(theirs["loss"], rel=1e-5)
    assert found[1].value == pytest.approx(theirs["prec1"], abs=1e-6)


def test_relabelled_by_index_not_by_place() -> None:
    """Slots in any order get the labels of their index; an empty list, a bad image and a filler are not scored."""
    batch = batch_of([9, 9, 9, 9, 9], [2, 0, 3, 1, -1], torch.zeros(5, 3))
    batch.valid[2] = False  # could not be read
    (found,) = relabelled([batch], [[5], [], [6, 7], [8]])
    assert found.labels.tolist() == [[6, 7], [5, -1], [8, -1], [-1, -1], [-1, -1]]
    assert found.label_weights.tolist() == [[1, 1], [1, 0], [1, 0], [0, 0], [0, 0]]
    assert found.valid.tolist() == [True, True, False, False, False]


def test_mean_per_class_is_not_accuracy() -> None:
    """Class 0: 3 of 4, class 2: 0 of 1, class 1 without images: mean 0.375, where accuracy is 0.6."""
    assert mean_per_class(np.array([0, 0, 0, 0, 2]), np.array([0, 0, 0, 1, 5])) == pytest.approx(0.375)


def slow_average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Over the positives, the share of positives among the images that score as high or higher."""
    return float(np.mean([positive[scores >= score].mean() for score in scores[positive]]))


def test_several_labels_per_image() -> None:
    """Mean average precision by a slow loop, a class without images left out; top-1 right for any of the labels."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(40, 6)).astype(np.float32)
    labels = np.stack([random.permutation(5)[:2] for _ in range(40)])  # class 5 never
    labels[::3, 1] = -1
    expected = [slow_average_precision(logits[:, k], (labels == k).any(axis=1)) for k in range(5)]
    assert mean_average_precision(logits, labels) == pytest.approx(np.mean(expected))
    batch = batch_of([0] * 40, list(range(40)), torch.from_numpy(logits))
    batch = batch._replace(labels=torch.from_numpy(labels), label_weights=torch.from_numpy(labels >= 0).float())
    parts = [Batch(*(t[rows] for t in batch[:6]), bad=[]) for rows in (slice(17, 40), slice(0, 17))]
    found = predict_all(lambda images: images, parts, loss="sigmoid", device=CPU, keep_logits=True)
    assert isinstance(found, Predictions) and found.logits is not None
    np.testing.assert_array_equal(found.index, np.arange(40))
    np.testing.assert_array_equal(found.logits, logits)
    any_of = np.mean([best in row for best, row in zip(logits.argmax(axis=1), labels)])
    assert scores_of(found)[1] == ("top1", pytest.approx(any_of), 40)

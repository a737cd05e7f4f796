"""Losses and accuracy counts against formulas written out by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss.binary_cross_entropy import BinaryCrossEntropy

from pretrain.losses import num_correct, per_image_loss

LOGITS = [[0.5, -1.0, 2.0], [3.0, 0.0, -2.5]]
LABELS = [2, 1]


def single(labels: list[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and weights of one class per image, both [batch, 1]."""
    column = torch.as_tensor(labels)[:, None]
    return column, torch.ones(column.shape)


def dense(labels: torch.Tensor, weights: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The target of each class, float32 [batch, classes], by a loop."""
    targets = torch.zeros(len(labels), num_classes)
    for row in range(len(labels)):
        for label, weight in zip(labels[row].tolist(), weights[row].tolist()):
            if label >= 0:
                targets[row, label] += weight
    return targets


def test_softmax_loss_equals_the_formula() -> None:
    """-log of the label's share, one number per image, in float32."""
    expected = [math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in zip(LOGITS, LABELS, strict=True)]
    loss = per_image_loss(torch.tensor(LOGITS), *single(LABELS), "softmax")
    assert loss.dtype == torch.float32 and loss.shape == (2,)
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


def test_sigmoid_loss_equals_the_formula() -> None:
    """Sum over classes of -log sigmoid(x) for the label and -log sigmoid(-x) for all others; not their mean."""
    expected = [
        sum(math.log1p(math.exp(-x if k == label else x)) for k, x in enumerate(row))
        for row, label in zip(LOGITS, LABELS, strict=True)
    ]
    loss = per_image_loss(torch.tensor(LOGITS), *single(LABELS), "sigmoid")
    assert loss.dtype == torch.float32 and loss.shape == (2,)
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_are_computed_in_float32(kind: str) -> None:
    """bf16 logits are widened first: the loss is that of the widened numbers, and the gradient flows back."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 1000, generator=random).bfloat16().requires_grad_()
    labels = torch.randint(1000, (5,), generator=random)
    loss = per_image_loss(logits, *single(labels), kind)
    assert torch.equal(loss, per_image_loss(logits.detach().float(), *single(labels), kind))
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_large_logits_stay_finite(kind: str) -> None:
    """Logits of +-1e4 give large losses, not inf or nan."""
    loss = per_image_loss(torch.tensor([[1e4, -1e4], [1e4, -1e4]]), *single([0, 1]), kind)
    assert torch.isfinite(loss).all() and loss[0] == 0 and loss[1] >= 2e4


def test_correct_images_are_counted() -> None:
    """Only valid images count; top 5 of three classes takes all of them."""
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5], [0.9, 0.0, 0.1]])
    labels = single([1, 1, 0, 0])
    everyone, some = torch.ones(4, dtype=torch.bool), torch.tensor([True, True, True, False])
    assert int(num_correct(logits, *labels, everyone)) == 2
    assert int(num_correct(logits, *labels, some)) == 1
    assert int(num_correct(logits, *labels, everyone, top=2)) == 3
    assert int(num_correct(logits, *labels, some, top=5)) == 3
    assert num_correct(logits, *labels, some).shape == ()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_one_label_is_torchs_loss_bit_for_bit(kind: str) -> None:
    """Loss and gradient of a single label are those of torch's functions for integer classes, to the last bit."""
    random = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(64, 1000, generator=random)
    labels = torch.randint(1000, (64,), generator=random)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = per_image_loss(ours, *single(labels), kind)
    if kind == "softmax":
        expected = F.cross_entropy(theirs, labels, reduction="none")
    else:
        targets = F.one_hot(labels, 1000).float()
        expected = F.binary_cross_entropy_with_logits(theirs, targets, reduction="none").sum(-1)
    assert torch.equal(loss, expected)
    factors = torch.rand(64, generator=random)
    (loss * factors).sum().backward()
    (expected * factors).sum().backward()
    assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_labels_are_soft_targets(smoothing: float) -> None:
    """Mixed labels (also twice the same), several labels and none: the formulas over dense targets, by torch."""
    logits = 3 * torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([[1, 4, -1], [2, 2, -1], [5, 0, 3], [0, -1, -1], [-1, -1, -1]])
    weights = torch.tensor([[0.75, 0.25, 0], [0.5, 0.5, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    targets = dense(labels, weights, 6)
    smooth = (1 - smoothing) * targets + smoothing / 6 * weights.sum(1, keepdim=True)
    softmax = -(smooth * logits.log_softmax(1)).sum(1)
    assert torch.allclose(per_image_loss(logits, labels, weights, "softmax", smoothing), softmax, atol=1e-5)
    by_torch = F.cross_entropy(logits[:2], targets[:2], reduction="none", label_smoothing=smoothing)
    assert torch.allclose(softmax[:2], by_torch, atol=1e-5)
    sigmoid = -(smooth * F.logsigmoid(logits) + (1 - smooth) * F.logsigmoid(-logits)).sum(1)
    assert torch.allclose(per_image_loss(logits, labels, weights, "sigmoid", smoothing), sigmoid, atol=1e-5)
    assert softmax[4] == 0  # no label, no loss


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5])
def test_labels_above_a_share_are_full_ones(threshold: float) -> None:
    """timm's BinaryCrossEntropy with a threshold, which DeiT III sets to 0; a class of both images counts once."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([[0, 1], [2, 2], [3, 4], [4, -1], [1, 0], [-1, -1]])
    shares = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [1.0, 0.0], [0.7, 0.3], [0.0, 0.0]])
    theirs = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold, reduction="none")
    expected = theirs(logits, dense(labels, shares, 5)).sum(-1)
    found = per_image_loss(logits, labels, shares, "sigmoid", label_threshold=threshold)
    assert torch.equal(found, expected)
    assert not torch.equal(found, per_image_loss(logits, labels, shares, "sigmoid"))


def test_correct_with_several_labels() -> None:
    """Mixed: the label of the larger share, both at equal shares. Several whole labels: any of them. -1: never."""
    logits = torch.tensor([[0.1, 0.7, 0.2]]).expand(6, 3)  # class 1, then 2
    labels = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1], [2, 0], [-1, -1]])
    weights = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.5, 0.5], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    valid = torch.ones(6, dtype=torch.bool)
    right = [int(num_correct(logits[i : i + 1], labels[i : i + 1], weights[i : i + 1], valid[:1])) for i in range(6)]
    assert right == [1, 0, 1, 1, 0, 0]
    assert int(num_correct(logits, labels, weights, valid)) == 3
    assert int(num_correct(logits, labels, weights, valid, top=2)) == 4
    assert int(num_correct(logits, labels, weights, ~valid)) == 0


def test_several_labels_equal_the_references_figures(test_fixtures: Path) -> None:
    """224 images with several right answers: both losses that Google's code gave."""
    folder = test_fixtures / "real_accuracy"
    with np.load(folder / "small.npz", allow_pickle=False) as arrays:
        logits = next(torch.from_numpy(arrays[name]) for name in arrays if "logits" in name)
    answers = json.loads((folder / "small_real_labels.json").read_text())
    counted = torch.tensor([len(row) > 0 for row in answers])
    most = max(map(len, answers))
    labels = torch.tensor([row + [-1] * (most - len(row)) for row in answers])
    weights = (labels >= 0).float()
    assert int(counted.sum()) == 224
    for kind, expected in (("softmax", 5.31053), ("sigmoid", 9.59736)):
        assert per_image_loss(logits, labels, weights, kind)[counted].mean().item() == pytest.approx(expected, abs=2e-5)
    best = logits.argmax(1).tolist()
    right = sum(answer in row for answer, row in zip(best, answers))
    assert int(num_correct(logits, labels, weights, counted)) == right > 0

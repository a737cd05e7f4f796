"""Losses and accuracy counts against formulas written out by hand."""

import math

import pytest
import torch

from pretrain.losses import num_correct, per_image_loss

LOGITS = [[0.5, -1.0, 2.0], [3.0, 0.0, -2.5]]
LABELS = [2, 1]


def test_softmax_loss_equals_the_formula() -> None:
    """-log of the label's share, one number per image, in float32."""
    expected = [math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in zip(LOGITS, LABELS, strict=True)]
    loss = per_image_loss(torch.tensor(LOGITS), torch.tensor(LABELS), "softmax")
    assert loss.dtype == torch.float32 and loss.shape == (2,)
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


def test_sigmoid_loss_equals_the_formula() -> None:
    """Sum over classes of -log sigmoid(x) for the label and -log sigmoid(-x) for all others; not their mean."""
    expected = [
        sum(math.log1p(math.exp(-x if k == label else x)) for k, x in enumerate(row))
        for row, label in zip(LOGITS, LABELS, strict=True)
    ]
    loss = per_image_loss(torch.tensor(LOGITS), torch.tensor(LABELS), "sigmoid")
    assert loss.dtype == torch.float32 and loss.shape == (2,)
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_losses_are_computed_in_float32(kind: str) -> None:
    """bf16 logits are widened first: the loss is that of the widened numbers, and the gradient flows back."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 1000, generator=random).bfloat16().requires_grad_()
    labels = torch.randint(1000, (5,), generator=random)
    loss = per_image_loss(logits, labels, kind)
    assert torch.equal(loss, per_image_loss(logits.detach().float(), labels, kind))
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_large_logits_stay_finite(kind: str) -> None:
    """Logits of +-1e4 give large losses, not inf or nan."""
    loss = per_image_loss(torch.tensor([[1e4, -1e4], [1e4, -1e4]]), torch.tensor([0, 1]), kind)
    assert torch.isfinite(loss).all() and loss[0] == 0 and loss[1] >= 2e4


def test_correct_images_are_counted() -> None:
    """Only valid images count; top 5 of three classes takes all of them."""
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5], [0.9, 0.0, 0.1]])
    labels = torch.tensor([1, 1, 0, 0])
    everyone, some = torch.ones(4, dtype=torch.bool), torch.tensor([True, True, True, False])
    assert int(num_correct(logits, labels, everyone)) == 2
    assert int(num_correct(logits, labels, some)) == 1
    assert int(num_correct(logits, labels, everyone, top=2)) == 3
    assert int(num_correct(logits, labels, some, top=5)) == 3
    assert num_correct(logits, labels, some).shape == ()

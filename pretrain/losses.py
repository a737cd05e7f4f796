"""Classification losses, one number per image, and the counts behind accuracy."""

import torch
import torch.nn.functional as F


def per_image_loss(logits: torch.Tensor, labels: torch.Tensor, kind: str) -> torch.Tensor:
    """Returns the cross-entropy of each image, float32 [batch].

    logits: [batch, classes], any float type (the loss is computed in float32). labels: [batch] integer classes.
    kind: "softmax", or "sigmoid": binary cross-entropy summed over classes (big_vision sigmoid_xent).
    """
    logits = logits.float()
    if kind == "softmax":
        return F.cross_entropy(logits, labels, reduction="none")
    targets = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)  # [batch, classes]
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)


def num_correct(logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, top: int = 1) -> torch.Tensor:
    """Returns how many valid images have their label among the `top` largest logits, a scalar tensor."""
    best = logits.topk(min(top, logits.shape[-1]), dim=-1).indices  # [batch, top]
    return ((best == labels[:, None]).any(-1) & valid).sum()

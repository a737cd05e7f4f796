"""Classification losses, one number per image, and the counts behind accuracy."""

import torch
import torch.nn.functional as F


def per_image_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_weights: torch.Tensor,
    kind: str,
    label_smoothing: float = 0.0,
    label_threshold: float | None = None,
) -> torch.Tensor:
    """Returns the cross-entropy of each image with its weighted labels, float32 [batch].

    logits: [batch, classes], any float type (the loss is computed in float32). labels: [batch, L] integer classes,
    padded with -1. label_weights: [batch, L] float32, 0 where there is no label. kind: "softmax", or "sigmoid":
    binary cross-entropy summed over classes; both as big_vision's softmax_xent and sigmoid_xent, also for several
    labels: softmax adds up the cross-entropies of all. label_smoothing: this share of the weights is spread evenly
    over all classes. label_threshold, of "sigmoid" alone: a class with more weight than this is a full label, others
    are none (DeiT III: 0, engine.py; timm's BinaryCrossEntropy); None: weights are targets.
    """
    logits, classes = logits.float(), labels.clamp(min=0)  # [batch, classes], [batch, L]
    if kind == "softmax":
        log_shares = F.log_softmax(logits, dim=-1)
        loss = -(label_weights * log_shares.gather(1, classes)).sum(-1)
        if not label_smoothing:
            return loss
        return (1 - label_smoothing) * loss - label_smoothing * label_weights.sum(-1) * log_shares.mean(-1)
    targets = torch.zeros_like(logits).scatter_add_(1, classes, label_weights)  # [batch, classes]
    if label_threshold is not None:
        targets = (targets > label_threshold).float()
    if label_smoothing:
        spread = label_smoothing / logits.shape[-1] * label_weights.sum(-1, keepdim=True)
        targets = (1 - label_smoothing) * targets + spread
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)


def num_correct(
    logits: torch.Tensor, labels: torch.Tensor, label_weights: torch.Tensor, valid: torch.Tensor, top: int = 1
) -> torch.Tensor:
    """Returns how many valid images have a label of greatest weight among the `top` largest logits, a scalar tensor.

    With mixup or CutMix that is the label of the larger share; of several labels without mixing any one will do.
    labels, label_weights: [batch, L], as for the loss.
    """
    best = logits.topk(min(top, logits.shape[-1]), dim=-1).indices  # [batch, top]
    wanted = torch.where(label_weights == label_weights.amax(-1, keepdim=True), labels, -1)  # [batch, L]
    return ((best[:, :, None] == wanted[:, None, :]).flatten(1).any(-1) & valid).sum()

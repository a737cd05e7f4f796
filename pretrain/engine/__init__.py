"""Wraps the model in DeepSpeed. Nothing else in training uses DeepSpeed."""

import os

import torch

from pretrain.cluster.local import gpus_expected

# Set before DeepSpeed is imported, so that it neither searches for an accelerator nor warns. Not set where GPUs are
# expected but missing: it would look like the user's choice, and the run would silently train on the CPU.
if not torch.cuda.is_available() and gpus_expected() is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

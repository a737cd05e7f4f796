"""DeepSpeed around the model. Nothing else in training knows DeepSpeed."""

import os

import torch

from pretrain.cluster.local import gpus_expected

# Before DeepSpeed's import: no search for an accelerator, no warning. Not where GPUs are expected but missing:
# it would look like the user's own wish, and the run would train on the CPU without a word.
if not torch.cuda.is_available() and gpus_expected() is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

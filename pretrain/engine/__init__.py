"""DeepSpeed around the model. Training knows DeepSpeed here alone."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed's import: no search for one, no warning

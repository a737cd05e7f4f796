"""Which releases of torch and DeepSpeed were tried together, and what is done about others.

Checkpoints read DeepSpeed's internals (slices.py), and the step replaces parts of them (patches.py). Releases that were
not tried are named at the start; one whose internals cannot be read is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch

from pretrain.errors import UserError, first_line

STEP_OF = "0.19.8"  # the release whose step patches.py knows; others keep their own, with more launches
TESTED_DEEPSPEED = (STEP_OF,)
TESTED_TORCH = ("2.9", "2.15")  # on CPUs: the oldest and the newest; those between were not tried
TESTED_TORCH_ON_GPUS = ("2.11",)

# What reading other internals may raise; AssertionError is from OwnedSlices.check: the model differs from the slices.
_UNREADABLE = (AttributeError, KeyError, IndexError, TypeError, AssertionError)


def untried(*, on_gpu: bool) -> str | None:
    """Returns a line that names the installed releases when they were not tried together, None when they were."""
    torch_release = ".".join(torch.__version__.split(".")[:2])
    tested, where = (TESTED_TORCH_ON_GPUS, " on GPUs") if on_gpu else (TESTED_TORCH, "")
    if torch_release in tested and deepspeed.__version__ in TESTED_DEEPSPEED:
        return None
    return (
        f"torch {torch.__version__} with deepspeed {deepspeed.__version__} has not been tried{where}; tried{where} are "
        f"torch {' and '.join(tested)} with deepspeed {' and '.join(TESTED_DEEPSPEED)}"
    )


def step_is_known() -> bool:
    """Returns whether DeepSpeed's step is the one that patches.py lightens."""
    return deepspeed.__version__ == STEP_OF


@contextmanager
def reading_inside() -> Iterator[None]:
    """Around the first use of DeepSpeed's internals. Raises UserError if those of an untried release are different."""
    try:
        yield
    except _UNREADABLE as error:
        if deepspeed.__version__ in TESTED_DEEPSPEED:
            raise  # a defect of ours
        found = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"deepspeed {deepspeed.__version__}: its inside cannot be read ({found}), and checkpoints are made of it; "
            f"install deepspeed=={STEP_OF}"
        ) from error

"""Checkpoints that DeepSpeed wrote itself: pickles, which execute code when they are read, so only when trusted."""

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain.config import Config
from pretrain.models.tensors import LazyTensor, Weights, finite, readable, use_in


def read_deepspeed(path: Path, config: Config) -> Weights:
    """Returns the fp32 weights of a ZeRO 1, 2 or 3 checkpoint: the folder with `latest`, or one global_stepN of it.

    EXECUTES what the pickles say. config: names the architecture; the tensors must bear our names, and the head tells
    the classes. ZeRO 3 is read tensor by tensor, ZeRO 1 and 2 as a whole, which is DeepSpeed's way. Raises UserError
    when it cannot be read.
    """
    tag = None
    if not (path / "latest").is_file() and list(path.glob("*_optim_states.pt")):
        path, tag = path.parent, path.name
    source = path / tag if tag else path
    states = _states(path, tag, source)
    tensors = {name: LazyTensor(tuple(t.shape), partial(_read, source, name, t)) for name, t in states.items()}
    return Weights(
        source=source,
        model=config.model,
        tensors=tensors,
        num_classes=tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
        **use_in(config),
    )


def _states(path: Path, tag: str | None, source: Path) -> dict[str, Any]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    told = io.StringIO()  # it prints, and shows a progress bar
    # Exception: whatever a pickle may raise.
    with readable(source, Exception), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(path), tag, lazy_mode=True) or {})


def _read(source: Path, name: str, tensor: Any) -> torch.Tensor:
    with readable(source):
        return finite(tensor.contiguous().detach().float().clone(), name, source)

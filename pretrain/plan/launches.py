"""Kernel launches of a step: what the host has to hand to a GPU, one by one, however few the images.

Counted in the real engine on CPU ranks, as in tests/test_counts.py, and for a compiled block in the code that the
compiler generates for a CPU; tests/test_plan.py compares. For a GPU the compiler splits sums over all tokens and fuses
copies: about as many launches. Not included: collectives, and ZeRO 3's work to gather matrices for each pass.
"""

from typing import NamedTuple

from pretrain.config import Config
from pretrain.plan.memory import Layout


class BlockLaunches(NamedTuple):
    """Of one block, forward and backward pass: 12 matrix products, 2 of attention, norms, GELU, sums for biases."""

    plain: int
    again: int  # of the second forward pass, with recomputation
    drop_path: int  # what stochastic depth adds: its draws, and products where they are not fused with others
    layer_scale: int  # its products in a forward pass, where they are not fused; the backward pass has three for each


EAGER, COMPILED = BlockLaunches(29, 8, 10, 2), BlockLaunches(27, 9, 3, 0)
_UNJOINED = 4  # ZeRO 3's linear layers add their bias in a launch of its own
_ENDS = 62  # of a micro-batch outside of its blocks: images, patches, head, loss, counts
_STEP, _STEP_FLOAT32_SUMS, _STEP_3 = 57, 35, 62  # of an optimizer step: norm, clipping, AdamW, casts
_GROUP = 20  # of each further group of parameters; optim.layer_decay makes two for each layer
_LAMB_GROUP = 17  # what LAMB adds to each group, besides a launch for each piece of a matrix
_TENSORS_OF_BLOCK, _SCALES_OF_BLOCK, _OTHER_TENSORS = 12, 2, 8  # parameters
_MATRICES_OF_BLOCK, _OTHER_MATRICES = 4, 2


def is_compiled(config: Config, layout: Layout) -> bool:
    """Returns whether a layout's blocks are compiled on a GPU: with engine.compile=auto not under ZeRO 3."""
    return config.engine.compiles(on_gpu=True, stage=layout.stage)


def launches(config: Config, layout: Layout) -> int:
    """Returns the launches of an optimizer step on one rank."""
    block = COMPILED if is_compiled(config, layout) else EAGER
    each = block.plain + block.again * layout.recompute + block.drop_path * (config.model.drop_path > 0)
    each += _UNJOINED * (layout.stage == 3)
    depth, scaled = config.model.shape.depth, config.model.layer_scale is not None
    each += block.layer_scale * (4 + layout.recompute) * scaled
    tensors = (_TENSORS_OF_BLOCK + _SCALES_OF_BLOCK * scaled) * depth + _OTHER_TENSORS
    passes = layout.accumulation * (depth * each + _ENDS)
    return passes + _of_gradients(config, layout, tensors) + _of_optimizer(config, layout, tensors)


def _sums_in_float32(config: Config, layout: Layout) -> bool:
    return layout.accumulation > 1 and config.engine.precision == "bf16"


def _of_gradients(config: Config, layout: Layout, tensors: int) -> int:
    """Per-tensor copies into and out of DeepSpeed's buckets, and sums of micro-batches."""
    times, in_float32 = layout.accumulation, _sums_in_float32(config, layout)
    copies = tensors + tensors // layout.num_ranks  # all into the bucket, a rank's own part out of it
    if layout.stage == 3:
        return tensors * (times + 1 + (2 * times - 1) * in_float32)
    if layout.stage == 2 and in_float32:
        return times * (copies + 2 * tensors // layout.num_ranks)
    added = (times - 1) * tensors
    if in_float32:  # each is cast and added, and DeepSpeed's class reduces them as one
        return added + 2 * times * tensors
    return added + (copies if layout.num_ranks > 1 else 0)


def _of_optimizer(config: Config, layout: Layout, tensors: int) -> int:
    groups = 2 * (config.model.shape.depth + 2) if config.optim.layer_decay < 1 else 2
    more = _GROUP * (groups - 2)
    if config.optim.name == "lamb":
        matrices = _MATRICES_OF_BLOCK * config.model.shape.depth + _OTHER_MATRICES
        more += _LAMB_GROUP * groups + matrices // (1 if layout.stage == 3 else layout.num_ranks)
    if layout.stage == 3:
        return 2 * tensors + _STEP_3 + more
    few = layout.stage == 1 and _sums_in_float32(config, layout)
    return (_STEP_FLOAT32_SUMS if few else _STEP) + more

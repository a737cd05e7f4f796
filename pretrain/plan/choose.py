"""Chooses the ZeRO stage, micro-batch and recomputation of a run on a given number of GPUs."""

from collections.abc import Iterable
from dataclasses import dataclass

from pretrain.config import Config
from pretrain.data.order import plan_batch
from pretrain.plan.memory import STAGES, Layout, Memory, memory
from pretrain.plan.speed import Cluster, Rate, Step, step
from pretrain.sizes import is_plain

# Images per forward pass that are tried as engine.max_micro_batch_size.
MICRO_BATCHES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
# Share of a GPU's memory for tensors: the rest is CUDA context, NCCL's buffers and the allocator's gaps. Assumed.
USABLE_SHARE = 0.92
# The share that a run may use which chooses by itself: on one H100, gaps were up to 15 % of the tensors' memory.
SURE_SHARE = 0.8
MOST_WITHOUT_FORMULA = 128  # images per forward pass, if no formula gives their memory
_ALIKE = 1.01  # ratio of step times below which steps count as equally fast: the simpler one is chosen


@dataclass(frozen=True)
class Choice:
    """A layout with what it costs."""

    layout: Layout
    memory: Memory
    step: Step


def layout_of(config: Config, num_ranks: int, stage: int, max_micro_batch: int, recompute: bool) -> Layout:
    """Returns the layout that the engine would give a step."""
    plan = plan_batch(config.data.global_batch, num_ranks, max_micro_batch)
    return Layout(num_ranks, stage, plan.micro_batch, plan.accumulation, recompute)


def price(config: Config, num_classes: int, layout: Layout, cluster: Cluster, rate: Rate) -> Choice:
    """Returns a layout with its memory and its time."""
    return Choice(layout, memory(config, num_classes, layout), step(config, num_classes, layout, cluster, rate))


def best(
    config: Config, num_classes: int, num_ranks: int, cluster: Cluster, rate: Rate, usable_bytes: float
) -> Choice | None:
    """Returns the fastest layout that fits, None when none does.

    Among equally fast ones: without recomputation, the lowest stage, the largest micro-batch.
    """
    choices = (price(config, num_classes, layout, cluster, rate) for layout in _layouts(config, num_ranks))
    fitting = [choice for choice in choices if choice.memory.peak <= usable_bytes]
    if not fitting:
        return None
    fastest = min(choice.step.total_s for choice in fitting)
    alike = [choice for choice in fitting if choice.step.total_s <= fastest * _ALIKE]
    return min(alike, key=lambda c: (c.layout.recompute, c.layout.stage, -c.layout.micro_batch))


def least_memory(config: Config, num_classes: int, num_ranks: int) -> Memory:
    """Returns the memory of the layout that needs least."""
    return min((memory(config, num_classes, layout) for layout in _layouts(config, num_ranks)), key=lambda m: m.peak)


def fitting_micro_batch(config: Config, num_classes: int, num_ranks: int, usable_bytes: float, most: int) -> int:
    """Returns how many images of a forward pass fit into a rank's memory, at most `most`; 1 if none fits.

    Their number changes only rounding and the masks of dropout. Only plain ViTs have a formula: other models get at
    most 128.
    """
    if not is_plain(config.model):
        return min(most, MOST_WITHOUT_FORMULA)
    for size in (most, *(size for size in MICRO_BATCHES if size < most)):
        layout = layout_of(config, num_ranks, config.engine.zero_stage, size, config.engine.checkpoint_activations)
        if memory(config, num_classes, layout).peak <= usable_bytes:
            return size
    return 1


def _layouts(config: Config, num_ranks: int) -> Iterable[Layout]:
    return dict.fromkeys(  # several limits of the micro-batch give the same layout
        layout_of(config, num_ranks, stage, micro, recompute)
        for recompute in (False, True)
        for stage in STAGES
        for micro in MICRO_BATCHES
    )

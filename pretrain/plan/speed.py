"""Time of a step by formula: products at an assumed or measured MFU, launches, communication."""

from dataclasses import dataclass, replace

from pretrain.config import Config
from pretrain.plan.devices import Device
from pretrain.plan.memory import Layout
from pretrain.sizes import plain_forward_macs, plain_parameters

# Host time of the eager step: 31 launches per block and 5 us each; compiled, the tenth. A small micro-batch is never
# faster. Launches were counted on CPU, their time is assumed.
_LAUNCHES_PER_BLOCK, _LAUNCH_S, _COMPILED_SHARE = 31, 5e-6, 0.1
_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_RATE_AGAINST_BF16 = {"bf16": 1.0, "fp16": 1.0, "fp32": 0.5}  # fp32 products run in TF32


@dataclass(frozen=True)
class Cluster:
    """The machines: GPUs per node and the network of a node, in bytes per second and direction."""

    device: Device
    gpus_per_node: int
    network_rate: float


@dataclass(frozen=True)
class Volume:
    """Bytes that a rank sends in a step."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        """Bytes."""
        return self.gradients + self.weights


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, and what follows."""

    compute_s: float
    communication_s: float
    images_per_s: float  # of all GPUs
    mfu: float  # with communication; recomputation does not count as work

    @property
    def total_s(self) -> float:
        """Seconds; nothing is overlapped, as engine/settings.py has it."""
        return self.compute_s + self.communication_s


def volume(config: Config, num_classes: int, layout: Layout) -> Volume:
    """Returns what a rank sends in a step, rings assumed.

    Stage 1 reduces once per step, 2 and 3 with each micro-batch. DeepSpeed's stages 1 and 2 all-reduce, where a
    reduce-scatter would do. Stage 3 gathers the weights for the forward and for the backward pass of each micro-batch.
    """
    size = plain_parameters(config.model, num_classes) * _ELEMENT_BYTES[config.engine.precision]
    share = (layout.num_ranks - 1) / layout.num_ranks
    times = layout.accumulation if layout.stage >= 2 else 1
    if layout.stage == 0:
        return Volume(2 * size * share, 0.0)
    if layout.stage == 3:
        return Volume(times * size * share, 2 * times * size * share)
    return Volume(times * 2 * size * share, size * share)


def communication_s(sent: Volume, num_ranks: int, cluster: Cluster) -> float:
    """Returns the seconds of a step's collectives: of NVLink alone, or of the slower of NVLink and a node's network."""
    if num_ranks == 1:
        return 0.0
    inside = sent.total / cluster.device.link_rate
    return inside if num_ranks <= cluster.gpus_per_node else max(inside, sent.total / cluster.network_rate)


def step(config: Config, num_classes: int, layout: Layout, cluster: Cluster, mfu: float) -> Step:
    """Returns the time of a step.

    mfu: of a step on one GPU without recomputation, optimizer included; against the dense bf16 peak.
    """
    flops = 6 * plain_forward_macs(config.model, num_classes)
    rate = cluster.device.peak_flops * _RATE_AGAINST_BF16[config.engine.precision]
    passes = layout.micro_batch * flops / (rate * mfu) * (4 / 3 if layout.recompute else 1)
    launches = config.model.shape.depth * _LAUNCHES_PER_BLOCK * _LAUNCH_S
    compiled = replace(config.engine, zero_stage=layout.stage).compiles(on_gpu=True)
    launches *= _COMPILED_SHARE if compiled else 1
    compute = layout.accumulation * max(passes, launches)
    talk = communication_s(volume(config, num_classes, layout), layout.num_ranks, cluster)
    images = config.data.global_batch / (compute + talk)
    reached = images * flops / (layout.num_ranks * cluster.device.peak_flops)
    return Step(compute, talk, images, reached)

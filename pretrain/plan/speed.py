"""Time of a step by formula: products at an assumed or measured MFU, launches, communication."""

from dataclasses import dataclass

from pretrain.config import Config
from pretrain.gpus import Device
from pretrain.plan.launches import launches
from pretrain.plan.memory import ELEMENT_BYTES, Layout
from pretrain.sizes import plain_forward_macs, plain_parameters

# Of the ceiling model: a matrix product reaches this share of the peak, a pointwise kernel this share of the memory's
# rate, and the whole step this share of the ceiling of both. The first two are assumed, the last is fitted to this code
# on one H100: L/16, H/14, B/16 and S/16, within 12 % (docs/results.md).
PRODUCT_SHARE, MEMORY_SHARE, STEP_SHARE = 0.8, 0.9, 0.85
# A compiled block with a residual of its precision moves 100 x width elements per token while it computes 72 x width^2
# FLOPs.
_ELEMENTS_PER_FLOP_AND_WIDTH = 100 / 72
# ZeRO 3's share of the rate of a compiled step under ZeRO 1: others measured 73 % of DDP's rate for L/16 on 2 GPUs, and
# 37 % for 3.8B parameters on 8 (stable-pretraining). The better of the two, since waiting also counts as communication.
ZERO3_SHARE = 0.73
# Host time of a launch, Python's and DeepSpeed's part included. Assumed: on two loaded cores of an EPYC it was 20 to 28
# us of CPU time in fp32, with what a CPU takes for the tiny arithmetic itself.
LAUNCH_S = 10e-6


@dataclass(frozen=True)
class Cluster:
    """The machines: GPUs per node and the network of a node, in bytes per second and direction."""

    device: Device
    gpus_per_node: int
    network_rate: float


@dataclass(frozen=True)
class Rate:
    """What a GPU and its host reach."""

    mfu: float  # of a step on one GPU, compiled, without recomputation, optimizer included; of its precision's peak
    zero3_share: float = ZERO3_SHARE
    launch_s: float = LAUNCH_S


def assumed_mfu(device: Device, width: int, precision: str = "bf16") -> float:
    """Returns the share of the precision's peak that a compiled step on one GPU is assumed to reach, by width."""
    products, memory = PRODUCT_SHARE * device.peak(precision), MEMORY_SHARE * device.memory_rate
    bytes_per_flop = _ELEMENTS_PER_FLOP_AND_WIDTH * ELEMENT_BYTES[precision] / width
    return STEP_SHARE * PRODUCT_SHARE / (1 + bytes_per_flop * products / memory)


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
    mfu: float  # of the precision's peak, with communication; recomputation does not count as work
    waits_for_host: bool  # the launches take longer than the device's work

    @property
    def total_s(self) -> float:
        """Seconds; nothing is overlapped, not even with engine.overlap_reduction."""
        return self.compute_s + self.communication_s


def volume(config: Config, num_classes: int, layout: Layout) -> Volume:
    """Returns what a rank sends in a step, assuming ring collectives.

    Stage 1 reduces once per step, 2 and 3 with each micro-batch. DeepSpeed's stages 1 and 2 all-reduce, where a
    reduce-scatter would do. Stage 3 gathers the weights for the forward and for the backward pass of each micro-batch.
    """
    parameters, item = plain_parameters(config.model, num_classes), ELEMENT_BYTES[config.engine.precision]
    weights, gradients = parameters * item, parameters * (4 if config.engine.reduce_dtype == "fp32" else item)
    share = (layout.num_ranks - 1) / layout.num_ranks
    times = layout.accumulation if layout.stage >= 2 else 1
    if layout.stage == 3:
        return Volume(times * gradients * share, 2 * times * weights * share)
    return Volume(times * 2 * gradients * share, weights * share)


def communication_s(sent: Volume, num_ranks: int, cluster: Cluster) -> float:
    """Returns the seconds of a step's collectives: of NVLink alone, or of the slower of NVLink and a node's network."""
    if num_ranks == 1:
        return 0.0
    inside = sent.total / cluster.device.link_rate
    return inside if num_ranks <= cluster.gpus_per_node else max(inside, sent.total / cluster.network_rate)


def step(config: Config, num_classes: int, layout: Layout, cluster: Cluster, rate: Rate) -> Step:
    """Returns the time of a step.

    The host runs ahead of the device and waits for it once, so the slower of the two counts, over the whole step.
    """
    flops = 6 * plain_forward_macs(config.model, num_classes)
    peak = cluster.device.peak(config.engine.precision)
    share = rate.mfu * (rate.zero3_share if layout.stage == 3 else 1.0)
    again = 4 / 3 if layout.recompute else 1.0
    device = layout.accumulation * layout.micro_batch * flops * again / (peak * share)
    host = rate.launch_s * launches(config, layout)
    compute = max(device, host)
    talk = communication_s(volume(config, num_classes, layout), layout.num_ranks, cluster)
    images = config.data.global_batch / (compute + talk)
    return Step(compute, talk, images, images * flops / (layout.num_ranks * peak), host > device)

"""What GPUs and their nodes can do: data sheets, and what is assumed where there is none."""

from dataclasses import dataclass

from pretrain.gpus import FP32_PEAK_FLOPS, PEAK_FLOPS

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One GPU and its share of a node. Rates are per second and per direction."""

    name: str
    memory_bytes: int  # what torch sees of it
    memory_rate: float  # bytes
    link_rate: float  # bytes over NVLink

    def peak(self, precision: str) -> float:
        """Returns the FLOP/s of dense bf16, which fp16 has too, or those of fp32, whose products are no TF32 here."""
        return (FP32_PEAK_FLOPS if precision == "fp32" else PEAK_FLOPS)[self.name]


# Data sheets of the SXM forms; memory as torch.cuda.get_device_properties tells it, memory of B200 from its sheet.
DEVICES = {
    "a100": Device("a100", int(79.1 * GIB), 2.04e12, 300e9),
    "h100": Device("h100", int(79.1 * GIB), 3.35e12, 450e9),
    "h200": Device("h200", int(139.8 * GIB), 4.8e12, 450e9),
    "b200": Device("b200", int(178 * GIB), 8.0e12, 900e9),
}

# Of the ceiling model: a matrix product reaches this share of the peak, a pointwise kernel this share of the memory's
# rate, and the whole step this share of the ceiling of both. The first two are assumed, the last is fitted to this code
# on one H100: L/16, H/14, B/16 and S/16, within 12 % (docs/results.md).
PRODUCT_SHARE, MEMORY_SHARE, STEP_SHARE = 0.8, 0.9, 0.85
# A compiled block with a residual of its precision moves 100 x width elements per token while it computes 72 x width^2
# FLOPs.
_ELEMENTS_PER_FLOP_AND_WIDTH = 100 / 72
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def assumed_mfu(device: Device, width: int, precision: str = "bf16") -> float:
    """Returns the share of the precision's peak that a compiled step on one GPU is assumed to reach, by width."""
    products, memory = PRODUCT_SHARE * device.peak(precision), MEMORY_SHARE * device.memory_rate
    bytes_per_flop = _ELEMENTS_PER_FLOP_AND_WIDTH * ELEMENT_BYTES[precision] / width
    return STEP_SHARE * PRODUCT_SHARE / (1 + bytes_per_flop * products / memory)

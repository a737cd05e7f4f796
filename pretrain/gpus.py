"""What GPUs can do by their data sheets, known by the names that torch gives them."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One GPU and its share of a node. Rates are per second and per direction."""

    name: str
    # Dense, which fp16 has too; the figures with 2:4 sparsity are twice as high and mean nothing here.
    bf16_flops: float
    # Without tensor cores: float32 products are not rounded to TF32 here, cluster/ranks.py sees to it.
    fp32_flops: float
    memory_bytes: int  # what torch sees of it
    memory_rate: float  # bytes
    link_rate: float  # bytes over NVLink

    def peak(self, precision: str) -> float:
        """Returns the FLOP/s of a precision."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


# Data sheets of the SXM forms (NVIDIA's of the A100, H100 and H200 SXM, HGX B200); memory as
# torch.cuda.get_device_properties tells it, memory of B200 from its sheet.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 19.5e12, int(79.1 * GIB), 2.04e12, 300e9),
        Device("h100", 989e12, 67e12, int(79.1 * GIB), 3.35e12, 450e9),
        Device("h200", 989e12, 67e12, int(139.8 * GIB), 4.8e12, 450e9),
        Device("b200", 2250e12, 75e12, int(178 * GIB), 8.0e12, 900e9),
    )
}
_OTHER_FORMS = ("pcie", "nvl", "mig")  # slower ones under the same name; an A100 alone is as fast on PCIe


def known_gpu(name: str) -> Device | None:
    """Returns the data sheet of "NVIDIA H100 80GB HBM3", None of a GPU that is not known here."""
    words = name.lower().replace("-", " ").split()
    if "a100" not in words and set(words) & set(_OTHER_FORMS) or "mig" in words:
        return None
    return next((device for key, device in DEVICES.items() if key in words), None)


def peak_flops(name: str) -> float | None:
    """Returns the FLOP/s in dense bf16 of "NVIDIA H100 80GB HBM3", None of a GPU whose peak is not known here."""
    known = known_gpu(name)
    return known.bf16_flops if known else None


def mfu(flops_per_s: float, name: str) -> float | None:
    """Returns the share of one GPU's peak in dense bf16 that a model's own FLOP/s make, None where it is not known."""
    peak = peak_flops(name)
    return flops_per_s / peak if peak else None

"""The peak rates of GPUs by their data sheets, known by the names that torch gives them."""

# FLOP/s of dense bf16, of the SXM forms; the figures with 2:4 sparsity are twice as high and mean nothing here.
PEAK_FLOPS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
# FLOP/s of fp32 on the same sheets (NVIDIA's of the A100, H100 and H200 SXM, HGX B200). Without tensor cores: products
# of float32 are not rounded to TF32 here, torch's default for matrices, and cluster/ranks.py's for convolutions.
FP32_PEAK_FLOPS = {"a100": 19.5e12, "h100": 67e12, "h200": 67e12, "b200": 75e12}
_OTHER_FORMS = ("pcie", "nvl", "mig")  # slower ones under the same name; an A100 alone is as fast on PCIe


def known_gpu(name: str) -> str | None:
    """Returns "h100" for "NVIDIA H100 80GB HBM3", None of a GPU whose peaks are not known here."""
    words = name.lower().replace("-", " ").split()
    if "a100" not in words and set(words) & set(_OTHER_FORMS) or "mig" in words:
        return None
    return next((key for key in PEAK_FLOPS if key in words), None)


def peak_flops(name: str) -> float | None:
    """Returns the FLOP/s in dense bf16 of "NVIDIA H100 80GB HBM3", None of a GPU whose peak is not known here."""
    known = known_gpu(name)
    return PEAK_FLOPS[known] if known else None


def mfu(flops_per_s: float, name: str) -> float | None:
    """Returns the share of one GPU's peak in dense bf16 that a model's own FLOP/s make, None where it is not known."""
    peak = peak_flops(name)
    return flops_per_s / peak if peak else None

"""The peak rates of GPUs by their data sheets, known by the names that torch gives them."""

# FLOP/s of dense bf16, of the SXM forms; the figures with 2:4 sparsity are twice as high and mean nothing here.
PEAK_FLOPS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
_OTHER_FORMS = ("pcie", "nvl", "mig")  # slower ones under the same name; an A100 alone is as fast on PCIe


def peak_flops(name: str) -> float | None:
    """Returns the FLOP/s in dense bf16 of "NVIDIA H100 80GB HBM3", None of a GPU whose peak is not known here."""
    words = name.lower().replace("-", " ").split()
    if "a100" not in words and set(words) & set(_OTHER_FORMS) or "mig" in words:
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if key in words), None)


def mfu(flops_per_s: float, name: str) -> float | None:
    """Returns the share of one GPU's peak in dense bf16 that a model's own FLOP/s make, None where it is not known."""
    peak = peak_flops(name)
    return flops_per_s / peak if peak else None

"""The formats of weights by name, for command lines, which are read before torch is imported."""

READABLE = "a run, a checkpoint step-N, a folder with config.json, Google's .npz or PyTorch's .pth"
WRITABLE = ("pretrain", "timm", "transformers", "npz", "onnx")  # rows of `convert.TARGETS`
NPZ_NAMINGS = ("released", "vit_jax", "big_vision")  # of the tensors in Google's .npz: as published, or code of today

"""Parameters and multiply-adds of a plain ViT by formula, and DeepSpeed's buckets: without torch, without a model."""

from pretrain.config import EngineConfig, ModelConfig

BUCKET_ELEMENTS = 500_000_000  # gradients that DeepSpeed sums over ranks at a time, by default: 1 GB in bf16
OVERLAPPED_BUCKET_ELEMENTS = 50_000_000  # if it overlaps with the backward pass: the last bucket overlaps nothing


def is_plain(config: ModelConfig) -> bool:
    """Returns whether the formulas hold: a ViT of this package, without a trunk and without relative positions."""
    return config.timm_name is None and config.trunk_units is None and config.positions != "relative"


def num_patches(config: ModelConfig) -> int:
    """Returns the patches of an image."""
    return (config.image_size // config.patch_size) ** 2


def num_tokens(config: ModelConfig) -> int:
    """Returns the tokens of a block: the patches and the class token."""
    return num_patches(config) + (config.pooling == "token")


def block_parameters(config: ModelConfig) -> int:
    """Returns the parameters of one block: q, k, v, projection, MLP, norms, layer scale; no table of positions."""
    (width, _, mlp_dim, heads), form = config.shape, config.form
    biases = 2 * width + mlp_dim + 3 * width * form.qkv_bias
    norms = width * (1 if form.parallel_blocks else 2) + 2 * (width // heads) * form.qk_norm
    scales = 2 * width * (config.layer_scale is not None)
    return 4 * width**2 + 2 * width * mlp_dim + biases + norms * _of_norm(config) + scales


def _of_norm(config: ModelConfig) -> int:
    """Parameters of a norm per channel: its scale, and its bias."""
    return 1 if config.form.rms_norm else 2


def plain_parameters(config: ModelConfig, num_classes: int) -> int:
    """Returns the number of trainable parameters of a plain ViT, as `build_model` makes it."""
    width, depth, mlp_dim, _ = config.shape
    total = 3 * config.patch_size**2 * width + width + depth * block_parameters(config)
    total += width * _of_norm(config)
    total += width * (config.pooling == "token")
    total += _table_parameters(config) * (depth if config.positions_at == "every_layer" else 1)
    if config.pooling == "map":  # probe, q, k, v, projection, norm, MLP
        total += 4 * width**2 + 2 * width * mlp_dim + mlp_dim + (6 + _of_norm(config)) * width
    rep = config.representation_size
    total += 0 if rep is None else width * rep + rep
    return total + (rep or width) * num_classes + num_classes


def _table_parameters(config: ModelConfig) -> int:
    if config.positions == "learned2d":  # half the channels for each column and each row
        side = config.image_size // config.patch_size
        return 2 * side * (config.shape.width // 2)
    rows = num_patches(config) + (config.pooling == "token" and config.class_position)
    return rows * config.shape.width if config.positions == "learned" else 0


def plain_forward_macs(config: ModelConfig, num_classes: int) -> int:
    """Returns the multiply-adds of one image's forward pass through a plain ViT.

    Patch convolution, q, k, v, attention, MLP and head; norms, softmax, GELU, biases and layer scale are not counted.
    """
    width, depth, mlp_dim, _ = config.shape
    tokens = num_tokens(config)
    block = tokens * (4 * width**2 + 2 * width * mlp_dim) + 2 * tokens**2 * width
    pool = 0
    if config.pooling == "map":
        pool = 2 * width**2 + 2 * width * mlp_dim + tokens * 2 * width**2 + 2 * tokens * width
    rep = config.representation_size
    head = width * num_classes if rep is None else width * rep + rep * num_classes
    return num_patches(config) * 3 * config.patch_size**2 * width + depth * block + pool + head


def bucket_elements(engine: EngineConfig, num_ranks: int, largest_parameter: int, num_parameters: int) -> int:
    """Returns the size of a bucket of gradients in elements; DeepSpeed allocates all of it.

    If reductions overlap with the backward pass, it has room for the largest parameter: otherwise DeepSpeed would read
    that gradient on another stream without telling the allocator, which could reuse its memory meanwhile.
    """
    beside = max(OVERLAPPED_BUCKET_ELEMENTS, largest_parameter)
    return min(beside if engine.overlaps(num_ranks) else BUCKET_ELEMENTS, num_parameters)

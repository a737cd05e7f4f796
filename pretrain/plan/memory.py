"""Memory of one rank by formula: what the engine's DeepSpeed holds, phase by phase, and what a forward pass saves.

Equal to what the real engine holds on CPU ranks (tests/test_plan.py). Not in it: the CUDA context, NCCL's buffers, the
allocator's gaps; `Memory.peak` is of tensors alone.
"""

from dataclasses import dataclass

from pretrain.config import Config
from pretrain.sizes import num_tokens, plain_parameters

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PREFETCH_ELEMENTS = 50_000_000  # ZeRO 3 gathers so much ahead: stage3_prefetch_bucket_size
_LIVE_ELEMENTS = 1_000_000_000  # ZeRO 3 keeps gathered weights up to this: stage3_max_live_parameters
_FALLBACK_ELEMENTS = 500_000_000  # DeepSpeed's BF16_Optimizer reduces gradients in pieces of this
_PIECE_ELEMENTS = 1 << 24  # optim.PIECE_ELEMENTS, which cannot be imported without torch
_PIECES = 3  # float32 temporaries of one piece in an update that is not fused
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Layout:
    """How a step is spread: ranks, images of a forward pass on a rank, forward passes of a step, recomputation."""

    num_ranks: int
    stage: int
    micro_batch: int
    accumulation: int
    recompute: bool


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. What a phase adds is on top of `rest`, which lives all the time."""

    weights: int
    gradients: int  # at the end of the backward pass, sums of micro-batches included
    optimizer: int  # float32 master weights and moments
    averages: int
    buckets: int
    activations: int  # saved for the backward pass, logits and loss included
    rest: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return max(self.phases.values())

    @property
    def worst_phase(self) -> str:
        """The name of that moment."""
        return max(self.phases, key=lambda name: self.phases[name])


def moment_bytes(config: Config) -> int:
    """Returns the bytes per parameter of the optimizer's moments."""
    first = 2 if config.optim.moment_dtype == "bf16" else 4
    return first + 4 if config.optim.name == "adamw" else first


def activation_bytes(config: Config, num_classes: int, images: int, recompute: bool) -> tuple[int, int]:
    """Returns what a forward pass of `images` saves for its backward pass, and what that adds at its start.

    Of the eager model with fused attention, which saves q, k, v, its output and a float32 per head and token, and with
    fused norms, which save their input and statistics. A compiled block saves no more. With `recompute` one block's
    are made again at a time.
    """
    model, item, form = config.model, ELEMENT_BYTES[config.engine.precision], config.model.form
    width, depth, mlp_dim, heads = model.shape
    tokens = num_tokens(model)
    # Two norms and what each is given; with parallel blocks one. Normalised queries and keys beside what they were.
    norms, rows = (1 if form.parallel_blocks else 2), 2 * heads * form.qk_norm
    widths = 2 * norms + 4 + 2 * form.qk_norm
    statistics = (norms + rows) * (1 if form.rms_norm else 2) * 4  # mean and deviation, float32
    block = tokens * (item * (widths * width + 2 * mlp_dim) + statistics + 4 * heads)
    if model.dropout:  # masks behind the projection and both layers of the MLP, a byte each
        block += tokens * (2 * width + mlp_dim)
    held = tokens * width * item  # a block's input, and the gradient that comes to it
    blocks = depth * held + block if recompute else depth * block
    ends = 3 * model.image_size**2 * item + 2 * held + _head_bytes(config, num_classes)
    ends += tokens * width if model.dropout else 0
    if model.pooling == "map":
        ends += tokens * 2 * width * item
    start = 2 * held + tokens * mlp_dim * item  # gradients inside the last block
    return images * (blocks + ends), images * start


def _head_bytes(config: Config, num_classes: int) -> int:
    """Logits as the model makes them and in float32; what the loss saves beside them."""
    return num_classes * (ELEMENT_BYTES[config.engine.precision] + 8)


def memory(
    config: Config,
    num_classes: int,
    layout: Layout,
    *,
    bucket: int | None = None,
    prefetch: int = PREFETCH_ELEMENTS,
) -> Memory:
    """Returns the memory of a rank that trains `config`'s model in this layout.

    bucket, prefetch: elements that are reduced, gathered at a time; None: as the engine has it.
    """
    activations = activation_bytes(config, num_classes, layout.micro_batch, layout.recompute)
    model = config.model
    images = 2 * layout.micro_batch * layout.accumulation * 3 * model.image_size**2  # uint8, two steps' whole shares
    matrix = largest_parameter(config, num_classes)
    num_parameters = plain_parameters(model, num_classes)
    bucket = bucket or config.engine.bucket_elements(layout.num_ranks, matrix, num_parameters)
    return _memory(config, num_parameters, layout, bucket, activations, images, matrix, prefetch)


def largest_parameter(config: Config, num_classes: int) -> int:
    """Returns the elements of the largest matrix."""
    width, _, mlp_dim, _ = config.model.shape
    return max(width * mlp_dim, 3 * width**2, width * num_classes, 3 * config.model.patch_size**2 * width)


def _memory(
    config: Config,
    num_parameters: int,
    layout: Layout,
    bucket: int,
    activations: tuple[int, int],
    images: int,
    largest: int,
    prefetch: int,
) -> Memory:
    item, p, ranks = ELEMENT_BYTES[config.engine.precision], num_parameters, layout.num_ranks
    sent = 4 if config.engine.reduce_dtype == "fp32" else item
    overlaps = config.engine.overlaps(ranks)
    part = -(-p // ranks)
    rounded = item < 4
    accumulates = layout.accumulation > 1
    in_float32 = accumulates and config.engine.precision == "bf16"  # gradients of several micro-batches
    bucket = bucket if _reduces(config, layout, in_float32) else 0
    unsharded = in_float32 and layout.stage == 1  # DeepSpeed's BF16_Optimizer
    weights = item * (part if layout.stage == 3 else p)
    optimizer = part * (4 + moment_bytes(config))
    averages = 4 * part if config.optim.average_decay else 0
    kept = bucket * sent if layout.stage == 3 else 0
    if unsharded:
        kept += 4 * p
    elif layout.stage == 3:
        kept += part * (4 if in_float32 else item)
    rest = weights + optimizer + averages + kept + images
    fused = config.optim.name == "adamw" and config.optim.moment_dtype == "fp32"
    update = 0 if fused else _PIECES * 4 * min(part, _PIECE_ELEMENTS)
    saved, start = activations
    sizes = item, sent, p, part
    backward, end, step = _phases(*sizes, layout, bucket, overlaps, in_float32, (saved, start), largest, prefetch)
    if not rounded:
        step -= item * part  # the gradients are float32 already
    # Stages 1 and 2 join the rounded weights, which are there twice for that; 3 has cut each parameter up at once.
    start = item * part + (item + 4) * largest if layout.stage == 3 else 2 * item * p
    phases = {
        "start": start,
        "backward": rest + backward,
        "reduce": rest + end,
        "step": rest + step + update,
    }
    held = part if layout.stage >= 2 else p
    gradients = held * (4 if in_float32 and layout.stage >= 2 else item) + (4 * p if unsharded else 0)
    buckets = bucket * (sent if layout.stage == 3 else item * (1 + overlaps))
    return Memory(weights, gradients, optimizer, averages, buckets, saved, rest, phases)


def _reduces(config: Config, layout: Layout, in_float32: bool) -> bool:
    """Whether gradients go through DeepSpeed's bucket: on one rank only where engine/patches.py leaves it so."""
    left_alone = layout.stage == 3 or config.engine.precision == "fp16" or (layout.stage == 2 and in_float32)
    return layout.num_ranks > 1 or left_alone


def _phases(
    item: int,
    sent: int,
    p: int,
    part: int,
    layout: Layout,
    bucket: int,
    overlaps: bool,
    in_float32: bool,
    activations: tuple[int, int],
    largest: int,
    prefetch: int,
) -> tuple[int, int, int]:
    """What the backward pass's start, its end with the reduction, and the step hold beside `rest`.

    item, sent: bytes of an element as the model has it, as a reduction sends it.
    """
    saved, start = activations
    shared = largest if layout.num_ranks > 1 else 0
    filled = min(bucket, p)  # elements of the first reduction
    left = saved * (p - filled) // p  # activations that are not used up when it comes
    if layout.stage == 1 and in_float32:
        pieces = min(p, _FALLBACK_ELEMENTS)
        # joined in float32, and as they are sent where that is another type
        return item * p + saved + start, item * p + (4 + sent * (sent < 4)) * pieces, item * p
    whole = item * p * (layout.accumulation > 1)  # of the micro-batches before
    if not bucket:  # one rank: gradients stay where they are; ZeRO 2 keeps the sums of micro-batches apart
        return whole + saved + start, item * p + whole * (layout.stage == 2), (2 * item + 4) * part
    wide = sent * (sent > item)  # bytes per element of a second copy, as it is sent
    if layout.stage == 1 and not overlaps:
        end = item * p + max(item * bucket + wide * filled, item * part)
        # own gradients are copied, with the whole of a parameter that two ranks share
        return item * bucket + whole + saved + start, end + item * shared, (2 * item + 4) * part + item * shared
    pending = item * largest if bucket < p else 0  # a gradient that waits until the bucket has room
    if layout.stage <= 2:  # gradients leave through buckets, as they come; with ZeRO 1 only beside the backward pass
        own = 4 * part if in_float32 else item * (part + shared)
        before = whole if layout.stage == 1 else own * (layout.accumulation > 1)
        held = item * bucket * (1 + overlaps)
        joins = layout.num_ranks > 1 or in_float32  # slices of several ranks, copied together
        joined, joined_next = ((item + wide) * elements * joins for elements in (filled, min(bucket, p - filled)))
        # Own gradients are allocated behind the first reduction; those of several micro-batches live since the first.
        reduced = own + joined + 4 * largest if in_float32 else max(joined, own + joined_next)
        sums = whole * (p - filled) // p if layout.stage == 1 else 0
        end = held + reduced + left + pending + sums
        return held + before + saved + start, end, own if in_float32 else item * shared + (2 * item + 4) * part
    gathered = item * min(p, _LIVE_ELEMENTS) if layout.num_ranks > 1 else 0
    # Joined pieces that are not cut up yet: two, but of a model of two pieces or less the second comes alone.
    joined_ahead = min(2 * prefetch, max(p - prefetch, min(p, prefetch)))
    ahead = item * joined_ahead if layout.num_ranks > 1 else 0
    kept = 4 if in_float32 else item
    copies = sent * filled + (kept * filled // layout.num_ranks if kept != sent else 0)  # joined; the own part
    end = copies + left + pending + gathered * (p - filled) // p
    return gathered + max(ahead, start) + saved, end, 4 * part + (0 if in_float32 else item * part)

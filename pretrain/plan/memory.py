"""Memory of one rank by formula: what the engine's DeepSpeed holds, phase by phase, and what a forward pass saves.

Equal to what the real engine holds on CPU ranks (tests/test_plan.py). Not in it: the CUDA context, NCCL's buffers, the
allocator's gaps; `Memory.peak` is of tensors alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

from pretrain.config import Config
from pretrain.sizes import bucket_elements, num_tokens, plain_parameters

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PREFETCH_ELEMENTS = 50_000_000  # ZeRO 3 gathers so much ahead: stage3_prefetch_bucket_size
_LIVE_ELEMENTS = 1_000_000_000  # ZeRO 3 keeps gathered weights up to this: stage3_max_live_parameters
_FALLBACK_ELEMENTS = 500_000_000  # DeepSpeed's BF16_Optimizer reduces gradients in pieces of this
_PIECE_ELEMENTS = 1 << 24  # optim.PIECE_ELEMENTS, which cannot be imported without torch
_PIECE_BYTES = {"fp32": 8, "bf16": 10}  # temporaries per element of a piece in an update that is not fused, by moment
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
    """Bytes of one rank. `rest` is held throughout training, and is part of each phase but the start."""

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
        """The phase with that moment."""
        return max(self.phases, key=lambda name: self.phases[name])


def moment_bytes(config: Config) -> int:
    """Returns the bytes per parameter of the optimizer's moments."""
    first = 2 if config.optim.moment_dtype == "bf16" else 4
    return first + 4 if config.optim.name in ("adamw", "lamb") else first


def activation_bytes(config: Config, num_classes: int, images: int, recompute: bool) -> tuple[int, int]:
    """Returns the bytes that a forward pass of `images` saves, and those that the start of its backward pass adds.

    For the eager model with fused attention, which saves q, k, v, its output and a float32 per head and token, and with
    fused norms, which save their input and statistics. A compiled block saves no more. With `recompute` the activations
    of one block at a time are computed again.
    """
    model, item, form = config.model, ELEMENT_BYTES[config.engine.precision], config.model.form
    width, depth, mlp_dim, heads = model.shape
    tokens = num_tokens(model)
    # Two norms and their inputs; with parallel blocks one. Normalised queries and keys in addition to the raw ones.
    # With layer scale, what it multiplies in both branches, for the gradient of its factors.
    norms, rows = (1 if form.parallel_blocks else 2), 2 * heads * form.qk_norm
    widths = 2 * norms + 4 + 2 * form.qk_norm + 2 * (model.layer_scale is not None)
    statistics = (norms + rows) * (1 if form.rms_norm else 2) * 4  # mean and deviation, float32
    block = tokens * (item * (widths * width + 2 * mlp_dim) + statistics + 4 * heads)
    if model.dropout:  # masks after the projection and both layers of the MLP, a byte each
        block += tokens * (2 * width + mlp_dim)
    held = tokens * width * item  # a block's input, or the gradient that comes to it
    blocks = depth * held + block if recompute else depth * block
    head = num_classes * (item + 8)  # logits as the model makes them and in float32; what the loss saves beside them
    ends = 3 * model.image_size**2 * item + 2 * held + head
    ends += tokens * width if model.dropout else 0
    if model.pooling == "map":
        ends += tokens * 2 * width * item
    start = 2 * held + tokens * mlp_dim * item  # gradients inside the last block
    return images * (blocks + ends), images * start


def memory(
    config: Config, num_classes: int, layout: Layout, *, bucket: int | None = None, prefetch: int = PREFETCH_ELEMENTS
) -> Memory:
    """Returns the memory of a rank that trains `config`'s model in this layout.

    bucket, prefetch: elements that are reduced, gathered at a time; None: as the engine has it.
    """
    s = _sizes(config, num_classes, layout, bucket, prefetch)
    weights = s.item * (s.part if layout.stage == 3 else s.p)
    optimizer = s.part * (4 + moment_bytes(config))
    averages = 4 * s.part if config.optim.average_decay else 0
    kept = 0
    if s.unsharded:
        kept = 4 * s.p
    elif layout.stage == 3:
        kept = s.bucket * s.sent + s.part * (4 if s.in_float32 else s.item)
    images = 2 * layout.micro_batch * layout.accumulation * 3 * config.model.image_size**2  # uint8, two steps' shares
    rest = weights + optimizer + averages + kept + images
    fused = config.optim.name == "adamw" and config.optim.moment_dtype == "fp32"
    update = 0 if fused else _PIECE_BYTES[config.optim.moment_dtype] * min(s.part, _PIECE_ELEMENTS)
    if not s.in_float32:  # the rounded gradients have been cast by then, and flattened ones freed
        update = max(0, update - s.item * s.part)
    if s.item == 4:
        update -= s.item * s.part  # the gradients are float32 already
    # Stages 1 and 2 flatten the rounded weights, which then exist twice; 3 has partitioned each parameter at once.
    start = s.item * s.part + (s.item + 4) * s.largest if layout.stage == 3 else 2 * s.item * s.p
    beside = _phases(s)
    phases = {
        "start": start,
        "backward": rest + beside.backward,
        "reduce": rest + beside.reduce,
        "step": rest + beside.step + update,
    }
    held = s.part if layout.stage >= 2 else s.p
    gradients = held * (4 if s.in_float32 and layout.stage >= 2 else s.item) + (4 * s.p if s.unsharded else 0)
    buckets = s.bucket * (s.sent if layout.stage == 3 else s.item * (1 + s.overlaps))
    return Memory(weights, gradients, optimizer, averages, buckets, s.saved, rest, phases)


def largest_parameter(config: Config, num_classes: int) -> int:
    """Returns the elements of the largest matrix."""
    width, _, mlp_dim, _ = config.model.shape
    return max(width * mlp_dim, 3 * width**2, width * num_classes, 3 * config.model.patch_size**2 * width)


@dataclass(frozen=True)
class _Sizes:
    """What the phases are computed from: elements, unless bytes are named."""

    layout: Layout
    item: int  # bytes of an element as the model has it
    sent: int  # bytes of an element as a reduction sends it
    p: int  # parameters
    part: int  # of them, those that a rank owns
    bucket: int  # reduced at a time; 0: gradients go through no bucket
    largest: int  # of the largest matrix
    prefetch: int  # gathered at a time
    saved: int  # bytes of activations
    start: int  # bytes that the start of the backward pass adds to them
    in_float32: bool  # gradients of several micro-batches are summed up in float32
    overlaps: bool  # reductions overlap with the backward pass

    @property
    def unsharded(self) -> bool:
        """Whether DeepSpeed's BF16_Optimizer trains, which holds whole gradients in float32."""
        return self.in_float32 and self.layout.stage == 1

    @property
    def several_ranks(self) -> bool:
        """Whether there are other ranks to reduce with."""
        return self.layout.num_ranks > 1

    @property
    def before(self) -> int:
        """Bytes of the whole gradients of earlier micro-batches."""
        return self.item * self.p * (self.layout.accumulation > 1)

    @property
    def filled(self) -> int:
        """Elements of the first reduction."""
        return min(self.bucket, self.p)

    @property
    def left(self) -> int:
        """Bytes of activations that are still held at the first reduction."""
        return self.saved * (self.p - self.filled) // self.p

    @property
    def pending(self) -> int:
        """Bytes of a gradient that waits until the bucket has room."""
        return self.item * self.largest if self.bucket < self.p else 0

    @property
    def shared(self) -> int:
        """Elements of a parameter that two ranks share: each has the whole of its gradient."""
        return self.largest if self.several_ranks else 0

    @property
    def wide(self) -> int:
        """Bytes per element of a second copy in the type that is sent, if that is wider; else 0."""
        return self.sent * (self.sent > self.item)


def _sizes(config: Config, num_classes: int, layout: Layout, bucket: int | None, prefetch: int) -> _Sizes:
    item, engine, p = ELEMENT_BYTES[config.engine.precision], config.engine, plain_parameters(config.model, num_classes)
    largest = largest_parameter(config, num_classes)
    in_float32 = layout.accumulation > 1 and engine.precision == "bf16"
    elements = bucket or bucket_elements(engine, layout.num_ranks, largest, p)
    saved, start = activation_bytes(config, num_classes, layout.micro_batch, layout.recompute)
    return _Sizes(
        layout,
        item,
        sent=4 if engine.reduce_dtype == "fp32" else item,
        p=p,
        part=-(-p // layout.num_ranks),
        bucket=elements if _reduces(config, layout, in_float32) else 0,
        largest=largest,
        prefetch=prefetch,
        saved=saved,
        start=start,
        in_float32=in_float32,
        overlaps=engine.overlaps(layout.num_ranks),
    )


def _reduces(config: Config, layout: Layout, in_float32: bool) -> bool:
    """Whether gradients go through DeepSpeed's bucket: on one rank only where engine/patches.py keeps it."""
    left_alone = layout.stage == 3 or config.engine.precision == "fp16" or (layout.stage == 2 and in_float32)
    return layout.num_ranks > 1 or left_alone


class _Phases(NamedTuple):
    """Bytes beside `Memory.rest`: at the start of the backward pass, at its end with the reduction, in the step."""

    backward: int
    reduce: int
    step: int


def _phases(s: _Sizes) -> _Phases:
    if s.layout.stage == 3:
        return _stage_3(s)
    if s.unsharded:
        return _unsharded(s)
    if not s.bucket:
        return _one_rank(s)
    if s.layout.stage == 1 and not s.overlaps:
        return _stage_1(s)
    return _through_buckets(s)


def _unsharded(s: _Sizes) -> _Phases:
    """ZeRO 1 in bf16 with several micro-batches."""
    pieces = min(s.p, _FALLBACK_ELEMENTS)
    # flattened in float32, and again in the type that is sent if that is another
    reduce = s.item * s.p + (4 + s.sent * (s.sent < 4)) * pieces
    return _Phases(s.item * s.p + s.saved + s.start, reduce, s.item * s.p)


def _one_rank(s: _Sizes) -> _Phases:
    """Gradients stay where they are; ZeRO 2 keeps the sums of micro-batches apart."""
    reduce = s.item * s.p + s.before * (s.layout.stage == 2)
    return _Phases(s.before + s.saved + s.start, reduce, (2 * s.item + 4) * s.part)


def _stage_1(s: _Sizes) -> _Phases:
    """Gradients are whole until the end of the backward pass. Own ones are copied, those of shared parameters whole."""
    backward = s.item * s.bucket + s.before + s.saved + s.start
    reduce = s.item * s.p + max(s.item * s.bucket + s.wide * s.filled, s.item * s.part) + s.item * s.shared
    return _Phases(backward, reduce, (2 * s.item + 4) * s.part + s.item * s.shared)


def _through_buckets(s: _Sizes) -> _Phases:
    """ZeRO 2, and ZeRO 1 that overlaps with the backward pass: gradients leave through buckets, as they come."""
    own = 4 * s.part if s.in_float32 else s.item * (s.part + s.shared)
    before = s.before if s.layout.stage == 1 else own * (s.layout.accumulation > 1)
    held = s.item * s.bucket * (1 + s.overlaps)
    joins = s.several_ranks or s.in_float32  # slices of several ranks, copied together
    joined, joined_next = ((s.item + s.wide) * n * joins for n in (s.filled, min(s.bucket, s.p - s.filled)))
    # Own gradients are allocated after the first reduction; with several micro-batches they exist since the first.
    reduced = own + joined + 4 * s.largest if s.in_float32 else max(joined, own + joined_next)
    sums = s.before * (s.p - s.filled) // s.p if s.layout.stage == 1 else 0
    step = own if s.in_float32 else s.item * s.shared + (2 * s.item + 4) * s.part
    return _Phases(held + before + s.saved + s.start, held + reduced + s.left + s.pending + sums, step)


def _stage_3(s: _Sizes) -> _Phases:
    """Weights are gathered for each pass, ahead of it, and gradients leave as they come."""
    gathered = s.item * min(s.p, _LIVE_ELEMENTS) if s.several_ranks else 0
    # Gathered pieces that are not split up yet: two; in a model of two pieces or less the second comes alone.
    joined_ahead = min(2 * s.prefetch, max(s.p - s.prefetch, min(s.p, s.prefetch)))
    ahead = s.item * joined_ahead if s.several_ranks else 0
    kept = 4 if s.in_float32 else s.item
    own = kept * s.filled // s.layout.num_ranks if kept != s.sent else 0  # beside what is joined
    reduce = s.sent * s.filled + own + s.left + s.pending + gathered * (s.p - s.filled) // s.p
    return _Phases(gathered + max(ahead, s.start) + s.saved, reduce, 4 * s.part + s.item * s.part * (not s.in_float32))

"""Every setting of a pretraining run except the model's, in one place: its name, type, unit and default.

Each section checks itself (`problems`), `Config` checks how they fit together and reports all problems at once.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from pretrain.config.checks import non_defaults, outside
from pretrain.config.model import ModelConfig
from pretrain.config.normalisation import Normalisation
from pretrain.config.sources import Reweight, Source, phases, training_data, weight_problems
from pretrain.errors import ConfigError

MAX_STEP = 10**10 - 1  # ten digits in the name of a checkpoint's folder; a larger number in a log is damage
EVAL_CROP_LIMITS = (0.1, 1)  # of data.eval_crop
_UNUSED_BY_CROP = {
    "random_resized": ("crop_share",),
    "inception": ("crop_share",),
    "simple": ("crop_area", "crop_ratio", "crop_share", "antialias"),
    "squashed": ("crop_area", "crop_ratio"),
}
_STEPS = (0, 1 << 40)  # the least and the most of a number of steps that may be 0


@dataclass
class DataConfig:
    """What is trained on and how its images are seen."""

    train: Any = MISSING  # manifest.json of the training shards, or its folder; a mixture: [{path: A, weight: 3}, ...]
    reweight: list[Reweight] = field(default_factory=list)  # other weights of a mixture from later steps on
    join_classes: bool = False  # of a mixture: its classes are those of all sets together; false: the largest set's
    val: Path | None = None  # manifest of validation shards; null: the held-out samples, if any
    held_out: int = 0  # samples of `train` kept for validation, the same ones for every seed; needs val=null
    subset: int | None = None  # train on so many of the others: a random choice, the same for every seed; null: all
    order: Literal["auto", "permuted", "lanes"] = "auto"  # of samples; auto: lanes for remote shards (docs/data.md)
    global_batch: int = MISSING  # samples per step over all ranks; part of the recipe, never of the machine
    repeats: int = 1  # each image comes so many times in its step, augmented anew each time (DeiT: 3); 1: once
    crop: Literal["random_resized", "inception", "simple", "squashed"] = "random_resized"  # of torchvision, Google ...
    crop_area: tuple[float, float] = (0.08, 1.0)  # of a crop: share of the image's area; Google's code: 0.05 to 1
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)  # of a crop: width / height
    crop_share: float = 0.875  # squashed: side of the crop / side of the square that the whole image is resized to
    flip: float = 0.5  # probability of a horizontal flip; 0 for characters and other things that are not symmetric
    randaugment_layers: int = 0  # operations of RandAugment per image; 0: none
    randaugment_magnitude: float = 10.0  # of RandAugment's operations, in TensorFlow's scale of 0 to 10 and beyond
    three_augment: bool = False  # one of grey, solarize and blur for each image (DeiT III); not beside RandAugment
    color_jitter: float = 0.0  # brightness, contrast and saturation: factors of 1 - this to 1 + this; 0: none
    random_erasing: float = 0.0  # probability that a box of an image becomes noise (timm's mode pixel); 0: none
    mixup: float = 0.0  # p of mixup's Beta(p, p), one draw per step; 0: none
    cutmix: float = 0.0  # p of CutMix's Beta(p, p), one draw per step; with mixup too, a coin chooses; 0: none
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"  # of crops, and of timm's and transformers' evaluation
    antialias: bool = True  # when crops are made smaller; false: as Google's code
    eval_transform: Literal[
        "timm", "timm_squash", "timm_border", "vit", "big_vision", "fewshot", "transformers", "transformers_shortest"
    ] = "timm"  # see docs/data.md
    eval_crop: float = 0.875  # evaluation: side of the central crop / side of the resized image; vit has no crop
    # Input of the model: (x - mean) / std of pixels x in [0, 1], per channel. It belongs to the weights: those of
    # init_from must have been trained with the same. Google's code: [-1, 1]; many of timm's models: ImageNet's.
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # red, green, blue
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # red, green, blue
    max_bad_fraction: float = 0.001  # stop when more of all samples, or of recent ones, cannot be used (docs/data.md)
    strict_images: bool = False  # true: a JPEG that libjpeg warns about is a bad sample; false: reported, but used
    workers: int = 4  # loader processes per rank; 0 reads in the training process
    prefetch: int = 2  # steps that each loader process prepares ahead
    store: Path | None = None  # local folder for blocks of remote shards; null: the user's own in $TMPDIR, or /tmp
    store_gb: float = 32.0  # limit of that folder in 10^9 bytes; a set that fits is downloaded once

    def __post_init__(self) -> None:
        if self.train != MISSING:  # else the value is still to come
            self.train = training_data(self.train)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sets that are trained on: one, or those of a mixture."""
        return self.train if isinstance(self.train, tuple) else (Source(self.train),)

    @property
    def phases(self) -> list[tuple[int, list[float]]]:
        """The weights of the sources, with the step from which they apply."""
        return phases(self.sources, self.reweight)

    @property
    def is_mixture(self) -> bool:
        """Whether several sets are trained on."""
        return isinstance(self.train, tuple)

    @property
    def normalisation(self) -> Normalisation:
        """The model's input, as `to_float` makes it."""
        return Normalisation(tuple(self.mean), tuple(self.std))

    def problems(self) -> Iterator[str]:
        """Yields a sentence for each thing that is wrong with the section."""
        yield from self.normalisation.problems("data.")
        if self.val is not None and self.held_out:
            yield f"data.held_out ({self.held_out}) and data.val ({self.val}) are both set; choose one"
        alone = {"held_out": "set data.val", "subset": "lower their weights", "repeats": "set it to 1"}
        for name, instead in alone.items() if self.is_mixture else ():
            if (value := getattr(self, name)) not in (None, getattr(DataConfig, name)):
                yield f"data.{name} ({value}) needs a single set, but data.train names several: {instead}"
        if self.repeats > 1 and self.global_batch % self.repeats:
            near = self.global_batch // self.repeats * self.repeats or self.repeats
            yield f"data.global_batch ({self.global_batch}) is no multiple of data.repeats ({self.repeats}); try {near}"
        if self.join_classes and not self.is_mixture:
            yield "data.join_classes has no effect: data.train is one set"
        yield from weight_problems(self.sources, self.reweight)
        for name in ("crop_area", "crop_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high < float("inf"):
                yield f"data.{name} is ({low}, {high}), expected 0 < low <= high"
        if self.eval_transform == "vit" and self.eval_crop != DataConfig.eval_crop:
            yield f"data.eval_crop ({self.eval_crop}) has no effect: eval_transform=vit does not crop"
        for name, value in non_defaults(self):
            if name in _UNUSED_BY_CROP[self.crop]:
                yield f"data.{name} ({value}) has no effect: crop={self.crop} does not use it"
        if self.crop_area[1] > 1:
            yield f"data.crop_area is ({self.crop_area[0]}, {self.crop_area[1]}); an image has no more than 1.0"
        yield from outside(
            self, "data", global_batch=(1, 1 << 24), held_out=(0, 1 << 40), flip=(0, 1), eval_crop=EVAL_CROP_LIMITS
        )
        yield from outside(self, "data", subset=(1, 1 << 40), max_bad_fraction=(0, 1), workers=(0, 256))
        yield from outside(self, "data", prefetch=(1, 256), store_gb=(1e-3, 1e6), repeats=(1, 256), crop_share=(0.1, 1))
        yield from outside(self, "data", randaugment_layers=(0, 16), randaugment_magnitude=(0, 30))
        if self.three_augment and self.randaugment_layers:
            yield (
                f"data.three_augment and data.randaugment_layers ({self.randaugment_layers}) are both set: "
                "each takes the other's place; choose one"
            )
        yield from outside(self, "data", color_jitter=(0, 10), random_erasing=(0, 1), mixup=(0, 1e3), cutmix=(0, 1e3))


@dataclass
class OptimConfig:
    """Optimizer, learning rate, averages."""

    name: Literal["adamw", "sgd", "lion", "lamb"] = "adamw"  # lamb: timm's and apex's, for large batches
    lr: float = MISSING  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam's two moments; Lion: of its update and of its momentum
    eps: float = 1e-8  # adamw, lamb: added to the root of the second moment
    momentum: float = 0.9  # sgd: m = momentum * m + gradient
    moment_dtype: Literal["fp32", "bf16"] = "fp32"  # of the first moment; bf16: rounded as in big_vision
    weight_decay: float = 0.0  # torch's convention (times lr), on kernels only; big_vision's wd / lr (docs/training.md)
    head_decay_multiplier: float = 1.0  # of the head's kernel: Scaling ViT decays it 100 times as much
    layer_decay: float = 1.0  # a layer's rate is this times the next one's (BEiT, MAE: 0.65 to 0.75); 1: all alike
    clip_norm: float = 1.0  # global gradient norm is clipped to this; 0: no clipping
    schedule: Literal["cosine", "linear", "rsqrt", "constant", "stair"] = "cosine"  # decay after the warm-up
    warmup_steps: int = 0  # the rate rises linearly from 0 in this many steps
    cooldown_steps: int = 0  # the rate falls linearly to 0 in the last steps, whatever the schedule; constant: WSD
    end_lr: float = 0.0  # cosine, linear: the rate at the last step (timm's min_lr; vision_transformer: 1e-5)
    power: float = 1.0  # linear: of the remaining share, (1 - progress) ^ power
    timescale_steps: int = 10_000  # rsqrt: lr / sqrt(1 + (max(step, warmup) + shift - warmup) / timescale)
    shift_steps: int = 0  # rsqrt: see above; with more than 0 the peak is below lr
    stair_steps: list[int] = field(default_factory=list)  # stair: from each of these steps on ...
    stair_multipliers: list[float] = field(default_factory=list)  # ... the rate is lr times this
    average_decay: float = 0.0  # Polyak average = decay * average + (1 - decay) * weights each step; 0: none

    def problems(self) -> Iterator[str]:
        """Yields a sentence for each thing that is wrong with the section."""
        yield from outside(self, "optim", lr=(0, 1e3), end_lr=(0, 1e3), weight_decay=(0, 1e3), clip_norm=(0, 1e9))
        yield from outside(self, "optim", warmup_steps=_STEPS, cooldown_steps=_STEPS, shift_steps=_STEPS, eps=(0, 1))
        yield from outside(self, "optim", timescale_steps=(1, 1 << 40), power=(0.01, 100), layer_decay=(0.01, 1))
        yield from outside(self, "optim", head_decay_multiplier=(0, 1e4), average_decay=(0, 0.9999999))
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            yield f"optim.betas is {tuple(self.betas)}, momentum {self.momentum}, expected numbers in 0 <= beta < 1"
        uses = (
            ("schedule", ("cosine", "linear"), ("end_lr",)),
            ("schedule", ("linear",), ("power",)),
            ("schedule", ("rsqrt",), ("timescale_steps", "shift_steps")),
            ("schedule", ("stair",), ("stair_steps", "stair_multipliers")),
            ("name", ("adamw", "lion", "lamb"), ("betas",)),
            ("name", ("adamw", "lamb"), ("eps",)),
            ("name", ("sgd",), ("momentum",)),
        )
        changed = dict(non_defaults(self))
        for key, users, names in uses:
            for name in names:
                if getattr(self, key) not in users and name in changed:
                    those = " and ".join(users).replace(" and ", ", ", max(len(users) - 2, 0))
                    told = f"optim.{name} ({changed[name]}) is used by {those} only"
                    yield f"{told}, not by optim.{key}={getattr(self, key)}"
        if "head_decay_multiplier" in changed and not self.weight_decay:
            yield f"optim.head_decay_multiplier ({self.head_decay_multiplier}) has no effect: optim.weight_decay is 0"
        increasing = all(a < b for a, b in zip(self.stair_steps, self.stair_steps[1:]))
        if len(self.stair_steps) != len(self.stair_multipliers) or not increasing:
            yield (
                f"optim.stair_steps {self.stair_steps} and stair_multipliers {self.stair_multipliers}: expected "
                "rising steps and as many multipliers"
            )
        if any(not 0 <= multiplier < float("inf") for multiplier in self.stair_multipliers):
            yield f"optim.stair_multipliers is {self.stair_multipliers}, expected numbers from 0 on"
        if self.name == "lion" and self.betas == (0.9, 0.999):
            yield "optim.betas is Adam's (0.9, 0.999); Lion's are (0.9, 0.99): set optim.betas"
        if self.name == "lamb" and not self.weight_decay:
            yield "optim.name=lamb adapts the steps of what decays, and optim.weight_decay is 0: set it, or name=adamw"


@dataclass
class EngineConfig:
    """Precision, sharding and other machinery that changes no recipe."""

    zero_stage: int = 1  # 1: shards optimizer state; 2: and gradients; 3: and weights. 0 is refused (wrong in bf16)
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and activations; master weights are always fp32
    reduce_dtype: Literal["precision", "fp32"] = "precision"  # of sums over ranks; fp32: more exact, twice bf16's bytes
    overlap_reduction: bool = False  # sum beside the backward pass (docs/performance.md); not yet tried on GPUs
    max_micro_batch_size: int | None = None  # images per rank and forward pass, at most; null: as many as the GPU holds
    compile: Literal["auto", True, False, "max-autotune"] = "auto"  # each block; auto: on GPUs, if it can, not ZeRO 3
    deterministic: bool = False  # on GPUs, kernels whose sums have one order, for more than 256 tokens; slower
    fp8: bool = False  # train with products of the blocks in fp8, by torchao, from Ada on (docs/performance.md)
    checkpoint_activations: bool = False  # recompute each block in the backward pass: less memory, about 30 % slower
    timeout_s: int = 600  # a collective that takes longer fails the run instead of hanging it
    watchdog_s: int = 300  # a rank silent for longer than this, and than 5 times its usual, is ended (76); 0: never

    def compiles(self, *, on_gpu: bool, able: bool = True, stage: int | None = None) -> bool:
        """Returns whether blocks are compiled; able: this machine can; stage: instead of zero_stage.

        With "auto" not under ZeRO 3, whose hooks cut each block into pieces that are compiled over and over.
        """
        stage = self.zero_stage if stage is None else stage
        return (on_gpu and able and stage < 3) if self.compile == "auto" else bool(self.compile)

    def overlaps(self, num_ranks: int) -> bool:
        """Returns whether gradients are summed over ranks during the backward pass: one rank has nothing to sum."""
        return self.overlap_reduction and num_ranks > 1

    def problems(self) -> Iterator[str]:
        """Yields a sentence for each thing that is wrong with the section."""
        if self.zero_stage == 0:
            yield (
                "engine.zero_stage is 0: DeepSpeed's stage 0 decays weights before the first step in bf16 and lets "
                "one NaN batch poison the weights; use 1, also on a single GPU"
            )
        elif self.zero_stage not in (1, 2, 3):
            yield f"engine.zero_stage is {self.zero_stage}, expected 1, 2 or 3"
        if self.fp8 and (self.precision != "bf16" or self.zero_stage == 3):
            yield (
                f"engine.fp8 needs engine.precision=bf16 and zero_stage 1 or 2, not {self.precision} with "
                f"{self.zero_stage}"
            )
        yield from outside(self, "engine", max_micro_batch_size=(1, 1 << 20))
        yield from outside(self, "engine", timeout_s=(1, 86_400), watchdog_s=(0, 86_400))


@dataclass
class EvalConfig:
    """What is evaluated during training."""

    every_steps: int = 1000  # evaluate on the validation set after this many steps, and at the end; 0: never
    batch_size: int = 256  # images per rank and forward pass
    fewshot_train: Path | None = None  # manifest of labelled images, of any classes, to draw shots from; null: none
    fewshot_test: Path | None = None  # manifest of images of the same classes, to test the regressions on
    fewshot_shots: list[int] = field(default_factory=lambda: [1, 5, 10, 25])  # images per class, of each regression
    fewshot_every_steps: int = 0  # after this many steps, and at the end; 0: as often as every_steps
    knn: bool = False  # also score nearest neighbours, on the same features

    @property
    def features_every_steps(self) -> int:
        """Every how many steps, and at the end, few-shot accuracy is measured; 0: never."""
        return (self.fewshot_every_steps or self.every_steps) if self.fewshot_train else 0

    def problems(self) -> Iterator[str]:
        """Yields a sentence for each thing that is wrong with the section."""
        yield from outside(self, "evaluation", every_steps=_STEPS, fewshot_every_steps=_STEPS, batch_size=(1, 1 << 20))
        if (self.fewshot_train is None) != (self.fewshot_test is None):
            there, absent = ("train", "test") if self.fewshot_train else ("test", "train")
            yield f"evaluation.fewshot_{there} is set but fewshot_{absent} is null; few-shot needs both"
        if self.knn and self.fewshot_train is None:
            yield "evaluation.knn needs images: set evaluation.fewshot_train and fewshot_test"
        if self.fewshot_every_steps and self.fewshot_train is None:
            yield f"evaluation.fewshot_every_steps ({self.fewshot_every_steps}) has no effect: fewshot_train is null"
        if self.fewshot_train is not None and not self.features_every_steps:
            yield "evaluation.fewshot_train is set but would never be used: set every_steps or fewshot_every_steps"
        shots = self.fewshot_shots
        if not shots or min(shots) < 1 or sorted(set(shots)) != shots:
            yield f"evaluation.fewshot_shots is {shots}, expected rising numbers from 1 on"


@dataclass
class LogConfig:
    """What is written down, and how often."""

    every_steps: int = 50  # steps between two lines of the console, metrics.jsonl and TensorBoard
    layers_every_steps: int = 0  # norms of each layer, largest attention logits (docs/training.md); 0: never
    wandb_project: str | None = None  # of Weights & Biases, for the same numbers (docs/training.md); null: none
    wandb_entity: str | None = None  # user or team there; null: the account's own
    samples: bool = False  # append the (epoch, index) of every sample to samples-RANK.jsonl: proof of order, 20 B each

    def problems(self) -> Iterator[str]:
        """Yields a sentence for each thing that is wrong with the section."""
        yield from outside(self, "log", every_steps=(1, 1 << 40), layers_every_steps=_STEPS)
        if self.wandb_entity is not None and self.wandb_project is None:
            yield f"log.wandb_entity ({self.wandb_entity}) has no effect: log.wandb_project is null"


@dataclass
class ProfileConfig:
    """A trace of some steps (docs/performance.md), on rank 0, in the run's folder."""

    at_step: int = 0  # trace from this step on, as the log counts them; 0: none
    num_steps: int = 3  # steps of a trace; each takes some 10 MB for a large model

    def problems(self) -> Iterator[str]:
        """Yields a sentence for each thing that is wrong with the section."""
        yield from outside(self, "profile", at_step=_STEPS, num_steps=(1, 100))


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every_steps: int = 1000  # save after this many steps, at the end, and when asked to stop
    behind: bool = True  # write beside the next steps, from a copy in host memory; false: training waits for the disk
    keep_last: int = 2  # newest checkpoints kept; at least 2, so that one may turn out damaged
    keep_every_steps: int = 0  # checkpoints of these steps are kept for ever; 0: none
    keep_best: bool = False  # also keep the one with the best validation top-1, of those saved at an evaluation
    copy_to: str | None = None  # second place for copies, a folder or a URL of fsspec (docs/reliability.md); null: none

    def problems(self) -> Iterator[str]:
        """Yields a sentence for each thing that is wrong with the section."""
        if self.copy_to is not None and (not self.copy_to.strip("/") or any(mark in self.copy_to for mark in "@?#")):
            yield (
                "checkpoint.copy_to is empty or contains one of @ ? #, which set off secrets in a URL; expected a "
                "folder or a URL such as s3://bucket/folder, credentials in the environment"
            )
        yield from outside(self, "checkpoint", every_steps=(1, 1 << 40), keep_every_steps=_STEPS)
        yield from outside(self, "checkpoint", keep_last=(2, 1 << 20))


@dataclass
class Config:
    """A pretraining run: what load_config hands on, checked as a whole."""

    name: str = MISSING  # of the run; its folder is output/name
    output: Path = Path("runs")  # folder of all runs
    seed: int = 0  # of initialisation, order of samples, augmentation and dropout
    total_steps: int = MISSING  # optimizer steps of the whole run; a step is one global batch
    total_epochs: float | None = None  # in place of total_steps: passes over the training images (docs/training.md)
    loss: Literal["softmax", "sigmoid"] = "softmax"  # cross-entropy; sigmoid: summed over classes (ImageNet-21k, JFT)
    label_smoothing: float = 0.0  # share of each target that is spread evenly over all classes
    label_threshold: float | None = None  # sigmoid: mixed labels of a larger share are 1, others 0 (DeiT III: 0)
    init_from: Path | None = None  # start from these weights: anything that load_model reads, at model.image_size
    init_new_head: bool = False  # with init_from: leave the head at its initial values, e.g. for other classes
    branch_from: Path | None = None  # go on from another run's checkpoint, optimizer state and all: to cool it down
    model: ModelConfig = field(default_factory=ModelConfig)  # what is trained
    data: DataConfig = field(default_factory=DataConfig)  # on what
    optim: OptimConfig = field(default_factory=OptimConfig)  # how
    engine: EngineConfig = field(default_factory=EngineConfig)  # with which machinery
    evaluation: EvalConfig = field(default_factory=EvalConfig)  # validation during training
    log: LogConfig = field(default_factory=LogConfig)  # what is written down
    profile: ProfileConfig = field(default_factory=ProfileConfig)  # where the time of some steps goes
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # what is kept

    def __post_init__(self) -> None:
        problems = [problem for part in _parts(self) for problem in part.problems()]
        by_epochs = self.total_epochs is not None and self.total_steps == 0  # until the data's size is known
        if self.total_epochs is not None and not 0 < self.total_epochs <= 1e6:
            problems.append(f"total_epochs is {self.total_epochs}, expected a number above 0, at most 1e6")
        if self.total_epochs is not None and self.data.is_mixture:  # each of its sets has passes of its own
            problems.append("total_epochs needs a single set, but data.train is a mixture; give total_steps")
        problems += [] if by_epochs else [*outside(self, "", total_steps=(1, MAX_STEP)), *self._schedule_problems()]
        problems += outside(self, "", seed=(0, (1 << 63) - 1), label_smoothing=(0, 0.99), label_threshold=(0, 0.99))
        if self.label_threshold is not None and (self.loss != "sigmoid" or self.label_smoothing):
            now = f"now loss={self.loss}, label_smoothing={self.label_smoothing:g}"
            problems.append(f"label_threshold needs loss=sigmoid and label_smoothing=0; {now}: or set it to null")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            problems.append(f"name is {self.name!r}; it names a folder: letters, digits, '.', '_' and '-'")
        if self.init_from is not None and self.branch_from is not None:
            both = f"init_from ({self.init_from}) and branch_from ({self.branch_from})"
            problems.append(f"{both} are both set; choose one")
        if self.init_new_head and self.init_from is None:
            problems.append("init_new_head needs init_from, which is null")
        if self.engine.fp8 and not problems:  # one may be that the model's name is unknown
            problems += self.model.fp8_problems()
        if problems:
            raise ConfigError(*problems)

    def _schedule_problems(self) -> Iterator[str]:
        if self.optim.warmup_steps > self.total_steps:
            yield (
                f"optim.warmup_steps ({self.optim.warmup_steps}) is larger than total_steps ({self.total_steps}); "
                "the peak learning rate would never be reached"
            )
        elif self.optim.warmup_steps + self.optim.cooldown_steps > self.total_steps:
            yield (
                f"optim.warmup_steps ({self.optim.warmup_steps}) and cooldown_steps ({self.optim.cooldown_steps}) "
                f"overlap: total_steps is {self.total_steps}"
            )
        if self.optim.stair_steps and self.optim.stair_steps[-1] >= self.total_steps:
            yield (
                f"optim.stair_steps {self.optim.stair_steps} go beyond the last of total_steps ({self.total_steps}); "
                "remove what is never reached"
            )


def _parts(config: Config) -> list[Any]:
    return [getattr(config, f.name) for f in fields(config) if is_dataclass(getattr(config, f.name))]

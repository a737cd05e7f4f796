"""Helps on the command line: other programs' names of settings, the override at fault, and every setting with its
comment."""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING as DATACLASS_MISSING
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from pretrain.config.sections import Config
from pretrain.config.values import short

# A setting -> its names in timm's train.py, big_vision, open_clip, Hugging Face, DeiT and torchvision
# (docs/coming_from.md).
_CALLED_ELSEWHERE = {
    "optim.lr": "lr learning_rate",
    "optim.lr, of the whole batch: a rate for 256 images times data.global_batch / 256": "base_lr blr lr_base",
    "optim.weight_decay": "weight_decay",
    "optim.weight_decay, torch's: big_vision's wd / lr": "wd",
    "data.global_batch, images per step of all ranks together": "batch_size batch",
    "data.global_batch": "global_batch_size",
    "engine.max_micro_batch_size, and data.global_batch for all ranks together": "per_device_train_batch_size",
    "engine.max_micro_batch_size; the accumulation follows from data.global_batch": (
        "accum_freq accum_steps grad_accum_steps gradient_accumulation_steps"
    ),
    "total_epochs (or total_steps)": "epochs num_epochs num_train_epochs",
    "total_steps (or total_epochs)": "steps max_steps",
    "optim.warmup_steps": "warmup warmup_steps",
    "optim.warmup_steps, in steps": "warmup_epochs",
    "optim.name": "opt optimizer",
    "optim.betas": "opt_betas",
    "optim.eps": "opt_eps",
    "optim.momentum": "momentum",
    "optim.schedule": "sched lr_scheduler lr_scheduler_type",
    "optim.end_lr": "min_lr",
    "optim.layer_decay": "layer_decay",
    "optim.clip_norm": "clip_grad grad_clip_norm max_grad_norm",
    "optim.average_decay": "model_ema_decay ema_decay",
    "model.name": "arch model_name",
    "model.image_size": "img_size input_size resolution",
    "model.num_classes": "num_classes",
    "model.dropout; in our own ViTs after every dense layer, not before the head alone": "drop drop_rate",
    "model.drop_path": "drop_path_rate",
    "model.drop_path_rule=uniform": "drop_path_uniform uniform_drop_path",
    "model.layer_scale": "layer_scale layerscale init_values init_scale layer_scale_init_value ls_init_value",
    "model.pooling": "gp",
    "label_smoothing": "smoothing",
    "label_threshold": "bce_target_thresh",
    "init_from=timm:NAME": "pretrained",
    "init_from": "initial_checkpoint model_init finetune",
    "nothing: the same command goes on by itself": "resume",
    "data.train": "data_dir train_data",
    "data.val": "val_data",
    "data.mean": "mean",
    "data.std": "std",
    "data.eval_crop": "crop_pct",
    "data.interpolation": "train_interpolation",
    "data.repeats": "aug_repeats repeated_aug",
    "data.crop_area": "scale",
    "data.crop_ratio": "ratio",
    "data.flip": "hflip",
    "data.randaugment_layers and data.randaugment_magnitude": "aa",
    "data.color_jitter": "color_jitter",
    "data.random_erasing": "reprob",
    "data.crop=simple": "src",
    "data.mixup": "mixup_alpha",
    "data.cutmix": "cutmix_alpha",
    "data.workers": "num_workers workers",
    "engine.precision": "amp amp_dtype",
    "engine.precision=bf16": "bf16",
    "engine.precision=fp16": "fp16",
    "engine.compile": "torchcompile",
    "engine.checkpoint_activations": "grad_checkpointing gradient_checkpointing",
    "log.every_steps": "log_interval log_every_n_steps log_training_steps",
    "log.wandb_project": "log_wandb wandb_project wandb_project_name",
    "log.wandb_project; TensorBoard's files are always written": "report_to",
    "checkpoint.every_steps": "ckpt_steps save_steps",
    "checkpoint.keep_last": "save_total_limit checkpoint_hist",
    "checkpoint.keep_every_steps": "keep_ckpt_steps",
    "evaluation.every_steps": "eval_steps",
    "output, the folder of all runs, and name": "output_dir",
    "output": "logs",
    "name": "experiment",
}
OTHER_NAMES = {other: here for here, others in _CALLED_ELSEWHERE.items() for other in others.split()}


def other_name(key: str) -> str | None:
    """Returns what a key of another program is called here; None when it is not known."""
    plain = key.lower().replace("-", "_")
    return OTHER_NAMES.get(plain) or OTHER_NAMES.get(plain.rpartition(".")[2])


def option_hint(option: str) -> str:
    """Returns one line for a word that looks like an option, like --optim.lr=1 or --epochs: how it is written here."""
    key, _, value = option.lstrip("-").partition("=")
    meant = other_name(key) if "." not in key else None
    if meant is None:
        return f"settings are written without dashes: {key}={value or 'VALUE'}"
    return f"settings are written KEY=VALUE, and here this one is {meant}"


def by_source(problems: Sequence[str], source: str, overrides: Sequence[str]) -> str:
    """Puts before each problem the overrides whose keys it names, or else the file."""
    last = {text.partition("=")[0]: short(text) for text in overrides}
    told: dict[str, list[str]] = {}
    for problem in problems:
        given = [text for key, text in last.items() if _names(problem, key)]
        told.setdefault(", ".join(given) or source, []).append(problem)
    return "; ".join(f"{origin}: {'; '.join(problems)}" for origin, problems in told.items())


def _names(problem: str, key: str) -> bool:
    """Whether a sentence is about a key; if it begins with the key's section, the key's last part is enough."""
    section, dot, last = key.rpartition(".")
    whole, last = re.escape(key), re.escape(last)
    if not dot:
        return bool(re.search(rf"(?<![\w.]){whole}(?= is |: | \(| needs )", problem))  # "name" may be a plain word, too
    alone = rf"(?:and |, |: |which ){last}(?!\w)|(?<![\w.]){last}="
    return bool(re.search(rf"(?<![\w.]){whole}(?!\w)", problem)) or (
        problem.startswith(section) and bool(re.search(alone, problem))
    )


def is_open(text: str) -> bool:
    """Returns whether an override ends inside a list or a section, as when a shell has split it at a space."""
    value = text.partition("=")[2]
    return any(value.startswith(left) and value.count(left) > value.count(right) for left, right in ("[]", "{}"))


def uncut(text: str, following: Sequence[str]) -> str:
    """Returns, in quotes, the override that a shell split at spaces; "" if none of the words completes it."""
    for word in following:
        if not is_open(text):
            break
        text = f"{text} {word}"
    return "" if is_open(text) else f"'{short(text)}'"


def settings() -> Iterator[tuple[str, str, str]]:
    """Yields key, default or choices, and comment of every setting, section by section."""
    here, comments = Path(__file__).parent, {}
    for page in ("model", "sections"):
        comments |= _comments((here / f"{page}.py").read_text(encoding="utf-8"))

    def of(section: type, prefix: str) -> Iterator[tuple[str, str, str]]:
        hints = get_type_hints(section)
        for f in fields(section):
            if is_dataclass(hints[f.name]):
                yield from of(hints[f.name], f"{f.name}.")
            else:
                default = f.default if f.default_factory is DATACLASS_MISSING else f.default_factory()
                yield prefix + f.name, _shown(default, hints[f.name]), comments[section.__name__, f.name]

    yield from of(Config, "")


def _shown(default: Any, hint: Any) -> str:
    if default == MISSING:
        return "(must be given)"
    others = get_args(hint) if get_origin(hint) is Literal else ()
    values = [default, *(choice for choice in others if choice != default)]
    return "|".join(str(value) if isinstance(value, (str, Path)) else json.dumps(value) for value in values)


def _comments(source: str) -> dict[tuple[str, str], str]:
    """The comment at the end of each field's last line, by class and field."""
    lines, found = source.splitlines(), {}
    for section in ast.parse(source).body:
        if isinstance(section, ast.ClassDef):
            for node in section.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    comment = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")[2]
                    found[section.name, node.target.id] = comment
    return found


def settings_help() -> str:
    """Returns every setting with its default and its comment, one a line, sections apart."""
    lines, before = ["settings (KEY=VALUE; a file names only what differs):"], ""
    for key, default, comment in settings():
        section = key.rpartition(".")[0]
        lines += [""] if section != before else []
        lines.append(f"  {key}={default}  # {comment}")
        before = section
    return "\n".join(lines)

"""What a person meant: settings by the names that other programs give them, the override at fault, and every setting
with its comment."""

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

# As timm's train.py, big_vision, open_clip, Hugging Face, DeiT and torchvision call it -> here (docs/coming_from.md).
OTHER_NAMES = {
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "blr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "wd": "optim.weight_decay",
    "batch_size": "data.global_batch, images per step of all ranks together",
    "batch": "data.global_batch, images per step of all ranks together",
    "global_batch_size": "data.global_batch",
    "per_device_train_batch_size": "engine.max_micro_batch_size, and data.global_batch for all ranks together",
    "accum_freq": "engine.max_micro_batch_size; the accumulation follows from data.global_batch",
    "accum_steps": "engine.max_micro_batch_size; the accumulation follows from data.global_batch",
    "grad_accum_steps": "engine.max_micro_batch_size; the accumulation follows from data.global_batch",
    "gradient_accumulation_steps": "engine.max_micro_batch_size; the accumulation follows from data.global_batch",
    "epochs": "total_epochs (or total_steps)",
    "num_epochs": "total_epochs (or total_steps)",
    "num_train_epochs": "total_epochs (or total_steps)",
    "steps": "total_steps (or total_epochs)",
    "max_steps": "total_steps (or total_epochs)",
    "warmup": "optim.warmup_steps",
    "warmup_steps": "optim.warmup_steps",
    "warmup_epochs": "optim.warmup_steps",
    "opt": "optim.name",
    "optimizer": "optim.name",
    "opt_betas": "optim.betas",
    "opt_eps": "optim.eps",
    "momentum": "optim.momentum",
    "sched": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "min_lr": "optim.end_lr",
    "layer_decay": "optim.layer_decay",
    "clip_grad": "optim.clip_norm",
    "grad_clip_norm": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "model_ema_decay": "optim.average_decay",
    "ema_decay": "optim.average_decay",
    "arch": "model.name",
    "model_name": "model.name",
    "img_size": "model.image_size",
    "input_size": "model.image_size",
    "resolution": "model.image_size",
    "num_classes": "model.num_classes",
    "drop": "model.dropout",
    "drop_rate": "model.dropout",
    "drop_path_rate": "model.drop_path",
    "gp": "model.pooling",
    "smoothing": "label_smoothing",
    "pretrained": "init_from=timm:NAME",
    "initial_checkpoint": "init_from",
    "model_init": "init_from",
    "finetune": "init_from",
    "resume": "nothing: the same command goes on by itself",
    "data_dir": "data.train",
    "train_data": "data.train",
    "val_data": "data.val",
    "mean": "data.mean",
    "std": "data.std",
    "crop_pct": "data.eval_crop",
    "train_interpolation": "data.interpolation",
    "scale": "data.crop_area",
    "ratio": "data.crop_ratio",
    "hflip": "data.flip",
    "aa": "data.randaugment_layers and data.randaugment_magnitude",
    "color_jitter": "data.color_jitter",
    "reprob": "data.random_erasing",
    "src": "data.crop=simple",
    "mixup_alpha": "data.mixup",
    "cutmix_alpha": "data.cutmix",
    "num_workers": "data.workers",
    "workers": "data.workers",
    "amp": "engine.precision",
    "amp_dtype": "engine.precision",
    "bf16": "engine.precision=bf16",
    "fp16": "engine.precision=fp16",
    "torchcompile": "engine.compile",
    "grad_checkpointing": "engine.checkpoint_activations",
    "gradient_checkpointing": "engine.checkpoint_activations",
    "log_interval": "log.every_steps",
    "log_every_n_steps": "log.every_steps",
    "log_training_steps": "log.every_steps",
    "log_wandb": "log.wandb_project",
    "wandb_project": "log.wandb_project",
    "wandb_project_name": "log.wandb_project",
    "report_to": "log.wandb_project; TensorBoard's files are always written",
    "ckpt_steps": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "checkpoint_hist": "checkpoint.keep_last",
    "keep_ckpt_steps": "checkpoint.keep_every_steps",
    "eval_steps": "evaluation.every_steps",
    "output_dir": "output, the folder of all runs, and name",
    "logs": "output",
    "experiment": "name",
}


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
    """Says each problem behind the overrides whose keys it names, the others behind the file."""
    last = {text.partition("=")[0]: short(text) for text in overrides}
    told: dict[str, list[str]] = {}
    for problem in problems:
        given = [text for key, text in last.items() if _names(problem, key)]
        told.setdefault(", ".join(given) or source, []).append(problem)
    return "; ".join(f"{origin}: {'; '.join(problems)}" for origin, problems in told.items())


def _names(problem: str, key: str) -> bool:
    """Whether a sentence is about a key; one that begins with the key's section may give its last part alone."""
    section, dot, last = key.rpartition(".")
    whole, last = re.escape(key), re.escape(last)
    if not dot:
        return bool(re.search(rf"(?<![\w.]){whole}(?= is |: | \(| needs )", problem))  # name may be a word, too
    alone = rf"(?:and |, |: |which ){last}(?!\w)|(?<![\w.]){last}="
    return bool(re.search(rf"(?<![\w.]){whole}(?!\w)", problem)) or (
        problem.startswith(section) and bool(re.search(alone, problem))
    )


def is_open(text: str) -> bool:
    """Returns whether an override ends within a list or a section, as where a shell has cut it at a blank."""
    value = text.partition("=")[2]
    return any(value.startswith(left) and value.count(left) > value.count(right) for left, right in ("[]", "{}"))


def uncut(text: str, following: Sequence[str]) -> str:
    """Returns the override before a shell cut it at its blanks, in quotes; "" where none of the words ends it."""
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
    if get_origin(hint) is Literal:
        return "|".join(map(_word, [default, *(choice for choice in get_args(hint) if choice != default)]))
    if isinstance(default, tuple):
        default = list(default)
    return str(default) if isinstance(default, (str, Path)) else json.dumps(default)


def _word(choice: Any) -> str:
    return json.dumps(choice) if isinstance(choice, bool) else str(choice)


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

"""What every input of a target has in common, in order, and what takes far longer than what is read: done once.

Readers are replaced, in this process alone, by themselves with their first answers kept. What an input changes is read
as ever.
"""

from collections.abc import Callable, Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import timm.layers.weight_init
import torch

from pretrain.audit import data as audit_data
from pretrain.audit import folder as audit_folder
from pretrain.audit import records as audit_records
from pretrain.data.manifest import Manifest
from pretrain.finetune import scores
from pretrain.models import card, timm_folder
from pretrain.models import weights as models_weights
from pretrain.report import runs as report_runs
from pretrain.report import target as report_target
from pretrain.train import resuming

KEPT = 8  # answers of each reader: those to good inputs, which come first


def kept(function: Callable[..., Any], key: Callable[..., Hashable]) -> Callable[..., Any]:
    """Returns a function that answers as `function` does, and remembers its first answers by `key` of what is given."""
    answers: dict[Hashable, Any] = {}

    def answer(*given: Any) -> Any:
        if (name := key(*given)) in answers:
            return answers[name]
        made = function(*given)
        if len(answers) < KEPT:
            answers[name] = made
        return made

    return answer


@cache
def spare_configs() -> None:
    """A config in order is read once: omegaconf takes 50 ms for one, ten times as long as all the rest."""
    timm_folder.model_from_dict = kept(timm_folder.model_from_dict, lambda values, _: repr(values))
    models_weights.config_from_dict = kept(models_weights.config_from_dict, lambda values, _: repr(values))
    audit_records.config_from_dict = kept(audit_records.config_from_dict, lambda values, _: repr(values))
    audit_folder.load_config = kept(audit_folder.load_config, Path.read_bytes)
    report_runs.load_config = kept(report_runs.load_config, Path.read_bytes)
    report_target.load_config = kept(report_target.load_config, lambda path, words: (path.read_bytes(), *words))
    scores.load_config = kept(scores.load_config, Path.read_bytes)
    card.config_from_dict = kept(card.config_from_dict, lambda values, _: repr(values))
    resuming.config_from_dict = kept(resuming.config_from_dict, lambda values, _: repr(values))


@cache
def spare_initial_values() -> None:
    """Models get no initial values, which weights then replace: on "meta", where they are built first, it is slow."""
    torch.nn.init.kaiming_uniform_ = torch.nn.init.uniform_ = lambda tensor, *_, **__: tensor
    timm.layers.weight_init._trunc_normal_ = lambda tensor, *_, **__: tensor


@cache
def spare_samples() -> None:
    """A sample of a data set, which no input of an audit changes, is read once, not in each of its steps."""
    read, reasons = audit_data._reasons, {}

    def remembered(manifest: Manifest, indices: list[int]) -> Iterator[str | None]:
        for index in indices:
            if (manifest.path, index) not in reasons:
                reasons[manifest.path, index] = next(read(manifest, [index]))
            yield reasons[manifest.path, index]

    audit_data._reasons = remembered

"""The configuration of a pretraining run: `load_config` returns one plain `Config`.

A YAML file names only what differs from the defaults; `key=value` overrides come last. Settings are in sections.py,
the model's in model.py. Nothing heavier than omegaconf is imported: tools read configs without torch.
"""

from pretrain.config.changes import BRANCH_MAY_CHANGE, MAY_CHANGE, resume_differences
from pretrain.config.checks import non_defaults
from pretrain.config.hints import option_hint, settings_help
from pretrain.config.model import (
    HYBRIDS,
    MAX_CLASSES,
    MAX_DEPTH,
    MAX_IMAGE_SIZE,
    MAX_WIDTH,
    TIMM_HYBRIDS,
    TIMM_SIZES,
    VIT_SHAPES,
    ModelConfig,
    model_name,
    named_model,
    stride_of,
)
from pretrain.config.normalisation import MINUS_ONE_TO_ONE, Normalisation
from pretrain.config.reading import (
    choices_of,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    load_config,
    model_from_dict,
)
from pretrain.config.sections import (
    EVAL_CROP_LIMITS,
    MAX_STEP,
    Config,
    DataConfig,
    EngineConfig,
    OptimConfig,
)
from pretrain.config.sources import MAX_REWEIGHT_STEP, MAX_SOURCES, Source

__all__ = [
    "BRANCH_MAY_CHANGE",
    "EVAL_CROP_LIMITS",
    "HYBRIDS",
    "MAX_CLASSES",
    "MAX_DEPTH",
    "MAX_IMAGE_SIZE",
    "MAX_REWEIGHT_STEP",
    "MAX_SOURCES",
    "MAX_STEP",
    "MAX_WIDTH",
    "MAY_CHANGE",
    "MINUS_ONE_TO_ONE",
    "TIMM_HYBRIDS",
    "TIMM_SIZES",
    "VIT_SHAPES",
    "Config",
    "DataConfig",
    "EngineConfig",
    "ModelConfig",
    "Normalisation",
    "OptimConfig",
    "Source",
    "choices_of",
    "config_from_dict",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "model_from_dict",
    "model_name",
    "named_model",
    "non_defaults",
    "option_hint",
    "resume_differences",
    "settings_help",
    "stride_of",
]

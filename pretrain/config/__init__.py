"""The configuration of a pretraining run: `load_config` returns one plain `Config`.

A YAML file names only what differs from the defaults; `key=value` overrides come last. Settings are in sections.py,
the model's in model.py. Nothing heavier than omegaconf is imported: tools read configs without torch.
`X as X` is Python's way to say that a name is exported.
"""

from pretrain.config.changes import BRANCH_MAY_CHANGE as BRANCH_MAY_CHANGE
from pretrain.config.changes import MAY_CHANGE as MAY_CHANGE
from pretrain.config.changes import resume_differences as resume_differences
from pretrain.config.checks import non_defaults as non_defaults
from pretrain.config.hints import option_hint as option_hint
from pretrain.config.hints import settings_help as settings_help
from pretrain.config.model import HYBRIDS as HYBRIDS
from pretrain.config.model import MAX_CLASSES as MAX_CLASSES
from pretrain.config.model import MAX_DEPTH as MAX_DEPTH
from pretrain.config.model import MAX_IMAGE_SIZE as MAX_IMAGE_SIZE
from pretrain.config.model import MAX_WIDTH as MAX_WIDTH
from pretrain.config.model import TIMM_HYBRIDS as TIMM_HYBRIDS
from pretrain.config.model import TIMM_SIZES as TIMM_SIZES
from pretrain.config.model import VIT_SHAPES as VIT_SHAPES
from pretrain.config.model import ModelConfig as ModelConfig
from pretrain.config.model import model_name as model_name
from pretrain.config.model import named_model as named_model
from pretrain.config.model import stride_of as stride_of
from pretrain.config.normalisation import MINUS_ONE_TO_ONE as MINUS_ONE_TO_ONE
from pretrain.config.normalisation import Normalisation as Normalisation
from pretrain.config.reading import choices_of as choices_of
from pretrain.config.reading import config_from_dict as config_from_dict
from pretrain.config.reading import config_to_dict as config_to_dict
from pretrain.config.reading import config_to_yaml as config_to_yaml
from pretrain.config.reading import load_config as load_config
from pretrain.config.reading import model_from_dict as model_from_dict
from pretrain.config.sections import EVAL_CROP_LIMITS as EVAL_CROP_LIMITS
from pretrain.config.sections import MAX_STEP as MAX_STEP
from pretrain.config.sections import Config as Config
from pretrain.config.sections import DataConfig as DataConfig
from pretrain.config.sections import OptimConfig as OptimConfig
from pretrain.config.sources import MAX_REWEIGHT_STEP as MAX_REWEIGHT_STEP
from pretrain.config.sources import MAX_SOURCES as MAX_SOURCES
from pretrain.config.sources import Source as Source

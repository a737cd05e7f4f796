"""total_epochs becomes total_steps as soon as the size of the training set is known."""

from dataclasses import replace

from pretrain.config import Config
from pretrain.data.manifest import load_manifest
from pretrain.data.order import order_of
from pretrain.errors import ConfigError


def in_steps(config: Config) -> Config:
    """Returns the config with total_steps computed from total_epochs; unchanged if it has no total_epochs.

    An epoch is one pass over data.train without data.held_out, or over data.subset; steps are rounded. A saved config
    has both, which must agree. Raises ConfigError when they do not, and where `order_of` does; UserError when the
    training set cannot be read.
    """
    if config.total_epochs is None:
        return config
    num_train = order_of(config, load_manifest(config.data.train).num_samples).num_train
    steps = max(1, round(config.total_epochs * num_train / config.data.global_batch))
    if config.total_steps not in (0, steps):
        raise ConfigError(
            f"total_steps is {config.total_steps}, but total_epochs ({config.total_epochs:g}) of {num_train:,} images "
            f"are {steps}; give one of them"
        )
    return replace(config, total_steps=steps)

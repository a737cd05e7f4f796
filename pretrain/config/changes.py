"""What a resumed run, or a run that branches off, may change."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pretrain.config.reading import config_to_dict, flatten
from pretrain.config.sections import CheckpointConfig, Config, EvalConfig, LogConfig, ProfileConfig

# All of these settings may change: none has a part in what a step computes.
_FREE_SECTIONS = {"evaluation": EvalConfig, "log": LogConfig, "profile": ProfileConfig, "checkpoint": CheckpointConfig}

# What a resumed run may change without becoming another run: where things lie, how often they are written, and how the
# same global batch is computed on the machine at hand. A longer total_steps is judged by `resume_differences`.
MAY_CHANGE = (
    "output",
    "total_epochs",  # total_steps, which they become, is compared
    "init_from",
    "branch_from",
    "data.train",  # what it names, and its weights, are compared with the checkpoint's
    "data.reweight",  # likewise
    "data.val",
    "data.order",  # the checkpoint's own order is compared with it
    "data.max_bad_fraction",
    "data.workers",
    "data.prefetch",
    "data.store",
    "data.store_gb",
    "engine.zero_stage",
    "engine.reduce_dtype",  # more ranks may need it
    "engine.overlap_reduction",
    "engine.max_micro_batch_size",
    "engine.compile",
    "engine.deterministic",
    "engine.checkpoint_activations",
    "engine.timeout_s",
    "engine.watchdog_s",
    *(f"{name}.{f.name}" for name, section in _FREE_SECTIONS.items() for f in fields(section)),
)

# What a run with branch_from may also change, against the run that it continues: its name, its length, its rates, and
# what a person turns down when a loss diverges.
BRANCH_MAY_CHANGE = (
    "name",
    "total_steps",
    "optim.lr",
    "optim.weight_decay",
    "optim.clip_norm",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.cooldown_steps",
    "optim.end_lr",
    "optim.power",
    "optim.timescale_steps",
    "optim.shift_steps",
    "optim.stair_steps",
    "optim.stair_multipliers",
)


def resume_differences(saved: dict[str, Any], config: Config, also_free: Sequence[str] = ()) -> list[str]:
    """Returns what forbids resuming a run of config `saved` with `config`, each as "key: was A, is B".

    also_free: keys that may differ besides MAY_CHANGE.
    """
    before, now = dict(flatten(saved)), dict(flatten(config_to_dict(config)))
    free = {*MAY_CHANGE, *also_free}
    endless = config.optim.schedule in ("rsqrt", "constant", "stair") and not config.optim.cooldown_steps
    if endless and config.total_steps >= before.get("total_steps", 0):
        free.add("total_steps")  # no learning rate depends on the end
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in free]
    return [f"{key}: was {before.get(key)}, is {now.get(key)}" for key in keys]

"""What a checkpoint of a run holds, and when it may fail."""

from dataclasses import asdict

from pretrain.checkpoint.retention import apply_retention
from pretrain.checkpoint.write import save_checkpoint
from pretrain.cluster import ranks
from pretrain.config import Config, config_to_dict
from pretrain.engine.step import Engine
from pretrain.errors import StorageError
from pretrain.log import RunLog
from pretrain.provenance import versions
from pretrain.train.datasets import DataSets
from pretrain.train.folder import digest_of_starts, fingerprint
from pretrain.train.meter import Meter
from pretrain.train.state import TrainState, receipt


def save(
    config: Config, data: DataSets, engine: Engine, state: TrainState, meter: Meter, log: RunLog, *, must_succeed: bool
) -> None:
    """Saves a checkpoint of the run, and deletes those that are not kept. Called by all ranks.

    Raises StorageError when it `must_succeed` and did not; else the training goes on, warned.
    """
    folder = config.output / config.name / "checkpoints"
    engine.check()
    log.sync()
    state.window = meter.window()
    of_data = fingerprint(data.train, data.order)
    everything_else = {
        "step": state.step,
        "train": asdict(state),
        "metrics": state.metrics,
        "engine": engine.state(),
        "data": of_data,
        "receipt": receipt(state, data.order, of_data["order"]),
        "starts_sha256": digest_of_starts(config.output / config.name),
        "config": config_to_dict(config),
        "num_classes": data.num_classes,
        "class_names": list(data.train.class_names),
        "world_size": ranks.world_size(),
        "zero_stage": config.engine.zero_stage,
        "versions": versions(),
    }
    tensors = engine.weights(), engine.moments(), engine.generators()
    if save_checkpoint(folder, state.step, *tensors, everything_else, engine.averages()):
        keep = config.checkpoint
        apply_retention(
            folder, keep_last=keep.keep_last, keep_every_steps=keep.keep_every_steps, keep_best=keep.keep_best
        )
    elif must_succeed:
        raise StorageError(
            f"{folder}: the checkpoint of step {state.step} could not be saved; make room, and the same command goes on"
        )

"""What a checkpoint of a run holds, and when it may fail."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from pretrain.checkpoint.behind import HostCopies
from pretrain.checkpoint.retention import apply_retention
from pretrain.checkpoint.write import Save
from pretrain.cluster import ranks, watchdog
from pretrain.config import Config, config_to_dict
from pretrain.engine.step import Engine
from pretrain.errors import NonFiniteError, StorageError, UserError
from pretrain.log import RunLog
from pretrain.provenance import versions
from pretrain.train.datasets import DataSets
from pretrain.train.folder import digest_of_starts, fingerprint
from pretrain.train.meter import Meter
from pretrain.train.state import TrainState, receipt


class Saver:
    """The saves of a run, one at a time. Made and used by all ranks, `done` excepted.

    What a step's `save` has begun is written behind the steps that follow (checkpoint.behind); these tell with `done`
    how far each rank is, and call `advance` when all are.
    """

    def __init__(self, config: Config, data: DataSets, engine: Engine, log: RunLog) -> None:
        self._config, self._data, self._engine, self._log = config, data, engine, log
        self._folder = config.output / config.name / "checkpoints"
        self._copies = HostCopies() if config.checkpoint.behind else None
        self._under_way: Save | None = None

    def save(self, state: TrainState, meter: Meter, *, must_succeed: bool) -> None:
        """Saves a checkpoint of the run as it is now, and deletes those that are not kept.

        Waits for the save before it; for this one when it `must_succeed`, and raises StorageError when it did not. Else
        the training goes on, warned.
        """
        self.finish()
        watchdog.section("save", state.step)
        engine = self._engine
        engine.check()
        self._log.sync()
        state.window = meter.window()
        tensors = engine.weights(), engine.moments(), engine.generators()
        self._under_way = Save(
            self._folder,
            state.step,
            *tensors,
            self._everything_else(state),
            engine.averages(),
            copies=self._copies,
            when_published=self._delete_old,
        )
        if must_succeed and not self.finish():
            raise StorageError(
                f"{self._folder}: the checkpoint of step {state.step} could not be saved; make room, and the same "
                "command goes on"
            )
        if self._copies is None:
            self.finish()
        watchdog.section("step")

    @property
    def done(self) -> bool:
        """Whether this rank has done its share of what is under way, so that `advance` would not wait for it."""
        return self._under_way is not None and self._under_way.done

    def advance(self) -> None:
        """Takes the save under way one part further. Called when all ranks are `done`."""
        assert self._under_way is not None
        self._under_way.advance()
        if self._under_way.published is not None:
            self._under_way = None

    def finish(self) -> bool:
        """Waits until nothing is under way; returns whether what was has been published."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return True
        watchdog.section("save")
        published = under_way.finish()
        watchdog.section("step")
        return published

    @contextmanager
    def finished_before_errors(self) -> Iterator[None]:
        """Around what raises on all ranks alike: what is under way is saved before such an error ends the run."""
        try:
            yield
        except (UserError, StorageError, NonFiniteError):
            self.finish()
            raise

    def _everything_else(self, state: TrainState) -> dict[str, Any]:
        """What is not a tensor, as state.json holds it."""
        config, data = self._config, self._data
        of_data = fingerprint(data.train, data.order)
        return {
            "step": state.step,
            "train": asdict(state),
            "metrics": state.metrics,
            "engine": self._engine.state(),
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

    def _delete_old(self) -> None:
        keep, folder = self._config.checkpoint, self._folder
        apply_retention(
            folder, keep_last=keep.keep_last, keep_every_steps=keep.keep_every_steps, keep_best=keep.keep_best
        )

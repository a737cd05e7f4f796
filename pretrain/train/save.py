"""What a checkpoint of a run holds, and when a save may fail without ending the run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.checkpoint.behind import HostCopies, in_background
from pretrain.checkpoint.copies import Copier, has_checkpoints, restore
from pretrain.checkpoint.retention import apply_retention
from pretrain.checkpoint.second_place import SecondPlace
from pretrain.checkpoint.write import Save
from pretrain.cluster import agreement, ranks, signals, watchdog
from pretrain.config import Config, config_to_dict
from pretrain.engine.step import Engine
from pretrain.errors import NonFiniteError, StorageError, UserError
from pretrain.log import RunLog, warn
from pretrain.provenance import versions
from pretrain.train.datasets import DataSets
from pretrain.train.folder import Claim, digest_of_starts
from pretrain.train.meter import Meter
from pretrain.train.resuming import fingerprint, receipt
from pretrain.train.state import TrainState

COPIED_S = 3600.0  # longest wait, after the last step, for a copy to the second place
COPIED_AFTER_STOP_S = 5.0  # launchers kill 30 s after asking to stop; the next start makes the copy
RESTORED_S = 3600.0  # longest wait for a download
LOOKED_S = 60.0  # longest wait where nothing is to be fetched, for a check whose copies these are
_LOOK_EVERY_S = 0.05


def restore_copy(config: Config, stop: signals.StopRequest) -> None:
    """Downloads the newest copy from checkpoint.copy_to if the run's folder has no checkpoint. Called by all ranks.

    Gives up when one of them is asked to stop. Raises StorageError when the copies cannot be read or do not arrive
    within RESTORED_S, UserError when none of them can be used or they belong to another run.
    """
    if (url := config.checkpoint.copy_to) is None:
        return
    main, folder = ranks.is_main(), _folder_of(config)
    has_own = agreement.from_main(lambda: has_checkpoints(folder))
    place = partial(SecondPlace, url, config.name)
    job = in_background(lambda: main and restore(place, folder, _told_by(config)), behind=main)
    limit = LOOKED_S if has_own else RESTORED_S
    until = time.monotonic() + limit
    while agreement.any_rank(not job.done()):  # a download may take longer than a collective's timeout
        if agreement.any_rank(stop.signal_name is not None):
            return
        if agreement.any_rank(time.monotonic() > until):
            if has_own:
                return  # the copying thread reports what is wrong
            raise StorageError(
                f"checkpoint.copy_to: {url}: no complete copy was downloaded in {limit:,.0f} s; the same command "
                "tries again; with checkpoint.copy_to=null it starts from scratch"
            )
        time.sleep(_LOOK_EVERY_S)
    agreement.from_main(job.result)


def _told_by(config: Config) -> dict[str, Any]:
    """Settings that tell this run from another one of the same name."""
    start = {"init_from": config.init_from, "branch_from": config.branch_from}
    return {
        "output": str(config.output.resolve()),
        "seed": config.seed,
        **{key: None if path is None else str(path) for key, path in start.items()},
    }


def _folder_of(config: Config) -> Path:
    return config.output / config.name / "checkpoints"


class Saver:
    """The saves of a run, one at a time. All ranks construct it and call its methods together; `done` is local.

    `save` begins a save that is written in the background of the steps that follow (checkpoint.behind). At each step
    the ranks exchange `done`, and call `advance` when it is set on all.
    """

    def __init__(self, config: Config, data: DataSets, engine: Engine, log: RunLog, claimed: Claim) -> None:
        self._config, self._data, self._engine, self._log, self._claimed = config, data, engine, log, claimed
        self._folder, keep = _folder_of(config), config.checkpoint
        self._copies = HostCopies() if keep.behind else None
        self._under_way: Save | None = None
        names = ("keep_last", "keep_every_steps", "keep_best")
        self._keep: dict[str, Any] = {name: getattr(keep, name) for name in names}
        self._copier: Copier | None = None
        if (url := keep.copy_to) is not None and ranks.is_main():
            place = partial(SecondPlace, url, config.name)
            self._copier = Copier(place, self._folder, self._keep, _told_by(config))
            self._copier.begin()  # with what the previous start did not copy

    def save(self, state: TrainState, meter: Meter, *, must_succeed: bool) -> None:
        """Saves a checkpoint of the run as it is now, and deletes those that are not kept.

        Waits for the previous save, and for this one if it `must_succeed`: then a failure is a StorageError, otherwise
        a warning. Raises TakenOverError when another start writes in the folder: they would remove each other's saves.
        """
        self.finish()
        watchdog.section("save", state.step)
        self._claimed.check()
        engine = self._engine
        engine.check()
        state.window = meter.window()
        tensors = engine.weights(), engine.moments(), engine.generators()
        self._under_way = Save(
            self._folder,
            state.step,
            *tensors,
            self._everything_else(state),
            engine.averages(),
            copies=self._copies,
            before_published=self._log.sync,  # the logs of these steps, first
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
        """Whether this rank has done its share of the save in progress, so that `advance` would not wait for it."""
        return self._under_way is not None and self._under_way.done

    def advance(self) -> None:
        """Moves the save in progress to its next part. Called when all ranks are `done`."""
        assert self._under_way is not None
        self._under_way.advance()
        if self._under_way.published is not None:
            self._under_way = None

    def finish(self) -> bool:
        """Waits for the save in progress, if there is one; returns False if it could not be published."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return True
        watchdog.section("save")
        published = under_way.finish()
        watchdog.section("step")
        return published

    def end(self, stop: signals.StopRequest) -> None:
        """Waits for the save in progress and for copies; for copies only briefly once a stop is requested."""
        self.finish()
        if self._config.checkpoint.copy_to is None:
            return
        watchdog.section("save")
        until = time.monotonic() + COPIED_S
        while agreement.any_rank(self._copier is not None and not self._copier.done and time.monotonic() < until):
            if agreement.any_rank(stop.signal_name is not None):
                until = min(until, time.monotonic() + COPIED_AFTER_STOP_S)
            time.sleep(_LOOK_EVERY_S)
        if self._copier is not None and not self._copier.done:
            warn("the copy of the last checkpoint is not complete; the next start goes on with it")
        watchdog.section("step")

    @contextmanager
    def finished_before_errors(self) -> Iterator[None]:
        """Wraps what raises the same error on all ranks: the save in progress is finished before it ends the run."""
        try:
            yield
        except (UserError, StorageError, NonFiniteError):
            self.finish()
            raise

    @contextmanager
    def saved_before_errors(self, state: TrainState, meter: Meter) -> Iterator[None]:
        """Wraps what comes between a step and its save and raises the same error on all ranks: saves the step first."""
        try:
            yield
        except (UserError, StorageError):
            self.save(state, meter, must_succeed=True)
            raise

    def _everything_else(self, state: TrainState) -> dict[str, Any]:
        """Returns the content of state.json, all that is not a tensor, on rank 0; {} elsewhere. Called by all ranks."""
        config, data, of_engine = self._config, self._data, self._engine.state()
        if not ranks.is_main():
            return {}
        of_data = fingerprint(data.train, data.order)
        return {
            "step": state.step,
            "train": asdict(state),
            "metrics": state.metrics,
            "engine": of_engine,
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
        copier = self._copier
        apply_retention(self._folder, **self._keep, spare=copier.reading if copier else None)
        if copier:
            copier.begin()

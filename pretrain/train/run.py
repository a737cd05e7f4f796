"""The training run: `train` is its table of contents, loop.py its loop.

deepspeed launch/pretrain.py --config configs/NAME.yaml
"""

import gc
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pretrain.checkpoint.find import find_checkpoint, newest_valid, set_aside_newer
from pretrain.checkpoint.read import CheckpointReader
from pretrain.cli import tell_next
from pretrain.cluster import agreement, peers, ranks, signals, watchdog
from pretrain.config import Config
from pretrain.data.loader import train_batches
from pretrain.engine.settings import check_machine
from pretrain.engine.step import Engine
from pretrain.errors import ConfigError, NonFiniteError, NotFoundError, StorageError, UserError
from pretrain.log import RunLog, in_words, say
from pretrain.models.weights import checkpoint_config
from pretrain.train import ending
from pretrain.train.alike import refuse_other_ranks
from pretrain.train.announce import facts_of, warn_of_settings
from pretrain.train.building import build_engine
from pretrain.train.datasets import DataSets, open_data, warn_of_single_reads, warn_of_small_store
from pretrain.train.epochs import in_steps
from pretrain.train.folder import Claim, again_if_started, claim, has_started, is_done, mark_done, record_start
from pretrain.train.incoming import Incoming
from pretrain.train.loop import loop
from pretrain.train.profile import Profile
from pretrain.train.resuming import refuse_changes, resumed_order
from pretrain.train.save import restore_copy
from pretrain.train.state import TrainState, resumed
from pretrain.train.wandb_log import check_installed, wandb_log


def train(config: Config, *, recipe: Path | None = None, stop: signals.StopRequest | None = None) -> None:
    """Trains until total_steps or until asked to stop; resumes from the newest valid checkpoint in the run's folder.

    recipe: the file that the config was read from; the run's folder keeps a copy. stop: has recorded signals since the
    process began. Raises UserError for what the user must change, NonFiniteError, BadSamplesError, StorageError,
    LostProcessError (pretrain/errors.py).
    """
    stop = stop or signals.StopRequest()
    folder = config.output / config.name
    watched = watchdog.watching(folder, config.engine.watchdog_s, config.engine.timeout_s)
    with watched, ending.lost_processes(folder), _refused_once(), _short_collections():
        with again_if_started(folder):
            device = ranks.start(config.engine.timeout_s)
            peers.meet(agreement.gather)
            refuse_other_ranks(config)
        agreement.together(lambda: check_machine(config))
        agreement.from_main(lambda: check_installed(config))
        claimed = claim(folder)
        with ending.noted(folder):
            _train(config, claimed, device, recipe, stop)
        watchdog.section("end")
        ranks.stop()
    stop.close()
    claimed.close()


@contextmanager
def _refused_once() -> Iterator[None]:
    """Lets rank 0 alone report an error of all ranks: its exit ends the others, perhaps seconds later."""
    try:
        yield
    except (UserError, StorageError, NonFiniteError) as error:
        if not ranks.is_main():
            signals.end_at_sigterm(error.exit_code)
        raise


@contextmanager
def _short_collections() -> Iterator[None]:
    """Exempts the objects that exist now, some 400,000 from imports, from garbage collection within the block."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _train(given: Config, claimed: Claim, device: torch.device, recipe: Path | None, stop: signals.StopRequest) -> None:
    folder = claimed.folder
    config, data = agreement.together(lambda: _opened(folder, given))
    restore_copy(config, stop)
    checkpoint = newest_valid(folder / "checkpoints")
    if checkpoint is not None:
        config = agreement.together(lambda: _go_on_from(checkpoint, config, data))
    if is_done(folder, config):
        say(f"{folder}: done already (step {config.total_steps}); for another run give another name=")
        return
    if agreement.any_rank(stop.signal_name is not None):  # a signal arrived during the imports
        ending.note(folder, "asked to stop before the first step")
        say("stopped as asked before the first step")
        return
    warn_of_settings(config, data)
    branches = config.branch_from is not None and checkpoint is None
    origin = agreement.together(lambda: _branch_point(config, data)) if branches else None
    start = checkpoint or origin
    warn_of_small_store(data.train, data.order)
    if start is None:  # a resumed run, or a branch, keeps its order
        warn_of_single_reads(config.data, data.train, data.order)
    engine = build_engine(config, data, device, from_scratch=start is None)
    if checkpoint is not None:
        agreement.from_main(lambda: set_aside_newer(checkpoint))
    state = _resume(engine, start, config) if start else _start(config)
    facts = facts_of(data, engine.num_parameters, device)
    agreement.from_main(
        lambda: record_start(
            folder, config, engine.deepspeed_config, state.step, recipe, branched=origin is not None, facts=facts
        )
    )
    log = RunLog(folder, state.step, config.total_steps, wandb_log(config, folder))
    with (
        Profile(config, engine) as profile,
        Incoming(train_batches(data.train, data.order, engine.plan, config, state.step), stop) as batches,
    ):
        gc.collect()
        gc.freeze()  # model and engine too: a full collection takes a third of a second, and delays all ranks
        loop(config, data, engine, state, log, profile, batches, stop, claimed, branched=origin is not None)
    if state.step == config.total_steps and not state.validation_due and not state.features_due:
        mark_done(folder, state.step, state.metrics)
        say(f"done: {folder}, step {state.step}" + "".join(f", {in_words(k, v)}" for k, v in state.metrics.items()))
        if ranks.is_main():
            tell_next(f"python tools/report.py {shlex.quote(str(folder))}")
    else:
        ending.note(folder, f"asked to stop; saved at step {state.step}" if state.step else "asked to stop at step 0")
        say(f"stopped as asked at step {state.step}; the same command goes on from there")
    log.close()
    engine.close()


def _opened(folder: Path, given: Config) -> tuple[Config, DataSets]:
    """The config with total_steps, and its data. StorageError if an earlier start found the data: its disk is away."""
    try:
        config = in_steps(given)
        return config, open_data(config)
    except NotFoundError as error:
        if not has_started(folder):
            raise
        raise StorageError(
            f"{error.args[0].partition(';')[0]}; an earlier start of this run found its data, so the disk may be away: "
            "the same command goes on when it is back"
        ) from None


def _start(config: Config) -> TrainState:
    ranks.seed_generators(config.seed, 0)
    return TrainState()


def _go_on_from(checkpoint: Path, config: Config, data: DataSets) -> Config:
    """Returns the config to resume with: for what it leaves to "auto", the run keeps its first choice."""
    refuse_changes(checkpoint, config, data.train)
    data.follow(resumed_order(checkpoint, data.order, config.total_steps))
    if config.engine.compile == "auto":
        config = replace(config, engine=replace(config.engine, compile=checkpoint_config(checkpoint).engine.compile))
        check_machine(config)
        if config.engine.compile != "auto":
            say(f"engine.compile: {str(config.engine.compile).lower()}, as at the start of the run")
    return config


def _branch_point(config: Config, data: DataSets) -> Path:
    assert config.branch_from is not None
    origin = find_checkpoint(config.branch_from)
    refuse_changes(origin, config, data.train, branching=True)
    if (step := resumed(origin).train.step) >= config.total_steps:
        raise ConfigError(f"branch_from: {origin} is at step {step}, but total_steps is {config.total_steps}; raise it")
    data.follow(resumed_order(origin, data.order, config.total_steps))
    return origin


def _resume(engine: Engine, checkpoint: Path, config: Config) -> TrainState:
    # Rank 0 checks the index for all: at hundreds of ranks it has a hundred thousand rows and more.
    saved, reader = agreement.together(
        lambda: (resumed(checkpoint), CheckpointReader(checkpoint, checked=not ranks.is_main()))
    )
    engine.load(reader, saved.engine)
    state = saved.train
    same_ranks = saved.world_size == ranks.world_size()
    restored = same_ranks and agreement.together(lambda: engine.load_generators(reader.generators(ranks.rank())))
    if not restored:
        ranks.seed_generators(config.seed, state.step)
    why = f"{saved.world_size} ranks then, {ranks.world_size()} now" if not same_ranks else "none saved for this device"
    note = "" if restored else f"; random states of dropout drawn anew ({why})"
    say(f"resumed from {checkpoint}{note}")
    return state

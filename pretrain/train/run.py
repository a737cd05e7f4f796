"""The training run: `train` is its table of contents, loop.py its loop.

deepspeed launch/pretrain.py --config configs/NAME.yaml
"""

import gc
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.find import find_checkpoint, newest_valid, set_aside_newer
from pretrain.checkpoint.read import CheckpointReader
from pretrain.cli import tell_next
from pretrain.cluster import agreement, peers, ranks, signals, watchdog
from pretrain.config import Config, model_name
from pretrain.data.classes import match_classes
from pretrain.data.lanes import read_amplification
from pretrain.data.loader import train_batches
from pretrain.data.manifest import Manifest
from pretrain.data.order import BatchPlan, Order, plan_batch, share
from pretrain.engine.frozen import statistics_of
from pretrain.engine.settings import check_machine
from pretrain.engine.step import Engine, first_sentence
from pretrain.engine.versions import untried
from pretrain.errors import ConfigError, DeviceMemoryError, NotFoundError, StorageError
from pretrain.evaluation import classification
from pretrain.log import RunLog, in_words, say
from pretrain.models.build import Values, build_model, build_without_values, drawn_values, zero_values
from pretrain.models.profile import num_parameters
from pretrain.models.tensors import Weights
from pretrain.models.weights import check_same_function, checkpoint_config, classifier_names, load_tensors, read_weights
from pretrain.provenance import processor
from pretrain.train import ending
from pretrain.train.datasets import DataSets, open_data, warn_of_single_reads, warn_of_small_store
from pretrain.train.epochs import in_steps
from pretrain.train.folder import (
    claim,
    has_started,
    is_done,
    mark_done,
    record_start,
    refuse_changes,
    resumed_order,
)
from pretrain.train.incoming import Incoming
from pretrain.train.loop import loop
from pretrain.train.profile import Profile
from pretrain.train.save import restore_copy
from pretrain.train.state import TrainState, resumed
from pretrain.train.wandb_log import check_installed, wandb_log

# Of the initial weights in the averages at the end; the paper's own rows, 0.9999 over 20,000 steps, leave 13.5 %.
MAX_INITIAL_SHARE = 0.5


def train(config: Config, *, recipe: Path | None = None, stop: signals.StopRequest | None = None) -> None:
    """Trains until total_steps or until asked to stop; resumes from the newest valid checkpoint in the run's folder.

    recipe: the file that the config was read from, of which the folder keeps a copy. stop: what has been listening for
    signals since the process began. Raises UserError for what the user must change, NonFiniteError, BadSamplesError,
    StorageError, LostProcessError (pretrain/errors.py).
    """
    stop = stop or signals.StopRequest()
    folder = config.output / config.name
    watched = watchdog.watching(folder, config.engine.watchdog_s, config.engine.timeout_s)
    with watched, ending.lost_processes(folder), _short_collections():
        device = ranks.start(config.engine.timeout_s)
        peers.meet(agreement.gather)
        agreement.together(lambda: check_machine(config))
        agreement.from_main(lambda: check_installed(config))
        lock = claim(folder)
        with ending.noted(folder):
            _train(config, folder, device, recipe, stop)
        watchdog.section("end")
        ranks.stop()
    stop.close()
    del lock


@contextmanager
def _short_collections() -> Iterator[None]:
    """Until its end Python's garbage collector does not look through what is there now, 400,000 objects of imports."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _train(given: Config, folder: Path, device: torch.device, recipe: Path | None, stop: signals.StopRequest) -> None:
    config: Config = agreement.together(lambda: _finding_data(folder, lambda: in_steps(given)))
    data: DataSets = agreement.together(lambda: _finding_data(folder, lambda: open_data(config)))
    restore_copy(config, stop)
    checkpoint = newest_valid(folder / "checkpoints")
    if checkpoint is not None:
        config = agreement.together(lambda: _go_on_from(checkpoint, config, data))
    if is_done(folder, config):
        say(f"{folder}: done already (step {config.total_steps}); for another run give another name=")
        return
    if agreement.any_rank(stop.signal_name is not None):  # heard during the imports
        ending.note(folder, "asked to stop before the first step")
        say("stopped as asked before the first step")
        return
    _warn_of_young_averages(config)
    branches = config.branch_from is not None and checkpoint is None
    origin: Path | None = agreement.together(lambda: _branch_point(config, data)) if branches else None
    start = checkpoint or origin
    warn_of_small_store(data.train, data.order)
    if start is None:  # one that goes on keeps its order
        warn_of_single_reads(config.data, data.train, data.order)
    engine = build_engine(config, data, device, from_scratch=start is None)
    if checkpoint is not None:
        set_aside_newer(checkpoint)
    state = _resume(engine, start, config) if start else _start(config)
    facts = _facts(data, engine.num_parameters, device)
    record = partial(record_start, folder, config, engine.deepspeed_config, state.step, recipe)
    agreement.from_main(lambda: record(branched=origin is not None, facts=facts))
    log = RunLog(folder, state.step, config.total_steps, wandb_log(config, folder))
    with (
        Profile(config, engine) as profile,
        Incoming(train_batches(data.train, data.order, engine.plan, config, state.step), stop) as batches,
    ):
        gc.collect()
        gc.freeze()  # model and engine too: a full collection takes a third of a second, and one rank's is all ranks'
        loop(config, data, engine, state, log, profile, batches, stop, branched=origin is not None)
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


def _facts(data: DataSets, num_parameters: int, device: torch.device) -> dict[str, Any]:
    """What starts.jsonl tells a reader of the model, the data and the machine."""
    return {
        "parameters": num_parameters,
        "train_set": data.train.name,
        "train_images": data.order.num_train,
        "num_classes": data.num_classes,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "device_type": device.type,
    }


def _finding_data(folder: Path, find: Callable[[], Any]) -> Any:
    """What `find` returns. Data that an earlier start has found, and this one does not, is on a disk that is away."""
    try:
        return find()
    except NotFoundError as error:
        if not has_started(folder):
            raise
        raise StorageError(
            f"{error.args[0].partition(';')[0]}; an earlier start of this run found its data, so the disk may be away: "
            "the same command goes on when it is back"
        ) from None


def build_engine(config: Config, data: DataSets, device: torch.device, *, from_scratch: bool) -> Engine:
    """Returns the engine of a run, from init_from's weights where it starts `from_scratch`, and tells what it trains.

    Raises UserError for a model that cannot be trained, or weights that do not fit it.
    """
    model, values = _model_and_values(config, data.num_classes, from_scratch=from_scratch)
    _refuse_state(model, config, from_scratch=from_scratch)
    heads = {name.rpartition(".")[0] for name in classifier_names(model)}
    if data.fewshot and len(heads) > 1:
        raise ConfigError(
            f"evaluation.fewshot_train: {config.model.name} has {len(heads)} heads; few-shot needs a single one"
        )
    if from_scratch and config.init_from is not None:
        agreement.together(lambda: _load(model, config, data))  # a node may lack them
        say(f"weights from {config.init_from}" + (", with a new head" if config.init_new_head else ""))
    plan = plan_batch(config.data.global_batch, ranks.world_size(), config.engine.max_micro_batch_size)
    if told := untried():
        say(f"warning: {told}")
    if idle := ranks.num_idle_gpus():
        say(f"warning: one rank uses one of {idle + 1} GPUs; deepspeed or torchrun starts a rank for each")
    if statistics_of(model):
        say("batch norm: its statistics stay those of the weights that the run starts from")
    say(*_told_of_run(config, data, model, plan, device))
    try:
        engine = Engine(model, config, plan, device, values)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"model.name: this GPU does not hold {config.model.name} and its optimizer ({first_sentence(error)}); "
            "try engine.zero_stage=2 or 3, or more GPUs; tools/plan.py says what fits"
        ) from error
    say(*filter(None, (engine.told_of_compiling, engine.told_of_overlap)))
    return engine


def _told_of_run(
    config: Config, data: DataSets, model: torch.nn.Module, plan: BatchPlan, device: torch.device
) -> list[str]:
    """What trains, on what, how the batch is split."""
    batch, masked = config.data.global_batch, plan.masked
    too_large = data.val is not None and data.val.multi_label and not data.has_average_precision
    most = classification.MAX_LOGIT_BYTES_IN_TRAINING
    without = f", no mean average precision: logits above {most >> 20:,} MB" if too_large else ""
    return [
        f"{config.output / config.name}: {model_name(config.model)}, {num_parameters(model):,} parameters, "
        f"{data.num_classes} classes",
        f"data: {data.order.num_train:,} images in {len(data.train.shards)} shards, "
        f"{data.order.epochs(config.total_steps):.1f} epochs{' of the slowest' if data.order.mixture else ''}; "
        f"validation: {len(data.val_indices):,} images{without}",
        *_told_of_order(data.order),
        *_told_of_sources(data, config.total_steps),
        f"batch {batch} = {ranks.world_size()} ranks x {plan.accumulation} x {plan.micro_batch}"
        + (f" less {masked} masked slots ({masked / (batch + masked):.1%})" if masked else "")
        + f"; ZeRO {config.engine.zero_stage}, {config.engine.precision}, {device.type}",
    ]


def _model_and_values(config: Config, num_classes: int, *, from_scratch: bool) -> tuple[torch.nn.Module, Values | None]:
    """The model with its values in it, or what fills it parameter by parameter, so that no rank holds all in float32.

    The first where timm draws them, and where init_from's are read: an error in a file has to be met before a part of
    the model waits for other ranks.
    """
    if config.model.timm_name is not None or (from_scratch and config.init_from is not None):
        return build_model(config.model, num_classes, config.seed), None
    model = build_without_values(config.model, num_classes)
    return model, drawn_values(model, config.model, config.seed) if from_scratch else zero_values(model)


def _load(model: torch.nn.Module, config: Config, data: DataSets) -> None:
    """Loads init_from's weights. Raises UserError when they do not fit."""
    assert config.init_from is not None
    weights = read_weights(config.init_from, config.model.image_size)
    check_same_function(weights, config.model, config.data)
    if not config.init_new_head:
        _refuse_other_classes(weights, data.train)
    load_tensors(model, weights, new_head=config.init_new_head)
    if config.init_new_head and config.model.timm_name is not None:  # ours is built with one of zeros
        with torch.no_grad():
            for name in classifier_names(model):
                model.get_parameter(name).zero_()


def _told_of_sources(data: DataSets, steps: int) -> list[str]:
    """What a mixture takes of each source."""
    if (mixture := data.order.mixture) is None:
        return []
    told, given = [], data.order.given(steps)
    for place, source in enumerate(data.train.sources):
        share = ", ".join(
            f"{phase.quotas[place]:,} of {phase.cycle:,} samples"
            + (f" from step {phase.first_slot // data.order.global_batch} on" if phase.first_slot else "")
            for phase in mixture.phases
        )
        passes = f"{source.num_samples:,} images, {given[place] / source.num_samples:.1f} passes"
        told.append(f"mixture: {source.name}: {share}; {passes}, {source.path}")
    return told


def _told_of_order(order: Order) -> list[str]:
    """The numbers of the order lanes, and what they make of the reading."""
    batch = order.global_batch
    lanes = [(batch, order.lanes)] if order.lanes else []
    if order.mixture:
        lanes = [(own.round_samples, own.lanes) for own in order.mixture.lanes]
    if not lanes:
        return []
    shares = [share(batch, rank, ranks.world_size()) for rank in range(ranks.world_size())]
    here = ranks.ranks_here()
    nodes = [(some[0].start, some[-1].stop) for some in (shares[at : at + here] for at in range(0, len(shares), here))]
    told = []
    for own, numbers in lanes:  # of a mixture a round is nearly a step's samples of a source
        slots = [range(start * own // batch, stop * own // batch) for start, stop in nodes]
        told.append(
            f"order: {numbers.num_lanes} lanes of blocks of {numbers.block_samples} samples; each node reads "
            f"{'about ' if order.mixture else ''}{read_amplification(numbers, own, slots):.2f} x the bytes that it uses"
        )
    return told


def _refuse_other_classes(weights: Weights, train_set: Manifest) -> None:
    """A head goes on only where its classes are the set's, in the same order."""
    if weights.num_classes < train_set.num_classes:
        return  # load_tensors tells the shapes
    sides = train_set.class_names, train_set.num_classes, weights.class_names, weights.num_classes
    match = match_classes(*sides, their_place=str(train_set.path), our_place=str(weights.source))
    if match.labels is not None:
        first = next(number for number, label in enumerate(match.labels) if number != label)
        names = (
            f"class {first} is {train_set.class_names[first]!r} there, {weights.class_names[first]!r} in the weights"
        )
        raise ConfigError(
            f"init_from: {train_set.path} has the classes of the head in another order ({names}); make the set with "
            "tools/make_shards.py --classes and the weights' names, or set init_new_head=true"
        )
    if match.told:
        say(f"init_from: {match.told}")


def _refuse_state(model: torch.nn.Module, config: Config, *, from_scratch: bool) -> None:
    """A checkpoint holds trained parameters, and statistics of batch norm that stay as they were given."""
    saved_names, name, statistics = model.state_dict().keys(), config.model.name, statistics_of(model)
    if held := [key for key, _ in model.named_buffers() if key in saved_names and key not in statistics]:
        raise ConfigError(f"model.name: {name} keeps state ({held[0]}, ...) that checkpoints do not hold")
    if statistics and from_scratch and config.init_from is None:
        raise ConfigError(
            f"model.name: {name} has batch norm ({statistics[0]}, ...), whose statistics are not trained here but kept "
            "from init_from, which is not given; or choose a model with layer or group norm, for example "
            "timm:resnetv2_50x1_bit"
        )
    if frozen := [key for key, parameter in model.named_parameters() if not parameter.requires_grad]:
        raise ConfigError(
            f"model.name: {name} has frozen parameters ({frozen[0]}, ...), which ZeRO checkpoints do not hold"
        )


def _warn_of_young_averages(config: Config) -> None:
    """Averages begin as the initial weights: of a short run they are little else, and it is they that are validated."""
    decay, steps = config.optim.average_decay, config.total_steps
    if (share := decay**steps) > MAX_INITIAL_SHARE:
        say(
            f"warning: optim.average_decay ({decay:g}): after {steps} steps the averages, which are validated and "
            f"kept, still hold {share:.1%} of the initial weights; {0.01 ** (1 / steps):.5f} would leave 1 %"
        )


def _start(config: Config) -> TrainState:
    ranks.seed_generators(config.seed, 0)
    return TrainState()


def _go_on_from(checkpoint: Path, config: Config, data: DataSets) -> Config:
    """The config, which keeps to what the run began with where it leaves a choice."""
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

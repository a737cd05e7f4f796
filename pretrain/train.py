"""The training run. Read `train`, then `_loop`; the rest is what they call.

deepspeed launch/pretrain.py --config configs/NAME.yaml
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import make_grid

from pretrain.checkpoint.find import find_checkpoint, newest_valid, set_aside_newer
from pretrain.checkpoint.read import CheckpointReader, read_state
from pretrain.checkpoint.retention import apply_retention
from pretrain.checkpoint.write import save_checkpoint
from pretrain.cluster import agreement, ranks, signals
from pretrain.config import Config, config_to_dict
from pretrain.data.loader import REASONS, Batch, check_bad_fraction, count_reasons, eval_batches, train_batches
from pretrain.data.manifest import Manifest, check_shards, load_manifest
from pretrain.data.order import Order, plan_batch
from pretrain.engine import Engine, StepResult, check_precision
from pretrain.errors import ConfigError, NonFiniteError, StorageError
from pretrain.evaluation import fewshot
from pretrain.evaluation.classification import EvaluationStopped, classification_scores
from pretrain.evaluation.features import Features, extract_features
from pretrain.evaluation.knn import knn
from pretrain.log import JsonLines, RunLog, say, warn
from pretrain.models.build import build_model
from pretrain.models.profile import num_parameters, train_flops
from pretrain.models.weights import check_same_function, classifier_names, load_tensors, read_weights
from pretrain.optim import learning_rate
from pretrain.run import claim, fingerprint, is_done, mark_done, record_start, refuse_changes, versions

MAX_LOGIT_BYTES = 1 << 30  # of float32 on every rank, for mean average precision: 40,000 images of 6,700 classes
MAX_SKIPPED_IN_A_ROW = 3  # steps whose loss or gradients are not finite; then the run stops


@dataclass
class TrainState:
    """All that a resumed run continues from, apart from tensors."""

    step: int = 0  # global batches consumed; skipped steps count
    validation_due: bool = False  # after this step; still set when a stop cut it short
    features_due: bool = False  # few-shot accuracy, likewise
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    bad_samples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation after this very step, if there was one
    window: list[float] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )  # loss, correct, images since the last log line


@dataclass
class DataSets:
    """What is trained on and validated on."""

    train: Manifest
    order: Order
    val: Manifest | None
    val_indices: np.ndarray
    num_classes: int  # of the model's head
    fewshot: tuple[Manifest, Manifest] | None = None  # to draw shots from, to test them on

    @property
    def ranks_classes(self) -> bool:
        """Whether validation has mean average precision: where images have several labels, and logits fit."""
        logit_bytes = 4 * len(self.val_indices) * self.num_classes
        return self.val is not None and self.val.multi_label and logit_bytes <= MAX_LOGIT_BYTES


def train(config: Config) -> None:
    """Trains until total_steps or until asked to stop; resumes from the newest valid checkpoint in the run's folder.

    Raises UserError for what the user must change, NonFiniteError, BadSamplesError, StorageError (pretrain/errors.py).
    """
    device = ranks.start(config.engine.timeout_s)
    agreement.together(lambda: check_precision(config))
    signals.end_with_launcher()
    stop = signals.StopRequest()
    folder = config.output / config.name
    lock = claim(folder)
    data = agreement.together(lambda: _open_data(config))
    checkpoint = newest_valid(folder / "checkpoints")
    if checkpoint is not None:
        refuse_changes(checkpoint, config, data.train)
    if is_done(folder, config):
        say(f"{folder}: done already (step {config.total_steps}); for another run give another name=")
        ranks.stop()
        return
    origin = _branch_point(config, data) if config.branch_from and checkpoint is None else None
    engine = _build_engine(config, data, device, from_scratch=checkpoint is None)
    if checkpoint is not None:
        set_aside_newer(checkpoint)
    start = checkpoint or origin
    state = _resume(engine, start, config) if start else _start(config)
    record_start(folder, config, engine.deepspeed_config, state.step)
    log = RunLog(folder, state.step, config.total_steps)
    _loop(config, data, engine, state, log, stop, branched=origin is not None)
    if state.step == config.total_steps and not state.validation_due and not state.features_due:
        mark_done(folder, state.step, state.metrics)
        say(f"done: {folder}, step {state.step}" + "".join(f", {k} {v:.4g}" for k, v in state.metrics.items()))
    else:
        say(f"stopped as asked at step {state.step}; the same command goes on from there")
    log.close()
    engine.close()
    stop.close()
    ranks.stop()
    del lock


def _loop(
    config: Config,
    data: DataSets,
    engine: Engine,
    state: TrainState,
    log: RunLog,
    stop: signals.StopRequest,
    *,
    branched: bool,
) -> None:
    meter = Meter(config, data.num_classes, state, engine.device)
    journal = Journal(config.output / config.name, config)
    batches = train_batches(data.train, data.order, engine.plan, config, state.step)
    if branched:  # the other run may delete its checkpoint, or be further on at the next start
        _save(config, data, engine, state, meter, log, must_succeed=True)
    state.validation_due &= data.val is not None  # evaluation may have been switched off since
    state.features_due &= data.fewshot is not None
    if state.validation_due or state.features_due:  # a stop cut it short
        if _evaluate(config, data, engine, state, log, stop):
            return
        _save(config, data, engine, state, meter, log, must_succeed=False)  # with its score, for keep_best
    while state.step < config.total_steps:
        batch = meter.wait_for(batches)
        if state.step == 0:
            log.image("batch", make_grid(batch.images[:64], nrow=8))
        lr = learning_rate(config.optim, config.total_steps, state.step)
        result = engine.train_step(batch.to(engine.device), lr)
        state.step += 1
        state.metrics = {}
        meter.add(result)
        stopping = journal.note(state, batch, result, stop)
        last = state.step == config.total_steps
        if due(state.step, config.log.every_steps) or last:
            log.scalars(state.step, meter.read(state, data, lr, result, engine))
        state.validation_due = data.val is not None and (due(state.step, config.evaluation.every_steps) or last)
        every = config.evaluation.features_every_steps
        state.features_due = data.fewshot is not None and (due(state.step, every) or last)
        with meter.paused():
            if (state.validation_due or state.features_due) and not stopping:
                stopping = _evaluate(config, data, engine, state, log, stop)
            if due(state.step, config.checkpoint.every_steps) or last or stopping:
                _save(config, data, engine, state, meter, log, must_succeed=last or stopping)
        if stopping:
            break


def due(step: int, every_steps: int) -> bool:
    """Returns whether something done every so many steps is done after `step`; 0 means never."""
    return bool(every_steps) and step % every_steps == 0


# --- before the loop -------------------------------------------------------------------------------------------------


def _open_data(config: Config) -> DataSets:
    train_set = load_manifest(config.data.train)
    val_set = load_manifest(config.data.val) if config.data.val else train_set if config.data.held_out else None
    for manifest in {m.path: m for m in (train_set, val_set) if m}.values():
        check_shards(manifest)
    if val_set is not None and val_set.num_classes != train_set.num_classes:
        raise ConfigError(
            f"{val_set.path} has {val_set.num_classes} classes, {train_set.path} has {train_set.num_classes}"
        )
    num_classes = config.model.num_classes or train_set.num_classes
    if num_classes < train_set.num_classes:
        raise ConfigError(
            f"model.num_classes ({num_classes}) is smaller than the {train_set.num_classes} of {train_set.path}"
        )
    if config.data.held_out >= train_set.num_samples:
        raise ConfigError(
            f"data.held_out ({config.data.held_out}) leaves nothing of {train_set.num_samples} samples to train on"
        )
    if config.data.global_batch < ranks.world_size():
        raise ConfigError(
            f"data.global_batch ({config.data.global_batch}) is smaller than the {ranks.world_size()} ranks; "
            "use fewer ranks or a recipe with a larger batch"
        )
    few = _open_fewshot(config)
    order = Order(train_set.num_samples, config.data.held_out, config.data.global_batch, config.seed)
    indices = order.held_out_indices() if config.data.held_out else np.arange(val_set.num_samples if val_set else 0)
    return DataSets(train_set, order, val_set if config.evaluation.every_steps else None, indices, num_classes, few)


def _open_fewshot(config: Config) -> tuple[Manifest, Manifest] | None:
    wanted = config.evaluation
    if wanted.fewshot_train is None or wanted.fewshot_test is None:
        return None
    sets = load_manifest(wanted.fewshot_train), load_manifest(wanted.fewshot_test)
    for manifest in sets:
        check_shards(manifest)
        if manifest.multi_label:
            raise ConfigError(f"evaluation.fewshot: {manifest.path} has several labels per image; few-shot needs one")
    if sets[0].num_classes != sets[1].num_classes or sets[0].class_names != sets[1].class_names:
        raise ConfigError(
            f"evaluation.fewshot: {sets[0].path} ({sets[0].num_classes} classes) and {sets[1].path} "
            f"({sets[1].num_classes} classes) must have the same classes under the same names"
        )
    return sets


def _build_engine(config: Config, data: DataSets, device: torch.device, *, from_scratch: bool) -> Engine:
    model = build_model(config.model, data.num_classes, config.seed)
    _refuse_state(model, config.model.name)
    heads = {name.rpartition(".")[0] for name in classifier_names(model)}
    if data.fewshot and len(heads) > 1:
        raise ConfigError(
            f"evaluation.fewshot_train: {config.model.name} has {len(heads)} heads, so no one input of it"
        )
    if from_scratch and config.init_from is not None:
        weights = read_weights(config.init_from, config.model.image_size)
        check_same_function(weights, config.model)
        load_tensors(model, weights, new_head=config.init_new_head)
        say(f"weights from {config.init_from}" + (", with a new head" if config.init_new_head else ""))
    num_ranks, batch = ranks.world_size(), config.data.global_batch
    plan = plan_batch(batch, num_ranks, config.engine.max_micro_batch_size)
    too_large = data.val is not None and data.val.multi_label and not data.ranks_classes
    without = f", no mean average precision: logits above {MAX_LOGIT_BYTES >> 20:,} MB" if too_large else ""
    say(
        f"{config.output / config.name}: {config.model.name}, {num_parameters(model):,} parameters, "
        f"{data.num_classes} classes\n"
        f"data: {data.order.num_train:,} images in {len(data.train.shards)} shards, "
        f"{config.total_steps * batch / data.order.num_train:.1f} epochs; "
        f"validation: {len(data.val_indices):,} images{without}\n"
        f"batch {batch} = {num_ranks} ranks x {plan.accumulation} x {plan.micro_batch}"
        + (f" less {plan.masked} masked slots ({plan.masked / (batch + plan.masked):.1%})" if plan.masked else "")
        + f"; ZeRO {config.engine.zero_stage}, {config.engine.precision}, {device.type}"
    )
    return Engine(model, config, plan, device)


def _refuse_state(model: torch.nn.Module, name: str) -> None:
    """A checkpoint holds trained parameters. Batch norm's statistics would be lost, and differ between ranks."""
    saved_names = model.state_dict().keys()
    if held := [key for key, _ in model.named_buffers() if key in saved_names]:
        raise ConfigError(
            f"model.name: {name} keeps statistics ({held[0]}, ...) that checkpoints do not hold; choose a model with "
            "layer or group norm, for example timm:resnetv2_50x1_bit"
        )
    if frozen := [key for key, parameter in model.named_parameters() if not parameter.requires_grad]:
        raise ConfigError(
            f"model.name: {name} has frozen parameters ({frozen[0]}, ...), which ZeRO checkpoints do not hold"
        )


def _start(config: Config) -> TrainState:
    ranks.seed_generators(config.seed, 0)
    return TrainState()


def _branch_point(config: Config, data: DataSets) -> Path:
    assert config.branch_from is not None
    origin = find_checkpoint(config.branch_from)
    refuse_changes(origin, config, data.train, branching=True)
    if (step := read_state(origin)["step"]) >= config.total_steps:
        raise ConfigError(f"branch_from: {origin} is at step {step}, but total_steps is {config.total_steps}; raise it")
    return origin


def _resume(engine: Engine, checkpoint: Path, config: Config) -> TrainState:
    saved, reader = read_state(checkpoint), CheckpointReader(checkpoint)
    engine.load(reader, saved["engine"])
    state = TrainState(**saved["train"])
    same_ranks = saved["world_size"] == ranks.world_size()
    restored = same_ranks and engine.load_generators(reader.generators(ranks.rank()))
    if not restored:
        ranks.seed_generators(config.seed, state.step)
    note = (
        ""
        if restored
        else f"; random states of dropout drawn anew ({saved['world_size']} ranks then, {ranks.world_size()} now)"
    )
    say(f"resumed from {checkpoint}{note}")
    return state


# --- in the loop -----------------------------------------------------------------------------------------------------


class Journal:
    """Agrees with the other ranks after each step, counts what was left out, and writes it down."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._config = config
        self._bad, self._skipped = JsonLines(folder / "bad_samples.jsonl"), JsonLines(folder / "skipped_steps.jsonl")
        self._samples = JsonLines(folder / f"samples-{ranks.rank():05d}.jsonl") if config.log.samples else None

    def note(self, state: TrainState, batch: Batch, result: StepResult, stop: signals.StopRequest) -> bool:
        """Returns, on all ranks alike, whether to stop. Raises BadSamplesError, NonFiniteError."""
        flags = [float(stop.signal_name is not None), float(batch.error is not None)]
        told = torch.cat([torch.tensor(flags, dtype=torch.float64), count_reasons(batch.bad)])  # [2 + reasons]
        stopping, failed, *bad = agreement.add_up(told).tolist()
        if failed:  # nothing of this step is saved
            agreement.raise_together(batch.error)
        if any(bad):
            self._note_bad(state, batch, [int(count) for count in bad])
        if self._samples is not None:
            used = [[e, i] for e, i in zip(batch.epoch.tolist(), batch.index.tolist()) if i >= 0]
            self._samples.append({"step": state.step, "samples": used})
        if result.applied:
            state.skipped_in_a_row = 0
        else:
            self._note_skipped(state, batch, result)
        return bool(stopping)

    def _note_bad(self, state: TrainState, batch: Batch, counts: list[int]) -> None:
        for reason, count in zip(REASONS, counts):
            state.bad_samples[reason] += count
        records = [record for of_rank in agreement.gather(batch.bad) for record in of_rank]
        if ranks.is_main():
            for record in records:
                self._bad.append({"step": state.step, **record._asdict()})
        seen = state.step * self._config.data.global_batch
        total = sum(state.bad_samples.values())
        if (total & (total - 1)) == 0 or total == sum(counts):  # the first, then each doubling
            say(
                f"warning: {total} of {seen} samples so far could not be used, the last: "
                f"{records[-1].shard}: {records[-1].detail}"
            )
        check_bad_fraction(state.bad_samples, seen, self._config.data.max_bad_fraction)

    def _note_skipped(self, state: TrainState, batch: Batch, result: StepResult) -> None:
        loss = agreement.add_up(result.sums)[0].item()
        state.skipped_steps += 1
        # In fp16 a finite loss with infinite gradients is the search for the loss scale, not a fault.
        searching_scale = self._config.engine.precision == "fp16" and np.isfinite(loss)
        state.skipped_in_a_row = 0 if searching_scale else state.skipped_in_a_row + 1
        indices = [index for of_rank in agreement.gather(batch.index.tolist()) for index in of_rank if index >= 0]
        if ranks.is_main():
            self._skipped.append({"step": state.step, "loss": str(loss), "indices": indices})
            warn(f"step {state.step} skipped on all ranks: loss or gradients not finite (loss sum {loss})")
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"step {state.step}: loss or gradients not finite in {state.skipped_in_a_row} steps in a row. Lower "
                "optim.lr, set optim.clip_norm, or look at the samples in skipped_steps.jsonl"
            )


class Meter:
    """What is measured between two log lines: loss and accuracy over all ranks, rate, waiting for data."""

    def __init__(self, config: Config, num_classes: int, state: TrainState, device: torch.device) -> None:
        self._config, self._device = config, device
        self._flops_per_image = train_flops(config.model, num_classes)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        if ranks.is_main():  # what was saved is the sum over all ranks
            self._sums += torch.tensor(state.window, dtype=torch.float64, device=device)
        self._restart()

    def _restart(self) -> None:
        self._started, self._steps, self._waited_s, self._paused_s = time.perf_counter(), 0, 0.0, 0.0

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch and counts the time until it came."""
        began = time.perf_counter()
        batch = next(batches)
        self._waited_s += time.perf_counter() - began
        return batch

    def add(self, result: StepResult) -> None:
        """Counts a step; nothing is read from the device."""
        if result.applied:
            self._sums += result.sums
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves evaluation and saving out of the rate."""
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def window(self) -> list[float]:
        """Returns loss, correct answers and images since the last reading, summed over all ranks."""
        return agreement.add_up(self._sums).tolist()

    def read(
        self, state: TrainState, data: DataSets, lr: float, result: StepResult, engine: Engine
    ) -> dict[str, float]:
        """Returns the numbers of a log line and starts anew."""
        loss, correct, images = self.window()
        elapsed = time.perf_counter() - self._started - self._paused_s
        rate = self._steps * self._config.data.global_batch / elapsed
        self._sums.zero_()
        numbers = {
            "train/loss": loss / max(1.0, images),
            "train/top1": correct / max(1.0, images),
            "train/lr": lr,
            "train/images_per_s": rate,
            "train/tflop_per_s": rate * self._flops_per_image / 1e12,
            "train/data_wait": self._waited_s / elapsed,
            "train/memory_gb": peak_memory_bytes(self._device) / 1e9,
            "train/epoch": state.step * self._config.data.global_batch / data.order.num_train,
            "train/bad_samples": sum(state.bad_samples.values()),
            "train/skipped_steps": state.skipped_steps,
        }
        if result.applied:
            numbers["train/grad_norm"] = float(result.grad_norm)
        if engine.loss_scale is not None:
            numbers["train/loss_scale"] = engine.loss_scale
        self._restart()
        return numbers


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory that this rank has used: of its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _evaluate(
    config: Config, data: DataSets, engine: Engine, state: TrainState, log: RunLog, stop: signals.StopRequest
) -> bool:
    """Measures what is due into state.metrics, with the averaged weights where they are kept.

    Returns whether it was given up to stop; then all that was due still is.
    """
    metrics: dict[str, float] = {}
    with engine.averaged():
        try:
            if state.validation_due:
                metrics |= _validation_metrics(config, data, engine, stop)
            if state.features_due:
                metrics |= _features_metrics(config, data, engine, stop)
        except EvaluationStopped:
            return True
    state.metrics = metrics
    state.validation_due = state.features_due = False
    log.scalars(state.step, state.metrics)
    return False


def _validation_metrics(config: Config, data: DataSets, engine: Engine, stop: signals.StopRequest) -> dict[str, float]:
    assert data.val is not None
    options = {"batch_size": config.evaluation.batch_size, "image_size": config.model.image_size, "config": config.data}
    batches = eval_batches(data.val, data.val_indices, **options)
    scores = classification_scores(
        engine.predict,
        batches,
        loss=config.loss,
        device=engine.device,
        stop_agreed=stop.agreed,
        keep_logits=data.ranks_classes,
    )
    return {f"val/{score.metric}": score.value for score in scores} | {"val/images": scores[0].n}


def _features_metrics(config: Config, data: DataSets, engine: Engine, stop: signals.StopRequest) -> dict[str, float]:
    """Few-shot accuracy as val/fewshot_10, of nearest neighbours as val/knn_20; images in few-shot's transform."""
    assert data.fewshot is not None
    options = {
        "image_size": config.model.image_size,
        "batch_size": config.evaluation.batch_size,
        "config": replace(config.data, eval_transform=fewshot.TRANSFORM, eval_crop=fewshot.CROP),
        "device": engine.device,
        "stop_agreed": stop.agreed,
    }
    few, test = data.fewshot
    shots = fewshot.spread_indices(few.num_samples)
    train_features = extract_features(engine.features, few, indices=shots, **options)
    test_features = extract_features(engine.features, test, **options)
    return agreement.from_main(lambda: _on_features(config, train_features, test_features, engine.device))


def _on_features(
    config: Config, train: Features | None, test: Features | None, device: torch.device
) -> dict[str, float]:
    assert train is not None and test is not None  # rank 0 has them
    values = {row.metric: row.value for row in fewshot.fewshot(*train, *test, shots=config.evaluation.fewshot_shots)}
    metrics = {f"val/fewshot_{k}": values[f"{k}-shot"] for k in config.evaluation.fewshot_shots}
    if config.evaluation.knn:
        metrics |= {f"val/knn_{row.metric.removesuffix('-nn')}": row.value for row in knn(*train, *test, device=device)}
    return metrics


def _save(
    config: Config, data: DataSets, engine: Engine, state: TrainState, meter: Meter, log: RunLog, *, must_succeed: bool
) -> None:
    folder = config.output / config.name / "checkpoints"
    engine.check()
    log.sync()
    state.window = meter.window()
    everything_else = {
        "step": state.step,
        "train": asdict(state),
        "metrics": state.metrics,
        "engine": engine.state(),
        "data": fingerprint(data.train),
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

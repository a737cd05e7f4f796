"""Evaluation during training, by the evaluators of tools/evaluate.py."""

from dataclasses import replace

from pretrain.cluster import agreement, signals, watchdog
from pretrain.config import Config
from pretrain.engine.step import Engine
from pretrain.errors import StorageError, UserError
from pretrain.evaluation import classification, fewshot
from pretrain.evaluation.classification import EvaluationStopped
from pretrain.evaluation.evaluators import EVALUATORS
from pretrain.evaluation.names import HEAD, Job
from pretrain.evaluation.subject import Images, Reading, Subject, all_images
from pretrain.log import RunLog
from pretrain.train.datasets import DataSets
from pretrain.train.state import TrainState


def evaluate(
    config: Config, data: DataSets, engine: Engine, state: TrainState, log: RunLog, stop: signals.StopRequest
) -> bool:
    """Runs the evaluations that are due and sets state.metrics; uses the averaged weights if the run keeps any.

    Returns whether a stop request cut it short. What was due then stays due, as after an error raised on all ranks.
    """
    watchdog.section("evaluate", state.step)
    subject = _subject(config, data, engine, stop)
    metrics: dict[str, float] = {}
    met: Exception | None = None
    with engine.averaged():
        try:
            if state.validation_due:
                assert data.val is not None
                metrics |= _validation_metrics(subject, Images(data.val, data.val_indices))
            if state.features_due:
                assert data.fewshot is not None
                few, test = map(all_images, data.fewshot)
                metrics |= _features_metrics(subject, {"train": few, "test": test}, knn=config.evaluation.knn)
        except EvaluationStopped:
            return True
        except (StorageError, UserError) as error:
            met = error  # raised below, once the trained weights are back in place
        finally:
            watchdog.section("step")
    if met is not None:
        raise met
    state.metrics = metrics
    state.validation_due = state.features_due = False
    log.scalars(state.step, state.metrics)
    return False


def _subject(config: Config, data: DataSets, engine: Engine, stop: signals.StopRequest) -> Subject:
    """The model in training as evaluators see it. They show no progress, and repeat nothing that the start printed."""
    few = replace(config.data, eval_transform=fewshot.TRANSFORM, eval_crop=fewshot.CROP)
    in_few = Reading(few, fewshot.MAX_TRAIN)
    return Subject(
        predict=engine.predict,
        extract=engine.features,
        num_classes=data.num_classes,
        image_size=config.model.image_size,
        loss=config.loss,
        device=engine.device,
        batch_size=config.evaluation.batch_size,
        own=config.data,
        readings={"fewshot": in_few, "knn": in_few},  # the same for both, which share their features
        shots=config.evaluation.fewshot_shots,
        max_logit_bytes=classification.MAX_LOGIT_BYTES_IN_TRAINING,
        stop_agreed=lambda: agreement.any_rank(stop.signal_name is not None),
    )


def _validation_metrics(subject: Subject, images: Images) -> dict[str, float]:
    rows = EVALUATORS[HEAD].score(subject, Job(HEAD), {"test": images}).rows
    return {f"val/{row.metric}": row.value for row in rows} | {"val/images": rows[0].n}


def _features_metrics(subject: Subject, sets: dict[str, Images], *, knn: bool) -> dict[str, float]:
    """Few-shot accuracy as val/fewshot_10, nearest-neighbour accuracy as val/knn_20; both in few-shot's transform."""
    rows = EVALUATORS["fewshot"].score(subject, Job("fewshot"), sets).rows
    values = {row.metric: row.value for row in rows}
    metrics = {f"val/fewshot_{k}": values[f"{k}-shot"] for k in subject.shots}
    if knn:
        rows = EVALUATORS["knn"].score(subject, Job("knn"), sets).rows
        metrics |= {f"val/knn_{row.metric.removesuffix('-nn')}": row.value for row in rows}
    return metrics

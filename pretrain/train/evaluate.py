"""What is evaluated on the way."""

from dataclasses import replace

import torch

from pretrain.cluster import agreement, signals
from pretrain.config import Config
from pretrain.data.loader import eval_batches
from pretrain.engine.step import Engine
from pretrain.evaluation import fewshot
from pretrain.evaluation.classification import EvaluationStopped, classification_scores
from pretrain.evaluation.features import Features, extract_features
from pretrain.evaluation.knn import knn
from pretrain.log import RunLog
from pretrain.train.datasets import DataSets
from pretrain.train.state import TrainState


def evaluate(
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

"""The engine of a run: its model, the values that it starts from, and what cannot be trained."""

import torch

from pretrain.cluster import agreement, ranks
from pretrain.config import Config
from pretrain.data.classes import match_classes
from pretrain.data.manifest import Manifest
from pretrain.data.order import plan_batch
from pretrain.engine.device_memory import first_sentence, raised_as_out_of_memory
from pretrain.engine.frozen import statistics_of
from pretrain.engine.step import Engine
from pretrain.engine.versions import untried
from pretrain.errors import ConfigError, DeviceMemoryError
from pretrain.log import say
from pretrain.models.build import Values, build_model, build_without_values, drawn_values, zero_values
from pretrain.models.tensors import Weights
from pretrain.models.weights import check_same_function, classifier_names, load_tensors, read_weights
from pretrain.plan.choose import MICRO_BATCHES, MOST_WITHOUT_FORMULA, SURE_SHARE, fitting_micro_batch
from pretrain.train.announce import told_of_run
from pretrain.train.datasets import DataSets


def build_engine(config: Config, data: DataSets, device: torch.device, *, from_scratch: bool) -> Engine:
    """Returns the engine of a run, with init_from's weights if it starts `from_scratch`, and prints what it trains.

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
        agreement.together(lambda: _load(model, config, data))  # a node may lack the files
        say(f"weights from {config.init_from}" + (", with a new head" if config.init_new_head else ""))
    most = micro_batch_limit(config, data.num_classes, device)
    plan = plan_batch(config.data.global_batch, ranks.world_size(), most)
    if told := untried(on_gpu=device.type == "cuda"):
        say(f"warning: {told}")
    if idle := ranks.num_idle_gpus():
        say(f"warning: one rank uses one of {idle + 1} GPUs; deepspeed or torchrun starts a rank for each")
    if ranks.hides_gpus():
        say(
            "warning: each task sees its own GPU alone, so that NCCL may not find NVLink between them; "
            f"--gpus-per-node={ranks.ranks_here()} in place of --gpus-per-task=1 shows them all"
        )
    if statistics_of(model):
        say("batch norm: its statistics stay those of the weights that the run starts from")
    say(*told_of_run(config, data, model, plan, device))
    try:
        with raised_as_out_of_memory():
            engine = Engine(model, config, plan, device, values)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"model.name: this GPU does not hold {config.model.name} and its optimizer ({first_sentence(error)}); "
            "try engine.zero_stage=2 or 3, or more GPUs; tools/plan.py says what fits"
        ) from error
    say(*engine.told)
    return engine


def micro_batch_limit(config: Config, num_classes: int, device: torch.device) -> int:
    """Returns the largest number of images per forward pass: the config's, or as many as the smallest GPU holds.

    Computed by formula from total memory, not from what is free now: the same machines choose the same number, so that
    a resumed run is bit-identical.
    """
    if config.engine.max_micro_batch_size is not None:
        return config.engine.max_micro_batch_size
    if device.type != "cuda":
        return MOST_WITHOUT_FORMULA
    smallest = min(agreement.gather(torch.cuda.get_device_properties(device).total_memory))
    return fitting_micro_batch(config, num_classes, ranks.world_size(), SURE_SHARE * smallest, max(MICRO_BATCHES))


def _model_and_values(config: Config, num_classes: int, *, from_scratch: bool) -> tuple[torch.nn.Module, Values | None]:
    """The model with its initial values, or an empty one and the values one by one: no rank holds all in float32.

    The first for timm's models, which draw their own, and for init_from: an error in its file must be raised before
    ranks wait for each other over a part of the model.
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
    if config.init_new_head and config.model.timm_name is not None:  # our own models are built with a zero head
        with torch.no_grad():
            for name in classifier_names(model):
                model.get_parameter(name).zero_()


def _refuse_other_classes(weights: Weights, train_set: Manifest) -> None:
    """Raises ConfigError unless the head's classes are those of the training set, in the same order."""
    if weights.num_classes < train_set.num_classes:
        return  # load_tensors reports the shapes
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
    """Raises ConfigError for state other than a checkpoint holds: trained parameters, frozen batch-norm statistics."""
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

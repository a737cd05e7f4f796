"""What a start reports, on the console and in starts.jsonl: model, data, batch, warnings."""

from typing import Any

import torch

from pretrain.cluster import ranks
from pretrain.config import Config, model_name
from pretrain.data.lanes import read_amplification
from pretrain.data.order import BatchPlan, Order, share
from pretrain.evaluation import classification
from pretrain.log import say
from pretrain.models.profile import num_parameters
from pretrain.provenance import processor
from pretrain.sizes import is_plain
from pretrain.train.datasets import DataSets

# Share of the initial weights in the final averages; the paper's own runs, 0.9999 over 20,000 steps, leave 13.5 %.
MAX_INITIAL_SHARE = 0.5


def told_of_run(
    config: Config, data: DataSets, model: torch.nn.Module, plan: BatchPlan, device: torch.device
) -> list[str]:
    """Returns the lines of the console that say what trains, on what data, and how the batch is split."""
    batch, masked = config.data.global_batch, plan.masked
    too_large = data.val is not None and data.val.multi_label and not data.has_average_precision
    most = classification.MAX_LOGIT_BYTES_IN_TRAINING
    chosen = config.engine.max_micro_batch_size is None and device.type == "cuda" and is_plain(config.model)
    fitted = ", as many as fit" if chosen and plan.accumulation > 1 else ""
    of_all = "" if data.order.subset is None else f" of {data.order.num_samples - data.order.held_out:,}"
    copies = f", each image {data.order.repeats} times in its step" if data.order.repeats > 1 else ""
    without = f", no mean average precision: logits above {most >> 20:,} MB" if too_large else ""
    return [
        f"{config.output / config.name}: {model_name(config.model)}, {num_parameters(model):,} parameters, "
        f"{data.num_classes} classes",
        f"data: {data.order.num_train:,} images{of_all} in {len(data.train.shards)} shards, "
        f"{data.order.epochs(config.total_steps):.1f} epochs{' of the slowest' if data.order.mixture else ''}{copies}; "
        f"validation: {len(data.val_indices):,} images{without}",
        *_told_of_order(data.order),
        *_told_of_sources(data, config.total_steps),
        f"batch {batch} = {ranks.world_size()} ranks x {plan.accumulation} x {plan.micro_batch}{fitted}"
        + (f" less {masked} masked slots ({masked / (batch + masked):.1%})" if masked else "")
        + f"; ZeRO {config.engine.zero_stage}, {config.engine.precision}, {device.type}",
    ]


def _told_of_order(order: Order) -> list[str]:
    """The parameters of the order `lanes`, and how many bytes a node reads for each byte that it uses."""
    batch = order.global_batch
    lanes = [(order.images_per_step, order.lanes)] if order.lanes else []
    if order.mixture:
        lanes = [(own.round_samples, own.lanes) for own in order.mixture.lanes]
    if not lanes:
        return []
    shares = [share(batch, rank, ranks.world_size()) for rank in range(ranks.world_size())]
    here = ranks.ranks_here()
    nodes = [(some[0].start, some[-1].stop) for some in (shares[at : at + here] for at in range(0, len(shares), here))]
    told = []
    for own, numbers in lanes:  # in a mixture, a round is about one step's samples from a source
        slots = [range(start * own // batch, -(-stop * own // batch)) for start, stop in nodes]
        told.append(
            f"order: {numbers.num_lanes} lanes of blocks of {numbers.block_samples} samples; each node reads "
            f"{'about ' if order.mixture else ''}{read_amplification(numbers, own, slots):.2f} x the bytes that it uses"
        )
    return told


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


def warn_of_settings(config: Config, data: DataSets) -> None:
    """Warns of what somebody may mean, but hardly does."""
    _warn_of_young_averages(config)
    _warn_of_added_losses(config, data)
    _warn_of_large_batch(data.order)
    _warn_of_no_best(config, data)
    _warn_of_head_of_zeros(config)


def _warn_of_young_averages(config: Config) -> None:
    """Warns of a run so short that its averages, which are validated, are still mostly the initial weights."""
    decay, steps = config.optim.average_decay, config.total_steps
    if (share := decay**steps) > MAX_INITIAL_SHARE:
        say(
            f"warning: optim.average_decay ({decay:g}): after {steps} steps the averages, which are validated and "
            f"kept, still hold {share:.1%} of the initial weights; {0.01 ** (1 / steps):.5f} would leave 1 %"
        )


def _warn_of_added_losses(config: Config, data: DataSets) -> None:
    """Warns of softmax on images with several labels, each of which it counts as an image: somebody may mean that."""
    if config.loss == "softmax" and data.train.multi_label:
        say(
            f"warning: {data.train.path}: images have several labels, and loss=softmax adds up the losses of all, as "
            "if only one label could be right; loss=sigmoid decides on every class by itself"
        )


def _warn_of_no_best(config: Config, data: DataSets) -> None:
    """Nothing says which checkpoint is the best where nothing is validated."""
    if config.checkpoint.keep_best and data.val is None:
        say(
            "warning: checkpoint.keep_best has nothing to choose by, for nothing is validated: that takes data.val or "
            "data.held_out, and evaluation.every_steps"
        )


def _warn_of_head_of_zeros(config: Config) -> None:
    """Warns of a head that starts at zero under LAMB, whose steps are relative to the weights: it hardly moves."""
    model, draws_head = config.model, config.init_from is None or config.init_new_head
    if config.optim.name == "lamb" and model.timm_name is None and model.init == "google" and draws_head:
        say(
            "warning: optim.name=lamb takes steps relative to the weights, and the head starts from zeros: little is "
            "learned during the warm-up; model.init=deit draws it from N(0, 0.02)"
        )


def _warn_of_large_batch(order: Order) -> None:
    """Warns of a batch larger than the training set: a typo, or a tiny set. Each of its steps takes long."""
    if order.images_per_step > order.num_train:
        say(
            f"warning: data.global_batch ({order.global_batch:,}) is larger than the {order.num_train:,} images to "
            f"train on: each step sees them {order.images_per_step / order.num_train:.1f} times"
        )


def facts_of(data: DataSets, num_parameters: int, device: torch.device) -> dict[str, Any]:
    """Returns what starts.jsonl records about the model, the data and the machine."""
    return {
        "parameters": num_parameters,
        "train_set": data.train.name,
        "train_images": data.order.num_train,
        "num_classes": data.num_classes,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "device_type": device.type,
    }

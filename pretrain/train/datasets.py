"""What a run trains on and is validated on, checked before anything is built."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pretrain.cluster import ranks
from pretrain.config import Config, DataConfig
from pretrain.data.lanes import Lanes, choose_lanes, fits
from pretrain.data.manifest import Manifest, check_shards, load_manifest, read_as
from pretrain.data.mixture import Mixture, choose_source_lanes, joined, phases_of, quotas_of
from pretrain.data.order import Order, order_of
from pretrain.data.store import make_folder, store_at
from pretrain.errors import ConfigError
from pretrain.evaluation import classification
from pretrain.log import say
from pretrain.storage import network_file_system


@dataclass
class DataSets:
    """What is trained on and validated on."""

    train: Manifest
    order: Order
    val: Manifest | None
    val_indices: np.ndarray
    num_classes: int  # of the model's head
    fewshot: tuple[Manifest, Manifest] | None = None  # the set that shots are drawn from, the test set

    def follow(self, order: Order) -> None:
        """Takes the order that a checkpoint's run began with, and its held-out samples."""
        self.order = order
        if order.held_out:
            self.val_indices = order.held_out_indices()

    @property
    def has_average_precision(self) -> bool:
        """Whether validation computes mean average precision: if images have several labels and the logits fit."""
        if self.val is None:
            return False
        most = classification.MAX_LOGIT_BYTES_IN_TRAINING
        return classification.has_average_precision(self.val, len(self.val_indices), self.num_classes, most)


def open_data(config: Config) -> DataSets:
    """Returns the data sets of a run. Raises UserError for those that are not there or do not fit each other.

    Only the first rank of each node checks that shards are there: the caller must raise its error on all ranks.
    """
    train_set, mixture = _open_train(config)
    val_set = _open(config.data.val, config) if config.data.val else train_set if config.data.held_out else None
    sets = [*(train_set.sources or [train_set]), *([val_set] if val_set else [])]
    for manifest in {manifest.path: manifest for manifest in sets}.values():
        if not ranks.local_rank():  # once a node: 30,000 shards on 512 ranks would be 30 million questions to a server
            check_shards(manifest)
    if val_set is not None and val_set is not train_set:
        val_set = _by_class_names(val_set, train_set)
    num_classes = config.model.num_classes or train_set.num_classes
    if num_classes < train_set.num_classes:
        raise ConfigError(
            f"model.num_classes ({num_classes}) is smaller than the {train_set.num_classes} of {train_set.path}"
        )
    if config.data.global_batch < ranks.world_size():
        raise ConfigError(
            f"data.global_batch ({config.data.global_batch}) is smaller than the {ranks.world_size()} ranks; "
            "use fewer ranks or a recipe with a larger batch"
        )
    few = _open_fewshot(config)
    order = _choose_order(config, train_set, mixture)
    indices = order.held_out_indices() if config.data.held_out else np.arange(val_set.num_samples if val_set else 0)
    return DataSets(train_set, order, val_set if config.evaluation.every_steps else None, indices, num_classes, few)


def _open_train(config: Config) -> tuple[Manifest, Mixture | None]:
    """The training set; for a mixture, its sets joined into one, and the mixture's parameters."""
    if not config.data.is_mixture:
        return _open(config.data.train, config), None
    sources = [_open(source.path, config) for source in config.data.sources]
    train_set, told = joined(sources, all_classes=config.data.join_classes)
    if config.loss == "softmax" and train_set.multi_label and not all(source.multi_label for source in sources):
        several, single = (next(s for s in sources if s.multi_label is kind) for kind in (True, False))
        raise ConfigError(
            f"data.train: images of {several.path} have several labels, those of {single.path} one, and loss=softmax "
            "would count each label as an image; set loss=sigmoid"
        )
    say(*told)
    for step, weights in config.data.phases:
        quotas, exact = quotas_of(weights)
        if not exact:
            since = f" from step {step} on" if step else ""
            rounded = f"{' : '.join(map(str, quotas))} of {sum(quotas):,} samples"
            say(f"data.train: the weights{since} are rounded to {rounded}")
        if step >= config.total_steps:
            say(f"warning: data.reweight: step {step} is not before the end, total_steps={config.total_steps}")
    phases, batch = phases_of(config.data), config.data.global_batch
    is_lanes = config.data.order == "lanes" or (config.data.order == "auto" and train_set.is_remote)
    lanes = choose_source_lanes(sources, phases, batch, config.total_steps) if is_lanes else ()
    return train_set, Mixture(tuple(source.num_samples for source in sources), phases, lanes)


def _open(path: Path, config: Config) -> Manifest:
    manifest = load_manifest(path)
    if not manifest.is_remote:
        return manifest
    store = store_at(config.data.store, config.data.store_gb)
    make_folder(store.folder)
    return replace(manifest, store=store)


def warn_of_small_store(manifest: Manifest, order: Order) -> None:
    """Warns when remote blocks would be evicted from a node's store before all their samples are used."""
    if manifest.store is None:
        return
    if order.name == "lanes":  # all blocks of the lanes are in use at once; if they do not fit, none stays
        needed = 1.25 * sum(_bytes_in_use(source, lanes) for source, lanes in zip(*_lanes_of(manifest, order)))
        if needed > manifest.store.max_bytes:
            say(
                f"warning: {manifest.path}: data.store_gb ({manifest.store.max_bytes / 1e9:g}) is less than the blocks "
                f"that a node has in use; each would be downloaded many times. Raise it to {needed / 1e9:.1f}"
            )
        return
    num_bytes = sum(shard.num_bytes for shard in manifest.shards if shard.url)
    block_bytes = manifest.block_samples * manifest.num_bytes / manifest.num_samples
    num_bytes = min(num_bytes, order.num_train * block_bytes)  # a small subset does not need all blocks
    if num_bytes > manifest.store.max_bytes:
        blocks = 1 - manifest.store.max_bytes / num_bytes
        say(
            f"warning: {manifest.path}: {num_bytes / 1e9:.1f} GB of remote shards do not fit data.store_gb "
            f"({manifest.store.max_bytes / 1e9:g}): {blocks:.0%} of all samples will download a whole block of "
            f"{manifest.block_samples}. Raise it, or set data.order=lanes"
        )


def warn_of_single_reads(config: DataConfig, manifest: Manifest, order: Order) -> None:
    """Warns when order=auto reads image by image over a network disk: it recognises remote shards by URL alone."""
    if config.order != "auto" or order.name == "lanes":
        return
    for source in manifest.sources or (manifest,):
        if system := network_file_system(source.path.parent):
            say(
                f"warning: {source.path} is on {system}, which order=permuted asks for each image at another place; "
                "data.order=lanes takes those that lie together within a few steps"
            )
            return


def _lanes_of(manifest: Manifest, order: Order) -> tuple[list[Manifest], list[Lanes]]:
    """The sets that are read, and the lanes of each."""
    if order.mixture:
        return list(manifest.sources), [own.lanes for own in order.mixture.lanes]
    return [manifest], [order.lanes] if order.lanes else []


def _bytes_in_use(manifest: Manifest, lanes: Lanes) -> float:
    """Bytes of the remote blocks that a node's lanes have open."""
    if not manifest.is_remote:
        return 0.0
    mean_bytes = manifest.num_bytes / manifest.num_samples
    share_of_lanes = min(1, (ranks.ranks_here() / ranks.world_size()) + 1 / lanes.num_lanes)
    return lanes.num_lanes * share_of_lanes * lanes.window_blocks * lanes.block_samples * mean_bytes


def _choose_order(config: Config, train_set: Manifest, mixture: Mixture | None) -> Order:
    """The order of a new run. A resumed run keeps that of its checkpoint: see `resumed_order` in resuming.py."""
    order = replace(order_of(config, train_set.num_samples), mixture=mixture)
    if mixture:
        return order
    if config.data.order == "permuted" or (config.data.order == "auto" and not train_set.is_remote):
        return order
    lanes = choose_lanes(train_set.block_samples, order.num_train, order.images_per_step)
    if not fits(lanes, order.num_train, order.images_per_step, config.total_steps):
        raise ConfigError(
            f"data.order: total_steps ({config.total_steps}) x global_batch ({order.global_batch}) is beyond the 64 "
            "bits that the order lanes counts with; lower one of them, or set data.order=permuted"
        )
    return replace(order, lanes=lanes)


def _open_fewshot(config: Config) -> tuple[Manifest, Manifest] | None:
    wanted = config.evaluation
    if wanted.fewshot_train is None or wanted.fewshot_test is None:
        return None
    sets = _open(wanted.fewshot_train, config), _open(wanted.fewshot_test, config)
    for manifest in sets:
        if not ranks.local_rank():  # once per node, as in open_data
            check_shards(manifest)
        if manifest.multi_label:
            raise ConfigError(f"evaluation.fewshot: {manifest.path} has several labels per image; few-shot needs one")
    return sets[0], _by_class_names(sets[1], sets[0])


def _by_class_names(theirs: Manifest, ours: Manifest) -> Manifest:
    """Returns a set with its labels mapped by class name to those of another set, and prints what was mapped."""
    read, told = read_as(theirs, ours)
    if told:
        say(told)
    return read

"""Everything of a data set read again: digests, indexes, labels, images."""

from collections.abc import Iterator
from dataclasses import replace

from pretrain.cli import shown
from pretrain.data.images import decode
from pretrain.data.manifest import Manifest, check_shards, load_index
from pretrain.data.reader import BadSample, parse_labels, read_sample
from pretrain.errors import UserError
from pretrain.shards.build import Progress
from pretrain.shards.tars import alone
from pretrain.storage import sha256


def verify(manifest: Manifest, progress: Progress = lambda _: None) -> Iterator[str]:
    """Yields what is wrong with a data set: digests, indexes, labels and images; every sample is decoded."""
    for shard in manifest.shards:
        try:
            check_shards(replace(manifest, shards=(shard,)))
            if sha256(shard.path) != shard.sha256:
                yield f"{shard.path}: is not the file that was indexed (SHA-256 differs)"
                continue
            load_index(shard)
        except UserError as error:
            yield str(error)
            continue
        only = alone(shard, manifest.num_classes)
        for number in range(shard.num_samples):
            try:
                raw = read_sample(only, number)
                parse_labels(raw.label, manifest.num_classes, manifest.multi_label)
                damage: list[str] = []
                decode(raw.image, damage.append)
                if damage:
                    yield f"{shard.path}: sample {number}: {shown(raw.key)}: damaged: {damage[0]}"
            except BadSample as bad:
                yield f"{shard.path}: sample {number}: {bad}"
            progress(1)

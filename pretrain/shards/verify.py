"""Everything of a data set read again: digests, indexes, labels, images."""

from collections.abc import Iterator
from dataclasses import replace

from pretrain.cli import shown
from pretrain.data.images import decode
from pretrain.data.manifest import Manifest, Shard, check_shards, load_index
from pretrain.data.reader import BadSample, is_intact, parse_labels, read_sample
from pretrain.errors import UserError
from pretrain.shards.build import Progress
from pretrain.shards.elsewhere import local_copy
from pretrain.shards.tars import alone
from pretrain.storage import sha256


def verify(manifest: Manifest, progress: Progress = lambda _: None) -> Iterator[str]:
    """Yields what is wrong with a data set: digests, indexes, labels and images; every sample is decoded."""
    for shard in manifest.shards:
        try:
            check_shards(replace(manifest, shards=(shard,)))
            with local_copy(shard) as here:
                yield from (f"{shard.url or shard.path}: {problem}" for problem in _problems(manifest, here, progress))
        except UserError as error:
            yield str(error)


def _problems(manifest: Manifest, shard: Shard, progress: Progress) -> Iterator[str]:
    """Yields what is wrong with a shard that lies here."""
    if sha256(shard.path) != shard.sha256:
        yield "is not the file that was indexed (SHA-256 differs)"
        return
    index, only = load_index(shard), alone(shard, manifest.num_classes)
    with shard.path.open("rb") as file:
        for number in range(shard.num_samples):
            try:
                raw = read_sample(only, number)
                parse_labels(raw.label, manifest.num_classes, manifest.multi_label)
                damage: list[str] = []
                decode(raw.image, damage.append)
                if damage:
                    yield f"sample {number}: {shown(raw.key)}: damaged: {damage[0]}"
                start, end = index.byte_range(number)
                file.seek(start)
                if not is_intact(file.read(end - start), index, number):
                    yield f"sample {number}: {shown(raw.key)}: has another CRC-32 than its index says; index it again"
            except BadSample as bad:
                yield f"sample {number}: {bad}"
            progress(1)

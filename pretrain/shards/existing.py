"""Existing tars, indexed as they are."""

import errno
import gzip
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pretrain.config import MAX_CLASSES
from pretrain.data.inside import file_inside
from pretrain.data.manifest import Shard
from pretrain.data.reader import BadSample, parse_labels, read_sample
from pretrain.errors import StorageError, UserError
from pretrain.escape import shown
from pretrain.json_files import is_text
from pretrain.shards.build import DataSet, Progress, finish, start_folder
from pretrain.shards.tars import alone, index_tar
from pretrain.shards.unpacking import max_unpacked_bytes, too_large
from pretrain.storage import PASSING_ERRORS, replacing


def index_existing(
    tars: Sequence[Path],
    classes: Sequence[str],
    out: Path,
    *,
    progress: Progress = lambda _: None,
    passed_over: Counter[str] | None = None,
) -> Path:
    """Indexes existing tars and returns the manifest's path. `.tar.gz` are decompressed; tars elsewhere are copied.

    passed_over: is told how many members belong to no sample, by kind. Raises UserError naming the shard, when one is
    damaged, holds a sample twice or without image or label.
    """
    if not all(path.resolve().parent == out.resolve() for path in tars):
        start_folder(out, classes)  # else: indexed again, where they lie
    names = [path.name.removesuffix(".gz") for path in tars]
    if len(set(names)) < len(names):
        raise UserError(f"two tars have the same name: {sorted(n for n in names if names.count(n) > 1)[0]}")
    if unreadable := next((name for name in names if not is_text(name)), None):
        raise UserError(f"{shown(unreadable)}: the tar's name is not UTF-8, and the manifest names it; rename it")
    shards, counts, multi_label = [], Counter[int](), False
    with _removed_on_refusal() as brought:
        for path, name in zip(tars, names):
            shard = index_tar(_brought(path, out / name, brought), passed_over)
            if not shard.num_samples:
                raise UserError(f"{path}: has no samples")
            multi_label = multi_label if shards else starts_with_list(shard)
            counts.update(labels_of(shard, len(classes), multi_label))
            shards.append(shard)
            progress(1)
        num_classes = len(classes) or max(counts) + 1
        if num_classes > MAX_CLASSES:
            raise UserError(f"{out}: label {max(counts)} makes more than {MAX_CLASSES} classes")
    return finish(out, DataSet(shards, num_classes, classes, counts, [], multi_label), {"scope": "none"})


@contextmanager
def _removed_on_refusal() -> Iterator[list[Path]]:
    """Yields a list for the files that are brought; when a tar is refused, all are removed: nobody can use them."""
    brought: list[Path] = []
    try:
        yield brought
    except UserError:
        for path in brought:
            path.unlink(missing_ok=True)
        raise


def _brought(source: Path, target: Path, brought: list[Path]) -> Path:
    """A tar in its place; where it was copied or unpacked, it and its index to be are added to `brought`."""
    if source.resolve() == target.resolve():
        file_inside(target.parent, target)
        return target
    limit = max_unpacked_bytes(source)
    try:
        with replacing(target) as temporary:
            opened = gzip.open(source) if source.suffix == ".gz" else source.open("rb")
            with opened as reader, temporary.open("wb") as writer:
                while block := reader.read(1 << 20):
                    if writer.tell() + len(block) > limit:
                        raise UserError(f"{source}: {too_large(writer.tell() + len(block), limit)}")
                    writer.write(block)
    except (OSError, EOFError, zlib.error) as error:
        passes = isinstance(error, OSError) and error.errno in PASSING_ERRORS | {errno.ENOSPC, errno.EDQUOT}
        kind = StorageError if passes else UserError
        raise kind(f"{source}: cannot be copied to {target} ({error})") from None
    index = target.with_suffix(".idx")
    brought += [target] if index.exists() else [target, index]  # one that lies there may be another tool's
    return target


def starts_with_list(shard: Shard) -> bool:
    """Returns whether the first label of existing tars is a list: then all have to be."""
    try:
        return read_sample(alone(shard, 1), 0).label.lstrip().startswith(b"[")
    except BadSample:
        return False  # told with its number by `labels_of`


def labels_of(shard: Shard, num_classes: int, multi_label: bool) -> list[int]:
    """Returns all labels of a tar that lies here, num_classes=0: of any class. Raises UserError for a bad one."""
    manifest = alone(shard, num_classes or 10**9)
    labels = []
    for number in range(shard.num_samples):
        try:
            raw = read_sample(manifest, number)
            labels += parse_labels(raw.label, manifest.num_classes, multi_label)
        except BadSample as bad:
            raise UserError(f"{shard.path}: sample {number}: {bad}") from None
    return labels

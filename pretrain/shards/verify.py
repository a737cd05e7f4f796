"""Checks a data set by reading all of it again, a shard at a time: digests, indexes, keys, labels, images."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from pretrain.cli import shown
from pretrain.data.images import decode
from pretrain.data.manifest import BLOCK, Manifest, Shard, ShardIndex, check_shards, load_index
from pretrain.data.reader import BadSample, forget_shards, is_intact, parse_labels, read_sample
from pretrain.errors import UserError
from pretrain.shards.elsewhere import local_copy
from pretrain.shards.pool import Progress, results
from pretrain.shards.tars import alone, check_end, repeated, samples_in
from pretrain.storage import sha256

_PARTS = 16  # words of keys are sorted in so many parts, so that not all are copied at once
_SHIFT = np.uint64(60)  # a word shifted by it gives its part
_NONE = np.zeros(0, dtype="<u8")


def verify(
    manifest: Manifest,
    progress: Progress = lambda _: None,
    *,
    workers: int = 1,
    told: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Yields what is wrong with a data set, in the order of its shards; every sample is decoded.

    workers: processes, with a shard at a time each, and a copy of it where it is remote; 1: this one. told: called with
    what is no error: that shards have keys in common. This check takes 12 bytes of memory a sample.
    """
    each = replace(manifest, class_names=(), label_map=None)  # sent to processes with each shard
    tasks = ((number, replace(each, shards=(shard,))) for number, shard in enumerate(manifest.shards))
    words = [_NONE] * len(manifest.shards)
    waiting: dict[int, list[str]] = {}
    following = 0
    for number, problems, found in results(_checked, tasks, min(workers, len(manifest.shards)), progress):
        words[number] = found
        waiting[number] = problems
        while following in waiting:
            yield from waiting.pop(following)
            following += 1
    if line := _in_common(manifest, words):
        told(line)


def _checked(task: tuple[int, Manifest], progress: Progress) -> tuple[int, list[str], np.ndarray]:
    """The number of a data set's only shard, what is wrong with it, and a word for each of its samples, 0 for none.

    There are no words if the shard is not the one in the manifest: it may claim any number of samples.
    """
    number, manifest = task
    (shard,) = manifest.shards
    problems: list[str] = []
    kept: list[np.ndarray] = []
    try:
        check_shards(manifest)
        with local_copy(shard) as here:
            try:
                for problem in _problems(manifest, here, kept, progress):
                    problems.append(f"{shard.url or shard.path}: {problem}")
            except UserError as error:  # of a remote shard it names the copy, which the user has never seen
                problems.append(str(error).replace(str(here.path.parent), str(shard.path.parent)))
    except UserError as error:
        problems.append(str(error))
    finally:
        forget_shards()
    words = kept[0] if kept else _NONE
    _, first = np.unique(words, return_index=True)  # a key that occurs again in its shard is reported already
    once = np.zeros_like(words)
    once[first] = words[first]
    return number, problems, once


def _problems(manifest: Manifest, shard: Shard, kept: list[np.ndarray], progress: Progress) -> Iterator[str]:
    """Yields what is wrong with a local shard, and adds the words of its keys to `kept`."""
    if sha256(shard.path) != shard.sha256:
        yield "is not the file that was indexed (SHA-256 differs)"
        return
    index, only = load_index(shard), alone(shard, manifest.num_classes)
    kept.append(words := np.zeros(shard.num_samples, dtype="<u8"))
    yield from _problems_of_keys(shard, index)
    with shard.path.open("rb") as file:
        for number in range(shard.num_samples):
            try:
                raw = read_sample(only, number)
                words[number] = _word(raw.key)
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


def _problems_of_keys(shard: Shard, index: ShardIndex) -> Iterator[str]:
    """Yields the keys that a tar holds twice, and samples that its index lacks; nothing its maker claims is trusted."""
    try:
        samples, end = samples_in(shard.path, Counter())
        check_end(shard.path, end)
    except UserError as error:
        yield str(error).removeprefix(f"{shard.path}: ")
        return
    for first, again in repeated(samples):
        places = f"{shown(first.member)} at byte {first.start} and {shown(again.member)} at byte {again.start}"
        yield f"key {shown(again.key)} occurs twice: {places}"
    starts = np.array([sample.start for sample in samples], dtype=np.uint64)
    missing = np.flatnonzero(~np.isin(starts // BLOCK, index.offsets[:-1]))
    if len(missing):
        first = samples[missing[0]]
        yield (
            f"its index lacks {len(missing):,} of {len(samples):,} samples, the first is {shown(first.member)} at byte "
            f"{first.start}; index it again"
        )


def _word(key: str) -> int:
    """64 bits of a digest of a key: of 300 million keys hardly two have one by chance. Never 0, which is none."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little") or 1


def _in_common(manifest: Manifest, words: Sequence[np.ndarray]) -> str | None:
    """A line about keys that several shards have; words: of the samples of each shard, 0 for none."""
    count, places = repeated_words(words)
    if not count:
        return None
    named = []
    for place, number in places:
        shard, index = manifest.shards[place], int(manifest.first_indices[place]) + number
        key = "" if shard.url else f" ({shown(read_sample(manifest, index).key)})"
        named.append(f"sample {number} of {shown(shard.path.name)}{key}")
    return f"{count:,} keys are in several shards, which is no error: {' and '.join(named)}"


def repeated_words(words: Sequence[np.ndarray]) -> tuple[int, list[tuple[int, int]]]:
    """Returns how many words other than 0 repeat an earlier one, and the places of the first two of one that does.

    A place: number of the array, place in it. words: arrays of uint64, 8 bytes of memory each; takes 4 more. 300
    million: 30 s.
    """
    count, places = 0, list[tuple[int, int]]()
    for part in range(_PARTS):
        found = np.sort(np.concatenate([_NONE, *(one[(one >> _SHIFT == part) & (one != 0)] for one in words)]))
        again = np.flatnonzero(found[1:] == found[:-1])
        count += len(again)
        if len(again) and not places:
            same = ((number, np.flatnonzero(one == found[again[0]]).tolist()) for number, one in enumerate(words))
            places = [(number, place) for number, found_there in same for place in found_there][:2]
    return count, places

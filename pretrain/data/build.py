"""Making a data set: sources -> shuffled shards, their indexes, and the manifest, which is written last.

A source is a list of `Item`s: where an image is and what its label is. Existing tars are indexed as they are.
"""

import gzip
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.writer import TarWriter

from pretrain.data.images import decode
from pretrain.data.manifest import (
    BLOCK,
    IMAGE_ENDINGS,
    LABEL_ENDING,
    Manifest,
    Shard,
    ShardIndex,
    key_crc32,
    load_index,
    write_index,
    write_manifest,
)
from pretrain.data.order import words
from pretrain.data.reader import BadSample, parse_labels, read_sample
from pretrain.errors import UserError
from pretrain.storage import replacing, sha256, write_text

Progress = Callable[[int], None]  # told the number of samples just done


class Item(NamedTuple):
    """A sample to be written."""

    read: Callable[[], bytes]  # the encoded image
    ending: str  # jpg, png, webp
    label: int | list[int]  # a class, or all classes of the image; one kind for a whole data set
    source: str  # where it came from, for error messages


# --- sources ---------------------------------------------------------------------------------------------------------


def folder_items(root: Path) -> tuple[list[Item], list[str]]:
    """Returns the images of root/CLASS/**/*, and the class names: the folders' names in sorted order."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    items = [
        Item(path.read_bytes, _ending(path.name), label, str(path))
        for label, name in enumerate(classes)
        for path in files_below(root / name)
        if _ending(path.name) in IMAGE_ENDINGS
    ]
    if not items:
        raise UserError(
            f"{root}: no images found; expected {root}/CLASS/NAME.jpg (endings: {', '.join(IMAGE_ENDINGS)})"
        )
    return items, classes


def files_below(folder: Path) -> list[Path]:
    """Returns all files below a folder, sorted; links to folders are followed, but for one that leads back up.

    Raises UserError on a link to nothing or a folder that cannot be read: images would be missing without a word.
    """
    found = []
    for place, folders, names in os.walk(folder, onerror=_cannot_list, followlinks=True):
        here = Path(place)
        folders[:] = [n for n in folders if not ((here / n).is_symlink() and _leads_up(here / n))]
        for path in (here / name for name in names):
            if path.is_file():
                found.append(path)
            elif path.is_symlink():
                raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there; mend or remove it")
    return sorted(found)


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")


def _leads_up(link: Path) -> bool:
    return link.parent.resolve().is_relative_to(link.resolve())


def npz_items(path: Path) -> tuple[list[Item], list[str]]:
    """Returns the images of a CIFAR-style archive: arrays blob (encoded images end to end), offset, label, classes."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            blob, offset, label = arrays["blob"], arrays["offset"], arrays["label"]
            classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else []
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not an archive of images (arrays blob, offset, label): {error}") from None
    if len(offset) != len(label) + 1 or int(offset[-1]) != len(blob):
        raise UserError(
            f"{path}: {len(offset)} offsets up to {offset[-1]} for {len(label)} labels and {len(blob)} bytes"
        )

    def image(number: int) -> bytes:
        return blob[offset[number] : offset[number + 1]].tobytes()

    return [
        Item(partial(image, i), sniffed_ending(image(i)), int(label[i]), f"{path}[{i}]") for i in range(len(label))
    ], classes


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def sniffed_ending(data: bytes) -> str:
    """Returns the ending of an encoded image's name by its first bytes: webp, png or jpg."""
    return "webp" if data[8:12] == b"WEBP" else "png" if data[:4] == b"\x89PNG" else "jpg"


# --- writing ---------------------------------------------------------------------------------------------------------


def build(
    items: Sequence[Item],
    classes: Sequence[str],
    out: Path,
    *,
    samples_per_shard: int,
    seed: int | None,
    progress: Progress = lambda _: None,
) -> Path:
    """Writes the items, shuffled over all shards, and returns the manifest's path. The same items give the same bytes.

    Without a seed they keep their order. Each image is decoded once: one that cannot be is left out, counted by the
    caller through `progress`, and named in provenance.json. Raises UserError when nothing is left or the folder holds
    another data set.
    """
    _start_folder(out)
    multi_label = _has_lists(items)
    check_labels(items, classes)
    plan = np.arange(len(items)) if seed is None else np.argsort(words(len(items), "v1", "plan", seed), kind="stable")
    shards, dropped = [], []
    for number in range(-(-len(items) // samples_per_shard)):
        chosen = plan[number * samples_per_shard : (number + 1) * samples_per_shard]
        path = out / f"{out.name}-{number:06d}.tar"
        shard, left_out = _write_shard(path, number, [items[i] for i in chosen], progress)
        dropped += left_out
        if shard.num_samples:
            shards.append(shard)
    if not shards:
        raise UserError(f"{out}: none of the {len(items)} images can be decoded, the first: {dropped[0]}")
    num_classes = len(classes) or 1 + max(label for item in items for label in _labels(item))
    return _finish(out, shards, num_classes, classes, dropped, _shuffled(seed), multi_label)


def check_labels(items: Iterable[Item], classes: Sequence[str]) -> None:
    """Raises UserError when a label is no class; without names any number is one."""
    for item in items:
        for label in _labels(item):
            if not 0 <= label < (len(classes) or label + 1):
                raise UserError(f"{item.source}: label {label} is not one of the {len(classes)} classes")


def _labels(item: Item) -> list[int]:
    return item.label if isinstance(item.label, list) else [item.label]


def _has_lists(items: Sequence[Item]) -> bool:
    """Returns whether labels are lists. Raises UserError when only some are, or when one is empty or repeats itself."""
    kinds = {isinstance(item.label, list) for item in items}
    for item in items:
        labels = _labels(item)
        if len(kinds) > 1:
            raise UserError(f"{item.source}: label {item.label}: single classes and lists are mixed in this data set")
        if not labels or len(set(labels)) < len(labels):
            raise UserError(f"{item.source}: label {item.label} is empty or names a class twice")
    return kinds == {True}


def write_samples(samples: Iterable[tuple[bytes, int]], ending: str, path: Path, number: int) -> Shard:
    """Writes encoded images and labels as shard `number`, in the given order, and returns it with its index written."""
    items = (Item(partial(bytes, image), ending, label, "") for image, label in samples)
    shard, _ = _write_shard(path, number, items, lambda _: None, check=False)
    return shard


def finish_manifest(out: Path, shards: list[Shard], classes: Sequence[str], seed: int) -> Path:
    """Writes classes.json and the manifest of shards written by `write_samples`, in shuffled order."""
    return _finish(out, shards, len(classes), classes, [], _shuffled(seed))


def _shuffled(seed: int | None) -> dict[str, Any]:
    """What the manifest says of samples that lie in random order over all shards, or in the order they came."""
    return {"scope": "none"} if seed is None else {"scope": "global", "seed": seed, "method": "permutation"}


def _write_shard(
    path: Path, number: int, items: Iterable[Item], progress: Progress, check: bool = True
) -> tuple[Shard, list[str]]:
    """Writes a tar and its index, and returns the shard and what was left out, with the reason."""
    with replacing(path) as temporary:
        dropped = _write_tar(temporary, number, items, progress, check)
    return index_tar(path), dropped


def _write_tar(path: Path, number: int, items: Iterable[Item], progress: Progress, check: bool) -> list[str]:
    """Writes a tar and returns what was left out, with the reason."""
    dropped = []
    with path.open("wb") as stream:
        writer = TarWriter(stream, mtime=0, encoder=False)
        written = 0
        for item in items:
            data = item.read()
            try:
                if check:
                    decode(data)
            except BadSample as bad:
                dropped.append(f"{item.source}: {bad}")
                continue
            finally:
                progress(1)
            label = json.dumps([int(k) for k in item.label]) if isinstance(item.label, list) else str(item.label)
            writer.write({"__key__": f"{number:06d}{written:06d}", item.ending: data, LABEL_ENDING: label.encode()})
            written += 1
        writer.close()
    return dropped


def index_existing(
    tars: Sequence[Path], classes: Sequence[str], out: Path, *, progress: Progress = lambda _: None
) -> Path:
    """Indexes existing tars and returns the manifest's path. `.tar.gz` are decompressed; tars elsewhere are copied.

    Raises UserError naming the shard, when one is damaged, holds a sample twice or without image or label.
    """
    if not all(path.resolve().parent == out.resolve() for path in tars):
        _start_folder(out)  # else: indexed again, where they lie
    names = [path.name.removesuffix(".gz") for path in tars]
    if len(set(names)) < len(names):
        raise UserError(f"two tars have the same name: {sorted(n for n in names if names.count(n) > 1)[0]}")
    shards, largest_label, multi_label = [], -1, False
    for path, name in zip(tars, names):
        shard = index_tar(_brought(path, out / name))
        if not shard.num_samples:
            raise UserError(f"{path}: has no samples")
        multi_label = multi_label if shards else _starts_with_list(shard)
        largest_label = max(largest_label, _largest_label(shard, len(classes), multi_label))
        shards.append(shard)
        progress(1)
    num_classes = len(classes) or largest_label + 1
    return _finish(out, shards, num_classes, classes, [], {"scope": "none"}, multi_label)


def _brought(source: Path, target: Path) -> Path:
    if source.resolve() == target.resolve():
        return target
    try:
        with replacing(target) as temporary:
            opened = gzip.open(source) if source.suffix == ".gz" else source.open("rb")
            with opened as reader, temporary.open("wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source}: cannot be copied to {target} ({error})") from None
    return target


def _start_folder(out: Path) -> None:
    if (out / "manifest.json").exists():
        raise UserError(f"{out}: holds a data set already; remove it or choose another folder")
    out.mkdir(parents=True, exist_ok=True)


def _finish(
    out: Path,
    shards: list[Shard],
    num_classes: int,
    classes: Sequence[str],
    dropped: list[str],
    shuffle: dict,
    multi_label: bool = False,
) -> Path:
    if classes:
        write_text(out / "classes.json", json.dumps(list(classes), ensure_ascii=False, indent=0) + "\n")
    if dropped:
        write_text(out / "provenance.json", json.dumps({"dropped": dropped}, indent=1) + "\n")
    options = {"has_names": bool(classes), "shuffle": shuffle, "multi_label": multi_label}
    return write_manifest(out, out.name, shards, num_classes, **options)


# --- indexing and checking -------------------------------------------------------------------------------------------


def index_tar(path: Path) -> Shard:
    """Walks a tar's headers, writes its index beside it, and returns the shard.

    Raises UserError when the tar ends early (plain tar reading would lose the rest without a word), when a sample comes
    twice, or when a sample has no image or no label.
    """
    starts, keys, end = [], [], 0
    endings: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():
                    raise UserError(f"{path}: {member.name} is not a plain file")
                key, ending = _key_and_ending(member.name)
                if not keys or key != keys[-1]:
                    _check_members(path, keys, endings)
                    starts.append(member.offset)
                    keys.append(key)
                    endings = set()
                endings.add(ending)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a readable tar ({error})") from None
    _check_members(path, keys, endings)
    _check_end(path, end)
    if len(set(keys)) < len(keys):
        raise UserError(f"{path}: key {_first_repeated(keys)} occurs twice; members of a sample must follow each other")
    shard = Shard(path, len(keys), path.stat().st_size, sha256(path))
    offsets = np.array([*starts, end], dtype=np.uint64) // BLOCK
    if int(offsets[-1]) >> 32:
        raise UserError(f"{path}: larger than 2 TiB; use smaller shards")
    crcs = np.array([key_crc32(key) for key in keys], dtype=np.uint32)
    write_index(shard, ShardIndex(offsets.astype(np.uint32), crcs))
    return shard


def _key_and_ending(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _check_members(path: Path, keys: list[str], endings: set[str]) -> None:
    if not keys:
        return
    for wanted, found in (("image", endings & set(IMAGE_ENDINGS)), ("label (.cls)", endings & {LABEL_ENDING})):
        if not found:
            raise UserError(f"{path}: sample {keys[-1]} has no {wanted}, only {', '.join(sorted(endings))}")


def _check_end(path: Path, end: int) -> None:
    with path.open("rb") as file:
        file.seek(end)
        if not file.read(1):
            raise UserError(f"{path}: ends without the empty block that ends a tar; it may have been cut there")
        file.seek(end)
        while block := file.read(1 << 20):
            if block.count(0) != len(block):
                raise UserError(f"{path}: no tar header at byte {end}; the shard is damaged there")


def _first_repeated(keys: list[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def _starts_with_list(shard: Shard) -> bool:
    """Whether the first label of existing tars is a list: then all have to be."""
    try:
        return read_sample(_alone(shard, 1), 0).label.lstrip().startswith(b"[")
    except BadSample:
        return False  # told with its number by `_largest_label`


def _largest_label(shard: Shard, num_classes: int, multi_label: bool) -> int:
    manifest = _alone(shard, num_classes or 10**9)
    labels = []
    for number in range(shard.num_samples):
        try:
            raw = read_sample(manifest, number)
            labels += parse_labels(raw.label, manifest.num_classes, multi_label)
        except BadSample as bad:
            raise UserError(f"{shard.path}: sample {number}: {bad}") from None
    return max(labels)


def _alone(shard: Shard, num_classes: int) -> Manifest:
    return Manifest(shard.path, "", "", shard.num_samples, num_classes, (), (shard,))


def verify(manifest: Manifest, progress: Progress = lambda _: None) -> Iterator[str]:
    """Yields what is wrong with a data set: digests, indexes, labels and images, every sample decoded."""
    for shard in manifest.shards:
        try:
            if not shard.path.is_file() or sha256(shard.path) != shard.sha256:
                yield f"{shard.path}: is missing or is not the file that was indexed (SHA-256 differs)"
                continue
            load_index(shard)
        except UserError as error:
            yield str(error)
            continue
        alone = _alone(shard, manifest.num_classes)
        for number in range(shard.num_samples):
            try:
                raw = read_sample(alone, number)
                parse_labels(raw.label, manifest.num_classes, manifest.multi_label)
                decode(raw.image)
            except BadSample as bad:
                yield f"{shard.path}: sample {number}: {bad}"
            progress(1)

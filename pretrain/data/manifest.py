"""What a data set consists of: its shards in order, with counts, sizes and checksums, and each shard's sample offsets.

`manifest.json` lists the shards; `NAME.idx` beside `NAME.tar`, or alone where the shard is remote, says where each
sample begins. Both are checked when read, so that a changed or cut shard is found before it loses samples silently. A
set may be a stranger's: its claims are compared with limits before they are used, and no link may lead out of it.
"""

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config import MAX_CLASSES
from pretrain.data.classes import ClassMatch, check_names, match_classes
from pretrain.data.index_rows import BLOCK, INDEX_FORMAT, INDEX_VERSION, MAX_LINE_BYTES, num_arrays_bytes, read_line
from pretrain.data.inside import file_inside, plain_files, real_folder_of
from pretrain.data.shard_list import MAX_SHARD_SAMPLES, Shard, name_inside, shards_of
from pretrain.data.store import Store
from pretrain.errors import PASSING_ERRORS, NotFoundError, StorageError, UserError
from pretrain.escape import shown
from pretrain.json_files import Fields, brief, read_bytes, read_json
from pretrain.storage import replacing, write_text

FORMAT, VERSION = "pretrain-shards", 1
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
LABEL_ENDING = "cls"
LABEL_KINDS = ("class", "multi")  # a `.cls` member holds an integer, or a JSON list of integers
BLOCK_BYTES = 8 << 20  # of one request: at 100 KB a sample, 12 requests for 1,000 samples
MIN_BLOCK_SAMPLES, MAX_BLOCK_SAMPLES = 64, 4096  # 16 requests for 1,000 samples, however large they are

MAX_SAMPLES = 1 << 48  # of a set, so that sums stay within 64 bits


@dataclass(frozen=True)
class Manifest:
    """A data set: its shards in index order. Sample `index` counts through them and never changes with the epoch."""

    path: Path
    name: str  # part of every augmentation's key
    sha256: str  # of the file: identifies the data set
    num_samples: int
    num_classes: int
    class_names: tuple[str, ...]  # empty when unknown
    shards: Sequence[Shard]
    multi_label: bool = False  # labels are lists of classes, as [3, 17], instead of one class
    label_map: tuple[int, ...] | None = None  # what each stored label means in another list of classes; None: itself
    store: Store | None = None  # where blocks of remote shards are kept; None: the default one
    sources: tuple["Manifest", ...] = ()  # of a mixture (mixture.py): its sets, whose samples follow each other

    @cached_property
    def is_remote(self) -> bool:
        """Whether any of its shards lies on a server."""
        return any(shard.url for shard in self.shards)

    @cached_property
    def first_indices(self) -> np.ndarray:
        """The index of each shard's first sample, and the end: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards])]).astype(np.int64)

    @cached_property
    def block_samples(self) -> int:
        """How many consecutive samples are read at once from remote shards: about 8 MiB."""
        return block_samples(self.num_samples, self.num_bytes)

    @cached_property
    def num_bytes(self) -> int:
        """The size of all its shards."""
        return sum(shard.num_bytes for shard in self.shards)

    def with_meaning(self, match: ClassMatch, class_names: tuple[str, ...]) -> "Manifest":
        """Returns the set with its labels read as those of another list of classes."""
        if not class_names:
            return self
        return replace(self, label_map=match.labels, class_names=class_names)

    def meant(self, labels: list[int]) -> list[int]:
        """Returns stored labels mapped by `label_map`."""
        return labels if self.label_map is None else [self.label_map[label] for label in labels]

    def locate(self, index: int) -> tuple[Shard, int]:
        """Returns the shard that holds a sample, and the sample's number in it."""
        shard = int(self.first_indices.searchsorted(index, side="right")) - 1  # a third of np.searchsorted's time
        return self.shards[shard], index - int(self.first_indices[shard])


def block_samples(num_samples: int, num_bytes: int) -> int:
    """Returns how many consecutive samples of a set are read at once, where a read is a request."""
    samples = min(max(int(BLOCK_BYTES * num_samples / max(1, num_bytes)), MIN_BLOCK_SAMPLES), MAX_BLOCK_SAMPLES)
    return max(1, min(samples, num_samples // 4))


def load_manifest(path: Path) -> Manifest:
    """Reads manifest.json, or the one in a folder. Raises UserError when it is missing, foreign or inconsistent.

    Shards are not looked at: 30,000 of them would take seconds on a shared disk. See `check_shards`.
    """
    try:
        path = path / "manifest.json" if path.is_dir() else path
        _refuse_shards(path)
        file_inside(path.parent, path)
        text = read_bytes(path)
        values = Fields.parse(text, str(path))
        found = values.text("format", ""), values.integer("version", 0, 1 << 16, 0)
        if found != (FORMAT, VERSION):
            raise UserError(f"{path}: is {brief(found[0])} version {found[1]}, expected {FORMAT!r} {VERSION}")
        label = values.part("label")
        kind = label.text("kind", "class")
        if kind not in LABEL_KINDS:
            label.wrong("kind", f"one of {', '.join(LABEL_KINDS)}")
        shards = shards_of(values, path.parent)
        num_classes = label.integer("num_classes", 1, MAX_CLASSES)
        manifest = Manifest(
            path=path,
            name=values.text("name"),
            sha256=hashlib.sha256(text).hexdigest(),
            num_samples=values.integer("num_samples", 0, MAX_SAMPLES),
            num_classes=num_classes,
            class_names=_read_names(label, path.parent, num_classes),
            shards=shards,
            multi_label=kind == "multi",
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{shown(error.filename)}: not found; {_way_to_a_manifest(path)}") from None
    except (OSError, ValueError) as error:  # also a path with a zero byte
        if isinstance(error, (UserError, StorageError)):
            raise
        if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
            raise StorageError(f"{path}: cannot be read for now ({error.strerror})") from None
        raise UserError(f"{path}: cannot be read as a manifest ({error})") from None
    totals = tuple(values.integer(key, 0, 1 << 63) for key in ("num_samples", "num_shards", "num_bytes"))
    listed = (sum(shard.num_samples for shard in shards), len(shards), manifest.num_bytes)
    if totals != listed:
        raise UserError(f"{path}: says {totals} samples, shards and bytes, its list adds up to {listed}")
    if not manifest.num_samples:
        raise UserError(f"{path}: lists no samples")
    return manifest


def check_manifest_found(path: Path) -> None:
    """Raises UserError as `load_manifest` does where there is no manifest: a look before imports that take seconds."""
    file = path / "manifest.json" if os.path.isdir(path) else path
    _refuse_shards(file)
    if not os.path.exists(file):
        raise NotFoundError(f"{shown(file)}: not found; {_way_to_a_manifest(file)}")


def _way_to_a_manifest(path: Path) -> str:
    """What makes the missing manifest.json at `path`: its folder may hold photos, or shards that are not all made."""
    folder = path.parent
    if path.name != "manifest.json" or path.exists() or not folder.is_dir():
        looked = "" if path.is_absolute() or path.exists() else f"; relative paths start at {Path.cwd()}"
        return f"make shards and manifest with tools/make_shards.py{looked}"
    if any((folder / name).exists() for name in (".unfinished-set", ".indexing")):
        return f"{folder} is unfinished: the same tools/make_shards.py command as before goes on with it"
    return f"make shards and manifest with tools/make_shards.py {folder} OUT, and give OUT"


def _refuse_shards(path: Path) -> None:
    """Raises UserError for what other loaders take: a tar, or a pattern of tars that no shell has expanded."""
    is_pattern = any(letter in path.name for letter in "*?[{")
    if path.name.endswith((".tar", ".tar.gz")) and (is_pattern or path.exists()):
        what = "is a pattern of shards" if is_pattern else "is a shard"
        index = " --index" if re.match(r"(https?|s3|gs):", str(path)) else ""
        raise UserError(
            f"{path}: {what}, expected a folder with a manifest.json; make its index with "
            f"python tools/make_shards.py{index} {path} OUT, and give OUT"
        )


def _read_names(label: Fields, folder: Path, num_classes: int) -> tuple[str, ...]:
    """The names of the classes, one for each; empty where the manifest names no file of them."""
    if not label.text("names", ""):
        return ()
    path = folder / name_inside(label, "names")
    file_inside(folder, path)
    return check_names(read_json(path), num_classes, str(path))


def read_as(theirs: Manifest, ours: Manifest) -> tuple[Manifest, str | None]:
    """Returns `theirs` with labels mapped to those of `ours` by class name, and a line for the user, if there is one.

    Raises UserError when a class has no counterpart, or when there are no names and the numbers of classes differ.
    """
    named = bool(theirs.class_names and ours.class_names)
    if theirs.num_classes != ours.num_classes and not named:
        raise UserError(
            f"{ours.path} ({ours.num_classes} classes) and {theirs.path} ({theirs.num_classes} classes) must have the "
            "same classes under the same names"
        )
    sides = theirs.class_names, theirs.num_classes, ours.class_names, ours.num_classes
    match = match_classes(*sides, their_place=str(theirs.path), our_place=str(ours.path))
    return theirs.with_meaning(match, ours.class_names), match.told


def check_shards(manifest: Manifest) -> None:
    """Checks that every shard and index exists inside the set's folder, each shard once and with the right size.

    Raises UserError naming the first that does not, StorageError when the disk does not answer.
    """
    folder, real_folder = manifest.path.parent, cache(real_folder_of)
    files: Callable[..., frozenset[str]] = cache(partial(plain_files, folder, real_folder=real_folder))
    if len(manifest.shards) == 1:  # as `verify` asks for each shard, which would list the folder as often
        files = lambda *_: frozenset()  # noqa: E731  # each file is looked at by itself
    look = partial(_looked_at, folder, real_folder, files)
    parts = [manifest.shards[start : start + _LOOKED_AT] for start in range(0, len(manifest.shards), _LOOKED_AT)]
    listed: dict[str, Shard] = {}
    with ThreadPoolExecutor(_LOOKERS) as pool:
        try:
            began = time.monotonic()
            first_part = look(parts[0])
            slow = time.monotonic() - began > _SLOW_S
            rest = pool.map(look, parts[1:]) if slow else map(look, parts[1:])
            for part, found in zip(parts, chain([first_part], rest)):
                for shard, (real, num_bytes) in zip(part, found):
                    if num_bytes != shard.num_bytes:
                        raise UserError(
                            f"{shard.place}: has {num_bytes} bytes, {manifest.path.name} says {shard.num_bytes}; "
                            "index it again"
                        )
                    if real in listed:
                        names = shard.path.name, listed[real].path.name
                        raise UserError(f"{manifest.path}: lists {names[0]}, which is the same file as {names[1]}")
                    listed[real] = shard
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{error.filename}: listed in {manifest.path} but not found") from None
        except OSError as error:
            if isinstance(error, (UserError, StorageError)):
                raise
            raise StorageError(f"{error.filename}: cannot be looked at ({error.strerror})") from None
        finally:
            pool.shutdown(cancel_futures=True)


_LOOKED_AT = 500  # shards at a time
_SLOW_S = 0.2  # for them: on a network disk each lookup takes a millisecond, and many can run at once
_LOOKERS = 16  # threads, which would slow each other down on a local disk


def _looked_at(
    folder: Path,
    real_folder: Callable[[str], str],
    files: Callable[[str], frozenset[str]],
    shards: Sequence[Shard],
) -> list[tuple[str, int]]:
    """Real paths and sizes of shards, whose indexes are checked to exist too. Raises as `file_inside`.

    files: the `plain_files` of a folder, for which only the size is looked up; all others go through `file_inside`.
    """
    found = []
    for shard in shards:
        parent, _, name = shard.place.rpartition("/")
        plain = files(parent)
        if shard.url:
            found.append((shard.url, shard.num_bytes))  # its size is checked in each response of the server
        elif name in plain:
            found.append((real_folder(parent) + name, os.lstat(shard.place).st_size))
        else:
            found.append(file_inside(folder, shard.place, real_folder))
        if name.removesuffix(".tar") + ".idx" not in plain:
            file_inside(folder, shard.place.removesuffix(".tar") + ".idx", real_folder)
    return found


def write_manifest(
    folder: Path,
    name: str,
    shards: list[Shard],
    num_classes: int,
    *,
    has_names: bool,
    shuffle: Any,
    multi_label: bool = False,
) -> Path:
    """Writes manifest.json as canonical JSON (the same shards give the same bytes) and returns its path."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "num_samples": sum(shard.num_samples for shard in shards),
        "num_shards": len(shards),
        "num_bytes": sum(shard.num_bytes for shard in shards),
        "members": {"image": list(IMAGE_ENDINGS), "label": LABEL_ENDING},
        "label": {
            "kind": "multi" if multi_label else "class",
            "num_classes": num_classes,
            "names": "classes.json" if has_names else None,
        },
        "keys": {"kind": "foreign"},
        "shuffle": shuffle,
        "image": None,
        "shards": [
            {"path": s.url or s.path.name, "num_samples": s.num_samples, "num_bytes": s.num_bytes, "sha256": s.sha256}
            | ({"name": s.path.name} if s.url else {})
            for s in shards
        ],
    }
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    write_text(folder / "manifest.json", text)
    return folder / "manifest.json"


@dataclass(frozen=True)
class ShardIndex:
    """Where a shard's samples lie."""

    offsets: np.ndarray  # uint32 [samples + 1], in blocks of 512 bytes: each sample's first header, then the end
    key_crc32: np.ndarray  # uint32 [samples]: CRC-32 of each key
    sample_crc32: np.ndarray | None = None  # uint32 [samples]: of each byte range; not in indexes of version 1

    def byte_range(self, sample: int) -> tuple[int, int]:
        """Returns the first byte of a sample and the first byte after it."""
        return int(self.offsets[sample]) * BLOCK, int(self.offsets[sample + 1]) * BLOCK


def key_crc32(key: str) -> int:
    """Returns the checksum of a sample's key. A key need not be UTF-8: it is a file's name."""
    return zlib.crc32(key.encode("utf-8", "surrogateescape"))


def write_index(shard: Shard, index: ShardIndex) -> None:
    """Writes `NAME.idx` beside `NAME.tar`: one line of JSON, then the arrays as little-endian uint32.

    Raises UserError when another kind of file has that name, or when the index would be too large to be read.
    """
    if shard.num_samples > MAX_SHARD_SAMPLES:
        raise UserError(
            f"{shard.path}: has {shard.num_samples} samples, at most {MAX_SHARD_SAMPLES}; use smaller shards"
        )
    arrays = [index.offsets, index.key_crc32] + ([] if index.sample_crc32 is None else [index.sample_crc32])
    payload = b"".join(array.astype("<u4").tobytes() for array in arrays)
    header = {
        "format": INDEX_FORMAT,
        "version": 1 if index.sample_crc32 is None else INDEX_VERSION,
        "shard": shard.path.name,
        "shard_bytes": shard.num_bytes,
        "shard_sha256": shard.sha256,
        "num_samples": shard.num_samples,
        "unit_bytes": BLOCK,
        "offsets": "<u4",
        "keys": "crc32",
        "payload_crc32": f"{zlib.crc32(payload):08x}",
    }
    path = shard.path.with_suffix(".idx")
    if path.exists() and not _is_index(path):
        raise UserError(f"{path}: is in the way and no index of ours (other tools write .idx too); move it away")
    with replacing(path, shared=True) as temporary:
        temporary.write_bytes(json.dumps(header, sort_keys=True).encode() + b"\n" + payload)


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        return INDEX_FORMAT.encode() in file.read(4096)


def load_index(shard: Shard) -> ShardIndex:
    """Reads a shard's index. Raises UserError when it is damaged or another shard's; OSError passes through."""
    path = shard.path.with_suffix(".idx")
    try:
        data = read_bytes(path, max_bytes=MAX_LINE_BYTES + num_arrays_bytes(INDEX_VERSION, shard.num_samples))
        version, start, expected = read_line(data, shard.num_bytes, shard.sha256, shard.num_samples)
        payload = data[start:]
        if len(payload) != num_arrays_bytes(version, shard.num_samples):
            raise ValueError(f"{len(payload)} bytes of offsets")
        if (found := f"{zlib.crc32(payload):08x}") != expected:
            raise ValueError(f"payload_crc32 is {brief(expected)}, expected {found!r}")
        arrays = np.frombuffer(payload, "<u4")
        parts = np.split(arrays, [shard.num_samples + 1, 2 * shard.num_samples + 1])
        index = ShardIndex(parts[0], parts[1], parts[2] if version > 1 else None)
        _check_offsets(index, shard)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with tools/make_shards.py") from None
    except ValueError as error:
        raise UserError(f"{path}: does not fit its shard ({error}); index the shard again") from None
    return index


def _check_offsets(index: ShardIndex, shard: Shard) -> None:
    """Raises ValueError unless each sample begins behind the one before, and the last ends within the shard."""
    falls = np.flatnonzero(index.offsets[1:] <= index.offsets[:-1])
    if len(falls):
        raise ValueError(f"sample {falls[0]} ends at block {index.offsets[falls[0] + 1]}, where it has not begun")
    if (end := int(index.offsets[-1]) * BLOCK) > shard.num_bytes:
        raise ValueError(f"its last sample ends at byte {end}, the shard has {shard.num_bytes}")

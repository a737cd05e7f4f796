"""What a data set consists of: its shards in order, with counts, sizes and checksums, and each shard's sample offsets.

`manifest.json` lists the shards; `NAME.idx` beside `NAME.tar` says where each sample begins. Both are checked when they
are read, so that a changed or cut shard is found before it loses samples silently.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.classes import ClassMatch, match_classes
from pretrain.errors import UserError
from pretrain.storage import replacing, write_text

FORMAT, VERSION = "pretrain-shards", 1
INDEX_FORMAT = "pretrain-index"
BLOCK = 512  # bytes; every tar member begins at a multiple of it
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
LABEL_ENDING = "cls"
LABEL_KINDS = ("class", "multi")  # a `.cls` member holds an integer, or a JSON list of integers


@dataclass(frozen=True)
class Shard:
    """A tar file of samples, as the manifest lists it."""

    path: Path
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A data set: its shards in index order. Sample `index` counts through them and never changes with the epoch."""

    path: Path
    name: str  # part of every augmentation's key
    sha256: str  # of the file: identifies the data set
    num_samples: int
    num_classes: int
    class_names: tuple[str, ...]  # empty when unknown
    shards: tuple[Shard, ...]
    multi_label: bool = False  # labels are lists of classes, as [3, 17], instead of one class
    label_map: tuple[int, ...] | None = None  # what each stored label means in another list of classes; None: itself

    @cached_property
    def first_indices(self) -> np.ndarray:
        """The index of each shard's first sample, and the end: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards])]).astype(np.int64)

    def with_meaning(self, match: ClassMatch, class_names: tuple[str, ...]) -> "Manifest":
        """Returns the set with its labels read as those of another list of classes."""
        if not class_names:
            return self
        return replace(self, label_map=match.labels, class_names=class_names)

    def meant(self, labels: list[int]) -> list[int]:
        """Returns what stored labels mean."""
        return labels if self.label_map is None else [self.label_map[label] for label in labels]

    def locate(self, index: int) -> tuple[Shard, int]:
        """Returns the shard that holds a sample, and the sample's number in it."""
        shard = int(np.searchsorted(self.first_indices, index, side="right")) - 1
        return self.shards[shard], index - int(self.first_indices[shard])


def load_manifest(path: Path) -> Manifest:
    """Reads manifest.json, or the one in a folder. Raises UserError when it is missing, foreign or inconsistent."""
    path = path / "manifest.json" if path.is_dir() else path
    try:
        text = path.read_bytes()
        values = json.loads(text)
        if (values["format"], values["version"]) != (FORMAT, VERSION):
            raise UserError(
                f"{path}: is {values['format']!r} version {values['version']}, expected {FORMAT!r} {VERSION}"
            )
        shards = tuple(
            Shard(_inside(path, s["path"]), int(s["num_samples"]), int(s["num_bytes"]), s["sha256"])
            for s in values["shards"]
        )
        kind, names = values["label"].get("kind", "class"), values["label"]["names"]
        if kind not in LABEL_KINDS:
            raise UserError(f"{path}: labels are of kind {kind!r}, expected one of {', '.join(LABEL_KINDS)}")
        manifest = Manifest(
            path=path,
            name=values["name"],
            sha256=hashlib.sha256(text).hexdigest(),
            num_samples=values["num_samples"],
            num_classes=int(values["label"]["num_classes"]),
            class_names=tuple(json.loads(_inside(path, names).read_text(encoding="utf-8"))) if names else (),
            shards=shards,
            multi_label=kind == "multi",
        )
        if not all(isinstance(name, str) for name in manifest.class_names):
            raise UserError(f"{path}: {names} is not a list of names")
        totals = (values["num_samples"], values["num_shards"], values["num_bytes"])
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found; make shards and manifest with tools/make_shards.py") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a manifest of shards ({type(error).__name__}: {error})") from None
    listed = (sum(s.num_samples for s in shards), len(shards), sum(s.num_bytes for s in shards))
    if totals != listed:
        raise UserError(f"{path}: says {totals} samples, shards and bytes, its list adds up to {listed}")
    if not manifest.num_samples:
        raise UserError(f"{path}: lists no samples")
    return manifest


def read_as(theirs: Manifest, ours: Manifest) -> tuple[Manifest, str | None]:
    """Returns a set with its labels read as another's, by the classes' names, and what is to be told of that.

    Raises UserError when a class has no counterpart, or when without names the numbers of classes differ.
    """
    named = bool(theirs.class_names and ours.class_names)
    if theirs.num_classes > ours.num_classes or (theirs.num_classes != ours.num_classes and not named):
        raise UserError(
            f"{ours.path} ({ours.num_classes} classes) and {theirs.path} ({theirs.num_classes} classes) must have the "
            "same classes under the same names"
        )
    sides = theirs.class_names, theirs.num_classes, ours.class_names, ours.num_classes
    match = match_classes(*sides, their_place=str(theirs.path), our_place=str(ours.path))
    return theirs.with_meaning(match, ours.class_names), match.told


def check_shards(manifest: Manifest) -> None:
    """Checks that every shard and index is there with the right size. Raises UserError naming the first that is not."""
    for shard in manifest.shards:
        for path in (shard.path, shard.path.with_suffix(".idx")):
            if not path.is_file():
                raise UserError(f"{path}: listed in {manifest.path} but not found")
        if (found := shard.path.stat().st_size) != shard.num_bytes:
            raise UserError(
                f"{shard.path}: has {found} bytes, {manifest.path.name} says {shard.num_bytes}; index it again"
            )


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
            {"path": s.path.name, "num_samples": s.num_samples, "num_bytes": s.num_bytes, "sha256": s.sha256}
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

    def byte_range(self, sample: int) -> tuple[int, int]:
        """Returns the first byte of a sample and the first byte after it."""
        return int(self.offsets[sample]) * BLOCK, int(self.offsets[sample + 1]) * BLOCK


def key_crc32(key: str) -> int:
    """Returns the checksum of a sample's key. A key need not be UTF-8: it is a file's name."""
    return zlib.crc32(key.encode("utf-8", "surrogateescape"))


def write_index(shard: Shard, index: ShardIndex) -> None:
    """Writes `NAME.idx` beside `NAME.tar`: one line of JSON, then the arrays as little-endian uint32.

    Raises UserError when a file of that name is there that is no index.
    """
    payload = index.offsets.astype("<u4").tobytes() + index.key_crc32.astype("<u4").tobytes()
    header = {
        "format": INDEX_FORMAT,
        "version": VERSION,
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
    with replacing(path) as temporary:
        temporary.write_bytes(json.dumps(header, sort_keys=True).encode() + b"\n" + payload)


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        return INDEX_FORMAT.encode() in file.read(4096)


def load_index(shard: Shard) -> ShardIndex:
    """Reads a shard's index. Raises UserError when it is damaged or belongs to another shard."""
    path = shard.path.with_suffix(".idx")
    try:
        line, _, payload = path.read_bytes().partition(b"\n")
        header = json.loads(line)
        expected = {"format": INDEX_FORMAT, "version": VERSION, "keys": "crc32", "unit_bytes": BLOCK, "offsets": "<u4"}
        expected |= {"shard_bytes": shard.num_bytes, "shard_sha256": shard.sha256, "num_samples": shard.num_samples}
        expected |= {"payload_crc32": f"{zlib.crc32(payload):08x}"}
        wrong = [
            f"{key} is {header.get(key)!r}, expected {value!r}"
            for key, value in expected.items()
            if header.get(key) != value
        ]
        if wrong or len(payload) != 4 * (2 * shard.num_samples + 1):
            raise ValueError("; ".join(wrong) or f"{len(payload)} bytes of offsets")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with tools/make_shards.py") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: does not fit its shard ({error}); index the shard again") from None
    arrays = np.frombuffer(payload, "<u4")
    return ShardIndex(arrays[: shard.num_samples + 1], arrays[shard.num_samples + 1 :])


def _inside(manifest: Path, name: str) -> Path:
    """A manifest names files below its own folder only: one from elsewhere must not make us read other files."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{manifest}: {name!r} lies outside the manifest's folder")
    return manifest.parent / name

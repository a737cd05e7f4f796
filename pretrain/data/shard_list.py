"""The shards of a data set as its manifest lists them: in columns, an object only where one is asked for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, overload

from pretrain.data.index_rows import BLOCK
from pretrain.data.remote import check_url, file_name, is_url
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief

MAX_SHARD_BYTES = 4 << 40  # offsets of 32 bits reach 2 TiB; zeros may follow the last sample
MAX_SHARD_SAMPLES = 1 << 24  # all of ImageNet-21k in one tar; its index has 128 MiB
_MIN_SAMPLE_BYTES = 2 * BLOCK  # the headers of image and label
_MAX_NAME_BYTES = 255  # of a file, as Linux has it
_SHA256 = re.compile("[0-9a-f]{64}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,250}\.tar")  # in the folder itself, at most 255 bytes


@dataclass(frozen=True)
class Shard:
    """A tar file of samples, as the manifest lists it."""

    path: Path  # its index lies beside it; of a remote shard only that
    num_samples: int
    num_bytes: int
    sha256: str
    url: str = ""  # where a remote shard lies

    @property
    def place(self) -> str:
        """Its path as text."""
        return str(self.path)


class ShardList(Sequence[Shard]):
    """Shards in index order, each made when it is asked for, and kept.

    30,000 objects, each with a path, take a fifth of a second, and bring a look of the garbage collector at everything
    that the imports have left, which takes as long.
    """

    def __init__(self) -> None:
        self.place: list[str] = []
        self.num_samples: list[int] = []
        self.num_bytes: list[int] = []
        self.sha256: list[str] = []
        self.url: list[str] = []
        self._made: dict[int, Shard] = {}

    def add(self, place: str, num_samples: int, num_bytes: int, sha256: str, url: str = "") -> None:
        """Adds a shard at the end. place: its path."""
        self.place.append(place)
        self.num_samples.append(num_samples)
        self.num_bytes.append(num_bytes)
        self.sha256.append(sha256)
        self.url.append(url)

    def __len__(self) -> int:
        return len(self.place)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, number: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(number, slice):
            return tuple(self[each] for each in range(*number.indices(len(self))))
        shard = self._made.get(number)
        if shard is None:
            facts = self.num_samples[number], self.num_bytes[number], self.sha256[number], self.url[number]
            shard = self._made[number] = Shard(Path(self.place[number]), *facts)
        return shard

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


def column(shards: Sequence[Shard], name: str) -> list[Any]:
    """Returns a field of all shards: place, num_samples, num_bytes, sha256 or url."""
    return getattr(shards, name) if isinstance(shards, ShardList) else [getattr(shard, name) for shard in shards]


def shards_of(values: Fields, folder: Path) -> ShardList:
    """Returns the shards that a manifest lists.

    Raises UserError when one claims what no shard can have, or comes twice.
    """
    shards, names, prefix = ShardList(), set[str](), str(folder / "_")[:-1]
    entries = values.values.get("shards")
    for number, entry in enumerate(entries if isinstance(entries, list) else values.parts("shards")):
        found = _plain_shard(entry) or _shard_of(Fields.of(entry, f"{values.source}: shards[{number}]"))
        name, num_samples, num_bytes, sha256, url = found
        if name in names:
            raise UserError(f"{values.source}: lists {brief(name)} twice; list each shard once")
        names.add(name)
        shards.add(prefix + name, num_samples, num_bytes, sha256, url)
    return shards


def _plain_shard(entry: Any) -> tuple[str, int, int, str, str] | None:
    """Fast path for the usual entry, in a tenth of the time: a set has 30,000 of them.

    Returns what `_shard_of` does; None: `_shard_of` has to decide, and says what is wrong.
    """
    if not isinstance(entry, dict):
        return None
    name, sha256 = entry.get("path", ""), entry.get("sha256", "")
    num_samples, num_bytes = entry.get("num_samples", 0), entry.get("num_bytes", 0)
    if (
        type(name) is type(sha256) is str
        and type(num_samples) is type(num_bytes) is int  # not bool
        and _PLAIN_NAME.fullmatch(name)
        and _SHA256.fullmatch(sha256)
        and _MIN_SAMPLE_BYTES <= num_bytes <= MAX_SHARD_BYTES
        and 1 <= num_samples <= _most_samples(num_bytes)
    ):
        return name, num_samples, num_bytes, sha256, ""
    return None


def _shard_of(entry: Fields) -> tuple[str, int, int, str, str]:
    """Its name, samples, bytes, digest and URL."""
    url = entry.text("path") if is_url(entry.text("path")) else ""
    name = name_inside(entry, "name", file_name(check_url(url))) if url else name_inside(entry, "path")
    if not name.endswith(".tar"):
        entry.wrong("path", "a name that ends in .tar")
    num_bytes = entry.integer("num_bytes", _MIN_SAMPLE_BYTES, MAX_SHARD_BYTES)
    num_samples = entry.integer("num_samples", 1, _most_samples(num_bytes))
    sha256 = entry.text("sha256")
    if not _SHA256.fullmatch(sha256):
        entry.wrong("sha256", "64 hexadecimal digits")
    return name, num_samples, num_bytes, sha256, url


def _most_samples(num_bytes: int) -> int:
    return min(MAX_SHARD_SAMPLES, num_bytes // _MIN_SAMPLE_BYTES)


def name_inside(entry: Fields, key: str, default: str | EllipsisType = ...) -> str:
    """Returns a file's name below the manifest's folder: a set from elsewhere must not make us read other files."""
    name = entry.text(key, default)
    parts = name.split("/")
    if not {"", ".", ".."}.isdisjoint(parts):
        entry.wrong(key, "a path inside the manifest's folder, as a.tar or train/a.tar")
    if "\0" in name or any(len(part.encode()) > _MAX_NAME_BYTES for part in parts):
        entry.wrong(key, f"a path whose parts have at most {_MAX_NAME_BYTES} bytes, none of them zero")
    return name

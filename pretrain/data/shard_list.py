"""The shards of a data set as its manifest lists them."""

import re
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple

from pretrain.data.index_rows import BLOCK
from pretrain.data.remote import check_url, file_name, is_url
from pretrain.errors import UserError
from pretrain.json_files import Fields, brief

MAX_SHARD_BYTES = 4 << 40  # offsets of 32 bits reach 2 TiB; zeros may follow the last sample
MAX_SHARD_SAMPLES = 1 << 24  # room for all of ImageNet-21k in one tar; the index has up to 192 MiB
_MIN_SAMPLE_BYTES = 2 * BLOCK  # the headers of image and label
_MAX_NAME_BYTES = 255  # of a file, as Linux has it
_SHA256 = re.compile("[0-9a-f]{64}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,250}\.tar")  # in the folder itself, at most 255 bytes


class Shard(NamedTuple):
    """A tar file of samples, as the manifest lists it. Only strings and numbers: 30,000 are created in some 20 ms."""

    place: str  # its path as text, with its index beside it; for a remote shard there is only the index
    num_samples: int
    num_bytes: int
    sha256: str
    url: str = ""  # where a remote shard lies

    @property
    def path(self) -> Path:
        """Its path."""
        return Path(self.place)


def shards_of(values: Fields, folder: Path) -> tuple[Shard, ...]:
    """Returns the shards that a manifest lists.

    Raises UserError when one has impossible values, or is listed twice.
    """
    shards: dict[str, Shard] = {}  # by name
    prefix = str(folder / "_")[:-1]
    entries = values.values.get("shards")
    for number, entry in enumerate(entries if isinstance(entries, list) else values.parts("shards")):
        found = _plain_shard(entry) or _shard_of(Fields.of(entry, f"{values.source}: shards[{number}]"))
        name = found[0]
        if name in shards:
            raise UserError(f"{values.source}: lists {brief(name)} twice; list each shard once")
        shards[name] = Shard(prefix + name, *found[1:])
    return tuple(shards.values())


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
    """An entry's name, samples, bytes, digest and URL."""
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

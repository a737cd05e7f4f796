"""A data set from whatever was given: the sources are rows of a table; the first that recognises the paths makes it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain import cli
from pretrain.errors import UserError
from pretrain.shards.build import build
from pretrain.shards.existing import index_existing
from pretrain.shards.sources import Item, folder_items, npz_items


class Source(NamedTuple):
    """A kind of source. A new kind is a new row of SOURCES."""

    named: str  # as the error lists it: "one folder"
    recognises: Callable[[Sequence[Path]], bool]
    items: Callable[[Path], tuple[list[Item], list[str]]] | None  # with class names; None: shards already


SOURCES = (
    Source("one folder", lambda paths: len(paths) == 1 and paths[0].is_dir(), folder_items),
    Source("one .npz", lambda paths: len(paths) == 1 and paths[0].suffix == ".npz", npz_items),
    Source(
        "any number of .tar and .tar.gz",
        lambda paths: all(path.name.endswith((".tar", ".tar.gz")) and not path.is_dir() for path in paths),
        None,
    ),
)


def make_shards(
    sources: Sequence[Path], classes: Sequence[str], out: Path, *, samples_per_shard: int, seed: int
) -> Path:
    """Makes the data set OUT, with progress on a terminal, and returns its manifest's path.

    classes: names, which take the place of those that the source has. Raises UserError when no row of SOURCES
    recognises the sources, or they cannot be used.
    """
    for path in sources:
        if not path.exists():
            raise UserError(f"{path}: not found")
    source = next((row for row in SOURCES if row.recognises(sources)), None)
    if source is None:
        kinds = ", ".join(row.named for row in SOURCES[:-1]) + f", or {SOURCES[-1].named}"
        raise UserError(f"{', '.join(map(str, sources))}: give {kinds}")
    if source.items is None:
        with cli.progress("indexing", len(sources), "shards") as advance:
            return index_existing(sources, classes, out, progress=advance)
    items, found = source.items(sources[0])
    with cli.progress("writing", len(items), "images") as advance:
        options = {"samples_per_shard": samples_per_shard, "seed": seed}
        return build(items, classes or found, out, **options, progress=advance)

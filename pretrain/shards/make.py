"""A data set from whatever was given: the sources are rows of a table; the first that recognises the paths makes it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pretrain import cli
from pretrain.errors import UserError
from pretrain.shards.build import build, check_labels
from pretrain.shards.class_list import ClassList, labels_of
from pretrain.shards.counts import add_to_counts
from pretrain.shards.elsewhere import are_urls, expanded, index_urls
from pretrain.shards.existing import index_existing
from pretrain.shards.sources import Item, Told, folder_items, npz_items


@dataclass(frozen=True)
class Options:
    """How a data set is made of a source."""

    samples_per_shard: int = 10_000
    seed: int = 0  # of the shuffle
    apply_orientation: bool = False  # turn photos as their EXIF says; folders only


class Source(NamedTuple):
    """A kind of source. A new kind is a new row of SOURCES, before one that recognises more."""

    named: str  # as the error lists it: "one folder"
    recognises: Callable[[Sequence[Path]], bool]
    # Returns the samples to write, and the names of classes or nothing; None: these are shards already.
    items: Callable[[Sequence[Path], Told, Options], tuple[list[Item], list[str]]] | None


SOURCES = (
    Source(
        "one folder",
        lambda paths: len(paths) == 1 and paths[0].is_dir(),
        lambda paths, told, options: folder_items(paths[0], told, apply_orientation=options.apply_orientation),
    ),
    Source(
        "one .npz",
        lambda paths: len(paths) == 1 and paths[0].suffix == ".npz",
        lambda paths, told, options: npz_items(paths[0]),
    ),
    Source(
        "any number of .tar and .tar.gz",
        lambda paths: all(path.name.endswith((".tar", ".tar.gz")) and not path.is_dir() for path in paths),
        None,
    ),
)


def make_shards(sources: Sequence[Path], classes: ClassList | None, out: Path, options: Options) -> tuple[Path, Told]:
    """Makes the data set OUT, with progress on a terminal; returns its manifest's path and what is to be told.

    classes: a source whose classes have names gets each one's label by its name; elsewhere labels are places in the
    list. Raises UserError when no row of SOURCES recognises the sources, or they cannot be used.
    """
    for path in sources:
        if re.match("(https?|s3|gs|pipe):", str(path)):  # of a URL a path keeps one slash
            raise UserError(f"{path}: give --index for shards that stay on a server")
        if not path.exists():
            raise UserError(f"{path}: not found")
    source = next((row for row in SOURCES if row.recognises(sources)), None)
    if source is None:
        kinds = ", ".join(row.named for row in SOURCES[:-1]) + f", or {SOURCES[-1].named}"
        raise UserError(f"{', '.join(map(str, sources))}: give {kinds}")
    if any(path.is_dir() and out.resolve().is_relative_to(path.resolve()) for path in sources):
        raise UserError(f"{out}: lies inside {sources[0]}, and would become a class of it; choose another folder")
    if options.apply_orientation and not sources[0].is_dir():
        raise UserError(
            f"--apply-orientation is for folders of photos, and has no effect on {sources[0]}; leave it out"
        )
    told = Told()
    if source.items is None:
        names = classes.names if classes else ()
        with cli.progress("indexing", len(sources), "shards") as advance:
            path = index_existing(sources, names, out, progress=advance, passed_over=told.passed_over)
    else:
        items, names = source.items(sources, told, options)
        if classes:
            items, names = _labelled(items, names, classes, told)
        with cli.progress("writing", len(items), "images") as advance:
            sizes = {"samples_per_shard": options.samples_per_shard, "seed": options.seed}
            path = build(items, names, out, **sizes, progress=advance)
    add_to_counts(out, {"passed_over": told.passed_over, "notes": told.notes})
    return path, told


def index_shards(patterns: Sequence[str], classes: ClassList | None, out: Path, options: Options) -> tuple[Path, Told]:
    """Makes a data set of shards that stay on their server, or of local tars; otherwise as `make_shards`.

    patterns: paths and URLs as webdataset writes them, with {000..127}.
    """
    sources = expanded(patterns)
    if not are_urls(sources):
        return make_shards([Path(source) for source in sources], classes, out, options)
    told = Told()
    names = classes.names if classes else ()
    with cli.progress("indexing", len(sources), "shards") as advance:
        path = index_urls(sources, names, out, progress=advance, passed_over=told.passed_over)
    add_to_counts(out, {"passed_over": told.passed_over, "notes": told.notes})
    return path, told


def _labelled(
    items: list[Item], found: Sequence[str], classes: ClassList, told: Told
) -> tuple[list[Item], tuple[str, ...]]:
    """The items with the labels that their classes' names have in the list, and the list's names."""
    if not found:  # an archive without names: its labels are places in the list
        return items, classes.names
    check_labels(items, found)
    labels, way = labels_of(found, classes)
    told.classes = f"{len(found):,} of {len(classes.names):,} classes of {classes.source}, recognised by {way}"
    relabelled = [item._replace(label=labels[item.label]) for item in items if isinstance(item.label, int)]
    assert len(relabelled) == len(items)  # no source with names has several labels to an image
    return relabelled, classes.names

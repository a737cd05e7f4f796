"""A data set from whatever was given: the sources are rows of a table; the first that recognises the paths makes it."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pretrain import cli
from pretrain.errors import UserError
from pretrain.shards.build import How, build, build_part, check_labels
from pretrain.shards.class_list import ClassList, labels_of
from pretrain.shards.class_tars import class_tar_items, is_of_class_tars
from pretrain.shards.counts import add_to_counts
from pretrain.shards.elsewhere import are_urls, expanded, index_urls
from pretrain.shards.existing import index_existing
from pretrain.shards.items import Item, PackedItems
from pretrain.shards.listed import ENDINGS as LIST_ENDINGS
from pretrain.shards.listed import listed_items
from pretrain.shards.resizing import Resizing
from pretrain.shards.sources import Told, folder_items, npz_items

MIN_IMAGES_FOR_PROCESSES = 1000  # fewer are written sooner than processes have started


@dataclass(frozen=True)
class Options:
    """How a data set is made of a source."""

    samples_per_shard: int = 10_000
    seed: int = 0  # of the shuffle
    apply_orientation: bool = False  # turn photos as their EXIF says; folders only
    resizing: Resizing | None = None  # of images that are larger
    workers: int | None = 1  # processes; None: one for each core, where there are enough images


class Source(NamedTuple):
    """A kind of source. A new kind is a new row of SOURCES, before one that recognises more."""

    named: str  # as the error lists it: "one folder"
    recognises: Callable[[Sequence[Path]], bool]
    # Returns the samples to write, and the names of classes or nothing; None: these are shards already.
    items: Callable[[Sequence[Path], Told, Options], tuple[Sequence[Item], list[str]]] | None
    has_files: bool = False  # of pictures, which may be of any format, and turned


SOURCES = (
    Source(
        "one folder (of class folders, or of a tar for each class)",
        lambda paths: len(paths) == 1 and paths[0].is_dir() and is_of_class_tars(paths[0]),
        lambda paths, told, options: class_tar_items(paths[0], told),
    ),
    Source(
        "",  # named above
        lambda paths: len(paths) == 1 and paths[0].is_dir(),
        lambda paths, told, options: folder_items(paths[0], told, apply_orientation=options.apply_orientation),
        has_files=True,
    ),
    Source(
        "one .npz",
        lambda paths: len(paths) == 1 and paths[0].suffix == ".npz",
        lambda paths, told, options: npz_items(paths[0]),
    ),
    Source(
        f"one list of paths and labels ({', '.join(LIST_ENDINGS)})",
        lambda paths: len(paths) == 1 and paths[0].suffix in LIST_ENDINGS,
        lambda paths, told, options: listed_items(paths[0], apply_orientation=options.apply_orientation),
        has_files=True,
    ),
    Source(
        "any number of .tar and .tar.gz",
        lambda paths: all(path.name.endswith((".tar", ".tar.gz")) and not path.is_dir() for path in paths),
        None,
    ),
)


def are_shards(sources: Sequence[Path]) -> bool:
    """Returns whether sources are shards already, which are indexed as they are, and not written."""
    return SOURCES[-1].recognises(sources)


def make_shards(sources: Sequence[Path], classes: ClassList | None, out: Path, options: Options) -> tuple[Path, Told]:
    """Makes the data set OUT, with progress on a terminal; returns its manifest's path and what is to be told.

    classes: a source whose classes have names gets each one's label by its name; elsewhere labels are places in the
    list. Raises UserError when no row of SOURCES recognises the sources, or they cannot be used.
    """
    source, told = _source_of(sources, out, options), Told()
    if source.items is None:
        names = classes.names if classes else ()
        with cli.progress("indexing", len(sources), "shards") as advance:
            path = index_existing(sources, names, out, progress=advance, passed_over=told.passed_over)
        add_to_counts(out, {"passed_over": told.passed_over, "notes": told.notes})
        return path, told
    items, names = _items_of(source, sources, classes, told, options)
    with cli.progress("writing", len(items), "images") as advance:
        how = _how(len(items), sources, options)
        sizes = {"samples_per_shard": options.samples_per_shard, "seed": options.seed}
        return build(items, names, out, **sizes, progress=advance, how=how, told=told), told


def make_part(
    sources: Sequence[Path], classes: ClassList | None, out: Path, part: tuple[int, int], options: Options
) -> tuple[int, int]:
    """Makes every n-th shard of a data set, from the i-th on; part: (i, n). `make_shards` then makes the rest.

    Returns the number of shards that are complete, and of all. Raises UserError as `make_shards`.
    """
    source = _source_of(sources, out, options)
    if source.items is None:
        raise UserError(f"--part has no effect on {sources[0]}, which is indexed as it is; leave it out")
    items, names = _items_of(source, sources, classes, Told(), options)
    with cli.progress("writing", -(-len(items) // part[1]), "images") as advance:
        how = _how(len(items), sources, options)
        sizes = {"samples_per_shard": options.samples_per_shard, "seed": options.seed}
        return build_part(items, names, out, part, **sizes, progress=advance, how=how)


def _source_of(sources: Sequence[Path], out: Path, options: Options) -> Source:
    """The row of SOURCES. Raises UserError when there is none, or an option has no effect on it."""
    for path in sources:
        if re.match("(https?|s3|gs|pipe):", str(path)):  # of a URL a path keeps one slash
            raise UserError(f"{path}: give --index for shards that stay on a server")
        if not path.exists():
            raise UserError(f"{path}: not found")
    source = next((row for row in SOURCES if row.recognises(sources)), None)
    if source is None:
        kinds = ", ".join(row.named for row in SOURCES[:-1] if row.named) + f", or {SOURCES[-1].named}"
        raise UserError(f"{', '.join(map(str, sources))}: give {kinds}")
    if any(path.is_dir() and out.resolve().is_relative_to(path.resolve()) for path in sources):
        raise UserError(f"{out}: lies inside {sources[0]}, and would become a class of it; choose another folder")
    if options.apply_orientation and not source.has_files:
        raise UserError(
            f"--apply-orientation is for folders and lists of photos, and has no effect on {sources[0]}; leave it out"
        )
    if options.resizing and source.items is None:
        raise UserError(f"--shorter-side has no effect on {sources[0]}, which is indexed as it is; leave it out")
    return source


def _items_of(
    source: Source, sources: Sequence[Path], classes: ClassList | None, told: Told, options: Options
) -> tuple[Sequence[Item], Sequence[str]]:
    assert source.items is not None  # else there are shards already
    items, names = source.items(sources, told, options)
    return _labelled(items, names, classes, told) if classes else (items, names)


def _how(num_images: int, sources: Sequence[Path], options: Options) -> How:
    """How shards are written: with which processes, and what their bytes depend on beside the items."""
    workers = options.workers
    if workers is None:  # each imports torch: 3 s
        workers = len(os.sched_getaffinity(0)) if num_images > MIN_IMAGES_FOR_PROCESSES else 1
    files = [(path.stat().st_size, path.stat().st_mtime_ns) for path in sources if path.is_file()]
    plan = {"--apply-orientation": int(options.apply_orientation), "sources (sizes, times)": str(files)}
    return How(workers, options.resizing, plan)


def index_shards(patterns: Sequence[str], classes: ClassList | None, out: Path, options: Options) -> tuple[Path, Told]:
    """Makes a data set of shards that stay on their server, or of local tars; otherwise as `make_shards`.

    patterns: paths and URLs as webdataset writes them, with {000..127}.
    """
    sources = expanded(patterns)
    if not are_urls(sources):
        return make_shards([Path(source) for source in sources], classes, out, options)
    for option, given in (("apply-orientation", options.apply_orientation), ("shorter-side", options.resizing)):
        if given:
            raise UserError(f"--{option} has no effect on {sources[0]}, which stays as it is; leave it out")
    told = Told()
    names = classes.names if classes else ()
    with cli.progress("indexing", len(sources), "shards") as advance:
        path = index_urls(sources, names, out, progress=advance, passed_over=told.passed_over)
    add_to_counts(out, {"passed_over": told.passed_over, "notes": told.notes})
    return path, told


def _labelled(
    items: Sequence[Item], found: Sequence[str], classes: ClassList, told: Told
) -> tuple[Sequence[Item], tuple[str, ...]]:
    """The items with the labels that their classes' names have in the list, and the list's names."""
    if not found:  # an archive without names: its labels are places in the list
        return items, classes.names
    check_labels(items, found)
    labels, way = labels_of(found, classes)
    told.classes = f"{len(found):,} of {len(classes.names):,} classes of {classes.source}, recognised by {way}"
    if isinstance(items, PackedItems):
        return items.relabelled(labels), classes.names
    relabelled = [item._replace(label=labels[item.label]) for item in items if isinstance(item.label, int)]
    assert len(relabelled) == len(items)  # no source with names has several labels to an image
    return relabelled, classes.names

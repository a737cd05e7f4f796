"""Makes a data set from any kind of source: the first row of the table SOURCES that recognises the paths makes it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import cli
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.shards import passes
from pretrain.shards.build import How, build, build_part, check_labels
from pretrain.shards.class_list import ClassList, labels_of, own_classes
from pretrain.shards.class_tars import class_tar_items, is_of_class_tars, is_tar_of_tars, tar_of_tars_items
from pretrain.shards.duplicates import merged, without_near
from pretrain.shards.elsewhere import THREADS, are_urls, expanded, index_urls
from pretrain.shards.existing import index_existing
from pretrain.shards.idx import idx_files, idx_items
from pretrain.shards.items import Item, PackedItems
from pretrain.shards.listed import ENDINGS as LIST_ENDINGS
from pretrain.shards.listed import listed_items
from pretrain.shards.parquet import parquet_files, parquet_items
from pretrain.shards.passes import Work
from pretrain.shards.pool import Engine, num_cores, results
from pretrain.shards.resizing import Resizing
from pretrain.shards.sources import Told, folder_items, npz_items
from pretrain.shards.tfrecord_items import tfrecord_files, tfrecord_items

# Less work is done before processes have started: each imports torch, 3 s.
MIN_IMAGES_FOR_PROCESSES = 1000
MIN_BYTES_FOR_PROCESSES = 2 << 30  # of tars that are indexed as they are


@dataclass(frozen=True)
class Options:
    """How a data set is made of a source."""

    samples_per_shard: int = 10_000
    seed: int = 0  # of the shuffle
    apply_orientation: bool = False  # turn photos as their EXIF says; folders only
    resizing: Resizing | None = None  # of images that are larger
    # Processes, or shards that are downloaded at a time; None: one for each core, where there are enough images
    workers: int | None = 1
    engine: Engine = results  # runs the tasks: processes of this machine, or a Ray cluster
    merge_duplicates: bool = False  # equal images become one, with a list of labels
    away_from: tuple[Path, ...] = ()  # data sets whose images, and what looks like them, are left out
    label_column: str | None = None  # of parquet and TFRecord files; None: the one known to be it


class Source(NamedTuple):
    """A kind of source. A new kind is a new row of SOURCES, before any that would recognise its paths too."""

    named: str  # as the error lists it: "one folder"
    recognises: Callable[[Sequence[Path]], bool]
    # Returns the samples to write, and the names of classes or nothing; None: these are shards already. A source that
    # must be read once beforehand runs that pass with the `Work`.
    items: Callable[[Sequence[Path], Told, Options, Work], tuple[Sequence[Item], list[str]]] | None
    has_files: bool = False  # pictures of any format, to which the EXIF orientation can be applied
    has_columns: bool = False  # one of which is the label


SOURCES = (
    Source(
        "",  # named with the lists
        lambda paths: bool(parquet_files(paths)),
        lambda paths, told, options, work: parquet_items(parquet_files(paths), work, **_of_columns(options)),
        has_files=True,
        has_columns=True,
    ),
    Source(
        "",  # named with the lists
        lambda paths: bool(tfrecord_files(paths)),
        lambda paths, told, options, work: tfrecord_items(tfrecord_files(paths), work, **_of_columns(options)),
        has_files=True,
        has_columns=True,
    ),
    Source(
        "one folder (of class folders, or of a tar for each class)",
        lambda paths: len(paths) == 1 and paths[0].is_dir() and is_of_class_tars(paths[0]),
        lambda paths, told, options, _: class_tar_items(paths[0], told),
    ),
    Source(
        "",  # named above
        lambda paths: len(paths) == 1 and paths[0].is_dir(),
        lambda paths, told, options, _: folder_items(paths[0], told, apply_orientation=options.apply_orientation),
        has_files=True,
    ),
    Source(
        "one .npz",
        lambda paths: len(paths) == 1 and paths[0].suffix == ".npz",
        lambda paths, told, options, _: npz_items(paths[0], told),
    ),
    Source(
        "MNIST's idx files of images and labels (of one split)",
        lambda paths: idx_files(paths) is not None,
        lambda paths, told, options, _: idx_items(paths),
    ),
    Source(
        f"one list of paths and labels ({', '.join(LIST_ENDINGS)}), .parquet or TFRecord files (or their folder)",
        lambda paths: len(paths) == 1 and paths[0].suffix in LIST_ENDINGS,
        lambda paths, told, options, _: listed_items(paths[0], apply_orientation=options.apply_orientation),
        has_files=True,
    ),
    Source(
        "one tar of tars, of one for each class (.tar, .tar.gz)",
        lambda paths: len(paths) == 1 and is_tar_of_tars(paths[0]),
        lambda paths, told, options, work: tar_of_tars_items(paths[0], told, work),
    ),
    Source(
        "any number of .tar and .tar.gz",
        lambda paths: all(path.name.endswith((".tar", ".tar.gz")) and not path.is_dir() for path in paths),
        None,
    ),
)


def _of_columns(options: Options) -> dict[str, Any]:
    return {"label_column": options.label_column, "apply_orientation": options.apply_orientation}


def are_shards(sources: Sequence[Path]) -> bool:
    """Returns whether sources are shards already, which are indexed as they are."""
    return SOURCES[-1].recognises(sources) and not (len(sources) == 1 and is_tar_of_tars(sources[0]))


def make_shards(sources: Sequence[Path], classes: ClassList | None, out: Path, options: Options) -> tuple[Path, Told]:
    """Makes the data set OUT, with progress on a terminal; returns its manifest's path and what to report.

    classes: if a source's classes have names, they get their labels by name; otherwise labels are places in the list.
    None: a set's own tars that are indexed again keep its names. Raises UserError when no row of SOURCES recognises
    the sources, or they cannot be used.
    """
    passes.clear(out)  # left by a call that was killed at its last step
    source, told = _source_of(sources, out, options), Told()
    if source.items is None:
        if not classes and (classes := own_classes(out)):
            told.classes = f"{len(classes.names):,} classes, as {classes.source} names them; --classes gives others"
        names = classes.names if classes else ()
        with cli.progress("indexing", len(sources), "shards") as advance:
            workers = _workers(sum(path.stat().st_size for path in sources) >= MIN_BYTES_FOR_PROCESSES, options)
            path = index_existing(sources, names, out, progress=advance, passed_over=told.passed_over, workers=workers)
        return path, told
    items, names = _items_of(source, sources, classes, told, options, out)
    with cli.progress("writing", len(items), "images") as advance:
        how = _how(len(items), sources, options)
        sizes = {"samples_per_shard": options.samples_per_shard, "seed": options.seed}
        path = build(items, names, out, **sizes, progress=advance, how=how, told=told)
    passes.clear(out)
    return path, told


def make_part(
    sources: Sequence[Path], classes: ClassList | None, out: Path, part: tuple[int, int], options: Options
) -> tuple[int, int]:
    """Makes every n-th shard of a data set, from the i-th on; part: (i, n). `make_shards` then makes the rest.

    Returns the number of shards that are complete, and of all. Raises UserError as `make_shards`.
    """
    source = _source_of(sources, out, options)
    if source.items is None:
        raise UserError(f"--part has no effect on {sources[0]}, which is indexed as it is; leave it out")
    items, names = _items_of(source, sources, classes, Told(), options, out, is_part=True)
    with cli.progress("writing", -(-len(items) // part[1]), "images") as advance:
        how = _how(len(items), sources, options)
        sizes = {"samples_per_shard": options.samples_per_shard, "seed": options.seed}
        return build_part(items, names, out, part, **sizes, progress=advance, how=how)


def _source_of(sources: Sequence[Path], out: Path, options: Options) -> Source:
    """The row of SOURCES. Raises UserError when there is none, or an option has no effect on it."""
    for path in sources:
        if re.match("(https?|s3|gs|pipe):", str(path)):  # Path keeps one slash of a URL's two
            raise UserError(f"{path}: give --index for shards that stay on a server")
        if not path.exists():
            raise UserError(f"{path}: not found")
    source = next((row for row in SOURCES if row.recognises(sources)), None)
    if source is None:
        if sources[0].suffix.lower() in {".zip", ".7z", ".rar", ".tgz"}:
            raise UserError(f"{sources[0]}: unpack it, and give what was in it")
        kinds = ", ".join(row.named for row in SOURCES[:-1] if row.named) + f", or {SOURCES[-1].named}"
        more = f" and {len(sources) - 3:,} more" if len(sources) > 3 else ""  # a shell expands */*.jpg to thousands
        raise UserError(f"{', '.join(map(str, sources[:3]))}{more}: give {kinds}")
    if any(path.is_dir() and out.resolve().is_relative_to(path.resolve()) for path in sources):
        raise UserError(f"{out}: lies inside {sources[0]}, and would become a class of it; choose another folder")
    if options.apply_orientation and not source.has_files:
        raise UserError(
            f"--apply-orientation is for folders and lists of photos, and has no effect on {sources[0]}; leave it out"
        )
    if options.label_column and not source.has_columns:
        raise UserError(
            f"--label-column is for parquet and TFRecord files, and has no effect on {sources[0]}; leave it out"
        )
    given = {"--shorter-side": options.resizing, "--merge-duplicates": options.merge_duplicates}
    for option, value in (given | {"--away-from": options.away_from}).items():
        if value and source.items is None:
            raise UserError(f"{option} has no effect on {sources[0]}, which is indexed as it is; leave it out")
    return source


def _items_of(
    source: Source,
    sources: Sequence[Path],
    classes: ClassList | None,
    told: Told,
    options: Options,
    out: Path,
    is_part: bool = False,
) -> tuple[Sequence[Item], Sequence[str]]:
    assert source.items is not None  # else there are shards already
    workers = _workers(True, options)
    work = Work(out, workers, options.engine, is_part, "turned" if options.apply_orientation else "")
    items, names = source.items(sources, told, options, work)
    items, names = _labelled(items, names, classes, told) if classes else (items, names)
    for option, given in (("--away-from", options.away_from), ("--merge-duplicates", options.merge_duplicates)):
        if given and not isinstance(items, PackedItems):
            raise UserError(f"{option} is for folders, lists, tars of classes and files of records, not {sources[0]}")
    if isinstance(items, PackedItems):
        items = without_near(items, options.away_from, work, told) if options.away_from else items
        items = merged(items, work, told) if options.merge_duplicates else items
    return items, names


def _how(num_images: int, sources: Sequence[Path], options: Options) -> How:
    """How shards are written: with which processes, and what their bytes depend on beside the items."""
    files = [(path.stat().st_size, path.stat().st_mtime_ns) for path in sources if path.is_file()]
    plan = {"--apply-orientation": int(options.apply_orientation), "sources (sizes, times)": str(files)}
    if options.merge_duplicates:
        plan["--merge-duplicates"] = 1
    if options.away_from:
        plan["--away-from"] = " ".join(load_manifest(folder).sha256 for folder in options.away_from)
    return How(_workers(num_images >= MIN_IMAGES_FOR_PROCESSES, options), options.resizing, plan, options.engine)


def _workers(are_many: bool, options: Options) -> int:
    if options.workers is not None:
        return options.workers
    if options.engine is not results:
        return 0  # as many as it has
    return num_cores() if are_many else 1


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
        threads = THREADS if options.workers is None else options.workers
        path = index_urls(sources, names, out, progress=advance, passed_over=told.passed_over, threads=threads)
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

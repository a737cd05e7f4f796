"""Makes WebDataset shards with their index and manifest, or checks existing ones.

python tools/make_shards.py SOURCE... OUT [--classes FILE]      (can be repeated: complete shards are kept)
python tools/make_shards.py --index URL... OUT [--classes FILE]
python tools/make_shards.py --task NAME SOURCE... OUT       (can be repeated: finished splits are kept)
python tools/make_shards.py --task NAME --download OUT
"""

import re
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.errors import UserError
from pretrain.tasks.table import Task, task

if TYPE_CHECKING:
    from pretrain.shards.make import Options
    from pretrain.shards.pool import Engine
    from pretrain.shards.sources import Told

_OF_WRITING = ("--engine", "--seed", "--samples-per-shard")
_OF_IMAGES = ("--apply-orientation", "--label-column", "--merge-duplicates", "--away-from")
_ALL = ("--index", "--task", "--download", "--classes", "--part", "--shorter-side", "--quality")
_ALL += (*_OF_IMAGES, *_OF_WRITING, "--workers")
SOURCES = "a folder of images, archives, a list of paths, parquet or TFRecord files, a .npz"
_IN_BRACES = re.compile(r"\{([^{},.]*)(?:,|\.\.)[^{}]*\}")  # braces in a pattern; the group is their first value
MAX_KINDS = 12  # printed, of what was passed over: frame.0001, frame.0002 ... are a kind each


def main() -> None:
    parser = cli.parser(
        "Makes shards, their index and manifest.json from an image folder (SOURCE/CLASS/NAME.jpg or CLASS.tar),\n"
        "a list of paths and labels (.csv, .jsonl), parquet and TFRecord files, an .npz, MNIST's archives,\n"
        "or existing WebDataset tars (.tar, .tar.gz), which are indexed as they are. --verify checks them.\n"
        "With --index, tars stay on their server (https://, s3://, gs://, with patterns as train-{000..127}.tar), and\n"
        "OUT gets their indexes and the manifest (docs/data.md).\n"
        "With --task, makes the splits of an evaluation set from a TFDS folder, the authors' downloads, or packs that\n"
        "are named for their splits (docs/tasks.md).",
        "python tools/make_shards.py photos data/photos --shorter-side 512 --apply-orientation",
    )
    parser.add_argument("paths", nargs="+", metavar="SOURCE... OUT", help="what to read, then the folder to write")
    parser.add_argument("--index", action="store_true", help="of shards on a server, or existing tars, by patterns")
    parser.add_argument("--task", metavar="NAME", help="evaluation set: imagenet, cifar10, pets, vtab/svhn ...")
    parser.add_argument(
        "--download", action="store_true", help="fetch the set's files, where anybody may; give OUT alone"
    )
    parser.add_argument(
        "--classes", type=Path, help='names in the order of labels: JSON list, or "names"; or .txt lines'
    )
    _add_building(parser)
    parser.add_argument("--verify", action="store_true", help="decode every sample of the folder and check all digests")
    arguments = parser.parse_args()
    cli.check_least(arguments, samples_per_shard=1, workers=1, shorter_side=1)
    if arguments.verify:
        return _verify(arguments)
    _check_paths(arguments)
    sources, out = [Path(path) for path in arguments.paths[:-1]], Path(arguments.paths[-1])
    samples_per_shard = arguments.samples_per_shard or 10_000
    if arguments.task:
        others = [option for option in _ALL if option not in ("--task", "--download", "--samples-per-shard")]
        cli.refuse(arguments, others, "with --task")
        _check_found(arguments)
        return _prepare(task(arguments.task), sources, out, samples_per_shard)
    if arguments.index:
        cli.refuse(arguments, ("--part", *_OF_IMAGES[1:], *_OF_WRITING), "with --index, which writes no shards")
    part = _part(arguments.part) if arguments.part is not None else None
    quality = _quality(arguments.quality, arguments.shorter_side)
    _check_found(arguments)

    with cli.loading():
        from pretrain.shards.class_list import read_class_list
        from pretrain.shards.make import are_shards, index_shards, make_part, make_shards

    if not arguments.index and are_shards(sources):
        cli.refuse(arguments, _OF_WRITING, f"on {sources[0]}, which is indexed as it is")
    classes = read_class_list(arguments.classes) if arguments.classes else None
    options = _options(arguments, samples_per_shard, quality)
    if part:
        done, number = make_part(sources, classes, out, part, options)
        return cli.tell(f"{out}: {done:,} of {number:,} shards are complete; the command without --part finishes it")
    make = partial(index_shards, arguments.paths[:-1]) if arguments.index else partial(make_shards, sources)
    _tell(out, *make(classes, out, options))


def _add_building(parser: ArgumentParser) -> None:
    parser.add_argument("--samples-per-shard", type=int, help="of folders and .npz (default 10000)")
    parser.add_argument("--seed", type=int, help="of the shuffle (default 0)")
    parser.add_argument(
        "--apply-orientation",
        action="store_true",
        help="turn photos as their EXIF says (default: as Google's code, not)",
    )
    parser.add_argument("--shorter-side", type=int, metavar="S", help="make larger images this small: JPEG, S pixels")
    parser.add_argument("--quality", type=int, metavar="Q", help="of these JPEGs, 1 to 100 (default 95)")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: one for each core), or tars that --index downloads at a time (default 8)",
    )
    parser.add_argument(
        "--engine", choices=["pool", "ray"], help="processes of this machine (default), or a Ray cluster, or Ray here"
    )
    parser.add_argument(
        "--merge-duplicates",
        action="store_true",
        help="write equal images once, with all their labels: makes a set with lists of labels",
    )
    parser.add_argument(
        "--away-from",
        type=Path,
        action="append",
        metavar="SET",
        help="leave out what looks like an image of this set, as one to evaluate on; near_duplicates.csv lists them",
    )
    parser.add_argument("--label-column", metavar="NAME", help="of parquet and TFRecord files (default: the known one)")
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="write every N-th shard, from the I-th on, I from 0: an element of a SLURM array; then the command "
        "without it writes what is missing and the manifest",
    )


def _check_paths(arguments: Namespace) -> None:
    """Raises UserError for too few or too many paths."""
    if arguments.download and not arguments.task:
        raise UserError("--download is of evaluation sets; give --task NAME too")
    if arguments.download and len(arguments.paths) > 1:
        raise UserError(f"--download fetches what is to be read; give the folder to write alone: {arguments.paths[-1]}")
    if len(arguments.paths) < 2 and not arguments.download:
        raise UserError("give at least one SOURCE and then the folder OUT to write")


def _check_found(arguments: Namespace) -> None:
    """Raises UserError for files that are not there."""
    expected = "shards, NAME.tar" if arguments.index else SOURCES
    for path in arguments.paths[:-1]:
        if ":" not in path.partition("/")[0]:  # for a URL make_shards says what to do
            first = _IN_BRACES.sub(r"\1", path) if arguments.index else path
            cli.check_found(Path(first), "the set's own files (docs/tasks.md)" if arguments.task else expected)
    if arguments.classes:
        cli.check_found(arguments.classes, "a list of the classes' names, JSON or .txt")
    for path in arguments.away_from or ():
        cli.check_found(path, "a folder of shards, or its manifest.json")


def _options(arguments: Namespace, samples_per_shard: int, quality: int) -> "Options":
    from pretrain.shards.make import Options
    from pretrain.shards.resizing import Resizing

    return Options(
        samples_per_shard=samples_per_shard,
        seed=arguments.seed or 0,
        apply_orientation=arguments.apply_orientation,
        resizing=Resizing(arguments.shorter_side, quality) if arguments.shorter_side else None,
        workers=arguments.workers,
        engine=_engine(arguments.engine),
        merge_duplicates=arguments.merge_duplicates,
        away_from=tuple(arguments.away_from or ()),
        label_column=arguments.label_column,
    )


def _engine(name: str | None) -> "Engine":
    if name == "ray":
        from pretrain.shards.ray_tasks import ray_results

        return ray_results
    from pretrain.shards.pool import results

    return results


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--part is {text!r}, expected I/N, I from 0 to N - 1: 0/4, 1/4, 2/4, 3/4")
    return int(found[1]), int(found[2])


def _quality(quality: int | None, shorter_side: int | None) -> int:
    if quality is not None and shorter_side is None:
        raise UserError("--quality is of images that --shorter-side makes smaller; give both, or leave it out")
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"--quality is {quality}, expected 1 to 100")
    return quality or 95


def _tell(out: Path, path: Path, told: "Told") -> None:
    from pretrain.data.manifest import load_manifest
    from pretrain.shards.counts import read_counts, table_of

    manifest = load_manifest(path)
    cli.tell(f"{path}: {manifest.num_samples} samples in {len(manifest.shards)} shards, {manifest.num_classes} classes")
    for line in table_of(*read_counts(out)):
        cli.tell(line)
    if told.classes:
        cli.tell(told.classes)
    for title, numbers in (("passed over", told.passed_over), ("pictures", told.notes)):
        kinds = [(number, kind) for kind, number in numbers.most_common() if number]
        for number, kind in kinds[:MAX_KINDS]:
            cli.tell(f"{title}: {number:,} {kind}")
        if len(kinds) > MAX_KINDS:
            cli.tell(f"{title}: {len(kinds) - MAX_KINDS:,} more kinds, in {out / 'counts.json'}")
    if told.num_dropped:  # as counted by the build: provenance.json may be too large to be read again
        named = f"{out / 'provenance.json'} names them; the first: {told.first_dropped}"
        _warn(f"{told.num_dropped} images left out, {named}")


def _warn(message: str) -> None:
    cli.tell(f"warning: {message}", sys.stderr)


def _prepare(row: Task, sources: list[Path], out: Path, samples_per_shard: int) -> None:
    with cli.loading():
        from pretrain.tasks.downloads import downloaded
        from pretrain.tasks.preparation import differences, open_source, prepare

    source = open_source(row, sources or [downloaded(row)])
    with cli.progress("writing", sum(map(len, source.splits.values())), "images") as advance:
        prepared, new = prepare(row, source, out, samples_per_shard=samples_per_shard, progress=advance)
    for split in prepared:
        folder = out / split.split
        kept = "" if split.split in new else "kept, as task.json lists it: "
        cli.tell(f"{folder / 'manifest.json'}: {kept}{split.num_samples} samples, examples {split.examples_sha256}")
        if split.left_out:
            _warn(f"{split.split}: {split.left_out} images left out, {folder / 'provenance.json'} names them")
    if absent := [split for split in row.splits if split not in [one.split for one in prepared]]:
        _warn(f"{row.name}: no {', '.join(absent)} in {source.kind}")
    if reasons := differences(row, prepared):
        _warn(f"{row.name}: not comparable with published scores: {'; '.join(reasons)}")


_TOLD = 20  # problems that are printed


def _verify(arguments: Namespace) -> None:
    cli.refuse(arguments, (option for option in _ALL if option != "--workers"), "with --verify")
    paths = [Path(path) for path in arguments.paths]
    for path in paths:
        cli.check_found(path, "a folder of shards, or its manifest.json")
    with cli.loading():
        from pretrain.data.manifest import load_manifest
        from pretrain.shards.make import MIN_IMAGES_FOR_PROCESSES
        from pretrain.shards.pool import num_cores
        from pretrain.shards.verify import verify

    number = 0
    for path in paths:
        manifest = load_manifest(path)
        processes = arguments.workers or (num_cores() if manifest.num_samples >= MIN_IMAGES_FOR_PROCESSES else 1)
        with cli.progress("checking", manifest.num_samples, "samples") as advance:
            problems = 0
            for problem in verify(manifest, advance, workers=processes, told=cli.tell):
                problems += 1
                if number + problems <= _TOLD:  # at once: an error may end the check early
                    cli.tell(problem, sys.stderr)
        cli.tell(f"{manifest.path}: {manifest.num_samples} samples, {problems} problems")
        number += problems
    if number:
        raise UserError(f"{number} problems found" + (f", the first {_TOLD} are above" if number > _TOLD else ""))


if __name__ == "__main__":
    cli.run(main)

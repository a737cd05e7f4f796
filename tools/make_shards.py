"""Makes WebDataset shards with their index and manifest, or checks existing ones.

python tools/make_shards.py SOURCE... OUT [--classes FILE]
python tools/make_shards.py --index URL... OUT [--classes FILE]
python tools/make_shards.py --task NAME SOURCE... OUT       (can be repeated: finished splits are kept)
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain import cli
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.shards.sources import Told

MAX_KINDS = 12  # of what was passed over, printed: frame.0001, frame.0002 ... are a kind each


def main() -> None:
    parser = cli.parser(
        "Makes shards, their index and manifest.json from an image folder (SOURCE/CLASS/NAME.jpg), a CIFAR-style\n"
        ".npz, or existing WebDataset tars (.tar, .tar.gz), which are indexed as they are. --verify checks them.\n"
        "With --index, tars stay on their server (https://, s3://, gs://, with patterns as train-{000..127}.tar), and\n"
        "OUT gets their indexes and the manifest (docs/data.md).\n"
        "With --task, makes the splits of an evaluation set from a TFDS folder, the authors' downloads, or packs that\n"
        "are named for their splits (docs/tasks.md).",
        "python tools/make_shards.py tiny_imagenet_train-*.tar.gz data/tiny-train --classes tiny_imagenet_classes.json",
    )
    parser.add_argument("paths", nargs="+", metavar="SOURCE... OUT", help="what to read, then the folder to write")
    parser.add_argument("--index", action="store_true", help="of shards on a server, or existing tars, by patterns")
    parser.add_argument("--task", metavar="NAME", help="evaluation set: imagenet, cifar10, pets, vtab/svhn ...")
    parser.add_argument("--classes", type=Path, help='names in the order of labels: JSON list, or "names"')
    parser.add_argument("--samples-per-shard", type=int, default=10_000, help="of folders and .npz (default 10000)")
    parser.add_argument("--seed", type=int, help="of the shuffle (default 0)")
    parser.add_argument(
        "--apply-orientation",
        action="store_true",
        help="turn photos as their EXIF says (default: as Google's code, not)",
    )
    parser.add_argument("--verify", action="store_true", help="decode every sample of the folder and check all digests")
    arguments = parser.parse_args()

    from pretrain.shards.class_list import read_class_list
    from pretrain.shards.make import Options, index_shards, make_shards

    if arguments.verify:
        return _verify([Path(path) for path in arguments.paths])
    if len(arguments.paths) < 2:
        raise UserError("give at least one SOURCE and then the folder OUT to write")
    sources, out = [Path(path) for path in arguments.paths[:-1]], Path(arguments.paths[-1])
    if arguments.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard is {arguments.samples_per_shard}, expected at least 1")
    if arguments.task:
        for option, value in (("--classes", arguments.classes), ("--seed", arguments.seed)):
            if value is not None:
                raise UserError(
                    f"{option} has no effect with --task, which has its own classes and order; leave it out"
                )
        return _prepare(arguments.task, sources, out, arguments.samples_per_shard)
    classes = read_class_list(arguments.classes) if arguments.classes else None
    options = Options(arguments.samples_per_shard, arguments.seed or 0, arguments.apply_orientation)
    make = partial(index_shards, arguments.paths[:-1]) if arguments.index else partial(make_shards, sources)
    path, told = make(classes, out, options)
    _tell(path, told, out)


def _tell(path: Path, told: "Told", out: Path) -> None:
    from pretrain.data.manifest import load_manifest
    from pretrain.shards.build import read_dropped
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
    if dropped := read_dropped(out):
        _warn(f"{len(dropped)} images left out, {out / 'provenance.json'} names them; the first: {dropped[0]}")


def _warn(message: str) -> None:
    cli.tell(f"warning: {message}", sys.stderr)


def _prepare(name: str, sources: list[Path], out: Path, samples_per_shard: int) -> None:
    from pretrain.tasks.preparation import differences, open_source, prepare
    from pretrain.tasks.table import task

    row = task(name)
    source = open_source(row, sources)
    with cli.progress("writing", sum(map(len, source.splits.values())), "images") as advance:
        prepared, new = prepare(row, source, out, samples_per_shard=samples_per_shard, progress=advance)
    for split in prepared:
        folder = out / split.split
        kept = "" if split.split in new else "kept, as task.json lists it: "
        cli.tell(f"{folder / 'manifest.json'}: {kept}{split.num_samples} samples, examples {split.examples_sha256}")
        if split.left_out:
            _warn(f"{split.split}: {split.left_out} images left out, {folder / 'provenance.json'} names them")
    if absent := [split for split in row.splits if split not in [one.split for one in prepared]]:
        _warn(f"{name}: no {', '.join(absent)} in {source.kind}")
    if reasons := differences(row, prepared):
        _warn(f"{name}: not comparable with published scores: {'; '.join(reasons)}")


def _verify(paths: list[Path]) -> None:
    from pretrain.data.manifest import load_manifest
    from pretrain.shards.verify import verify

    problems = []
    for path in paths:
        manifest = load_manifest(path)
        with cli.progress("checking", manifest.num_samples, "samples") as advance:
            problems += list(verify(manifest, advance))
        cli.tell(f"{manifest.path}: {manifest.num_samples} samples, {len(problems)} problems")
    for problem in problems[:20]:
        cli.tell(problem, sys.stderr)
    if problems:
        raise UserError(f"{len(problems)} problems found")


if __name__ == "__main__":
    cli.run(main)

"""Prepares own photos or shards for fine-tuning: makes shards of folders, holds out a test set where there is none.

`prepare` returns an OwnData. OUT/data/PART holds the shards, OUT/data/made-of.json what they were made of.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from pretrain import cli
from pretrain.config.checks import did_you_mean
from pretrain.data.classes import match_classes
from pretrain.data.manifest import Manifest, check_shards, load_manifest, read_as
from pretrain.data.reader import BadSample, parse_label, read_sample
from pretrain.errors import UserError
from pretrain.escape import shown
from pretrain.evaluation.results import one_at_a_time
from pretrain.finetune.own_folders import MANIFEST, is_manifest
from pretrain.json_files import Fields
from pretrain.shards.build import How, build, read_dropped, read_dropped_items
from pretrain.shards.class_tars import class_tar_items, is_of_class_tars
from pretrain.shards.examples import FILE as EXAMPLES
from pretrain.shards.examples import Example, content_sha256, write_examples
from pretrain.shards.items import Item, PackedItems, digest_of
from pretrain.shards.make import MIN_IMAGES_FOR_PROCESSES
from pretrain.shards.pool import num_cores
from pretrain.shards.resizing import Resizing
from pretrain.shards.sources import Told, folder_items, sniffed_ending
from pretrain.storage import remove, write_text

TEST_SHARE = 0.2  # of each class, held out where there is no test set
SPLIT_SEED = 0
SAMPLES_PER_SHARD = 10_000
JPEG_QUALITY = 95  # of photos that are downsized
_FORMAT, _VERSION = "pretrain-own-data", 1


@dataclass(frozen=True)
class OwnData:
    """The sets to train on, to choose the learning rate on, and to test on."""

    train: Path  # manifests
    choose: Path | None  # None: a part of train is held out to choose the learning rate
    test: Path
    num_train: int
    num_test: int
    class_names: tuple[str, ...]  # or numbers, where the set has no names
    told: tuple[str, ...]  # what the user should know of the split


class _Part(NamedTuple):
    """A part of the set before shards are made of it."""

    place: Path
    names: tuple[str, ...]  # empty where shards have none
    num_classes: int
    manifest: Manifest | None  # of shards
    items: PackedItems | None  # of a folder


def prepare(parts: Mapping[str, Path], out: Path, *, shorter_side: int) -> OwnData:
    """Makes shards of the folders among `parts` in OUT/data and returns what to train on; a second call reuses them.

    parts: see `find_parts`. A folder's shards are made again when names, sizes or times of its files have changed.
    shorter_side: larger photos are downsized to it. Raises UserError where there is nothing to train or test on.
    """
    notes = Told()
    found = {name: _open(path, notes) for name, path in parts.items()}
    _check_classes(found)
    told: list[str] = []
    train = found["train"]
    if "test" not in found:
        items = train.items or _items_of(_manifest(train), notes)
        chosen = held_out(items.labels, list(_references(items)))
        told.append(_told_of_split(train, items.labels, chosen))
        rest = set(range(len(items))).difference(chosen)
        found["train"] = train._replace(items=items.without(set(chosen)), manifest=None)
        found["test"] = train._replace(items=items.without(rest), manifest=None)
    made = {name: part for name, part in found.items() if part.items is not None}
    folder = out / "data"
    _check_place(out, made)
    with one_at_a_time(out):
        _begin(folder, out, made, shorter_side)
        ready = {name: _ready(name, part, folder, notes, shorter_side) for name, part in found.items()}
    for title, numbers in (("passed over", notes.passed_over), ("pictures", notes.notes)):
        told += [f"{title}: {number:,} {kind}" for kind, number in numbers.most_common()]
    for name, part in made.items():
        if dropped := read_dropped(folder / name):
            images = "1 image is" if len(dropped) == 1 else f"{len(dropped):,} images are"
            first = dropped[0].removeprefix(shown(f"{part.place}/"))  # pages show no paths
            told.append(f"{name}: {images} left out, the first: {first}")
    manifests = {name: load_manifest(path) for name, path in ready.items()}
    for name, manifest in manifests.items():
        check_shards(manifest)
        if name != "train":
            told += _read_as(name, manifest, manifests["train"])
    learnt = manifests["train"]
    return OwnData(
        train=ready["train"],
        choose=ready.get("val"),
        test=ready["test"],
        num_train=learnt.num_samples,
        num_test=manifests["test"].num_samples,
        class_names=learnt.class_names or tuple(map(str, range(learnt.num_classes))),
        told=tuple(told),
    )


def _read_as(name: str, manifest: Manifest, train: Manifest) -> list[str]:
    """Returns notes on the classes of val or test, with the parts' names in place of paths: pages show no paths."""
    told = read_as(manifest, train)[1]
    return [told.replace(str(manifest.path), name).replace(str(train.path), "train")] if told else []


# --- the parts -------------------------------------------------------------------------------------------------------


def _open(path: Path, notes: Told) -> _Part:
    if is_manifest(path):
        manifest = load_manifest(path)
        if manifest.multi_label:
            raise UserError(f"{path}: has several labels per image; fine-tuning by name of class needs one")
        return _Part(path, manifest.class_names, manifest.num_classes, manifest, None)
    if is_of_class_tars(path):
        items, names = class_tar_items(path, notes)
    else:
        # EXIF orientation is applied, as in tools/predict.py.
        items, names = folder_items(path, notes, apply_orientation=True)
        if names and len(set(items.labels)) < len(names):
            items, names = _without_empty(items, names, notes)
    return _Part(path, tuple(names), len(names), None, items)


def _without_empty(items: PackedItems, names: Sequence[str], notes: Told) -> tuple[PackedItems, list[str]]:
    """Returns the items and names without the classes that have no image, which are noted."""
    kept = set(items.labels)
    first = next(name for label, name in enumerate(names) if label not in kept)
    notes.passed_over[f"folders without pictures, the first {first!r}"] += len(names) - len(kept)
    places = {label: place for place, label in enumerate(sorted(kept))}
    return items.relabelled([places.get(label, 0) for label in range(len(names))]), [
        names[label] for label in sorted(kept)
    ]


def _check_classes(found: Mapping[str, _Part]) -> None:
    """Raises UserError for a single class, and for one of val or test that train does not have."""
    train = found["train"]
    if train.num_classes < 2:
        only = f", {train.names[0]!r}" if train.names else ""
        raise UserError(
            f"{train.place}: has one class{only}; expected at least two, each a folder: {train.place}/CLASS/NAME.jpg"
        )
    for part in found.values():
        if part.items is None:
            continue  # class names of shards are compared later, by `read_as`
        for name in part.names if train.names else ():
            try:
                one = [name], 1, train.names, train.num_classes
                match_classes(*one, their_place=str(part.place), our_place=str(train.place))
            except UserError:
                raise UserError(
                    f"{part.place}: class {name!r} is none of the {train.num_classes} of {train.place}; rename the "
                    f"folder, or move it away.{did_you_mean(name, train.names)}"
                ) from None


def _manifest(part: _Part) -> Manifest:
    assert part.manifest is not None  # a part without items is of shards
    return part.manifest


# --- what is held out ------------------------------------------------------------------------------------------------


def held_out(labels: Sequence[int], names: Sequence[str], *, seed: int = SPLIT_SEED) -> list[int]:
    """Returns the indices of images held out for the test, ascending: TEST_SHARE of each class, at least 1, never all.

    The draw depends only on the seed and on an image's name, so that a set that grows keeps most of its test images.
    """
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    chosen: list[int] = []
    for members in places.values():
        number = min(max(1, round(TEST_SHARE * len(members))), len(members) - 1)
        chosen += sorted(members, key=lambda place: _draw(names[place], seed))[:number]
    return sorted(chosen)


def _draw(name: str, seed: int) -> bytes:
    return blake2b(f"{seed} {name}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _told_of_split(part: _Part, labels: Sequence[int], chosen: Sequence[int]) -> str:
    if not chosen:
        raise UserError(
            f"{part.place}: each class has one image, which is learnt from; give --test, or a second image of each"
        )
    single = [label for label, number in sorted(Counter(labels).items()) if number == 1]
    first = f", {part.names[single[0]]!r} first" if single and part.names else ""
    alone = f"; classes of one image, which is learnt from and not tested: {len(single):,}{first}" if single else ""
    return (
        f"no test was given: {len(chosen):,} of {len(labels):,} images are held out for it ({TEST_SHARE:.0%} of each "
        f"class, seed {SPLIT_SEED}){alone}"
    )


def _items_of(manifest: Manifest, notes: Told) -> PackedItems:
    """Returns the samples of shards as items, to be split into two sets; counts those that cannot be used."""
    check_shards(manifest)
    items = PackedItems(partial(_sample_item, manifest))
    with cli.progress("reading labels", manifest.num_samples, "images") as advance:
        for index in range(manifest.num_samples):
            try:
                label = parse_label(read_sample(manifest, index).label, manifest.num_classes)
                items.append(str(index), label, manifest.sha256)
            except BadSample as bad:
                notes.passed_over[f"samples that cannot be used ({bad.reason})"] += 1
            advance(1)
    if not items:
        raise UserError(f"{manifest.path}: none of its samples can be read; tools/make_shards.py --verify tells why")
    return items


def _sample_item(manifest: Manifest, reference: str, label: int, notes: Counter[str]) -> Item:
    """Returns a sample of shards as an item. reference: its index."""
    index = int(reference)
    ending = sniffed_ending(read_sample(manifest, index).image[:12])
    return Item(partial(_image_of, manifest, index), ending, label, f"{manifest.path}[{index}]")


def _image_of(manifest: Manifest, index: int) -> bytes:
    return read_sample(manifest, index).image


# --- shards ----------------------------------------------------------------------------------------------------------


def _check_place(out: Path, made: Mapping[str, _Part]) -> None:
    for part in made.values():
        if part.place.is_dir() and out.resolve().is_relative_to(part.place.resolve()):
            raise UserError(f"{out}: lies inside {part.place}, and would be taken for photos; give another --out")


def _begin(folder: Path, out: Path, made: Mapping[str, _Part], shorter_side: int) -> None:
    """Records what the shards are made of; where that has changed, first removes the old shards.

    Raises UserError when runs have been trained on the old shards, or the folder was not made here.
    """
    path = folder / "made-of.json"
    parts = {name: {"images": len(part.items or ()), "digest": _digest(part)} for name, part in made.items()}
    own = {"format": _FORMAT, "version": _VERSION, "shorter_side": shorter_side, "parts": parts}
    if path.is_file():
        found = Fields.read(path).values
        if found == own:
            return
        if (out / "sweep.json").exists():
            raise UserError(
                f"{out}: was begun with other photos or options (names, sizes or times of files differ: see "
                f"{path.name} in {folder}); give another --out for those of now"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty, and was not made here; give another --out")
    with cli.writing(folder):
        remove(folder)
        folder.mkdir(parents=True)
        write_text(path, json.dumps(own, indent=1) + "\n")


def _digest(part: _Part) -> str:
    """Returns a digest of the names, labels, sizes and times of a part's images and of its classes, not of content."""
    digest = hashlib.sha256(digest_of(part.items or ()).encode())
    digest.update(json.dumps(part.names).encode())
    return digest.hexdigest()


def _ready(name: str, part: _Part, folder: Path, notes: Told, shorter_side: int) -> Path:
    """Returns the manifest of a part; makes the shards of a folder where they are missing."""
    if part.items is None:
        path = _manifest(part).path.absolute()
    elif not (path := (folder / name / MANIFEST).absolute()).is_file():
        path = _build(name, part, part.items, folder / name, notes, shorter_side)
    if name == "test" and part.items is not None and not (path.parent / EXAMPLES).is_file():
        _write_names(path, part.items)
    return path


def _build(name: str, part: _Part, items: PackedItems, folder: Path, notes: Told, shorter_side: int) -> Path:
    from_shards = part.place.is_file() or is_manifest(part.place)
    workers = 1 if from_shards or len(items) < MIN_IMAGES_FOR_PROCESSES else num_cores()
    how = How(workers, Resizing(shorter_side, JPEG_QUALITY))
    seed = None if name == "test" else 0  # the test keeps its order, which `_write_names` relies on
    with cli.progress(f"shards of {name}", len(items), "images") as advance:
        sizes = {"samples_per_shard": SAMPLES_PER_SHARD, "seed": seed}
        return build(items, part.names, folder, **sizes, progress=advance, how=how, told=notes).absolute()


def _write_names(path: Path, items: PackedItems) -> None:
    """Writes the name of each test image, for the pages that show mistakes."""
    manifest = load_manifest(path)
    kept = items.without(read_dropped_items(path.parent))
    assert len(kept) == manifest.num_samples
    write_examples(
        path.parent,
        (
            Example(index, shown(name), label, content_sha256(read_sample(manifest, index).image))
            for index, (name, label) in enumerate(zip(_references(kept), kept.labels))
        ),
    )


def _references(items: PackedItems) -> Iterable[str]:
    return (items.reference(index) for index in range(len(items)))

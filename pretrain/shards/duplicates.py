"""Duplicates: merges the labels of images with equal bytes, leaves out images that look like a test set's.

Both need a 64-bit number per image, which a pass (passes.py) computes in pieces, with any engine: the start of a digest
of its bytes, or the perceptual hash of the library imagehash.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from pretrain.data.images import decode
from pretrain.data.manifest import Manifest, check_shards, load_manifest
from pretrain.data.reader import MAX_LABELS, BadSample, read_sample
from pretrain.errors import UserError
from pretrain.shards.items import Item, PackedItems, Unreadable, read_item
from pretrain.shards.passes import Piece, Work, run_pass
from pretrain.shards.pool import Progress
from pretrain.shards.sources import Told
from pretrain.storage import write_text

NEAR_FILE = "near_duplicates.csv"
# How many of 64 bits may differ. Measured on resized and re-saved photos: docs/data.md.
MAX_DISTANCE = 6
_MIN_CONTRAST = 8  # of 256 levels: below, rounding errors would determine the hash
_PIECE = 2048  # images: some seconds of work
_FAR, _UNREAD = 65, 66  # in place of a distance: the image has no hash; the disk failed to return it
# In place of a digest or a hash: the image cannot be read, or has one colour and would be near to all such images.
_NONE = np.uint64(0)


class Near(NamedTuple):
    """The images of evaluation sets."""

    names: list[str]  # of the sets
    hashes: np.ndarray  # uint64, each image's followed by its mirror image's
    places: np.ndarray  # int64 [hashes, 2]: which set, which sample


# --- equal bytes -----------------------------------------------------------------------------------------------------


def merged(items: PackedItems, work: Work, told: Told) -> PackedItems:
    """Returns each image once, with the sorted list of all labels that it had. An image that cannot be read stays.

    Images are equal if 64 bits of their BLAKE2b digests are: among 14 million, the chance of a collision is 1 in
    190,000. Raises UserError for an image with more labels than are read.
    """
    digests = _pass(_digests, items, work, "comparing", "1")
    order = np.argsort(digests, kind="stable").astype(np.int32 if len(digests) < 1 << 31 else np.int64)  # half of it
    digests = digests[order]
    same = (digests[1:] == digests[:-1]) & (digests[1:] != _NONE)  # what cannot be read is equal to nothing
    dropped: list[int] = []
    lists: dict[int, set[int]] = {}
    first = -1
    for place in np.flatnonzero(same).tolist():
        if place == 0 or not same[place - 1]:
            first = int(order[place])  # of equal ones the first: the sort is stable
        again = int(order[place + 1])
        dropped.append(again)
        lists.setdefault(first, set(items.labels_of(first))).update(items.labels_of(again))
    for index, labels in lists.items():
        if len(labels) > MAX_LABELS:
            raise UserError(f"{items[index].source}: is in {len(labels)} classes, at most {MAX_LABELS} are read")
    told.passed_over["images that are there already, whose labels were merged"] += len(dropped)
    told.notes["in several classes, with a list of labels"] += sum(len(labels) > 1 for labels in lists.values())
    return items.without(dropped, {**(items.lists or {}), **lists})


def _digests(task: Any, path: Path, progress: Progress) -> bytes:
    digests = []
    for item in task:
        data = _read(item)
        digests.append(int.from_bytes(blake2b(data, digest_size=8).digest(), "big") if data else int(_NONE))
        progress(1)
    return np.array(digests, dtype="<u8").tobytes()


def _read(item: Item) -> bytes:
    """An image's bytes, b"" where it cannot be read, which is reported when its shard is written."""
    try:
        return read_item(item)
    except BadSample:
        return b""


# --- looks -----------------------------------------------------------------------------------------------------------


def without_near(items: PackedItems, folders: Sequence[Path], work: Work, told: Told) -> PackedItems:
    """Returns the items without those that look like an image of evaluation sets; OUT/near_duplicates.csv lists these.

    Two images look alike when their perceptual hashes, or that of the mirror image, differ in at most MAX_DISTANCE
    bits. What the disk fails to return is left out too, and listed without a set: its shard's writer might be able to
    read it, uncompared. folders: data sets, with their manifests and shards. Raises UserError where one is not
    complete, where imagehash is not installed, and when nothing is left.
    """
    manifests = [load_manifest(folder) for folder in folders]
    for manifest in manifests:
        check_shards(manifest)
    key = " ".join(manifest.sha256 for manifest in manifests)
    near = _near(manifests, work)
    found = _pass(partial(_nearest, near), items, work, "looking", f"2 {key}")
    distances = found >> np.uint64(32)
    left_out = np.flatnonzero((distances <= MAX_DISTANCE) | (distances == _UNREAD)).tolist()
    unread = int((distances == _UNREAD).sum())
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", "set", "sample", "distance"])
    for index in left_out:
        distance, place = divmod(int(found[index]), 1 << 32)
        source = items[index].source.encode("utf-8", "backslashreplace").decode()
        if distance == _UNREAD:
            writer.writerow([source, "", "", ""])
            continue
        number, sample = near.places[place].tolist()
        writer.writerow([source, near.names[number], sample, distance])
    write_text(work.out / NEAR_FILE, file.getvalue(), shared=True)
    if len(left_out) == len(items):
        raise UserError(
            f"{work.out}: nothing is left: all {len(items):,} images look like those of --away-from ({NEAR_FILE}) or "
            "cannot be read; is it the set itself?"
        )
    told.passed_over[f"images that look like those of evaluation sets ({NEAR_FILE})"] += len(left_out) - unread
    if unread:
        told.passed_over[f"images that cannot be read, and not be compared with them ({NEAR_FILE})"] += unread
    return items.without(left_out)


def _near(manifests: Sequence[Manifest], work: Work) -> Near:
    """The hashes of evaluation sets, computed in pieces."""
    pieces, places = [], []
    for number, manifest in enumerate(manifests):
        for start in range(0, manifest.num_samples, _PIECE):
            samples = range(start, min(start + _PIECE, manifest.num_samples))
            pieces.append(Piece(f"hashes 1 {manifest.sha256} {start}", partial(tuple, (manifest, samples))))
            places += [(number, sample) for sample in samples for _ in range(2)]
    paths = run_pass(_hashes, pieces, work, "reading the evaluation sets", "parts")
    hashes = np.concatenate([np.fromfile(path, dtype="<u8") for path in paths])
    kept = hashes != _NONE  # neither what cannot be read nor what has one colour
    return Near([manifest.name for manifest in manifests], hashes[kept], np.array(places)[kept])


def _hashes(task: tuple[Manifest, Iterable[int]], path: Path, progress: Progress) -> bytes:
    manifest, samples = task
    hashes = []
    for sample in samples:
        try:
            image = _picture(read_sample(manifest, sample).image)
            hashes += [perceptual_hash(image), perceptual_hash(ImageOps.mirror(image))]
        except BadSample:
            hashes += [_NONE, _NONE]
    return np.array(hashes, dtype="<u8").tobytes()


def _nearest(near: Near, task: Iterable[Item], path: Path, progress: Progress) -> bytes:
    """For each image the place of the nearest hash, with the distance in the 32 bits above it."""
    found = []
    for item in task:
        found.append(_nearest_of(near, item))
        progress(1)
    return np.array(found, dtype="<u8").tobytes()


def _nearest_of(near: Near, item: Item) -> int:
    try:
        own = perceptual_hash(_picture(read_item(item)))
    except Unreadable:
        return _UNREAD << 32
    except BadSample:  # reported when its shard is written
        own = _NONE
    if own == _NONE or not len(near.hashes):  # not decoded, or of one colour
        return _FAR << 32
    distances = np.bitwise_count(near.hashes ^ own)
    place = int(distances.argmin())
    return int(distances[place]) << 32 | place


def _picture(data: bytes) -> Image.Image:
    if not data:
        raise BadSample("missing", "no image")
    return Image.fromarray(decode(data, lambda _: None).permute(1, 2, 0).numpy())


def perceptual_hash(image: Image.Image) -> np.uint64:
    """Returns 64 bits of an image's low frequencies: the library's `phash`; 0 for an image of nearly one colour.

    Raises UserError without the library.
    """
    try:
        from imagehash import phash
    except ImportError:
        raise UserError("--away-from needs a package: pip install -e '.[duplicates]'") from None
    grey = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)  # as the library does it
    if np.ptp(np.asarray(grey)) < _MIN_CONTRAST:
        return _NONE
    bits = np.packbits(phash(grey).hash.flatten())
    # The first bit, the sign of the mean, tells nothing: nearly every image has it, even one of one colour.
    return np.uint64(int.from_bytes(bits.tobytes(), "big") & ~(1 << 63))


# --- pieces ----------------------------------------------------------------------------------------------------------


def _pass(function: Any, items: PackedItems, work: Work, title: str, key: str) -> np.ndarray:
    """The function's number for each image, uint64 [images]."""
    digest, name = items.digest(), getattr(function, "func", function).__name__
    spans = [range(start, min(start + _PIECE, len(items))) for start in range(0, len(items), _PIECE)]
    pieces = [Piece(f"{name} {key} {digest} {span}", partial(items.take, span, Counter[str]())) for span in spans]
    paths = run_pass(function, pieces, work, title, f"parts of {_PIECE:,} images")
    return np.concatenate([np.fromfile(path, dtype="<u8") for path in paths])

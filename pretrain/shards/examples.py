"""The list of examples beside a manifest: original name and content digest of each sample of an evaluation set.

`examples.jsonl` has a line for each sample in index order. Two people can show with its digest that they used the same
images and labels, whatever tool packed them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pretrain.config import MAX_CLASSES
from pretrain.data.images import decode
from pretrain.data.inside import file_inside
from pretrain.data.manifest import IMAGE_ENDINGS, Manifest
from pretrain.data.reader import BadSample, read_sample
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.storage import write_text

FILE = "examples.jsonl"
_MAX_LINE_BYTES = 64 << 10  # an id is a file's name or TFDS's, of some hundred letters at most


class Example(NamedTuple):
    """A sample as its source knows it."""

    index: int
    id: str  # file name or TFDS id
    label: int
    sha256: str  # of the content, see `content_sha256`


def content_sha256(data: bytes) -> str:
    """Returns the SHA-256 of an image: of a JPEG's bytes, of the decoded pixels of anything else.

    JPEGs are copied unchanged, and decoders differ in the last bit; lossless files are re-encoded by each tool, and
    only their pixels stay. Raises BadSample when such a file cannot be decoded.
    """
    if data.startswith(b"\xff\xd8"):
        return hashlib.sha256(data).hexdigest()
    pixels = decode(data)  # [3, height, width]
    return hashlib.sha256(repr(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()


def examples_sha256(examples: Iterable[Example]) -> str:
    """Returns the digest of a list: of its sorted (content, label) pairs, so that neither order nor names count."""
    lines = sorted(f"{example.sha256} {example.label}\n" for example in examples)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_examples(folder: Path, examples: Iterable[Example]) -> None:
    """Writes the list beside a manifest."""
    text = "".join(json.dumps(example._asdict(), ensure_ascii=False) + "\n" for example in examples)
    write_text(folder / FILE, text)


def load_examples(manifest: Manifest) -> list[Example]:
    """Reads the list beside a manifest. Raises UserError when it is missing or does not fit."""
    path = manifest.path.parent / FILE
    try:
        file_inside(path.parent, path)
        with path.open("rb") as file:
            examples = list(_lines(file, path, manifest))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; prepare the set with tools/make_shards.py --task") from None
    except OSError as error:
        raise UserError(f"{path}: not a list of examples ({error.strerror})") from None
    if len(examples) != manifest.num_samples:
        raise UserError(f"{path}: lists {len(examples)} examples, {manifest.path} has {manifest.num_samples}")
    return examples


def _lines(file: BinaryIO, path: Path, manifest: Manifest) -> Iterator[Example]:
    """Yields the examples, one a line. Raises UserError when there are more than samples, or one is no example."""
    for index in range(manifest.num_samples + 1):
        line = file.readline(_MAX_LINE_BYTES)
        if not line:
            return
        if index == manifest.num_samples:
            raise UserError(f"{path}: lists more examples than the {manifest.num_samples} of {manifest.path}")
        values = Fields.parse(line, f"{path}: line {index + 1}")
        if values.integer("index", 0, manifest.num_samples) != index:
            values.wrong("index", str(index))
        yield Example(index, values.text("id"), values.integer("label", 0, MAX_CLASSES), values.text("sha256"))


def sample_names(manifest: Manifest, indices: Sequence[int]) -> list[str]:
    """Returns the original names of samples, without the ending of an image: ILSVRC2012_val_00000001, n01498041/x.

    From examples.jsonl beside the manifest, where a name that comes more than once gets its index in front (17/x);
    without it, from the keys of the shards, which are names where existing tars were indexed. "" where a sample's key
    cannot be read.
    """
    if not (manifest.path.parent / FILE).exists():
        return [_key(manifest, index) for index in indices]
    names = [_without_ending(example.id) for example in load_examples(manifest)]
    count = Counter(names)
    return [names[index] if count[names[index]] == 1 else f"{index}/{names[index]}" for index in indices]


def _key(manifest: Manifest, index: int) -> str:
    try:
        return read_sample(manifest, index).key
    except BadSample:
        return ""


def _without_ending(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    return stem if ending.lower() in IMAGE_ENDINGS else name

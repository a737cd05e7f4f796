"""Parquet files as Hugging Face publishes data sets: an image's bytes and a label in each row. pyarrow reads them.

Pages are compressed, so no row can be read by itself: each file is unpacked once, row after row, to a file of images
end to end in OUT/.passes, from which shards are written in their shuffled order. Nothing in a file is executed.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.index_rows import read_at
from pretrain.data.reader import MAX_IMAGE_BYTES, BadSample
from pretrain.errors import UserError, first_line
from pretrain.json_files import Fields, brief, is_text
from pretrain.shards import records
from pretrain.shards.items import Item, PackedItems
from pretrain.shards.passes import FOLDER, Piece, Work, run_pass
from pretrain.shards.pictures import picture_of
from pretrain.shards.pool import Progress
from pretrain.shards.tars import unreadable
from pretrain.shards.unpacking import max_unpacked_bytes, too_large
from pretrain.storage import replacing

ENDING = ".parquet"
_LABELS = ("label", "labels", "class", "cls")  # columns taken as the label if none is named
# Types of a label: no list, as a page of a few bytes may hold one of 10^8 zeros.
_LABEL_TYPE = re.compile(r"(dictionary<values=)?(u?int\d+|(large_)?(string|binary))(, indices=.*)?")
_ROWS_AT_ONCE = 8  # in memory, each of 64 MB at most: a dictionary of a few large images may stand for many rows
_BUFFER_BYTES = 1 << 20  # of a column that is read from the disk at a time
# train-00003-of-00016.parquet, also with a digest behind it; 0003.parquet, as the hub converts sets
_SPLIT = re.compile(r"(.*?)-?\d{4,5}(-of-\d{5}.*)?")


class Columns(NamedTuple):
    """Which columns of a file are read."""

    image: str
    label: str
    names: list[str]  # of the classes, where the file gives them


def parquet_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the parquet files among sources: these files, or those of a folder or of its folder `data`."""
    if len(paths) == 1 and paths[0].is_dir():
        found = (sorted(folder.glob(f"*{ENDING}")) for folder in (paths[0], paths[0] / "data"))
        return next(filter(None, found), [])
    return sorted(paths) if all(path.suffix == ENDING and path.is_file() for path in paths) else []


def parquet_items(
    files: Sequence[Path], work: Work, *, label_column: str | None = None, apply_orientation: bool = False
) -> tuple[PackedItems, list[str]]:
    """Returns the images of parquet files in the order of their names, and the names of classes, where there are some.

    The image column is the metadata's only Image, or the only column of bytes; the label column is `label_column`, or
    the only ClassLabel, or one called `label`. Raises UserError for files of several splits, of other columns, or with
    rows without a label, and for a file that is missing or given twice.
    """
    records.one_split(files, _split_of)
    columns = [columns_of(path, label_column) for path in files]
    for path, found in zip(files, columns):
        if found.names != columns[0].names:
            raise UserError(f"{path}: has other classes than {files[0]}; make two sets of them")
    records.check_complete(files)
    keys = [records.key_of("parquet 1", number, path) for number, path in enumerate(files)]
    pieces = [Piece(f"{key} {found}", partial(tuple, (path, found))) for key, path, found in zip(keys, files, columns)]
    listings = run_pass(_unpack, pieces, work, "unpacking", "files")
    item_of = partial(_item, work.out / FOLDER, apply_orientation)
    prefixes = [f"{path.name}\0{listing.name}" for path, listing in zip(files, listings)]
    return records.items_of_rows(files, listings, columns[0].names, item_of, prefixes)


def _split_of(path: Path) -> str:
    match = _SPLIT.fullmatch(path.stem)
    return match[1] if match and match[1] else records.unnumbered(path)


def _opened(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: parquet files need a package: pip install -e '.[parquet]'") from None
    return ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)  # else a whole row group would be in memory


def columns_of(path: Path, label_column: str | None) -> Columns:
    """Returns which columns of a file hold images and labels. Raises UserError when that is not clear."""
    try:
        with _opened(path) as file:
            schema = file.schema_arrow
            raw = (schema.metadata or {}).get(b"huggingface", b"{}")
            kinds = {field.name: str(field.type) for field in schema}
    except UserError:
        raise
    except Exception as error:  # pyarrow's are of many kinds
        raise _unreadable(path, error) from None
    features = _features(path, raw)
    types = {name: features.get(name, {}).get("_type") for name in kinds}
    binary = [name for name, kind in kinds.items() if re.match(r"(struct<.*bytes: )?(large_)?binary", kind)]
    images = [name for name in kinds if types[name] == "Image"] or binary
    labels = [name for name in kinds if types[name] == "ClassLabel"] or [name for name in _LABELS if name in kinds]
    labels = [label_column] if label_column else labels
    for what, found, way_out in (("images", images, "keep one"), ("labels", labels, "give --label-column NAME")):
        if len(found) != 1 or found[0] not in kinds:
            raise UserError(f"{path}: {brief(found)} as the column of {what}, of {brief(list(kinds))}; {way_out}")
    image, label = images[0], labels[0]
    if image not in binary:
        raise UserError(
            f"{path}: column {image} is {brief(kinds[image])}, expected bytes of images, or a struct of them"
        )
    if kinds[label].startswith(("list<", "large_list<", "fixed_size_list<")):
        raise UserError(f"{path}: column {label} is a list; for several labels of an image write files and a .jsonl")
    if not _LABEL_TYPE.fullmatch(kinds[label]):
        raise UserError(f"{path}: column {label} is {brief(kinds[label])}, expected whole numbers or names of classes")
    names = features.get(label, {}).get("names")
    if names is not None and not (isinstance(names, list) and all(map(is_text, names))):
        raise UserError(f"{path}: the names of {label} are no list of texts")
    return Columns(f"{image}.bytes" if kinds[image].startswith("struct") else image, label, list(names or ()))


def _features(path: Path, raw: bytes) -> dict[str, dict[str, Any]]:
    """What `datasets` declares of the columns: in the file itself, or in dataset_infos.json beside it or above."""
    values = Fields.parse(raw, f"{path}: metadata").values
    if not values:
        place = next((p for p in (path.parent, path.parent.parent) if (p / "dataset_infos.json").is_file()), None)
        infos = Fields.read(place / "dataset_infos.json").values if place else {}
        values = {"info": next(iter(infos.values()))} if len(infos) == 1 else {}
    info = values.get("info")
    features = info.get("features") if isinstance(info, dict) else None
    columns = features if isinstance(features, dict) else {}
    return {name: said for name, said in columns.items() if isinstance(said, dict)}


def _unreadable(path: Path, error: Exception) -> Exception:
    if not isinstance(error, OSError) or error.errno is None:  # pyarrow's texts have many lines
        error = ValueError(first_line(error)[:300])
    return unreadable(path, error, what="parquet file", way_out="; get it again")


def _unpack(task: tuple[Path, Columns], listing: Path, progress: Progress) -> bytes:
    """Writes a file's images end to end beside the listing that it returns."""
    path, columns = task
    rows, limit, at = records.RowsSoFar(str(path)), max_unpacked_bytes(path), 0
    with replacing(_images_of(listing), shared=True) as temporary, temporary.open("wb") as file:
        for image, label in _rows(path, columns):
            image = image if isinstance(image, bytes) else b""  # null, or a path without bytes: left out by name later
            rows.add(at, image, label)
            if len(image) <= MAX_IMAGE_BYTES:  # larger ones are left out by name, too
                at += file.write(image)
            if at > limit:
                raise UserError(f"{path}: {too_large(at, limit)}")
    return rows.to_bytes()


def _images_of(listing: Path) -> Path:
    return listing.with_name(f"{listing.name}.images")


def _rows(path: Path, columns: Columns) -> Iterator[tuple[Any, Any]]:
    """Yields image and label of each row, with only a few rows in memory."""
    try:
        with _opened(path) as file:
            _check_size(path, file.metadata, columns)
            wanted = [columns.image, columns.label]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    image = row[columns.image.removesuffix(".bytes")]
                    yield image.get("bytes") if isinstance(image, dict) else image, row[columns.label]
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None


def _check_size(path: Path, metadata: Any, columns: Columns) -> None:
    """Raises UserError, before a page is read, when the file states that the two columns unpack to too much."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    parts = (group.column(number) for group in groups for number in range(group.num_columns))
    wanted = (part for part in parts if part.path_in_schema in (columns.image, columns.label))
    num_bytes, limit = sum(part.total_uncompressed_size for part in wanted), max_unpacked_bytes(path)
    if num_bytes > limit:
        raise UserError(f"{path}: {too_large(num_bytes, limit)}")


def _item(folder: Path, apply_orientation: bool, reference: str, label: int, notes: Counter[str]) -> Item:
    """Returns the item of a row. reference: file, listing, row, first byte, number of bytes, ending."""
    name, listing, row, start, num_bytes, kind = reference.split("\0")
    read = partial(_read, _images_of(folder / listing), int(start), int(num_bytes), notes, apply_orientation)
    return Item(read, records.ending_of_kind(kind), label, f"{name}[{row}]", apply_orientation)


def _read(path: Path, start: int, num_bytes: int, notes: Counter[str], apply_orientation: bool) -> bytes:
    if not num_bytes:
        raise BadSample("missing", "the row holds no image")
    if num_bytes > MAX_IMAGE_BYTES:
        raise BadSample("tar", f"{num_bytes} bytes, at most {MAX_IMAGE_BYTES}")
    with path.open("rb") as file:
        data = read_at(file.fileno(), start, start + num_bytes)
    if len(data) != num_bytes:
        raise UserError(f"{path}: is cut; remove {path.parent} to have it made anew")
    return picture_of(data, "row.jpg", notes, apply_orientation)

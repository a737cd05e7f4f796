"""Shards that stay where they are, on a server: only their indexes and the manifest are made here."""

import json
import math
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from pretrain.config import MAX_CLASSES
from pretrain.data.manifest import Shard, load_index, write_index
from pretrain.data.reader import forget_shards
from pretrain.data.remote import check_url, download, is_url, num_bytes_of, without_secrets
from pretrain.errors import StorageError, UserError
from pretrain.json_files import Fields, brief, read_json
from pretrain.shards.build import DataSet, Progress, finish, start_folder
from pretrain.shards.existing import labels_of, starts_with_list
from pretrain.shards.tars import index_tar
from pretrain.storage import write_text

THREADS = 8  # shards that are downloaded at a time; as many lie in OUT/.indexing meanwhile
MAX_URLS = 300_000  # that patterns may stand for
_SPAN = re.compile(r"\{(-?\d{1,12})\.\.(-?\d{1,12})")


def expanded(patterns: Sequence[str]) -> list[str]:
    """Returns the paths and URLs that patterns stand for, as webdataset writes them: shard-{000..127}.tar, {a,b}.tar.

    Raises UserError for a pattern that cannot be read, or stands for too many.
    """
    found = []
    for pattern in patterns:
        # Counted first: braceexpand keeps each range as a list.
        spans = [abs(int(last) - int(first)) + 1 for first, last in _SPAN.findall(pattern)]
        try:
            if math.prod(spans) <= MAX_URLS:
                found += islice(braceexpand(pattern), MAX_URLS + 1)
        except ValueError:
            raise UserError(f"{brief(without_secrets(pattern))}: is no pattern as a-{{00..99}}.tar") from None
        if max(math.prod(spans), len(found)) > MAX_URLS:
            raise UserError(f"{brief(without_secrets(pattern))}: stands for more than {MAX_URLS:,} shards")
    return found


def index_urls(
    urls: Sequence[str],
    classes: Sequence[str],
    out: Path,
    *,
    progress: Progress = lambda _: None,
    passed_over: Counter[str] | None = None,
) -> Path:
    """Makes indexes and manifest of tars on a server in OUT, and returns the manifest's path. Each is read once.

    Started again after a stop, it goes on with the shards that are not done. Raises UserError naming the shard, when it
    cannot be had, is damaged, or holds a sample twice or without image or label.
    """
    names = local_names([check_url(url) for url in urls])
    start_folder(out, classes)
    work = out / ".indexing"
    work.mkdir(exist_ok=True)
    pool, stopped = ThreadPoolExecutor(THREADS), threading.Event()
    try:
        walks, told = [], Counter[str]()
        for walk in pool.map(partial(_walked, out, work, len(classes), stopped), urls, names):
            walks.append(walk)
            told.update(walk.passed_over)
            if walk.multi_label != walks[0].multi_label:
                kinds = ["a class", "a list of classes"]
                raise UserError(
                    f"{walk.shard.url}: its labels are {kinds[walk.multi_label]} each, those of "
                    f"{walks[0].shard.url} {kinds[walks[0].multi_label]}"
                )
            progress(1)
    except KeyboardInterrupt:  # after other errors the shards that have begun come to their end: a later start has them
        stopped.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    counts = sum((walk.counts for walk in walks), Counter[int]())
    num_classes = len(classes) or max(counts) + 1
    if num_classes > MAX_CLASSES:
        raise UserError(f"{out}: label {max(counts)} makes more than {MAX_CLASSES} classes")
    if passed_over is not None:
        passed_over.update(told)
    made = DataSet([walk.shard for walk in walks], num_classes, classes, counts, [], walks[0].multi_label)
    path = finish(out, made, {"scope": "none"})
    shutil.rmtree(work)
    return path


def local_names(urls: Sequence[str]) -> list[str]:
    """Returns a file name for each URL: its last part, or as many as tell them apart, joined by -."""
    if len(set(urls)) < len(urls):
        raise UserError(f"{Counter(urls).most_common(1)[0][0]}: is given twice")
    parts = [[part for part in unquote(f"{u.netloc}{u.path}").split("/") if part] for u in map(urlsplit, urls)]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            if wrong := next((url for url, name in zip(urls, names) if not is_file_name(name)), None):
                raise UserError(f"{wrong}: its name is too long for the files made of it, or has a zero byte")
            if wrong := next((url for url, name in zip(urls, names) if not name.endswith(".tar")), None):
                raise UserError(f"{wrong}: a shard's name ends in .tar; a compressed one cannot be read in parts")
            return names
    raise UserError(f"{urls[0]}: the shards' names cannot be told apart")


def is_file_name(name: str) -> bool:
    """Returns whether a shard's files beside it can be made: their endings are longer than its own."""
    return "\0" not in name and len(name.encode()) <= 240


class _Walk(NamedTuple):
    """What was found in one shard."""

    shard: Shard
    multi_label: bool
    counts: Counter[int]  # images of each class
    passed_over: Counter[str]


def _walked(out: Path, work: Path, num_classes: int, stopped: threading.Event, url: str, name: str) -> _Walk:
    """Reads a shard once, writes its index to OUT, and a record with which a second start need not read it again."""
    num_bytes, record = num_bytes_of(url, stopped), work / f"{name}.json"
    if (known := _known(record, out / name, url, num_bytes)) and not (num_classes and max(known.counts) >= num_classes):
        return known
    copy = work / name
    try:
        download_to(copy, url, num_bytes, stopped)
        passed_over = Counter[str]()
        here = index_tar(copy, passed_over)
        if not here.num_samples:
            raise UserError(f"{url}: has no samples")
        multi_label = starts_with_list(here)
        counts = Counter(labels_of(here, num_classes, multi_label))
        shard = replace(here, path=out / name, url=url)
        write_index(shard, load_index(here))
    except UserError as error:  # names the copy, which the user has never seen
        raise UserError(str(error).replace(str(copy), url)) from None
    finally:
        forget_shards()
        copy.unlink(missing_ok=True)
        copy.with_suffix(".idx").unlink(missing_ok=True)
    values = {"url": url, "num_bytes": num_bytes, "num_samples": shard.num_samples, "sha256": shard.sha256}
    values |= {"multi_label": multi_label, "counts": counts, "passed_over": passed_over}
    write_text(record, json.dumps(values))
    return _Walk(shard, multi_label, counts, passed_over)


def _known(record: Path, path: Path, url: str, num_bytes: int) -> _Walk | None:
    """What an earlier start found, when its record and its index still fit the file on the server."""
    try:
        values = Fields.of(read_json(record), str(record))
        shard = Shard(path, values.integer("num_samples", 1, 1 << 32), num_bytes, values.text("sha256"), url)
        if (values.text("url"), values.integer("num_bytes", 0, 1 << 63)) != (url, num_bytes):
            return None
        load_index(shard)
        counts = values.part("counts")
        labels = Counter({int(label): counts.integer(label, 0, 1 << 48) for label in counts.values})
        if not labels or min(labels) < 0:
            return None
        kinds = values.part("passed_over")
        passed_over = Counter({kind: kinds.integer(kind, 0, 1 << 48) for kind in kinds.values})
        return _Walk(shard, values.flag("multi_label"), labels, passed_over)
    except (OSError, ValueError):
        return None


def download_to(path: Path, url: str, num_bytes: int, stopped: threading.Event | None = None) -> None:
    """Writes a remote file to `path`. Raises what `download` does, and StorageError of the disk."""
    try:
        with path.open("wb") as file:
            download(url, 0, num_bytes, num_bytes, file.write, stopped)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def local_copy(shard: Shard) -> Iterator[Shard]:
    """Yields the shard itself, or where it is remote a copy of it, with its index, that is removed afterwards."""
    if not shard.url:
        yield shard
        return
    with tempfile.TemporaryDirectory(prefix="pretrain-verify-") as folder:
        copy = Path(folder) / shard.path.name
        download_to(copy, shard.url, shard.num_bytes)
        shutil.copyfile(shard.path.with_suffix(".idx"), copy.with_suffix(".idx"))
        try:
            yield replace(shard, path=copy, url="")
        finally:
            forget_shards()


def are_urls(sources: Sequence[str]) -> bool:
    """Returns whether sources are URLs. Raises UserError when only some are."""
    kinds = [is_url(source) for source in sources]
    if len(set(kinds)) > 1:
        raise UserError(
            f"{sources[kinds.index(False)]}: paths and URLs are mixed; index them one by one, each to its own OUT"
        )
    return kinds[0]

"""Shards that stay on a server: only their indexes and the manifest are made here."""

import math
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from pretrain.data.manifest import Shard, load_index, write_index
from pretrain.data.reader import forget_shards
from pretrain.data.remote import check_url, download, is_url, num_bytes_of, without_secrets
from pretrain.errors import StorageError, UserError
from pretrain.json_files import brief
from pretrain.shards import walks
from pretrain.shards.build import start_folder
from pretrain.shards.pool import Progress
from pretrain.shards.walks import Walk, finish_walks, is_file_name
from pretrain.storage import remove

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
    threads: int = THREADS,
) -> Path:
    """Makes indexes and manifest of tars on a server in OUT, and returns the manifest's path. Each is read once.

    threads: shards that are read at a time. After a stop, the same call resumes with the shards that are not done.
    Raises UserError naming the shard, when it cannot be fetched, is damaged, or holds a sample twice or without image
    or label.
    """
    names = local_names([check_url(url) for url in urls])
    start_folder(out, classes)
    work = walks.begin(out)
    pool, stopped = ThreadPoolExecutor(threads), threading.Event()
    try:
        found = enumerate(pool.map(partial(_walked, out, work, len(classes), stopped), urls, names))
        path = finish_walks(found, classes, out, progress, passed_over)
    except KeyboardInterrupt:  # after other errors, shards in progress are finished for a later start
        stopped.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    remove(work)
    return path


def local_names(urls: Sequence[str]) -> list[str]:
    """Returns a file name for each URL: its last path part, or as many as make names unique, joined by -."""
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
    raise UserError(f"{urls[0]}: two shards have the same host and path; rename one")


def _walked(out: Path, work: Path, num_classes: int, stopped: threading.Event, url: str, name: str) -> Walk:
    """Reads a shard once, and writes its index to OUT, and a record so that a later start need not read it again."""
    num_bytes, record = num_bytes_of(url, stopped), work / f"{name}.json"
    origin = {"url": url, "num_bytes": num_bytes}
    if found := walks.known(record, origin, out / name, num_classes, url):
        return found
    copy = work / name
    try:
        download_to(copy, url, num_bytes, stopped)
        here = walks.walk(copy, num_classes)
        found = here._replace(shard=here.shard._replace(place=str(out / name), url=url))
        write_index(found.shard, load_index(here.shard))
    except UserError as error:  # names the copy, which the user has never seen
        raise UserError(str(error).replace(str(copy), url)) from None
    finally:
        forget_shards()
        copy.unlink(missing_ok=True)
        copy.with_suffix(".idx").unlink(missing_ok=True)
    walks.keep(record, origin, found)
    return found


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
    """Yields the shard itself, or for a remote one a temporary copy of it with its index."""
    if not shard.url:
        yield shard
        return
    with tempfile.TemporaryDirectory(prefix="pretrain-verify-") as folder:
        copy = Path(folder) / shard.path.name
        download_to(copy, shard.url, shard.num_bytes)
        shutil.copyfile(shard.path.with_suffix(".idx"), copy.with_suffix(".idx"))
        try:
            yield shard._replace(place=str(copy), url="")
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

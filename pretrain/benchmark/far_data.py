"""The benchmark of reading over a network: an epoch from a slow and faulty server, compared with one from disk."""

import hashlib
import json
import multiprocessing
import re
import signal
import statistics
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pretrain.benchmark.reading import line, loader, photo_set, repeated_set
from pretrain.data.loader import Batch
from pretrain.data.manifest import Manifest, load_manifest
from pretrain.data.reader import read_sample
from pretrain.data.store import Store
from pretrain.shards.elsewhere import index_urls

_BATCH = 64
_LATENCY_S = 0.03
_STALL_S = 60.0  # longer than any client should wait


def far_rows(folder: Path, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields: an epoch from the disk and one over the network; a second epoch from the store; CPU time in turns."""
    shards, samples = options["far_shards"], options["far_samples"]
    near = repeated_set(photo_set(Path(options["photos"]), folder), folder / "near", shards, samples)
    with _served(folder / "near") as site:
        urls = [f"http://127.0.0.1:{site.port}/{shard.path.name}" for shard in near.shards]
        far = replace(load_manifest(index_urls(urls, (), folder / "far")), name=near.name)
        far = replace(far, store=Store(folder / "store", 1 << 40))
        steps, workers = near.num_samples // _BATCH, options["far_workers"]
        logs, seconds = [], []
        for manifest in (near, far):
            site.begin(faulty=manifest is far)
            start = time.perf_counter()
            batches = loader(manifest, steps, _BATCH, lanes=True, workers=workers)
            logs.append(b"".join(map(_logged, batches)))
            seconds.append(time.perf_counter() - start)
        requests, sent, images = site.requests.value, site.sent.value, steps * _BATCH
        faults = f"{images:,} images of {sent / images / 1e3:.0f} KB, {workers} worker(s), {requests} requests"
        rates = f"{images / seconds[1]:.0f} and {images / seconds[0]:.0f} images/s; {faults}"
        yield line("images/s over a faulty network / from the disk", seconds[0] / seconds[1], at_least=0.95, told=rates)
        yield line("requests per 1,000 images", 1000 * requests / images, at_most=20)
        same, digest = logs[0] == logs[1], hashlib.sha256(logs[1]).hexdigest()[:12]
        yield line("logs of samples and pixels are equal", float(same), at_least=1, told=f"SHA-256 {digest}...")
        site.begin(faulty=True)
        for index in range(far.num_samples):
            read_sample(far, index)
        yield line("bytes over the network in the second epoch", float(site.sent.value), at_most=0)
        site.begin(faulty=True)
        far = replace(far, store=Store(folder / "another-store", 1 << 40))
        own, other = _in_turns(near, far, options["far_turns"])
        told = f"{other:.2f} and {own:.2f} ms an image, steps of both in turns"
        yield line(
            "processor time of a loader: from the disk / over the network", own / other, at_least=0.95, told=told
        )


def _in_turns(near: Manifest, far: Manifest, steps: int) -> tuple[float, float]:
    """Returns each set's median CPU time per image, in ms, of the process that reads and decodes.

    Wall-clock time would include the server and the fetcher, unless they have cores of their own, and other load on
    the machine. CPU time of steps in turns includes neither.
    """
    loaders = [loader(manifest, steps + 1, _BATCH, lanes=True) for manifest in (near, far)]
    times: tuple[list[float], list[float]] = [], []
    for _ in range(steps + 1):
        for batches, own in zip(loaders, times):
            start = time.process_time()
            next(batches)
            own.append((time.process_time() - start) * 1000 / _BATCH)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])  # without the first, which opens files


def _logged(batch: Batch) -> bytes:
    """Returns a batch's samples as a log line: epochs, indices, labels, and a checksum of the pixels."""
    told = batch.epoch.tolist(), batch.index.tolist(), batch.labels.tolist(), zlib.crc32(batch.images.numpy().data)
    return json.dumps(told).encode() + b"\n"


@dataclass
class _Site:
    """State shared by the server's process and this one."""

    port: Any
    requests: Any
    sent: Any  # bytes of bodies
    faulty: Any

    def begin(self, *, faulty: bool) -> None:
        """Resets the counters, and turns latency and faults on or off."""
        self.requests.value = self.sent.value = 0
        self.faulty.value = faulty


@contextmanager
def _served(folder: Path) -> Iterator[_Site]:
    """Serves a folder from a process of its own, so that its CPU time is not the reader's."""
    context = multiprocessing.get_context("fork")
    site = _Site(0, *(context.Value("q", 0) for _ in range(3)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, site, folder))
    site.port = server.server_address[1]
    process = context.Process(target=_serve, args=(server,), daemon=True)
    process.start()
    server.socket.close()
    try:
        yield site
    finally:
        process.kill()
        process.join()


def _serve(server: ThreadingHTTPServer) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.daemon_threads = True
    server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def __init__(self, site: _Site, folder: Path, *rest: Any) -> None:
        self._site, self._folder = site, folder
        super().__init__(*rest)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        with self._site.requests.get_lock():
            number = self._site.requests.value
            self._site.requests.value += 1
        fault = _fault(number) if self._site.faulty.value else ""
        if self._site.faulty.value:
            time.sleep(_LATENCY_S)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if fault == "503" or not wanted:
            self.send_response(503 if fault else 400)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        with (self._folder / Path(self.path).name).open("rb") as file:
            start, total = int(wanted[1]), file.seek(0, 2)
            length = min(int(wanted[2]) + 1, total) - start
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + length - 1}/{total}")
            self.send_header("Content-Length", str(length))
            self.end_headers()
            part = length // 2 if fault else length
            self.connection.sendfile(file, start, part)
        with self._site.sent.get_lock():
            self._site.sent.value += part
        if fault == "stalled":
            time.sleep(_STALL_S)
        self.close_connection = bool(fault)


def _fault(number: int) -> str:
    """Of 1,000 answers, 10 are 503, one stalls and one is cut short; all kinds occur within the first 201."""
    special = {100: "stalled", 200: "short"}
    return special.get(number % 1000, "503" if number % 100 == 50 else "")

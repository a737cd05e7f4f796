"""A web server of this machine that hands out byte ranges of files, with planted faults and a count of what it sent."""

import gc
import importlib
import random
import re
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

FAULTS = (
    *("503", "500", "429", "stall", "silence", "short", "half-way", "range", "total", "whole", "slow start"),
    *("bytes", "gzip", "nonsense"),
)


@dataclass
class Site:
    """The files below a folder, and what goes wrong with requests for them."""

    folder: Path
    fault: Callable[[int], str] = lambda _: ""  # of the n-th request: one of FAULTS, "one byte", a status, "to:ADDRESS"
    latency_s: float = 0.0
    chunk_bytes: int = 0  # a body is sent in such pieces, one each ms
    stall_s: float = 30.0  # or until the server ends
    headers: dict[str, str] = field(default_factory=dict)  # of every answer with bytes
    url: str = ""
    requests: list[tuple[str, int, int]] = field(default_factory=list)  # name, first byte, byte behind the last
    connections: int = 0
    sent: int = 0  # bytes of bodies
    faults: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)


def every(n: int, kind: str) -> Callable[[int], str]:
    """A fault in every n-th request."""
    return lambda number: kind if number % n == n - 1 else ""


def at_random(share: float, kinds: tuple[str, ...], seed: int = 0) -> Callable[[int], str]:
    """One of several faults in a share of the requests."""

    def fault(number: int) -> str:
        draw = random.Random(seed * 1_000_003 + number)
        return draw.choice(kinds) if draw.random() < share else ""

    return fault


@contextmanager
def served(site: Site) -> Iterator[Site]:
    """Serves a site on a free port while the block runs; `site.url` is its address, without a slash at its end."""

    class Handler(_Handler):
        of = site

    server = _Server(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield site
    finally:
        site.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    of: Site
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        with self.of.lock:
            self.of.connections += 1
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        site, path = self.of, self.of.folder / self.path.lstrip("/").partition("?")[0]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        with site.lock:
            number = len(site.requests)
            start, end = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, 0)
            site.requests.append((path.name, start, end))
            fault = site.fault(number)
            site.faults[fault] += bool(fault)
        if site.latency_s:
            time.sleep(site.latency_s)
        if fault == "slow start" or fault == "silence":
            site.ended.wait(site.stall_s if fault == "silence" else 0.2)
        if fault.startswith("to:"):
            return self._head(302, {"Location": fault[3:], "Content-Length": "0"})
        if fault == "nonsense":
            self.wfile.write(b"\x00\x01 no answer\r\n\r\n")
            self.close_connection = True
            return
        if fault.isdigit() or not path.is_file():
            return self._head(int(fault or 404), {"Content-Length": "0"})
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        total = path.stat().st_size
        if fault == "whole":
            self._head(200, {"Content-Length": str(total)})
            return self._send(path.read_bytes())
        if start >= total:
            return self._head(416, {"Content-Length": "0"})
        first = start + 512 if fault == "range" else start
        claimed = total + 512 if fault == "total" else total
        headers = {"Content-Range": f"bytes {first}-{first + len(data) - 1}/{claimed}"}
        headers["Content-Length"] = str(len(data) - (1 if fault == "short" else 0))
        headers |= site.headers | ({"Content-Encoding": "gzip"} if fault == "gzip" else {})
        self._head(206, headers)
        if fault == "bytes":
            data = bytes(byte ^ 1 for byte in data)
        if fault in ("stall", "half-way", "one byte"):
            self._send(data[: 1 if fault == "one byte" else len(data) // 2])
            if fault == "stall":
                site.ended.wait(site.stall_s)
            self.close_connection = True
            return
        self._send(data[:-1] if fault == "short" else data)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, data: bytes) -> None:
        size = self.of.chunk_bytes or len(data)
        with self.of.lock:
            self.of.sent += len(data)  # before the client can have it, and look
        for start in range(0, len(data), size):
            self.wfile.write(data[start : start + size])
            if self.of.chunk_bytes:
                time.sleep(0.001)


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3-compatible server, which the environment's credentials and address lead to; skips where it is missing.

    Yields boto3's client of it.
    """
    files = pytest.importorskip("s3fs", reason="s3fs is not installed").S3FileSystem
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    threaded = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    threaded.start()
    try:
        host, port = threaded.get_host_and_port()
        names = {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "ENDPOINT_URL": f"http://{host}:{port}"}
        for name, value in (names | {"DEFAULT_REGION": "us-east-1"}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        files.clear_instance_cache()  # of another server's address
        with closing(importlib.import_module("boto3").client("s3")) as client:
            yield client
    finally:
        threaded.stop()
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # sockets that these packages leave
            gc.collect()

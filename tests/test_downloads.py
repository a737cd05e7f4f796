"""Evaluation sets fetched by make_shards --task --download, from a server of this machine."""

import hashlib
import io
import re
import runpy
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data import remote
from pretrain.data.manifest import load_manifest
from pretrain.errors import StorageError, UserError
from pretrain.tasks import downloads
from pretrain.tasks.downloads import downloaded
from pretrain.tasks.public_files import PUBLIC, PublicFile
from pretrain.tasks.table import TASKS, task
from tests.test_building import refusal
from tests.web import Site, served

ROOT = Path(__file__).resolve().parents[1]
NAME = "cifar-10-binary.tar.gz"


def archive() -> bytes:
    """CIFAR-10 in its authors' form, with a picture in each batch."""
    file, rng = io.BytesIO(), np.random.default_rng(0)
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
            data = bytes([3]) + rng.integers(0, 256, 3072).astype(np.uint8).tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server with that archive, told as the set's; a cache of the test's own."""
    data = archive()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / NAME).write_bytes(data)
    row = PublicFile(PUBLIC["cifar10"][0].url, len(data), sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(downloads.PUBLIC, "cifar10", (row,))
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "MAX_WAIT_S", 0.01)
    with served(Site(tmp_path / "site")) as server:
        monkeypatch.setenv("PRETRAIN_TASK_MIRROR", server.url)
        yield server


def make(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """tools/make_shards.py, in this process."""
    monkeypatch.setattr(sys, "argv", ["make_shards.py", *options])
    runpy.run_path(str(ROOT / "tools" / "make_shards.py"))["main"]()


def test_a_set_is_fetched_once_and_made(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line says what is fetched, with size, licence and place; the second time the cache serves."""
    counts = []
    for out in ("one", "two"):
        make(monkeypatch, "--task", "cifar10", "--download", str(tmp_path / out))
        assert load_manifest(tmp_path / out / "train").num_samples == 5
        told = capsys.readouterr().err
        assert (f"cifar10: {NAME}: fetching {site.url}/{NAME} (0.0 MiB, none stated" in told) == (out == "one")
        counts.append(len(site.requests))
    assert counts[0] == counts[1] > 0
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.name for path in kept] == [NAME]


@pytest.mark.parametrize("way", ["half-way", "bytes", "size"])
def test_what_arrives_is_what_was_published(way: str, site: Site, tmp_path: Path) -> None:
    """A stop goes on at the byte reached; damaged bytes and another file are told, and nothing stays of them."""
    path, row = tmp_path / "site" / NAME, PUBLIC["cifar10"][0]
    if way == "half-way":
        part = tmp_path / "cache" / "tasks" / row.url.partition("://")[2]
        part.parent.mkdir(parents=True)
        part.with_name(f"{NAME}.part").write_bytes(path.read_bytes()[:1000])
        assert downloaded(task("cifar10")).read_bytes() == path.read_bytes()
        assert site.requests[-1][1] == 1000
        return
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(bytes(data) + b"x" * (way == "size"))
    message = refusal(downloaded, task("cifar10"))
    assert ("has sha256" if way == "bytes" else "is another one") in message
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_without_a_network_one_line_says_what_to_do(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address, the size, and where to put the file."""
    monkeypatch.setenv("PRETRAIN_TASK_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=re.escape("download http://127.0.0.1:9/cifar-10")) as told:
        downloaded(task("cifar10"))
    assert "put it at" in str(told.value) and "\n" not in str(told.value)


def test_the_table_is_of_tasks_and_has_checksums() -> None:
    """Each row is a task with a reader of original files; https, a size, a checksum of the right length."""
    for name, files in PUBLIC.items():
        assert TASKS[name].originals is not None
        for file in files:
            assert file.url.startswith("https://") and file.num_bytes > 0
            assert re.fullmatch("[0-9a-f]{64}", file.sha256 or "") or re.fullmatch("[0-9a-f]{32}", file.md5 or "")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--task", "imagenet", "--download", "out"], "imagenet cannot be downloaded here; get it from https://image"),
        (["--task", "cifar10", "--download", "in", "out"], "give the folder to write alone: out"),
        (["--download", "out"], "give --task NAME too"),
    ],
)
def test_downloads_that_cannot_be(options: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each."""
    with pytest.raises(UserError, match=re.escape(said)):
        make(monkeypatch, *options)

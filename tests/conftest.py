"""What several test files need: a tiny data set made on the fly, and the places of real data and reference numbers.

PRETRAIN_TEST_DATA and PRETRAIN_TEST_FIXTURES name folders of real images and of numbers that Google's code produced;
tests that need one are skipped, with the reason, where the variable is not set.
"""

import errno
import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_browser
from PIL import Image

from pretrain import cli
from pretrain.data.manifest import Manifest, load_manifest
from pretrain.shards.build import build
from pretrain.shards.sources import Item

# By the time of all tests in them, longest first: two files run at a time, and a long one must not begin last.
LONG_FILES = ("timm_loop", "timm_models", "finetune", "convert", "slurm", "tasks_scored", "variants", "resume")
LONG_FILES += ("engine", "transformers", "mixtures", "launch", "saving", "restarts", "disasters", "stops", "demo")

# What whoever starts the tests has around him: a launcher's or a job's world, a claim that any output is a terminal
# (rich's tables), proxies, which would be asked for the servers that tests start here.
NOT_OF_TESTS = re.compile(r"RANK|WORLD_SIZE|(LOCAL|MASTER|SLURM)_\w+|FORCE_COLOR|TTY_COMPATIBLE|(?i:\w+_proxy)")

CLASSES = ["ash", "birch", "cedar", "elm", "fir"]


def pytest_configure() -> None:
    """Tests see the same world wherever they are started.

    A shell starts what is in its background deaf to Ctrl-C, and so would be all that the tests start.
    """
    for name in filter(NOT_OF_TESTS.fullmatch, list(os.environ)):
        del os.environ[name]
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of the longest files first; else the order stays."""
    place = {f"test_{name}": number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG_FILES)))


@pytest.fixture(autouse=True)
def commands_leave_by_system_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's end would be that of the tests, where they run it in their own process."""
    monkeypatch.setattr(cli, "end_process", sys.exit)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is brought to the disk (fsync), and "now NAME" of each rename, in the order that they come."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(number: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def renamed(source: Path, target: Path) -> None:
        done.append(f"now {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    return done


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 103 JPEG images, 24 to 40 pixels a side, in 5 classes and shards of 40, 40 and 23. Never change it."""
    random = np.random.default_rng(0)
    items = []
    for number in range(103):
        height, width = random.integers(24, 41, 2)
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        file = io.BytesIO()
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(file, "jpeg", quality=92)
        items.append(Item(file.getvalue, "jpg", number % len(CLASSES), f"picture {number}"))
    folder = tmp_path_factory.mktemp("shards") / "trees"
    build(items, CLASSES, folder, samples_per_shard=40, seed=0)
    return folder


@pytest.fixture(scope="session")
def manifest(shard_folder: Path) -> Manifest:
    """The manifest of `shard_folder`."""
    return load_manifest(shard_folder)


@pytest.fixture
def own_shards(shard_folder: Path, tmp_path: Path) -> Path:
    """A copy of `shard_folder` that a test may damage."""
    return Path(shutil.copytree(shard_folder, tmp_path / shard_folder.name))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images."""
    return _named_folder("PRETRAIN_TEST_DATA")


@pytest.fixture(scope="session")
def test_fixtures() -> Path:
    """The folder of reference numbers."""
    return _named_folder("PRETRAIN_TEST_FIXTURES")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real browser, one for each file of tests."""
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium or Chrome is installed (apt install chromium)")
    found = Browser(path)
    yield found
    found.close()


def _named_folder(variable: str) -> Path:
    name = os.environ.get(variable)
    if not name:
        pytest.skip(f"{variable} is not set")
    if not Path(name).is_dir():
        pytest.skip(f"{variable} is {name}, which is not a folder")
    return Path(name)


@pytest.fixture
def no_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder can be listed, by whatever call."""

    def fail(*_: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    for call in ("listdir", "scandir"):
        monkeypatch.setattr(os, call, fail)

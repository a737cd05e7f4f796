"""The benchmark of reading: each row gives its lines, with targets, on a few small images; figures are not judged."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from weights_on_disk import load_tool

from pretrain.benchmark import data, far_data, first_batch
from pretrain.benchmark.data_table import OPTIONS, ROWS, data_lines
from pretrain.benchmark.reading import line
from pretrain.data.manifest import load_manifest
from pretrain.data.reader import read_sample
from pretrain.shards.build import write_samples
from tests.test_loader import needs_shared_memory

tool = load_tool("benchmark")

SMALL = {"rounds": 1, "worker_steps": 2, "far_shards": 2, "far_samples": 96, "far_workers": 0, "repeats": 1}
SMALL |= {"far_turns": 2, "built_images": 320, "built_times": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of 60 small pictures, one of them gray."""
    samples = []
    for number in range(60):
        random, file = np.random.default_rng(number), io.BytesIO()
        pixels = random.integers(0, 256, (30 + number % 7, 40) + ((3,) if number else ())).astype(np.uint8)
        Image.fromarray(pixels).save(file, "jpeg", quality=92)
        samples.append((file.getvalue(), number % 5))
    return write_samples(samples, "jpg", tmp_path_factory.mktemp("photos") / "photos.tar", 0).path


def lines_of(row: str, photos: Path, folder: Path) -> dict[str, dict[str, Any]]:
    found = list(data.measure(row, {**OPTIONS, **SMALL, "photos": str(photos), "folder": str(folder)}))
    assert all(one["row"] == row for one in found) and list(folder.iterdir()) == []
    return {one["what"]: one for one in found}


def test_targets() -> None:
    """A figure holds when it reaches its target, from the right side."""
    holds = [line("x", value, at_least=1.6)["holds"] for value in (1.59, 1.6)]
    holds += [line("x", value, at_most=0)["holds"] for value in (0, 1)]
    assert holds == [False, True, True, False] and line("x", 2, at_most=20)["target"] == "<= 20"


@pytest.mark.parametrize("row", ["decode", "randaugment"])
def test_one_core(row: str, photos: Path, tmp_path: Path) -> None:
    """The loader and timm's path both run, and every pixel is that of torchvision's functions on the whole image."""
    rate, equal = lines_of(row, photos, tmp_path).values()
    assert rate["value"] > 0 and rate["target"] == (">= 1.6" if row == "decode" else ">= 1.75")
    assert equal["value"] == 1 and equal["holds"] and equal["told"] == "of 100"


def test_another_pixel_is_seen(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself."""
    monkeypatch.setattr(data, "_plain", lambda *_: data.torch.zeros(3, 224, 224, dtype=data.torch.uint8))
    assert not list(lines_of("decode", photos, tmp_path).values())[1]["holds"]


@pytest.mark.parametrize("row", ["workers", "memory"])
def test_loader_processes(row: str, photos: Path, tmp_path: Path) -> None:
    """Rates of one and two; memory and open files of one."""
    needs_shared_memory()
    found = lines_of(row, photos, tmp_path)
    if row == "workers":
        (rate,) = found.values()
        assert rate["value"] > 0
    else:
        assert all(len(one["told"].split()) == 10 for one in found.values())
        assert found["open files that it gains"]["holds"]


@pytest.mark.slow
def test_making_shards(photos: Path, tmp_path: Path) -> None:
    """By one process and by two."""
    (rate,) = lines_of("building", photos, tmp_path).values()
    assert rate["value"] > 0 and rate["target"] == ">= 1.8"


def test_a_faulty_network_gives_the_same_log(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer of each kind of fault; the second epoch needs no byte."""
    monkeypatch.setattr(far_data, "_LATENCY_S", 0.001)
    monkeypatch.setattr(far_data, "_fault", lambda number: {1: "503", 2: "short"}.get(number, ""))
    found = lines_of("far", photos, tmp_path)
    assert found["logs of samples and pixels are equal"]["holds"]
    assert found["bytes over the network in the second epoch"]["value"] == 0
    assert found["requests per 1,000 images"]["value"] * 0.192 == pytest.approx(6)  # 4 blocks of 48, 2 faults
    assert found["processor time of a loader: from the disk / over the network"]["value"] > 0


@pytest.mark.parametrize("rank, world_size", [(0, 1), (500, 512)])
def test_the_first_batch(rank: int, world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set of many shards that are one file: seconds, memory, a rank's share of the images."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    shards = first_batch.faked_set(tmp_path / "set", 70, 40)
    assert read_sample(load_manifest(shards), 69 * 40 + 39) == read_sample(load_manifest(shards), 39)
    monkeypatch.setattr(first_batch, "_BATCH", 512)
    case = {"order": "lanes", "rank": rank, "world_size": world_size, "first": 1_000_000, "shards": str(shards)}
    (found,) = data.measure("first_batch", {"folder": str(tmp_path)} | case)
    assert found["images"] == 512 // world_size and found["seconds"] > 0 and found["mb"] >= 0


def test_rows_without_photos_say_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped, with the reason; nothing is started."""
    monkeypatch.delenv("PRETRAIN_TEST_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "data", "--rows", "decode", "far"])
    tool.main()
    table = capsys.readouterr().out
    assert table.count("| skipped | no photos: set --photos or PRETRAIN_TEST_DATA |") == 2
    assert [*data_lines("workers", Path("nowhere.tar"), None)][0]["skipped"] == "nowhere.tar is not there"
    assert set(ROWS) <= set(data._ROWS)

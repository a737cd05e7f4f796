"""Building shards with several processes, in parts, and after kills: the same bytes whatever happens on the way."""

import errno
import gc
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from halves import Asked, half, interrupt_at_start
from PIL import Image
from processes import processes_of

from pretrain import cli
from pretrain.data.images import decode
from pretrain.data.manifest import load_manifest
from pretrain.data.reader import read_sample
from pretrain.errors import LostProcessError, StorageError, UserError
from pretrain.json_files import Fields
from pretrain.shards import build as build_module
from pretrain.shards import elsewhere, existing, make, ray_tasks, walks
from pretrain.shards.build import write_samples
from pretrain.shards.class_list import ClassList, read_class_list
from pretrain.shards.existing import index_existing
from pretrain.shards.items import PackedItems
from pretrain.shards.listed import listed_items
from pretrain.shards.make import Options, make_part, make_shards
from pretrain.shards.passes import Piece, Work, run_pass
from pretrain.shards.pool import results
from pretrain.shards.ray_tasks import ray_results
from pretrain.shards.resizing import Resizing
from pretrain.shards.sources import Told, folder_items
from pretrain.shards.unfinished import FOLDER
from pretrain.shards.verify import verify

ROOT = Path(__file__).resolve().parents[1]
SMALL = Options(samples_per_shard=7, seed=3)


def pixels(seed: int, side: int = 9) -> np.ndarray:
    """A small picture."""
    return np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3)).astype(np.uint8)


def photos(root: Path, count: int = 40, side: int = 9) -> Path:
    """A folder of three classes, with a broken image, a BMP, a text file, and a name that is not UTF-8."""
    for number in range(count):
        path = root / "abc"[number % 3] / f"{number}.{'png' if number % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number, side)).save(path)
    Image.fromarray(pixels(count)).save(root / "a" / "x.bmp")
    (root / "b" / "broken.jpg").write_bytes(b"\xff\xd8broken")
    (root / "b" / "notes.txt").write_text("x")
    os.rename(root / "c" / "2.jpg", os.fsencode(root / "c") + b"/\xff.jpg")
    return root


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of each file, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refusal(function: Any, *arguments: Any, **options: Any) -> str:
    """The message with which a call is refused, checked to be one line."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of photos that most tests read."""
    return photos(tmp_path_factory.mktemp("source") / "photos")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed build in this process."""
    out = tmp_path_factory.mktemp("whole") / "set"
    make_shards([source], None, out, SMALL)
    assert list(verify(load_manifest(out))) == []
    return tree(out)


def test_processes_give_the_same_bytes(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Two processes: shards, indexes, counts, what was left out and noted, manifest."""
    _, told = make_shards([source], None, tmp_path / "set", replace(SMALL, workers=2))
    assert tree(tmp_path / "set") == whole
    assert told.notes["BMP converted to PNG"] == 1 and told.passed_over[".txt files"] == 1
    assert set(whole) >= {"manifest.json", "classes.json", "counts.json", "provenance.json", "set-000005.idx"}


def test_the_bytes_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Order, keys and members of a set do not change: training runs resume on what was made before."""
    for number in range(11):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG + bytes([number]))  # no bytes that depend on an encoder's version
    make_shards([tmp_path / "photos"], None, tmp_path / "set", Options(samples_per_shard=4, seed=5))
    found = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted((tmp_path / "set").glob("*.tar"))]
    assert found == EARLIER


# One grey pixel; what follows the end of a PNG is no part of it.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)
EARLIER = ["6ff54ab4a7530328", "8c8af473295dc7ed", "5316986049163686"]


def test_parts_and_then_the_rest(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements of an array write their shards, in any order, again without harm; the whole command writes the rest.

    An element reads the records of its own shards: of the others it counts them.
    """
    out = tmp_path / "set"
    assert make_part([source], None, out, (2, 3), SMALL) == (2, 6)
    assert make_part([source], None, out, (0, 3), SMALL) == (4, 6)
    assert not (out / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    monkeypatch.setattr(build_module.unfinished, "read", read := Mock(side_effect=build_module.unfinished.read))
    assert make_part([source], None, out, (0, 3), SMALL) == (4, 6) and read.call_count == 2
    make_shards([source], None, out, SMALL)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before  # not written twice
    assert tree(out) == whole


@pytest.mark.parametrize("last", [False, True])
def test_a_part_of_a_set_that_is_finished_meanwhile(
    last: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the whole command, which was given too early, before the part's last record or behind it: one line."""
    out = tmp_path / "set"
    module, name = (build_module.unfinished, "keep") if last else (build_module, "_write_shard")
    real = getattr(module, name)

    def finished(*arguments: Any) -> Any:
        result = real(*arguments)
        shutil.rmtree(out / FOLDER)
        return result

    monkeypatch.setattr(module, name, finished)
    said = refusal(make_part, [source], None, out, (0, 6), SMALL)
    assert said == f"{out / FOLDER}: is gone; another command has finished this data set meanwhile, or removed it"


def test_a_pass_of_a_set_that_is_finished_meanwhile(tmp_path: Path) -> None:
    """The same, and what is missing elsewhere is not taken for it."""

    def removing(own: Path, path: Path, progress: Any) -> bytes:
        shutil.rmtree(own)
        return b""

    work = Work(tmp_path / "set")
    said = refusal(run_pass, removing, [Piece("a", lambda: work.out / ".passes")], work, "reading", "files")
    assert said.startswith(f"{work.out / '.passes'}: is gone; another command has finished")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        run_pass(removing, [Piece("a", lambda: tmp_path / "elsewhere")], work, "reading", "files")


@pytest.mark.parametrize("when", ["index_tar", "finish", "clear"])
def test_an_interrupted_build_goes_on(
    when: str, source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at a shard's index, before the manifest, and behind it: the same command finishes."""
    owner = build_module.unfinished if when == "clear" else build_module
    real, calls = getattr(owner, when), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == (4 if when == "index_tar" else 1):
            raise KeyboardInterrupt
        return real(*arguments)

    out = tmp_path / "set"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, when, interrupted)
        make_shards([source], None, out, SMALL)
    assert (out / FOLDER).exists()
    torn, young = out / ".tmp-host-1-set-000004.tar", out / ".tmp-host-2-set-000004.tar"
    for path, age_s in ((torn, 700), (young, 500)):  # another node may still write the younger one
        path.write_bytes(b"torn")
        os.utime(path, (time.time() - age_s,) * 2)
    make_shards([source], None, out, SMALL)
    assert young.read_bytes() == b"torn"
    young.unlink()
    assert tree(out) == whole
    assert "holds a data set already" in refusal(make_shards, [source], None, out, SMALL)


def test_what_a_killed_build_of_this_machine_left_is_removed_at_once(source: Path, tmp_path: Path) -> None:
    """Killed and begun again within seconds: its half shard and half index do not stay for ever."""
    program = (
        "import os, sys; from pathlib import Path; from pretrain.storage import replacing\n"
        "for name in ('set-000004.tar', 'set-000004.idx'):\n"
        "    if not os.fork():\n"
        "        with replacing(Path(sys.argv[1]) / name, shared=True) as temporary:\n"
        "            temporary.write_text('torn'); os.kill(os.getpid(), 9)\n"
        "    os.wait()"
    )
    out = tmp_path / "set"
    out.mkdir()
    subprocess.run([sys.executable, "-c", program, out], check=True, cwd=ROOT)
    assert len(list(out.iterdir())) == 2
    make_shards([source], None, out, SMALL)
    assert not list(out.glob(".*"))


def test_what_became_old_meanwhile_is_removed_at_the_end(source: Path, tmp_path: Path) -> None:
    """A killed process's file, too young at the start of a build, is gone when the set is complete."""
    out = tmp_path / "set"
    torn = out / ".tmp-host-1-set-000004.tar"
    out.mkdir()
    torn.write_bytes(b"torn")
    os.utime(torn, (time.time() - 500,) * 2)
    items, names = folder_items(source)

    def older(_: int) -> None:
        os.utime(torn, (time.time() - 700,) * 2)

    build_module.build(items, names, out, samples_per_shard=7, seed=3, progress=older)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("last", ["000000.json", "plan.json"])
def test_killed_while_it_forgets_what_was_unfinished(
    last: str, source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first file, and after the plan: the same command is done, or says that the set is there."""
    real, out = os.unlink, tmp_path / "set"

    def killed(path: Any, **options: Any) -> None:
        real(path, **options)
        if os.path.basename(path) == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", killed)
        make_shards([source], None, out, SMALL)
    assert (out / FOLDER / "plan.json").exists() == (last != "plan.json")
    if last == "plan.json":
        assert "holds a data set already" in refusal(make_shards, [source], None, out, SMALL)
    else:
        make_shards([source], None, out, SMALL)
    assert tree(out) == whole and not (out / FOLDER).exists()


def test_another_plan_is_refused_by_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options, images, their sizes, times and labels; nothing that is there is touched."""
    root, out = photos(tmp_path / "photos"), tmp_path / "set"
    make_part([root], None, out, (0, 2), SMALL)
    before = tree(out)
    for options, said in (
        (replace(SMALL, seed=4), "its seed was 3 and is now 4"),
        (replace(SMALL, samples_per_shard=8), "its samples per shard was 7 and is now 8"),
        (replace(SMALL, apply_orientation=True), "its --apply-orientation was 0 and is now 1"),
        (replace(SMALL, resizing=Resizing(5, 90)), "its shorter side was None and is now 5"),
    ):
        message = refusal(make_shards, [root], None, out, options)
        assert said in message and f"remove {out}" in message
    with monkeypatch.context() as patch:
        patch.setattr("torchvision.__version__", "0")  # it decodes: what is left out depends on it
        assert "its torchvision was" in refusal(make_shards, [root], None, out, SMALL)
    path = root / "a" / "0.jpg"
    data, status = path.read_bytes(), path.stat()
    for change in (lambda: path.write_bytes(data + b"x"), path.touch, lambda: path.rename(root / "b" / "0.jpg")):
        change()
        assert "list of images" in refusal(make_shards, [root], None, out, SMALL)
        (root / "b" / "0.jpg").rename(path) if not path.exists() else path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (root / "a" / "new.jpg").write_bytes(data)
    assert "its number of images was 42 and is now 43" in refusal(make_shards, [root], None, out, SMALL)
    assert tree(out) == before


def test_a_corrected_list_of_classes_is_another_plan(source: Path, tmp_path: Path) -> None:
    """The same names and images, one folder's id at another place: old and new labels do not mix in one set."""

    def listed(*wnids: str) -> ClassList:
        (tmp_path / "classes.json").write_text(json.dumps({"names": ["one", "two", "three"], "wnids": wnids}))
        return read_class_list(tmp_path / "classes.json")

    make_part([source], listed("a", "b", "c"), tmp_path / "set", (0, 2), SMALL)
    assert "its list of images" in refusal(make_shards, [source], listed("b", "a", "c"), tmp_path / "set", SMALL)
    make_shards([source], listed("a", "b", "c"), tmp_path / "set", SMALL)


def test_a_read_that_fails_for_a_moment_loses_no_image(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the build with the code for "try again", without noise of what was open; the same command goes on."""
    real, noise = Path.read_bytes, []

    def away(path: Path) -> bytes:
        if path.name == "9.png":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", noise.append)
        patch.setattr(Path, "read_bytes", away)
        with pytest.raises(
            StorageError, match="9.png: cannot be read for now .Stale file handle.; the same comm"
        ) as told:
            make_shards([source], None, tmp_path / "set", SMALL)
        assert told.value.exit_code == 75
        del told
        gc.collect()
    assert not noise
    make_shards([source], None, tmp_path / "set", SMALL)
    assert tree(tmp_path / "set") == whole


@pytest.mark.parametrize("damage", ["cut", "removed", "without index"])
def test_a_shard_that_is_not_complete_is_written_again(
    damage: str, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    """Its size is compared with what was written down."""
    out = tmp_path / "set"
    make_part([source], None, out, (0, 1), SMALL)
    path = out / "set-000002.tar"
    if damage == "cut":
        os.truncate(path, 1024)
    else:
        (path if damage == "removed" else path.with_suffix(".idx")).unlink()
    make_shards([source], None, out, SMALL)
    assert tree(out) == whole


def test_counts_are_added_up_as_shards_come(source: Path, tmp_path: Path) -> None:
    """Written and found: those of 30,000 shards of many classes would take gigabytes beside each other."""
    items, names = folder_items(source)
    plan = build_module._plan(items, names, 7, 3, build_module.ALONE)
    for _ in ("written", "found"):
        shards = build_module._Shards(items, names, tmp_path / "set", 7, 3, plan)
        complete = shards.write(range(shards.number), build_module.ALONE, lambda _: None)
        assert sum(shards.counts.values()) == sum(done.shard.num_samples for done in complete) > 30
        assert not any(done.counts for done in complete)


def test_images_that_nobody_can_decode_leave_no_beginning(tmp_path: Path) -> None:
    """The user mends them, which changes their times, and gives the same command."""
    path = tmp_path / "photos" / "a" / "1.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xd8")
    assert "none of the 1 images" in refusal(make_shards, [tmp_path / "photos"], None, tmp_path / "set", SMALL)
    Image.fromarray(pixels(0)).save(path)
    make_shards([tmp_path / "photos"], None, tmp_path / "set", SMALL)


# --- processes -------------------------------------------------------------------------------------------------------


def test_results_and_errors_of_processes() -> None:
    """All results; an error as it was raised; a killed process is one line."""
    told: list[int] = []
    assert sorted(results(half, range(0, 12, 2), 2, told.append)) == [0, 1, 2, 3, 4, 5] and sum(told) == 6
    with pytest.raises(UserError, match="^7 is odd$"):
        list(results(half, [2, 7], 2, told.append))
    with pytest.raises(LostProcessError, match="exit code -9.*the same command again keeps the shards") as lost:
        list(results(half, [2, -2, 4], 2, told.append))
    assert "\n" not in str(lost.value) and lost.value.exit_code == 76


def test_results_and_errors_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """All results, and what they told; an error as it was raised, in one line."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # where `half` is
    told: list[int] = []
    try:
        assert sorted(ray_results(half, range(0, 12, 2), 2, told.append)) == [0, 1, 2, 3, 4, 5] and sum(told) == 6
        with pytest.raises(UserError, match="^7 is odd$"):
            list(ray_results(half, [2, 7], 0, told.append))
        with pytest.raises(LostProcessError, match="Ray has given up a task.*the same command goes on") as lost:
            list(ray_results(half, [-2], 2, told.append))
        assert "\n" not in str(lost.value)
    finally:
        ray.shutdown()


def test_a_task_on_another_machine_has_the_folder_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are as they were given; what that machine does not see is one line, for now."""
    (tmp_path / "x").write_bytes(b"x")
    monkeypatch.chdir("/")
    folder = str(tmp_path)
    assert ray_tasks._counted(lambda path, _: Path(path).read_bytes(), "x", folder) == (b"x", 0)
    monkeypatch.chdir("/")
    assert ray_tasks._counted(lambda path, _: Path(path).read_bytes(), f"{folder}/x", "/no/folder") == (b"x", 0)
    with pytest.raises(StorageError, match="^y: not found on ") as error:
        ray_tasks._counted(lambda path, _: Path(path).read_bytes(), "y", "/no/folder")
    assert "\n" not in str(error.value)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, in one line."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install -e '.[ray]'" in refusal(lambda: list(ray_results(half, [2], 1, lambda _: None)))


def test_an_interrupt_at_the_start_of_a_process_is_the_listener_s() -> None:
    """The terminal sends it to all: a process is deaf to it from its birth; this one hears it."""
    before = signal.getsignal(signal.SIGINT)
    assert list(results(partial(interrupt_at_start, Asked()), [1, 2], 2, lambda _: None)) == [False, False]
    assert signal.getsignal(signal.SIGINT) is before


TARS = 6


def some_tars(folder: Path) -> list[Path]:
    """Shards of another tool, in the order that the manifest is to have; one is compressed."""
    folder.mkdir()
    shards = [(number, [(PNG, label % 3) for label in range(2 + number)]) for number in range(TARS)]
    tars = [write_samples(samples, "png", folder / f"{9 - number}.tar", number).path for number, samples in shards]
    for path in folder.glob("*.idx"):
        path.unlink()
    packed = tars[1].with_name(f"{tars[1].name}.gz")
    packed.write_bytes(gzip.compress(tars[1].read_bytes()))
    tars[1].unlink()
    return [packed if path == tars[1] else path for path in tars]


@pytest.mark.parametrize("stop", ["walk", "keep", "finish", "a wrong label"])
def test_indexing_goes_on_where_it_was_stopped(stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in a tar, before its record and before the manifest, and refused: what is done is not done again.

    Processes may be done in another order than that of the tars.
    """
    tars, out, names = some_tars(tmp_path / "in"), tmp_path / "out" / "set", ["x", "y", "z"]
    whole = tree(index_existing(tars, names, tmp_path / "whole" / "set").parent)
    real, calls = {name: getattr(walks, name) for name in ("walk", "keep", "finish")}, Counter[str]()
    stops = {"walk": 4, "keep": 4, "finish": 1}

    def counted(name: str, *arguments: Any) -> Any:
        calls[name] += 1
        if name == stop and calls[name] == stops.get(name):
            raise KeyboardInterrupt
        return real[name](*arguments)

    for name in real:
        monkeypatch.setattr(walks, name, partial(counted, name))
    good = tars[3].read_bytes()
    if stop not in real:
        write_samples([(PNG, 9)], "png", tars[3], 3)
    with pytest.raises(KeyboardInterrupt if stop in real else UserError):
        index_existing(tars, names, out)
    assert len(list((out / ".indexing").glob("*.json"))) == (TARS if stop == "finish" else 3)
    assert stop in real or not (out / tars[3].name).exists()
    tars[3].write_bytes(good)
    tars[0].touch()  # another time than its record says: read anew
    calls.clear()
    stops.clear()
    monkeypatch.setattr(existing, "results", lambda function, tasks, *_: (function(t, len) for t in [*tasks][::-1]))
    index_existing(tars, names, out)
    assert calls["walk"] == (2 if stop == "finish" else TARS - 3 + 1) and tree(out) == whole


@pytest.mark.parametrize(
    "source, given, least, found",
    [
        ("a.tar", None, 1, 5),  # many bytes: a process for each core
        ("a.tar", None, 10**9, 1),
        ("a.tar", 3, 10**9, 3),
        ("http://h/a.tar", None, 1, elsewhere.THREADS),
        ("http://h/a.tar", 3, 1, 3),
    ],
)
def test_how_many_tars_are_indexed_at_a_time(
    source: str, given: int | None, least: int, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes for those that lie here, threads for those on a server; as many as are asked for."""
    asked: list[int] = []
    monkeypatch.chdir(tmp_path)
    write_samples([(PNG, 0)], "png", Path("a.tar"), 0)
    monkeypatch.setattr(make, "MIN_BYTES_FOR_PROCESSES", least)
    monkeypatch.setattr(make, "num_cores", lambda: 5)
    for name, option in (("index_existing", "workers"), ("index_urls", "threads")):
        monkeypatch.setattr(make, name, lambda *_, option=option, **named: asked.append(named[option]) or Path("out"))
    make.index_shards([source], None, Path("out"), Options(workers=given))
    assert asked == [found]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.long)])
def test_indexing_in_processes_killed_at_any_moment(kills: int, tmp_path: Path) -> None:
    """kill -9 of the command, or of it and its processes: the bytes of one process undisturbed. Checked in two, too."""
    photos(tmp_path / "photos", 20 + 20 * kills, side=90)
    made = make_shards([tmp_path / "photos"], None, tmp_path / "in", replace(SMALL, samples_per_shard=1))[0]
    tars, out = [shard.path for shard in load_manifest(made).shards], tmp_path / "out" / "set"
    whole = tree(make_shards(tars, None, tmp_path / "whole" / "set", Options())[0].parent)
    line = [sys.executable, ROOT / "tools" / "make_shards.py", *tars, out, "--workers", "2"]
    for kill in range(kills):
        there = len(list(out.glob("*.idx")))
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and len(list(out.glob("*.idx"))) == there:
            time.sleep(0.01)
        with suppress(ProcessLookupError):
            (os.killpg if kill % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        until = time.monotonic() + 60
        while processes_of(process.pid) and time.monotonic() < until:
            time.sleep(0.05)  # its processes end, or what they write would be found by the comparison
        if (out / "manifest.json").exists():  # it was faster
            break
    else:
        make_shards(tars, None, out, Options(workers=2 if kills > 1 else 1))
    assert tree(out) == whole
    manifest, counted = load_manifest(out), list[int]()
    assert list(verify(manifest, counted.append, workers=2)) == [] and sum(counted) == manifest.num_samples


@pytest.mark.long
def test_an_interrupt_ends_a_check_and_its_processes(own_shards: Path) -> None:
    """Ctrl-C while shards are decoded."""

    def interrupt(_: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        list(verify(load_manifest(own_shards), interrupt, workers=2))
    assert not multiprocessing.active_children()


def command(source: Path, out: Path, *options: str) -> subprocess.Popen:
    """tools/make_shards.py, with two processes, in a session of its own. Ray starts a cluster of its own."""
    line = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(source), str(out)]
    line += ["--samples-per-shard", "7", "--seed", "3", "--workers", "2", *options]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen(line, env=os.environ | {"RAY_ADDRESS": "local"}, **quiet)


SLOW, LONG = (pytest.mark.slow, pytest.mark.timeout(1500)), (pytest.mark.long, pytest.mark.timeout(6000))
WAYS = {"pool": [()], "parts": [("--part", f"{part}/3") for part in range(3)], "ray": [("--engine", "ray")]}


@pytest.mark.parametrize(
    "kills, way", [pytest.param(1, "pool", marks=SLOW), *(pytest.param(20, way, marks=LONG) for way in WAYS)]
)
def test_killed_at_any_moment(kills: int, way: str, tmp_path: Path) -> None:
    """kill -9 of the command, or of it and its processes, while it makes shards: the bytes of an undisturbed build.

    With processes of this machine, as elements of an array, and with Ray.
    """
    if way == "ray":
        pytest.importorskip("ray", reason="ray is not installed")
    root, out = photos(tmp_path / "photos", 40 * kills, side=90), tmp_path / "out" / "set"
    make_shards([root], None, tmp_path / "whole" / "set", SMALL)
    moments = random.Random(kills)
    for kill in range(kills):
        process = command(root, out, *WAYS[way][kill % len(WAYS[way])])
        there = len(list(out.glob("*.tar")))
        while process.poll() is None and len(list(out.glob("*.tar"))) == there:
            time.sleep(0.01)  # until it has begun to write, however slow the machine is
        time.sleep(moments.uniform(0, 0.3))
        with suppress(ProcessLookupError):  # it has just ended
            (os.killpg if kill % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        assert out.exists()
    for options in WAYS[way]:
        assert command(root, out, *options).wait() == 0
    for path in out.glob(".tmp-*"):
        os.utime(path, (time.time() - 700,) * 2)  # what is younger may be another node's
    if way == "parts":
        make_shards([root], None, out, SMALL)
    elif left := list(out.glob(".*")):
        assert all(path.name.startswith(".tmp-") for path in left)
        for path in left:
            path.unlink()
    assert tree(out) == tree(tmp_path / "whole" / "set")


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's log has a line every 30 s, with the rate since the one before and the time left."""
    now = [0.0]
    monkeypatch.setattr("pretrain.cli.time.monotonic", lambda: now[0])
    with cli.progress("writing", 100_000, "images") as advance:
        advance(40_000)  # complete already
        for _ in range(70):
            now[0] += 1
            advance(10)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("writing: 40,300 of 100,000 images, 1,343/s") and first.endswith("minutes left")
    assert second == "writing: 40,600 of 100,000 images, 10/s, 99 minutes left"


OF_WRITING = [["--engine", "pool"], ["--seed", "0"], ["--samples-per-shard", "10000"]]
OF_ALL = [*OF_WRITING, ["--classes", "x"], ["--part", "0/2"], ["--shorter-side", "9"], ["--quality", "9"]]
OF_ALL += [["--task", "pets"], ["--index"], ["--apply-orientation"], ["--download"], ["--merge-duplicates"]]
OF_ALL += [["--away-from", "x"], ["--label-column", "x"]]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--part", "4/4"], "--part is '4/4', expected I/N"),
        (["--part", ""], "--part is '', expected I/N"),
        (["--part", "-1/4"], "expected I/N"),
        (["--workers", "0"], "--workers is 0, expected at least 1"),
        (["--workers", "0", "--verify"], "--workers is 0, expected at least 1"),
        (["--shorter-side", "0"], "--shorter-side is 0"),
        (["--shorter-side", "9", "--quality", "101"], "--quality is 101, expected 1 to 100"),
        (["--quality", "90"], "give both"),
        (["--task", "pets", "--workers", "2"], "--workers has no effect with --task"),
        (["--task", "pets", "--part", "0/2"], "--part has no effect with --task"),
        (["--away-from", "x", "--task", "pets"], "--away-from has no effect with --task"),
        (["--merge-duplicates", "--index"], "--merge-duplicates has no effect with --index"),
        (["--apply-orientation", "--task", "pets"], "--apply-orientation has no effect with --task"),
        (["--index", "--task", "pets"], "--index has no effect with --task"),
        *(([*option, "--index"], f"{option[0]} has no effect with --index") for option in OF_WRITING),
        *(
            (option, f"{option[0]} has no effect on in.tar, which is indexed as it is; leave it out")
            for option in OF_WRITING
        ),
        *(([*option, "--verify"], f"{option[0]} has no effect with --verify") for option in OF_ALL),
    ],
)
def test_options_that_cannot_be(options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each."""
    monkeypatch.chdir(tmp_path)
    for name in ("in.tar", "x"):  # what is not there is told first
        Path(name).touch()
    first, *rest = options
    given = [f"{first}={rest[0]}", *rest[1:]] if rest and not rest[0].startswith("--") else options
    monkeypatch.setattr(sys, "argv", ["make_shards.py", "in.tar", "out", *given])
    main = runpy.run_path(str(ROOT / "tools" / "make_shards.py"))["main"]
    assert said in refusal(main)


def test_a_long_list_of_what_was_left_out_ends_no_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 300 million images it is larger than any JSON that is read: the command line takes number and first line from
    the build."""

    class TooLarge(Fields):
        @classmethod
        def read(cls, path: Path, **limits: int) -> Fields:
            raise UserError(f"{path}: holds more than 3,145,728 values")

    monkeypatch.setattr(build_module, "Fields", TooLarge)
    out = tmp_path / "set"
    monkeypatch.setattr(sys, "argv", ["make_shards.py", str(photos(tmp_path / "in", 8)), str(out), "--workers=1"])
    runpy.run_path(str(ROOT / "tools" / "make_shards.py"))["main"]()
    said = capsys.readouterr().err
    assert f"warning: 1 images left out, {out}/provenance.json names them; the first: " in said and "broken.jpg" in said


def test_tars_that_are_shards_have_no_parts(tmp_path: Path) -> None:
    """What would have no effect is refused."""
    (tmp_path / "a.tar").write_bytes(b"")
    assert "--part has no effect" in refusal(make_part, [tmp_path / "a.tar"], None, tmp_path / "o", (0, 2), SMALL)
    smaller = replace(SMALL, resizing=Resizing(5, 90))
    assert "--shorter-side has no" in refusal(make_shards, [tmp_path / "a.tar"], None, tmp_path / "o", smaller)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_links_are_found_among_packed_names(tmp_path: Path) -> None:
    """The first in order stays, as with an object for each; what comes behind keeps its place."""
    root = photos(tmp_path / "photos", 9)
    (root / "a" / "00.png").symlink_to(root / "a" / "3.png")  # before its file
    told = Told()
    items, _ = folder_items(root, told)
    assert isinstance(items, PackedItems)
    names = [item.source.removeprefix(f"{root}/") for item in items]
    assert "a/00.png" in names and "a/3.png" not in names and len(names) == len(set(names)) == 11
    assert told.passed_over["files reached again by links"] == 1
    assert [items[k].label for k in range(len(items))] == [item.label for item in items] == list(items.labels)


# --- lists, and tars of classes --------------------------------------------------------------------------------------


def stored(folder: Path) -> set[tuple[bytes, int]]:
    """(image, label) of all samples."""
    manifest = load_manifest(folder)
    samples = [read_sample(manifest, index) for index in range(manifest.num_samples)]
    return {(sample.image, int(sample.label)) for sample in samples}


def few(root: Path) -> dict[str, bytes]:
    """Three pictures a/0.png, b/1.png, a/2.png."""
    found = {}
    for number, name in enumerate(("a/0.png", "b/1.png", "a/2.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(root / name)
        found[name] = (root / name).read_bytes()
    return found


@pytest.mark.parametrize(
    "name, text, labels, names",
    [
        ("x.csv", "path,label\na/0.png,dog\nb/1.png,cat\n./a/2.png,dog\n", (1, 0, 1), ("cat", "dog")),
        ("x.csv", '\ufeffid,Label,File_Name\n7,2,a/0.png\n\n8,0,"b/1.png"\n9,02,a/2.png\n', (2, 0, 2), ()),
        (
            "x.jsonl",
            '{"path": "a/0.png", "label": 1}\n{"label": 0, "path": "b/1.png"}\n{"path": "a/2.png", "label": 3}\n',
            (1, 0, 3),
            (),
        ),
    ],
)
def test_lists_of_paths_and_labels(
    name: str, text: str, labels: tuple[int, ...], names: tuple[str, ...], tmp_path: Path
) -> None:
    """Columns by name, in any order; labels are numbers, or names numbered in sorted order."""
    images = few(tmp_path)
    (tmp_path / name).write_text(text)
    make_shards([tmp_path / name], None, tmp_path / "set", SMALL)
    assert stored(tmp_path / "set") == set(zip(images.values(), labels))
    assert load_manifest(tmp_path / "set").class_names == names


@pytest.mark.parametrize(
    "lines, said",
    [
        ("", "lists no images"),
        ("path\n", "line 1: ['path'], expected one column label"),
        ("path,label,class\n", "expected one column label"),
        ("path,label\na/0.png\n", "line 2: has 1 columns"),
        ("path,label\n/etc/passwd,1\n", "is absolute, or has .. in it"),
        ("path,label\na/../../x.png,1\n", "is absolute, or has .. in it"),
        ("path,label\nout/x.png,1\n", "leads out of the list's folder"),
        ("path,label\na,1\n", "'a' is no file"),
        ("path,label\na/9.png,1\n", "line 2: 'a/9.png' is not there"),
        ("path,label\nx.csv,1\n", "is no picture"),
        ("path,label\na/0.png,1\na/0.png,2\n", "is listed already"),
        ("path,label\na/0.png,1\na/link.png,1\n", "'a/link.png' is listed already, as 'a/0.png'"),
        ("path,label\na/0.png,\n", "'' is no label"),
        ("path,label\na/0.png,9999999\n", "label 9999999 is not one of"),
        ('path,label\n"a/0.png,1\n', "line 2: is no line of CSV"),
        ("path,label\n" + "a" * 70_000 + ",1\n", "line 2: more than 65536 bytes"),
        ("path,label\n" + "a" * 5000 + ",1\n", "is not there"),
        ("path,label\na/\0.png,1\n", "is no path"),
    ],
)
def test_lists_that_cannot_be_used(lines: str, said: str, tmp_path: Path) -> None:
    """One line, with the place in the list; nothing outside its folder is read."""
    few(tmp_path / "in")
    (tmp_path / "x.png").write_bytes(b"x")
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    (tmp_path / "in" / "a" / "link.png").symlink_to("0.png")
    (tmp_path / "in" / "x.csv").write_text(lines)
    message = refusal(make_shards, [tmp_path / "in" / "x.csv"], None, tmp_path / "set", SMALL)
    assert said in message and len(message) < 500 and not list(tmp_path.glob("set/*.tar"))


def test_bytes_and_json_that_are_no_list(tmp_path: Path) -> None:
    """Not UTF-8, and lines of JSON of other types."""
    few(tmp_path)
    for name, data, said in (
        ("x.csv", b"path,label\na/\xff.png,1\n", "line 2: a/"),
        ("x.jsonl", b"[]\n", "line 1: is [], expected an object"),
        ("x.jsonl", b'{"path": "a/0.png", "label": 1.5}\n', "label is 1.5"),
        ("x.jsonl", b'{"path": "a/0.png", "label": -1}\n', "label is -1"),
        ("x.jsonl", b'{"path": ["a/0.png"], "label": 1}\n', "path is ['a/0.png']"),
        ("x.jsonl", b"[" * 60_000 + b"\n", "is nested"),
    ):
        (tmp_path / name).write_bytes(data)
        assert said in refusal(make_shards, [tmp_path / name], None, tmp_path / "set", SMALL)


@pytest.mark.parametrize(
    "labels, stored_as, names",
    [
        ([[3, 0], [5], [1]], [[0, 3], [5], [1]], ()),
        ([["dog", "cat"], ["cat"], ["ox", "dog"]], [[0, 1], [0], [1, 2]], ("cat", "dog", "ox")),
        ([["dog"], ["cat"], ["dog"]], [[1], [0], [1]], ("cat", "dog")),
    ],
)
def test_lists_of_several_labels(labels: Any, stored_as: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    """A list of labels in JSON lines is stored as one, whatever its length, as a tar's own is."""
    images = few(tmp_path)
    lines = (json.dumps({"path": path, "label": own}) for path, own in zip(images, labels))
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    make_shards([tmp_path / "x.jsonl"], None, tmp_path / "set", SMALL)
    manifest = load_manifest(tmp_path / "set")
    assert manifest.multi_label and manifest.class_names == names and manifest.num_classes == (len(names) or 6)
    found = {sample.image: sample.label for sample in map(partial(read_sample, manifest), range(3))}
    assert [json.loads(found[image]) for image in images.values()] == stored_as


def test_several_labels_and_what_changes_them(tmp_path: Path) -> None:
    """--classes gives each label its number there, equal images have all labels of both."""
    images = few(tmp_path)
    (tmp_path / "b" / "3.png").write_bytes(images["b/1.png"])
    labels = {"a/0.png": ["dog"], "b/1.png": ["cat", "dog"], "b/3.png": ["ox"], "a/2.png": ["ox"]}
    lines = (json.dumps({"path": path, "label": own}) for path, own in labels.items())
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    classes = ClassList(("ox", "ant", "dog", "cat"))
    make_shards([tmp_path / "x.jsonl"], classes, tmp_path / "set", replace(SMALL, merge_duplicates=True))
    manifest = load_manifest(tmp_path / "set")
    found = {sample.image: sample.label for sample in map(partial(read_sample, manifest), range(3))}
    assert [json.loads(found[image]) for image in images.values()] == [[2], [0, 2, 3], [0]]
    items, names = listed_items(tmp_path / "x.jsonl")
    assert names == ["cat", "dog", "ox"]
    assert [item.label for item in items.without([0])] == [[0, 1], [2], [2]]  # as --away-from leaves some out


@pytest.mark.parametrize(
    "name, lines, said",
    [
        ("x.jsonl", [[1], 2], "line 2: single labels and lists of labels are mixed; write [label] for a single one"),
        ("x.jsonl", [1, [2]], "line 2: single labels and lists of labels are mixed"),
        ("x.jsonl", [[1], []], "line 2: an image without a label cannot be kept; leave it out"),
        ("x.jsonl", [[1, 2, 1]], "line 1: ['1', '2', '1'] names a class twice"),
        ("x.jsonl", [["1", "01"]], "line 1: ['1', '01'] names a class twice"),
        ("x.jsonl", [[1, [2]]], "line 1: label[1] is [2]"),
        ("x.jsonl", [[1, -2]], "line 1: label[1] is -2"),
        ("x.jsonl", [list(range(1001))], "line 1: has 1001 labels, at most 1000 of an image are read"),
        ("x.csv", "[12]", "line 2: '[12]': a .csv has one label for an image"),
        ("x.csv", '"[1, 2]"', "line 2: '[1, 2]': a .csv has one label for an image; write a .jsonl for several"),
    ],
)
def test_lists_of_labels_that_cannot_be_used(name: str, lines: Any, said: str, tmp_path: Path) -> None:
    """One line, with the place in the list."""
    paths = list(few(tmp_path))
    text = "\n".join(json.dumps({"path": path, "label": own}) for path, own in zip(paths, lines))
    (tmp_path / name).write_text(f"path,label\n{paths[0]},{lines}" if name == "x.csv" else text)
    assert said in refusal(make_shards, [tmp_path / name], None, tmp_path / "set", SMALL)


def test_labels_of_lists_beyond_the_classes(tmp_path: Path) -> None:
    """Also where the first of an image is one."""
    (path, *_) = few(tmp_path)
    (tmp_path / "x.jsonl").write_text(json.dumps({"path": path, "label": [0, 2]}))
    classes = ClassList(("ox", "ant"))
    said = refusal(make_shards, [tmp_path / "x.jsonl"], classes, tmp_path / "set", SMALL)
    assert "label 2 is not one of the 2 classes" in said


def test_a_tar_for_each_class(tmp_path: Path) -> None:
    """As ImageNet-21k comes: classes are the tars' names; with two processes and with names of classes too."""
    images = few(tmp_path / "in")
    root = tmp_path / "tars"
    root.mkdir()
    for name in ("n02", "n01"):
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for number, path in enumerate(images):
                if (number % 2 == 0) == (name == "n02"):
                    tar.add(tmp_path / "in" / path, f"{name}_{number}.png")
            if name == "n01":
                tar.add(__file__, "README")
    _, told = make_shards([root], None, tmp_path / "set", SMALL)
    assert stored(tmp_path / "set") == set(zip(images.values(), (1, 0, 1)))
    assert (
        load_manifest(tmp_path / "set").class_names == ("n01", "n02")
        and told.passed_over["files without an ending"] == 1
    )
    os.truncate(root / "n01.tar", 700)
    assert "n01.tar: not a readable tar" in refusal(make_shards, [root], None, tmp_path / "cut", SMALL)


@pytest.mark.parametrize(
    "members, damage, said",
    [
        (["1.jpg", "2.jpg"], lambda data: data[:1024], "b.tar: ends without the empty block that ends a tar"),
        (["1.jpg", "2.jpg"], lambda data: data[:1024] + bytes(512) + data[1536:], "b.tar: no tar header at byte 1024"),
        (["1.jpg", "1.cls"], lambda data: data, "b.tar: 1.cls holds labels (.cls): these are WebDataset shards; give"),
        ([], lambda data: b"", "b.tar: ends without"),
    ],
    ids=["cut between members", "a header lost", "shards", "empty"],
)
def test_tars_that_are_no_classes(members: list[str], damage: Any, said: str, tmp_path: Path) -> None:
    """What would lose images without a word, or take shards for classes."""
    for name, names, change in (("a", ["0.jpg"], lambda data: data), ("b", members, damage)):
        path = tmp_path / "tars" / f"{name}.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for member in names:
                info = tarfile.TarInfo(member)
                info.size = 1
                tar.addfile(info, io.BytesIO(b"1"))
        path.write_bytes(change(path.read_bytes()))
    assert said in refusal(make_shards, [tmp_path / "tars"], None, tmp_path / "set", SMALL)
    (tmp_path / "tars" / "b.tar").unlink()
    message = refusal(make_shards, [tmp_path / "tars"], None, tmp_path / "set", SMALL)
    assert "tars: holds a single tar, which makes a single class" in message and "a.tar" in message
    assert not list(tmp_path.glob("set/*.tar"))


# --- smaller images --------------------------------------------------------------------------------------------------


def idx(path: Path, array: np.ndarray, dimensions: int | None = None) -> Path:
    """An array as MNIST's archives hold it."""
    shape = array.shape if dimensions is None else array.shape[:1] * dimensions
    data = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


DIGITS = np.random.default_rng(0).integers(0, 256, (11, 28, 28)).astype(np.uint8)
OF_DIGITS = np.arange(11, dtype=np.uint8) % 10


@pytest.mark.parametrize("given", ["images", "both", "labels first"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_archives_of_mnist(given: str, ending: str, tmp_path: Path) -> None:
    """Grey PNG of 28 x 28, every pixel and label as it was; the labels' file is found by its name."""
    images = idx(tmp_path / f"train-images-idx3-ubyte{ending}", DIGITS)
    labels = idx(tmp_path / "train-labels-idx1-ubyte.gz", OF_DIGITS)
    sources = {"images": [images], "both": [images, labels], "labels first": [labels, images]}[given]
    manifest = load_manifest(make_shards(sources, None, tmp_path / "set", SMALL)[0])
    assert manifest.num_classes == 10
    raw = [read_sample(manifest, index) for index in range(manifest.num_samples)]
    found = {(decode(sample.image)[0].numpy().tobytes(), int(sample.label)) for sample in raw}
    assert found == {(digit.tobytes(), int(label)) for digit, label in zip(DIGITS, OF_DIGITS)}
    with Image.open(io.BytesIO(raw[0].image)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda images, labels: labels.unlink(), "images-idx3-ubyte: its labels are not beside it; give their file"),
        (lambda images, labels: idx(labels, OF_DIGITS[:9]), "has 9 labels, .* has 11 images"),
        (lambda images, labels: os.truncate(images, 900), "11 x 28 x 28 are 8,624 bytes, it has 884; get it again"),
        (lambda images, labels: images.write_bytes(images.read_bytes() + b"x"), "8,624 bytes, it has more"),
        (
            lambda images, labels: labels.write_bytes(b"junk"),
            "idx1-ubyte: begins with 6a 75 6e 6b, expected 00 00 08 01",
        ),
        (lambda images, labels: labels.write_bytes(b"\x1f\x8bjunk"), "labels-idx1-ubyte: not a readable idx file"),
        (lambda images, labels: idx(images, DIGITS[:0]), "has no samples|has 11 labels"),
        (
            lambda images, labels: images.write_bytes(b"\0\0\x08\3" + b"\xff" * 12),
            r"images-idx3-ubyte: becomes 79,228,[\d,]+ bytes or more, at most 67,108,864",
        ),
    ],
)
def test_archives_of_mnist_that_cannot_be(change: Any, said: str, tmp_path: Path) -> None:
    """One line, and nothing is written."""
    images = idx(tmp_path / "train-images-idx3-ubyte", DIGITS)
    change(images, idx(tmp_path / "train-labels-idx1-ubyte", OF_DIGITS))
    assert re.search(said, refusal(make_shards, [images], None, tmp_path / "set", SMALL))
    assert not (tmp_path / "set").exists()


def test_the_documented_source_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/data.md's function and row, as they stand there."""
    page = (ROOT / "docs" / "data.md").read_text().partition("### Adding a source")[2].partition("\n## ")[0]
    function, row = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = dict(vars(make))
    exec(function, names)
    monkeypatch.setattr(make, "SOURCES", (eval(row, names), *make.SOURCES))
    with closing(sqlite3.connect(tmp_path / "my.sqlite")) as base, base:
        base.execute("CREATE TABLE photos (image BLOB, label INTEGER)")
        base.executemany("INSERT INTO photos VALUES (?, ?)", [(PNG + bytes([n]), n % 3) for n in range(9)])
    manifest = load_manifest(make_shards([tmp_path / "my.sqlite"], None, tmp_path / "set", SMALL)[0])
    raw = [read_sample(manifest, index) for index in range(manifest.num_samples)]
    assert {(sample.image, sample.label) for sample in raw} == {(PNG + bytes([n]), b"%d" % (n % 3)) for n in range(9)}


def test_larger_images_are_made_smaller(tmp_path: Path) -> None:
    """Only those; the shorter side is as asked, the pixels near Pillow's of the whole picture; provenance says it."""
    root = tmp_path / "photos" / "a"
    root.mkdir(parents=True)
    smooth = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
    Image.fromarray(smooth).save(root / "large.png")
    Image.fromarray(smooth.transpose(1, 0, 2)[:, :20]).save(root / "small.jpg")
    options = Options(resizing=Resizing(20, 95))
    _, told = make_shards([tmp_path / "photos"], None, tmp_path / "set", options)
    manifest = load_manifest(tmp_path / "set")
    found = {decode(data).shape: data for data in (read_sample(manifest, index).image for index in range(2))}
    assert set(found) == {(3, 20, 30), (3, 90, 20)}
    assert found[(3, 90, 20)] == (root / "small.jpg").read_bytes()
    whole = np.asarray(Image.fromarray(smooth).resize((30, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(decode(found[(3, 20, 30)]).numpy().astype(int) - whole).mean() < 3
    values = json.loads((tmp_path / "set" / "provenance.json").read_text())
    assert values["resized"] == {"shorter_side": 20, "quality": 95, "num_images": 1} and values["dropped"] == []
    assert sum(told.notes.values()) == 1

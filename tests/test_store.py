"""The store of remote blocks: a run over the network sees what a local run sees, whatever fails or is killed."""

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from pretrain.audit.checks import audit
from pretrain.audit.folder import Options
from pretrain.data import manifest as manifest_module
from pretrain.data import remote, store
from pretrain.data.manifest import Manifest, load_manifest
from pretrain.data.reader import BadSample, block_of, read_sample
from pretrain.data.store import Block, Store, default_folder, make_folder, store_at
from pretrain.errors import StorageError, UserError
from pretrain.shards.elsewhere import index_urls
from pretrain.train.run import train
from tests.ranks import run_ranks
from tests.tiny import make_shards, tiny_config
from tests.web import FAULTS, Site, at_random, s3_server, served

PASSING = tuple(kind for kind in FAULTS if kind not in ("bytes", "stall", "silence"))


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are short, and blocks are small: 8 samples."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "MAX_WAIT_S", 0.01)
    monkeypatch.setattr(manifest_module, "MIN_BLOCK_SAMPLES", 8)
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 1)


def remote_set(site: Site, out: Path) -> Manifest:
    """The manifest of a site's shards, made in `out`, with a store beside it."""
    urls = [f"{site.url}/{path.name}" for path in sorted(site.folder.glob("*.tar"))]
    made = load_manifest(index_urls(urls, (), out))
    site.requests.clear()
    site.sent = 0
    return replace(made, store=Store(out.parent / "store", 1 << 30))


@pytest.fixture
def site(shard_folder: Path) -> Iterator[Site]:
    """A server of three shards with 103 images."""
    with served(Site(shard_folder)) as site:
        yield site


@pytest.fixture
def far(site: Site, tmp_path: Path) -> Manifest:
    """Those shards as a remote set."""
    return remote_set(site, tmp_path / "trees")


def blocks_of(manifest: Manifest) -> list[Block]:
    """All blocks of a remote set."""
    found = [block_of(manifest, index) for index in range(manifest.num_samples)]
    return [block for block in dict.fromkeys(found) if block]


def source_of(site: Site, block: Block) -> bytes:
    """What a block must hold."""
    return (site.folder / block.url.rpartition("/")[2]).read_bytes()[block.start : block.end]


def stored(manifest: Manifest) -> dict[str, bytes]:
    """The files of its store."""
    assert manifest.store
    found = {}
    for path in manifest.store.folder.glob("*"):  # the folder itself is made with the first block
        with suppress(FileNotFoundError):  # finished or removed meanwhile
            found |= {} if path.name.startswith(".") else {path.name: path.read_bytes()}
    return found


def test_every_sample_is_the_local_one(site: Site, far: Manifest, manifest: Manifest) -> None:
    """In any order, with a fifth of the answers failing; each block is asked for once, in a second pass none."""
    site.fault = at_random(0.3, PASSING, seed=1)
    indices = np.random.default_rng(0).permutation(manifest.num_samples).tolist()
    for index in indices:
        assert read_sample(far, index) == read_sample(manifest, index)
    assert site.faults.total() > 1
    blocks = blocks_of(far)
    assert far.block_samples == 8 and len(blocks) == 5 + 5 + 3  # 40 and 80 are multiples of 8
    assert stored(far) == {block.name: source_of(site, block) for block in blocks}
    count = len(site.requests)
    assert [read_sample(far, index) for index in indices] and len(site.requests) == count


def test_a_block_costs_one_look_into_its_index(far: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are read together and kept: three reads for a block, one for a sample, one to open an index."""
    real, reads = os.pread, list[tuple[int, ...]]()
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(arguments) or real(*arguments))
    for index in range(far.num_samples):
        read_sample(far, index)
    assert len(reads) == 3 * 13 + far.num_samples + 3


@pytest.mark.parametrize("row", ["offset", "key", "sample"])
def test_a_damaged_index_is_told(row: str, far: Manifest) -> None:
    """Of the rows of a block, one wrong number: the index is named, and no sample is called bad."""
    path = far.shards[0].path.with_suffix(".idx")
    data = bytearray(path.read_bytes())
    numbers = {"offset": 2, "key": 41 + 2, "sample": 41 + 40 + 2}  # of 40 samples, of which this is the third
    data[data.index(b"\n") + 1 + 4 * numbers[row] + 3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name}: does not fit its shard .payload_crc32"):
        read_sample(far, 2)
    assert read_sample(far, 40)


def test_blocks_go_through_the_manifest_and_end_with_shards(far: Manifest) -> None:
    """A block on the border of two shards is two; together the blocks are the shards, each sample in one."""
    for size in (1, 7, 64):
        odd = replace(far)
        odd.__dict__["block_samples"] = size
        blocks = blocks_of(odd)
        for shard in far.shards:
            own = [block for block in blocks if block.url == shard.url]
            assert own[0].start == 0 and all(a.end == b.start for a, b in zip(own, own[1:]))
        numbers = {index // size for index in range(far.num_samples)}
        assert len(numbers) <= len(blocks) <= len(numbers) + 2


@pytest.mark.parametrize("where", ["store", "cut", "network"])
def test_wrong_bytes_are_never_a_sample(site: Site, far: Manifest, manifest: Manifest, where: str) -> None:
    """A block that rotted or was cut in the store is downloaded anew; wrong bytes from the server are a bad sample."""
    block = blocks_of(far)[0]
    assert far.store
    far.store.ensure(block)
    path = far.store.folder / block.name
    data = bytearray(path.read_bytes())
    if where == "cut":
        path.write_bytes(data[:1000])
    else:
        data[700] ^= 1  # inside the first image, where tar headers say nothing
        path.write_bytes(data)
    if where == "network":
        site.fault = lambda _: "bytes"
        with pytest.raises(BadSample, match="are not those that were indexed") as caught:
            read_sample(far, 0)
        assert caught.value.reason == "tar"
        site.fault = lambda _: ""
        far.store.discard(block)
    assert read_sample(far, 0) == read_sample(manifest, 0)
    assert stored(far)[block.name] == source_of(site, block)


def test_a_changed_shard_is_told(site: Site, far: Manifest) -> None:
    """Another size on the server is an error with the shard's name, not a matter of retries."""
    site.fault = lambda _: "total"
    with pytest.raises(UserError, match="trees-000000.tar: has .* bytes, the manifest says .*; index it again"):
        read_sample(far, 0)


def test_the_store_is_bounded(site: Site, far: Manifest) -> None:
    """The blocks that were used longest ago go first; what is being read stays readable; left-overs go too."""
    blocks = blocks_of(far)
    most = max(block.end - block.start for block in blocks)
    small = replace(far, store=Store(far.path.parent.parent / "small", 4 * most))
    assert small.store
    make_folder(small.store.folder)
    left_over = small.store.folder / f"{blocks[-1].name}.part"
    left_over.write_bytes(bytes(most))
    os.utime(left_over, (1, 1))
    for count, block in enumerate(blocks):
        small.store.ensure(block)
        os.utime(small.store.folder / block.name, (count + 2, count + 2))
        assert sum(map(len, stored(small).values())) <= 4 * most
        assert block.name in stored(small)
    assert not left_over.exists() or blocks[-1].name in stored(small)
    for index in range(small.num_samples):
        read_sample(small, index)


def test_processes_in_step_keep_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 processes begin together, and each downloads a block in turn: they look at the bound at different times."""
    block, shared = 8 << 20, Store(tmp_path, 4 << 30)
    counters, total, most = [dict[Path, int]() for _ in range(64)], 0, 0

    def remove(_: Path, max_bytes: int) -> None:
        nonlocal total
        total = total if total <= max_bytes else int(max_bytes * store._KEPT)

    monkeypatch.setattr(store, "remove_oldest", remove)
    monkeypatch.setattr(store, "_random", random.Random(0))
    for turn in range(64 * 40):
        monkeypatch.setattr(store, "_unchecked", counters[turn % 64])
        shared._make_room(block)
        total += block
        most = max(most, total)
    assert 0.9 * shared.max_bytes < most < 1.15 * shared.max_bytes


def test_a_store_that_cannot_be(far: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in its place, a full disk: one line, and the way out. A folder that was removed is made again."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be the store .*data.store"):
        make_folder(tmp_path / "file")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert store_at(None).folder == default_folder() == tmp_path / f"pretrain-store-{os.geteuid()}"

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "write", full)
        with pytest.raises(StorageError, match="No space left on device; lower data.store_gb"):
            read_sample(far, 0)
    assert read_sample(far, 0)


def _reader(far: Manifest, seed: int) -> None:
    """Reads all samples in an order of its own."""
    for index in np.random.default_rng(seed).permutation(far.num_samples).tolist():
        read_sample(far, index)
    os._exit(0)


@pytest.mark.parametrize("kills", [20, pytest.param(300, marks=pytest.mark.long)])
def test_readers_killed_at_random(site: Site, far: Manifest, kills: int) -> None:
    """Four processes share a store and are killed while they download: no byte is wrong, nobody waits for the dead."""
    site.fault, site.latency_s, site.chunk_bytes = at_random(0.1, PASSING), 0.002, 256
    wanted = {block.name: source_of(site, block) for block in blocks_of(far)}
    chance, fork, readers, half_done = random.Random(0), get_context("fork"), [], 0
    for number in range(kills + 4):
        if len(readers) == 4:
            time.sleep(chance.uniform(0, 0.06))
            victim = readers.pop(chance.randrange(4))
            victim.kill()
            victim.join()
            found = stored(far)
            half_done += any(name.endswith(".part") for name in found)
            if found.keys() >= wanted.keys():  # begin anew, while others are reading
                assert {name: found[name] for name in wanted} == wanted
                for name in wanted:
                    (far.store.folder / name).unlink()  # pyright: ignore
        readers.append(fork.Process(target=_reader, args=(far, number)))
        readers[-1].start()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    assert half_done >= kills // 4, "hardly any process was killed while it downloaded"
    assert stored(far) == wanted


@pytest.mark.slow
def test_readers_of_s3_killed_at_random(own_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An S3-compatible server: indexed, then read by processes that are killed while they download."""
    with s3_server(monkeypatch) as client:
        client.create_bucket(Bucket="trees")
        tars = sorted(own_shards.glob("*.tar"))
        for path in tars:
            client.upload_file(str(path), "trees", f"a/{path.name}")
        made = load_manifest(index_urls([f"s3://trees/a/{path.name}" for path in tars], (), tmp_path / "far"))
        far = replace(made, store=Store(tmp_path / "store", 1 << 30))
        wanted = {b.name: (own_shards / b.url.rpartition("/")[2]).read_bytes()[b.start : b.end] for b in blocks_of(far)}
        chance, fork = random.Random(0), get_context("fork")
        for number in range(20):
            victim = fork.Process(target=_reader, args=(far, number))
            victim.start()
            victim.join(chance.uniform(0, 1))
            victim.kill()
            victim.join()
            found = stored(far)
            assert all(found[name] == wanted[name] for name in found.keys() & wanted.keys())
            if found.keys() >= wanted.keys():
                for name in found:
                    (tmp_path / "store" / name).unlink()
        survivor = fork.Process(target=_reader, args=(far, 99))
        survivor.start()
        survivor.join(120)
        assert survivor.exitcode == 0 and stored(far) == wanted


def test_one_download_for_all(site: Site, far: Manifest) -> None:
    """Six processes at once on an empty store: every byte is sent once."""
    site.latency_s = 0.01
    readers = [get_context("fork").Process(target=_reader, args=(far, number)) for number in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    assert site.sent == sum(block.end - block.start for block in blocks_of(far))


def test_only_blocks_are_removed(tmp_path: Path) -> None:
    """A folder that holds other files as well keeps them, whatever the bound."""
    block = tmp_path / f"{'0' * 64}-0-512"
    for path in (tmp_path / "thesis.tex", tmp_path / "train-000.tar", block):
        path.write_bytes(bytes(512))
    store.remove_oldest(tmp_path, 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex", "train-000.tar"]


@pytest.mark.parametrize("kind", ["a link", "open to all", "another user's"])
def test_the_default_folder_is_nobody_elses(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies where everybody may write: what somebody has put in its place is not read, by the tools neither."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = default_folder()
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir(mode=0o700)
    if kind == "open to all":
        folder.chmod(0o777)
    elif kind == "another user's":
        owner = folder.stat().st_uid
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        monkeypatch.setattr(store, "default_folder", lambda: folder)
    store._check_once.cache_clear()
    with pytest.raises(UserError, match="another user could change the blocks"):
        store_at(None).ensure(Block("http://127.0.0.1:1/x.tar", "0" * 64, 1024, 0, 512))


def test_a_link_in_the_store_is_not_followed(site: Site, far: Manifest, tmp_path: Path) -> None:
    """Nothing is appended to the file that it leads to."""
    block, victim = blocks_of(far)[0], tmp_path / "victim"
    victim.write_text("precious")
    assert far.store
    far.store.folder.mkdir(exist_ok=True)
    (far.store.folder / f"{block.name}.part").symlink_to(victim)
    with pytest.raises(StorageError, match="symbolic links"):
        far.store.ensure(block)
    assert victim.read_text() == "precious"


def test_a_block_larger_than_the_store_is_told(far: Manifest) -> None:
    """Before anything is downloaded or removed."""
    block = blocks_of(far)[0]
    small = Store(far.store.folder, block.end - block.start - 1) if far.store else None
    with pytest.raises(UserError, match="does not fit data.store_gb"):
        small.ensure(block)  # pyright: ignore


@pytest.mark.slow
def test_training_over_the_network_is_training_on_the_disk(tmp_path: Path) -> None:
    """The same samples in the same steps, and the same losses; a second run asks nothing of the server."""
    local = make_shards(tmp_path / "squares")
    with served(Site(local)) as site:
        remote_set(site, tmp_path / "remote" / "squares")
        site.fault = at_random(0.2, PASSING)
        far = tiny_config(tmp_path / "remote" / "squares", tmp_path / "far", total_steps=4)  # in the order lanes
        far.data.store = tmp_path / "store"
        run_ranks(train, 1, far)
        sent = site.sent
        run_ranks(train, 1, replace(far, name="again"))
        assert site.sent == sent, "the second run downloaded what the store has"
        found = audit(tmp_path / "far" / "tiny", Options(full=True, data=None, no_data=False, seed=0))
    run_ranks(train, 1, tiny_config(local, tmp_path / "near", total_steps=4, data__order="lanes"))
    assert not any(row.wrong for row in found)
    assert {row.check for row in found if row.left_out} <= {"shards", "scores"}, found
    runs = [tmp_path / "far" / "tiny", tmp_path / "far" / "again", tmp_path / "near" / "tiny"]
    for name in ("samples-00000.jsonl", "metrics.jsonl"):
        texts = [_without_times((run / name).read_text()) for run in runs]
        assert texts[0] == texts[1] == texts[2] and texts[0]


def _without_times(text: str) -> list[dict]:
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key in ("step", "samples", "loss")} for line in lines]

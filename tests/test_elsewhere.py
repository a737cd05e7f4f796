"""Shards that stay on a server: indexed as local ones are, each read once, and every refusal names the shard."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data import remote
from pretrain.data.manifest import Manifest, ShardIndex, check_shards, load_index, load_manifest, write_index
from pretrain.data.reader import read_sample
from pretrain.errors import StorageError, UserError
from pretrain.shards.counts import read_counts
from pretrain.shards.elsewhere import expanded, index_urls, local_names
from pretrain.shards.verify import verify
from tests.web import FAULTS, Site, at_random, served

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are short."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "MAX_WAIT_S", 0.01)


@pytest.fixture
def site(own_shards: Path) -> Iterator[Site]:
    """A server of three shards that a test may damage."""
    with served(Site(own_shards)) as site:
        yield site


def urls_of(site: Site) -> list[str]:
    """Its shards' URLs."""
    return [f"{site.url}/{path.name}" for path in sorted(site.folder.glob("*.tar"))]


def test_a_remote_index_is_the_local_one(site: Site, manifest: Manifest, tmp_path: Path) -> None:
    """Counts, digests, offsets, checksums and classes, with faults on the way; nothing else is left in the folder."""
    site.fault = at_random(0.3, tuple(kind for kind in FAULTS if kind not in ("bytes", "stall", "silence")))
    far = load_manifest(index_urls(urls_of(site), manifest.class_names, tmp_path / "out" / "trees"))
    check_shards(far)
    assert far.is_remote and not manifest.is_remote
    assert (far.name, far.num_classes, far.class_names) == (manifest.name, 5, manifest.class_names)
    for ours, theirs in zip(far.shards, manifest.shards, strict=True):
        assert (ours.num_samples, ours.num_bytes, ours.sha256) == (theirs.num_samples, theirs.num_bytes, theirs.sha256)
        assert ours.url == f"{site.url}/{theirs.path.name}"
        pairs = zip(vars(load_index(ours)).values(), vars(load_index(theirs)).values(), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    names = {"manifest.json", "classes.json", "counts.json", *(f"trees-{number:06d}.idx" for number in range(3))}
    assert {path.name for path in (tmp_path / "out" / "trees").iterdir()} == names
    assert read_counts(tmp_path / "out" / "trees") == read_counts(site.folder)


def test_a_second_start_goes_on(site: Site, tmp_path: Path) -> None:
    """Shards that were done are not read again; one that changed since is."""
    out, urls = tmp_path / "out" / "trees", urls_of(site)
    site.fault = lambda number: "404" if site.requests[-1][0] == "trees-000002.tar" else ""
    with pytest.raises(UserError, match="trees-000002.tar: not found"):
        index_urls(urls, (), out)
    site.fault, site.sent = lambda _: "", 0
    path = index_urls(urls, (), out)
    last = load_manifest(path).shards[-1]
    assert site.sent == last.num_bytes + 3, "a byte of each for its size, and what was missing"


@pytest.mark.parametrize("change", [{"counts": {}}, {"counts": {"-1": 9}}, {"num_samples": 1 << 31}, {"sha256": "0"}])
def test_a_record_that_cannot_be_is_not_believed(site: Site, tmp_path: Path, change: dict[str, Any]) -> None:
    """Of a shard that an earlier start has read: it is read again."""
    out, urls = tmp_path / "out" / "trees", urls_of(site)
    site.fault = lambda number: "404" if site.requests[-1][0] == "trees-000002.tar" else ""
    with pytest.raises(UserError, match="trees-000002.tar: not found"):
        index_urls(urls, (), out)
    site.fault, site.sent = lambda _: "", 0
    record = out / ".indexing" / "trees-000000.tar.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    first, _, last = load_manifest(index_urls(urls, (), out)).shards
    assert site.sent == first.num_bytes + last.num_bytes + 3
    assert read_counts(out)[0] == read_counts(site.folder)[0]


@pytest.mark.parametrize("damage", ["cut", "no tar", "twice", "label"])
def test_a_shard_that_cannot_be_used_is_named(site: Site, tmp_path: Path, damage: str) -> None:
    """By its URL, in one line; no manifest is left."""
    shard = site.folder / "trees-000001.tar"
    data = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(data[: len(data) // 2 // 512 * 512])
    elif damage == "no tar":
        shard.write_bytes(b"x" * 4096)
    elif damage == "twice":
        shard.write_bytes(data.rstrip(b"\0")[: -(-len(data.rstrip(b"\0")) // 512) * 512] + bytes(512) + data)
    else:
        shard.write_bytes(data.replace(b"cls", b"clx"))
    with pytest.raises(UserError) as caught:
        index_urls(urls_of(site), (), tmp_path / "out" / "trees")
    assert f"{site.url}/trees-000001.tar" in str(caught.value) and ".indexing" not in str(caught.value)
    assert not (tmp_path / "out" / "trees" / "manifest.json").exists()


def test_verify_reads_what_lies_there_now(site: Site, tmp_path: Path) -> None:
    """A shard that changed on the server is named; an unreachable one is a matter of time."""
    far = load_manifest(index_urls(urls_of(site), (), tmp_path / "out" / "trees"))
    assert list(verify(far)) == []
    shard = site.folder / "trees-000001.tar"
    shard.write_bytes(bytes(512) + shard.read_bytes()[512:])
    assert list(verify(far)) == [f"{far.shards[1].url}: is not the file that was indexed (SHA-256 differs)"]
    site.fault = lambda _: "503"
    with pytest.raises(StorageError, match="status 503"):
        list(verify(far))


def test_verify_compares_checksums_of_samples(own_shards: Path) -> None:
    """A local index whose checksum is another one; an index of version 1, which has none, is still read."""
    far = load_manifest(own_shards)
    shard, index = far.shards[0], load_index(far.shards[0])
    assert index.sample_crc32 is not None
    sums = index.sample_crc32.copy()
    sums[7] ^= 1
    write_index(shard, ShardIndex(index.offsets, index.key_crc32, sums))
    assert [text.partition(": ")[2] for text in verify(far)] == [
        f"sample 7: {read_sample(far, 7).key}: has another CRC-32 than its index says; index it again"
    ]
    write_index(shard, ShardIndex(index.offsets, index.key_crc32))
    assert b'"version": 1' in shard.path.with_suffix(".idx").read_bytes()
    assert load_index(shard).sample_crc32 is None and list(verify(far)) == []


@pytest.mark.parametrize(
    "patterns, found",
    [
        (["a-{00..02}.tar"], ["a-00.tar", "a-01.tar", "a-02.tar"]),
        (["s3://b/{x,y}/{0..1}.tar"], ["s3://b/x/0.tar", "s3://b/x/1.tar", "s3://b/y/0.tar", "s3://b/y/1.tar"]),
        (["a.tar", "b.tar"], ["a.tar", "b.tar"]),
        (["a-{0..999999999}.tar"], "more than 300,000"),
        (["{0..999}{0..999}.tar"], "more than 300,000"),
        (["a-{0..1.tar"], "is no pattern"),
        (["https://me:secret@h/a-{0..1.tar?secret"], "is no pattern"),
    ],
)
def test_patterns(patterns: list[str], found: list[str] | str) -> None:
    """As webdataset writes them; one that stands for too many is refused before it is expanded."""
    if isinstance(found, list):
        assert expanded(patterns) == found
        return
    with pytest.raises(UserError, match=found) as caught:
        expanded(patterns)
    assert "secret" not in str(caught.value)


def test_local_names() -> None:
    """The last part of a URL where that is enough; shards need a name of their own, and to be no compressed tars."""
    assert local_names(["http://h/a/0.tar", "http://h/a/1.tar"]) == ["0.tar", "1.tar"]
    assert local_names(["http://h/a/0.tar", "http://h/b/0.tar"]) == ["a-0.tar", "b-0.tar"]
    assert local_names(["http://h/a/%30.tar"]) == ["0.tar"]
    for urls, said in ((["http://h/0.tar"] * 2, "given twice"), (["http://h/0.tar.gz"], "compressed")):
        with pytest.raises(UserError, match=said):
            local_names(urls)


@pytest.mark.parametrize(
    "path, said",
    [
        ("file:///etc/0.tar", "is not read"),
        ("pipe:cat 0.tar", "is not read"),
        ("https://me:pw@h/0.tar", "may be a secret"),
        ("https://h/0.tar?sig=pw", "may be a secret"),
        ("https://h/..%2F0.tar", "a path inside the manifest's folder"),
        ("https://h/0.tgz", "ends in .tar"),
    ],
)
def test_what_a_manifest_may_not_name(own_shards: Path, path: str, said: str) -> None:
    """A stranger's manifest runs nothing, reads no local file, leads out of no folder; a secret is not repeated."""
    values = json.loads((own_shards / "manifest.json").read_text())
    values["shards"][0]["path"] = path
    (own_shards / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=said) as caught:
        load_manifest(own_shards)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("kind", ["many pieces", pytest.param("silence", marks=pytest.mark.slow)])
def test_an_interrupt_waits_for_no_download(site: Site, tmp_path: Path, kind: str) -> None:
    """A server that is silent, or sends a shard for minutes: Ctrl-C ends the command, which later goes on."""
    site.fault, site.chunk_bytes = lambda _: kind if kind == "silence" else "", 1
    program = (
        "import sys; from pathlib import Path\n"
        "from pretrain import cli\n"
        "from pretrain.shards.elsewhere import index_urls\n"
        "cli.run(lambda: index_urls(sys.argv[2:], (), Path(sys.argv[1])) and None)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out" / "trees"), *urls_of(site)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while len(site.requests) < (3 if kind == "silence" else 6) and process.poll() is None:
            time.sleep(0.05)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=200)[1]
    assert (process.returncode, told) == (130, "interrupted\n")
    assert time.monotonic() - begun < 20  # else minutes, or 9 tries of 3 s and their waits
    site.fault, site.chunk_bytes = lambda _: "", 0
    assert index_urls(urls_of(site), (), tmp_path / "out" / "trees").exists()
    assert not list((tmp_path / "out" / "trees").glob(".*"))


@pytest.mark.slow
def test_the_command(site: Site, tmp_path: Path) -> None:
    """`--index PATTERN OUT`, then `--verify OUT`; a URL without --index is told of it."""

    def make_shards(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=280)

    url = f"{site.url}/trees-{{000000..000002}}.tar"
    done = make_shards("--index", url, str(tmp_path / "out" / "trees"))
    assert done.returncode == 0 and "103 samples in 3 shards, 5 classes" in done.stdout, done.stderr
    assert make_shards("--verify", str(tmp_path / "out" / "trees")).returncode == 0
    told = make_shards(url, str(tmp_path / "other"))
    assert told.returncode == 2 and "--index" in told.stderr and len(told.stderr.splitlines()) == 1
    shutil.rmtree(tmp_path / "out" / "trees")

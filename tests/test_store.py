"""The store of remote blocks: a run over the network sees what a local run sees, whatever fails or is killed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.data import remote
from pretrain.data.manifest import Manifest, load_manifest
from pretrain.shards.elsewhere import index_urls
from pretrain.train.run import train
from tests.ranks import run_ranks
from tests.tiny import make_shards, tiny_config
from tests.web import Site, served


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are short, and the default store is nobody's."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


def remote_set(site: Site, out: Path) -> Manifest:
    """The manifest of a site's shards, made in `out`."""
    urls = [f"{site.url}/{path.name}" for path in sorted(site.folder.glob("*.tar"))]
    return load_manifest(index_urls(urls, (), out))


@pytest.mark.slow
def test_training_over_the_network_is_training_on_the_disk(tmp_path: Path) -> None:
    """The same samples in the same steps, and the same losses."""
    local = make_shards(tmp_path / "squares")
    with served(Site(local)) as site:
        remote_set(site, tmp_path / "remote" / "squares")
        far = tiny_config(tmp_path / "remote" / "squares", tmp_path / "far", total_steps=4)
        far.data.store = tmp_path / "store"
        run_ranks(train, 1, far)
        sent = site.sent
        run_ranks(train, 1, replace(far, name="again"))
        assert site.sent == sent, "the second run downloaded what the store has"
    run_ranks(train, 1, tiny_config(local, tmp_path / "near", total_steps=4))
    runs = [tmp_path / "far" / "tiny", tmp_path / "far" / "again", tmp_path / "near" / "tiny"]
    for name in ("samples-00000.jsonl", "metrics.jsonl"):
        texts = [_without_times((run / name).read_text()) for run in runs]
        assert texts[0] == texts[1] == texts[2] and texts[0]


def _without_times(text: str) -> list[dict]:
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key in ("step", "samples", "loss")} for line in lines]

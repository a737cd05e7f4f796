"""Remote shards: what is read over the network is what lies there, or the reason is told; nothing is lost silently."""

from pathlib import Path

import pytest

from pretrain.data import remote
from tests.web import Site, every, served


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are short: it is their order that matters here."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "SILENCE_S", 0.5)


def read(url: str, start: int, end: int, num_bytes: int) -> bytes:
    pieces = bytearray()
    remote.download(url, start, end, num_bytes, pieces.extend)
    return bytes(pieces)


def test_a_range(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    (tmp_path / "a.tar").write_bytes(data)
    with served(Site(tmp_path, every(2, "half-way"))) as site:
        assert read(f"{site.url}/a.tar", 5, 900_000, len(data)) == data[5:900_000]

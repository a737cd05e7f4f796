"""The picture of the first batch: what stands below each image, and that the report cuts out the right ones."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain import log as log_module
from pretrain.data.loader import Batch, single_labels
from pretrain.log import RunLog
from pretrain.report.batch import MAX_SHOWN, read_batch
from pretrain.train import first_batch
from pretrain.train.first_batch import MAX_IMAGES, MAX_LETTERS, caption, show_first_batch

NAMES = ("cat", "dog", "newt\n\x1b[31m", "x" * 300)


@pytest.mark.parametrize(
    ("labels", "weights", "text"),
    [
        ([0], [1.0], "cat"),
        ([1, 0], [0.7, 0.3], "70% dog, 30% cat"),  # mixup, CutMix
        ([1, 1], [0.7, 0.3], "dog"),
        ([0, 1, -1], [1.0, 1.0, 0.0], "cat, dog"),  # several labels of one image
        ([0, -1, 1, 0], [0.75, 0.0, 0.25, 0.25], "100% cat, 25% dog"),  # of two such images, mixed
        ([2], [1.0], "newt\\n\\x1b[31m"),
        ([9], [1.0], "9"),
        ([-1], [0.0], ""),
        ([3], [1.0], "x" * (MAX_LETTERS - 1) + "…"),
    ],
)
def test_what_stands_below_an_image(labels: list[int], weights: list[float], text: str) -> None:
    """Names, shares of mixed images, numbers of classes without a name; nothing that a terminal obeys."""
    assert caption(torch.tensor(labels), torch.tensor(weights), NAMES) == text


@pytest.mark.parametrize(("size", "count"), [(20, 70), (160, 9), (300, 1)])
def test_the_report_cuts_out_what_was_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, count: int
) -> None:
    """Images smaller and larger than they are drawn, full rows and part of one: each has its colour and its class."""
    monkeypatch.setattr(log_module, "_board", lambda folder, step: None)
    colors = torch.tensor([[3 * n, 255 - 3 * n, 90] for n in range(count)], dtype=torch.uint8)
    images = colors[:, :, None, None].expand(-1, -1, size, size)
    labels, weights = single_labels(torch.arange(count))
    none = torch.zeros(count, dtype=torch.int64)
    valid = torch.arange(count) != 5
    names = [f"class {n}" for n in range(count)]
    index = torch.arange(count)
    fill_up = (torch.cat([given, given[:1]]) for given in (images, labels, weights, valid, none, index))
    batch = Batch(*fill_up, bad=[])
    batch.index[-1], batch.valid[-1] = -1, False  # of no sample: fills the micro-batch up
    show_first_batch(batch, names, RunLog(tmp_path, 0, 1))
    written = json.loads((tmp_path / "batch.json").read_text())
    assert len(written["images"]) == min(count, MAX_IMAGES)
    found = read_batch(tmp_path)
    assert len(found) == min(count, MAX_SHOWN)
    for number, example in enumerate(found):
        assert example.caption == ("(could not be used)" if number == 5 else f"class {number}")
        data = base64.b64decode(example.picture.data_uri.partition(",")[2])
        pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=int)
        assert min(pixels.shape[:2]) >= 128 and abs(pixels - colors[number].numpy()).max() <= 4


def test_a_picture_that_cannot_be_drawn_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine without the font, say: one line."""

    def no_font() -> None:
        raise OSError("cannot open resource")

    monkeypatch.setattr(log_module, "_board", lambda folder, step: None)
    monkeypatch.setattr(first_batch, "_font", no_font)
    labels, weights = single_labels(torch.zeros(1, dtype=torch.int64))
    none, images = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    show_first_batch(Batch(images, labels, weights, none == 0, none, none, bad=[]), NAMES, RunLog(tmp_path, 0, 1))
    assert "cannot open resource; the training goes on without it" in capsys.readouterr().err
    assert not list(tmp_path.glob("batch.*"))

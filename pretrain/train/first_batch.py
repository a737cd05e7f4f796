"""The first batch as a picture: what augmentation makes of the images, each above its classes.

`batch.png` is for TensorBoard and for people who open the folder; `batch.json` gives each image's position and caption
to the report, which sets text in the reader's font.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pretrain.cluster import ranks
from pretrain.data.loader import Batch
from pretrain.escape import shown
from pretrain.log import RunLog, warn

COLUMNS, MAX_IMAGES = 8, 64
_LEAST, _MOST = 128, 256  # side of a drawn image in pixels: a few letters fit below, and a page shows it whole
_GAP, _TEXT_HEIGHT, _FONT_SIZE = 6, 20, 13
MAX_LETTERS = 100  # of a caption: anyone may have named the classes


def show_first_batch(batch: Batch, class_names: Sequence[str], log: RunLog) -> None:
    """Writes the picture of a batch, on rank 0. A failure, such as a missing font, is only a warning."""
    if not ranks.is_main():
        return
    slots = torch.nonzero(batch.index >= 0).flatten()[:MAX_IMAGES].tolist()  # the others only pad a micro-batch
    try:
        captions = [
            caption(batch.labels[n], batch.label_weights[n], class_names) if batch.valid[n] else "(could not be used)"
            for n in slots
        ]
        picture, places, side = _drawn(batch.images[slots], captions)
        images = [{"x": x, "y": y, "caption": text} for (x, y), text in zip(places, captions)]
        log.image("batch", picture, {"format": "pretrain-batch", "version": 1, "side": side, "images": images})
    except Exception as error:
        warn(f"batch.png: {error}; the training goes on without it")


def caption(labels: torch.Tensor, weights: torch.Tensor, class_names: Sequence[str]) -> str:
    """Returns the names of an image's classes, labels int64 [L]; with their shares if it is mixed from two images."""
    shares: dict[str, float] = {}
    for label, weight in zip(labels.tolist(), weights.tolist()):
        if label >= 0 and weight > 0:
            name: str = class_names[int(label)] if label < len(class_names) else str(label)
            shares[name] = shares.get(name, 0) + weight
    is_mixed = any(share < 0.999 for share in shares.values())
    text = ", ".join(f"{share:.0%} {name}" if is_mixed else name for name, share in shares.items())
    return shown(text if len(text) <= MAX_LETTERS else f"{text[: MAX_LETTERS - 1]}…")


def _drawn(images: torch.Tensor, captions: Sequence[str]) -> tuple[torch.Tensor, list[tuple[int, int]], int]:
    """Draws images, uint8 [n, 3, S, S]; returns uint8 [3, height, width], the images' places in it, and their side."""
    size = images.shape[-1]
    side = size * -(-_LEAST // size) if size < _LEAST else min(size, _MOST)  # pixels stay squares
    across, down = side + _GAP, side + _TEXT_HEIGHT + _GAP
    places = [(_GAP + n % COLUMNS * across, _GAP + n // COLUMNS * down) for n in range(len(captions))]
    width, height = max(x for x, _ in places) + across, max(y for _, y in places) + down
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), _font()
    for image, (x, y), text in zip(images, places, captions):
        tile = Image.fromarray(image.permute(1, 2, 0).numpy())
        kind = Image.Resampling.NEAREST if side > size else Image.Resampling.LANCZOS
        canvas.paste(tile if side == size else tile.resize((side, side), kind), (x, y))
        draw.text((x, y + side + 2), _fitting(text, font, side), "black", font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1), places, side


def _font() -> Any:
    """matplotlib's own font, which has the letters of most alphabets."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _fitting(text: str, font: Any, width: int) -> str:
    """Cuts a text to `width` pixels."""
    text = text[:width]  # no letter is narrower than a pixel
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"

"""The first batch of a run, image by image: cut out of batch.png as batch.json describes it (train/first_batch.py)."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.log import warn
from pretrain.report.files import Picture, embedded, image_file, inside

MAX_SHOWN = 32  # of the 64 in the file: as many as a reader looks at
_MAX_SIDE = 1024  # pixels of an image
_QUALITY = 90  # of JPEG: as PNG, photos would add megabytes to the page


@dataclass(frozen=True)
class Example:
    """An image as the training sees it, and its classes."""

    picture: Picture
    caption: str


def read_batch(folder: Path) -> list[Example]:
    """Returns the first images of the batch; none where the folder has no picture of it, or no usable captions."""
    record, path = inside(folder, "batch.json"), inside(folder, "batch.png")
    if record is None or path is None or (image := image_file(path)) is None:
        return []
    try:
        values = Fields.read(record)
        side = values.integer("side", 1, _MAX_SIDE)
        return [_example(image, of, side) for of in values.parts("images")[:MAX_SHOWN]]
    except OSError as error:
        warn(f"{record}: cannot be read ({error.strerror}); its picture is shown without captions")
    except UserError as error:
        warn(f"{error}; its picture is shown without captions")
    return []


def _example(image: Image.Image, of: Fields, side: int) -> Example:
    x, y = of.integer("x", 0, image.width - side), of.integer("y", 0, image.height - side)
    own, file = image.crop((x, y, x + side, y + side)).convert("RGB"), io.BytesIO()
    own.save(file, "jpeg", quality=_QUALITY, subsampling=0)
    return Example(embedded("example", file.getvalue(), own), of.text("caption"))

"""Reads files of an untrusted folder: only those inside it, within size limits; pictures that can be shown."""

import base64
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pretrain.config.reading import MAX_BYTES as MAX_TEXT_BYTES
from pretrain.data import headers
from pretrain.errors import UserError
from pretrain.json_files import Fields
from pretrain.log import warn

MAX_LOG_BYTES, MAX_LINE_BYTES = 512 << 20, 1 << 20  # a million lines of 20 metrics; the rest is not read
MAX_PICTURE_BYTES, MAX_PIXELS = 32 << 20, 50_000_000  # ours have at most 4096 pixels a side


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG that can be shown."""

    name: str  # of its file, without the ending
    data_uri: str
    width: int  # pixels
    height: int


def inside(folder: Path, name: str) -> Path | None:
    """Returns the path of a file in the folder, None where there is none.

    Warns of a link that leads out of the folder, and does not follow it: a page must not leak other files.
    """
    path = folder / name
    try:
        real = path.resolve()
        if not real.is_file():
            return None
        if real.is_relative_to(folder.resolve()):
            return path
    except (OSError, RuntimeError, ValueError):  # links in a circle; a name with a zero byte
        return None
    warn(f"{path}: leads out of {folder}; left out")
    return None


def read_text(folder: Path, name: str) -> str | None:
    """Returns the content of a small text file; None where there is none or, with a warning, it cannot be used."""
    if (path := inside(folder, name)) is None or (content := _content(path, MAX_TEXT_BYTES)) is None:
        return None
    return content.decode(errors="replace")


def _content(path: Path, max_bytes: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        return warn(f"{path}: cannot be read ({error.strerror}); left out")
    if len(content) > max_bytes:
        return warn(f"{path}: has more than {max_bytes:,} bytes; left out")
    return content


def lines(folder: Path, name: str, use: Callable[[Fields], Any]) -> Iterator[Any]:
    """Yields the result of `use` for each line of a log; nothing where there is no file.

    Lines for which it raises UserError are left out, and a warning says how many: the last line of a running or killed
    run may be incomplete.
    """
    if (path := inside(folder, name)) is None:
        return
    damaged = 0
    with path.open("rb") as file:  # line by line: bad_samples.jsonl of a large run has millions
        while file.tell() < MAX_LOG_BYTES and (line := file.readline(MAX_LINE_BYTES)):
            try:
                found = use(Fields.parse(line, "line"))
            except UserError:
                damaged += 1
                continue
            yield found
        if file.read(1):
            warn(f"{path}: what comes after its first {MAX_LOG_BYTES:,} bytes is left out")
    if damaged:
        warn(f"{path}: {damaged} damaged lines left out")


def picture_file(name: str, path: Path) -> Picture | None:
    content = _content(path, MAX_PICTURE_BYTES)
    return None if content is None else picture(name, content, str(path))


def image_file(path: Path) -> Image.Image | None:
    """Returns the decoded image of a file; warns and returns None when `picture` would not show it."""
    content = _content(path, MAX_PICTURE_BYTES)
    return None if content is None else _decoded(content, str(path))


def picture(name: str, content: bytes, source: str) -> Picture | None:
    """Returns bytes as a picture; warns and returns None when they are not a PNG or JPEG, or too large."""
    image = _decoded(content, source)
    return None if image is None else embedded(name, content, image)


def embedded(name: str, content: bytes, image: Image.Image) -> Picture:
    """Returns a PNG or JPEG as part of a page; `image` is what it decodes to."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return Picture(name, f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *image.size)


def _decoded(content: bytes, source: str) -> Image.Image | None:
    if len(content) > MAX_PICTURE_BYTES:
        return warn(f"{source}: has more than {MAX_PICTURE_BYTES:,} bytes; left out")
    try:
        headers.check_parts(content)
        coefficients = headers.jpeg_header(content).coefficients if content.startswith(b"\xff\xd8") else 0
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
                if math.prod(image.size) > MAX_PIXELS:
                    return warn(f"{source}: has more than {MAX_PIXELS:,} pixels; left out")
                if image.format == "JPEG":
                    headers.check_memory(*image.size, headers.PILLOW["JPEG"] + coefficients, content)
                image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files: struct.error, IndexError, TypeError ...
        return warn(f"{source}: not a picture that can be shown ({' '.join(str(error).split())}); left out")
    return image

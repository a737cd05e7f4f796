"""Checks the header of an image file against limits of memory and time, before the image is decoded.

They keep a worker process within 300 MB and an image within 2 seconds: a few kilobytes can claim to be gigabytes.
"""

import re
from typing import NamedTuple

from pretrain.data.reader import BadSample

MAX_PIXELS = 50_000_000  # width x height of any image: enough for photos of cameras and phones
MAX_DECODE_BYTES = 270_000_000  # of memory to decode one image, its file included; of 300 MB, 30 are left to resize it
MAX_ASPECT = 100  # longer / shorter side
MAX_SCANS = 20  # of a JPEG; each is a pass over the image, 50 ms for the largest. Usual: 1, or 10 (progressive)
MAX_PARTS = 50_000  # segments and stray bytes before a JPEG's first scan; chunks of PNG and WebP
MAX_HEADER_BYTES = 16 << 20  # before a JPEG's first scan: Pillow joins EXIF segments in quadratic time
MAX_PROFILES = 100  # colour profiles in a PNG, each of which Pillow unpacks to up to 1 MB

# A decoder's peak memory in bytes per pixel, including the result's 3.
TORCHVISION_JPEG = 3  # row by row
PILLOW = {"JPEG": 7, "PNG": 7, "WEBP": 18}  # with Pillow's own image, up to 4, and WebP's canvas and copies

_PNG = b"\x89PNG\r\n\x1a\n"
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # within a scan, FF 00 and FF D0-D7 are data
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_HUFFMAN = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_SOS, _EOI = 0xDA, 0xD9
_ALONE = {0x00, 0x01, *range(0xD0, 0xD9)}  # markers without a segment


def check_size(width: int, height: int) -> None:
    """Raises BadSample("decode") for an image with too many pixels or too large an aspect ratio."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(
            "decode", f"{width} x {height} pixels: no picture, and gigabytes once its shorter side is resized"
        )
    if width * height > MAX_PIXELS:
        raise BadSample("decode", f"{width} x {height} pixels, at most {MAX_PIXELS:,} in all")


def check_memory(width: int, height: int, bytes_per_pixel: float, data: bytes) -> None:
    """Raises BadSample("decode") when an image takes more than MAX_DECODE_BYTES to decode.

    The file is counted three times: the sample's, the decoder's and the file object's.
    """
    needed = width * height * bytes_per_pixel + 3 * len(data)
    if needed > MAX_DECODE_BYTES:
        raise BadSample(
            "decode",
            f"{width} x {height} pixels take {needed / 1e6:.0f} MB to decode in this format, at most "
            f"{MAX_DECODE_BYTES / 1e6:.0f}; store it smaller, or as a baseline JPEG",
        )


def check_parts(data: bytes) -> None:
    """Raises BadSample("decode") for a PNG or WebP with too many chunks: Pillow takes microseconds for each.

    Bytes behind the image's end, such as zero padding, are not counted: no decoder looks at them.
    """
    end = len(data)
    if data.startswith(_PNG):
        at, head, order = len(_PNG), 12, "big"  # length, kind, content, checksum
        if data.count(b"iCCP") > MAX_PROFILES:
            raise BadSample("decode", f"PNG with more than {MAX_PROFILES} colour profiles")
    elif data.startswith(b"RIFF"):
        at, head, order = 12, 8, "little"  # kind, length, content
        end = min(end, 8 + int.from_bytes(data[4:8], order))
    else:
        return
    for _ in range(MAX_PARTS):
        if at >= end or (order == "big" and data[at + 4 : at + 8] == b"IEND"):
            return
        start = at if order == "big" else at + 4
        length = int.from_bytes(data[start : start + 4], order)
        at += head + length + (length % 2 if order == "little" else 0)
    raise BadSample("decode", f"more than {MAX_PARTS} chunks")


class JpegHeader(NamedTuple):
    """What must be known of a JPEG before it is decoded."""

    coefficients: float  # bytes per pixel that a decoder keeps between scans; 0: one scan holds the whole image
    size: tuple[int, int] | None = None  # width, height of a plain gray or colour image; None: ask Pillow


def jpeg_header(data: bytes) -> JpegHeader:
    """Reads a JPEG's header; the result is empty where it cannot be read, since the decoder reports what is wrong.

    Raises BadSample("decode") for too many scans, or too much data before the first.
    """
    frame, first_scan = _frame_and_scan(data)
    if not frame or first_scan + 4 >= len(data) or len(data) < frame + 10:
        return JpegHeader(0)
    components = data[frame + 9]
    if len(data) < frame + 10 + 3 * components:
        return JpegHeader(0)
    height, width = data[frame + 5] << 8 | data[frame + 6], data[frame + 7] << 8 | data[frame + 8]
    is_plain = components in (1, 3) and data[frame + 4] == 8 and width and height and data[frame + 1] in _HUFFMAN
    size = (width, height) if is_plain else None
    return JpegHeader(_coefficients(data, frame, first_scan), size)


def _coefficients(data: bytes, frame: int, first_scan: int) -> float:
    components = data[frame + 9]
    progressive = data[frame + 1] & 0x03 == 2
    if data[first_scan + 4] == components and not progressive:
        return 0
    _check_scans(data, first_scan)
    factors = [(data[at] >> 4, data[at] & 15) for at in range(frame + 11, frame + 10 + 3 * components, 3)]
    largest = max((h for h, _ in factors), default=0) * max((v for _, v in factors), default=0)
    return 2 * sum(h * v for h, v in factors) / max(1, largest)  # int16 for each value of each component


def _frame_and_scan(data: bytes) -> tuple[int, int]:
    """Returns the positions of the frame marker (0: none) and of the first scan or end marker, or the data's end."""
    frame, at, parts, size = 0, 2, 0, len(data)
    while at + 3 < size:
        parts += 1
        if parts > MAX_PARTS or at > MAX_HEADER_BYTES:
            raise BadSample(
                "decode",
                f"JPEG with more than {MAX_PARTS} segments or {MAX_HEADER_BYTES >> 20} MB before its first scan",
            )
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:
            at += 1  # stray and fill bytes, skipped one by one as Pillow does
        elif marker == _SOS or marker == _EOI:
            break
        elif marker in _ALONE:
            at += 2
        else:
            if marker in _FRAMES:
                frame = at
            at += 2 + max(2, data[at + 2] << 8 | data[at + 3])
    return frame, at


def _check_scans(data: bytes, at: int) -> None:
    """Raises BadSample for more than MAX_SCANS scans; the first begins at `at`."""
    scans = 0
    while (match := _NEXT_MARKER.search(data, at)) is not None and data[match.start() + 1] != _EOI:
        marker, at = data[match.start() + 1], match.start() + 2
        if marker in _ALONE:
            continue
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
        scans += marker == _SOS
        if scans > MAX_SCANS:
            raise BadSample("decode", f"JPEG with more than {MAX_SCANS} scans")

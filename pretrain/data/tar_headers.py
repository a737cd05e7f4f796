"""Walks the members of a tar, comparing each header's claims with limits before they are followed.

tarfile follows a negative size backwards for ever, and searches extended headers by patterns that can take hours. So
indexing and archive reading use this module instead, and a sample is checked here before webdataset gives it to
tarfile. Within the limits both read a tar in the same way.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: every header has one, and data is filled up to a multiple of it
MAX_EXTENDED_BYTES = 64 << 10  # of one extended header, a long name or PAX records: attributes of a file have 64 kB
MAX_EXTENDED_HEADERS = 8  # before one member: tarfile recurses for each; one or two are usual
MAX_NAME_BYTES = 4096  # PATH_MAX of Linux; webdataset's pattern takes quadratic time
MAX_DIGITS = 255  # in a row in PAX records, as a file's name may have; tarfile's pattern takes quadratic time
# Of a sample, which each epoch reads again: one at the limits takes about 0.5 s, 2 s where names are full of slashes.
MAX_SAMPLE_HEADERS = 10_000  # with the folders and skipped files between samples
MAX_SAMPLE_MEMBERS = 1000  # without folders and skipped files; also the limit of extended headers
MAX_SAMPLE_EXTENDED_BYTES = 32 << 10  # of all its extended headers together

_LONG_NAME, _LONG_LINK, _GLOBAL = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE
_EXTENDED = (_LONG_NAME, _LONG_LINK, _GLOBAL, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ([^=]+)=")  # of PAX: LENGTH KEY=VALUE\n
_MANY_DIGITS = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_SIZE = re.compile(rb"[0-9]{1,18}")


class BadHeader(ValueError):
    """A header is damaged, or claims more than is there or a limit allows. The message begins with its byte offset."""


@dataclass
class _Extended:
    """What the extended headers before a member say; of several values the first counts."""

    count: int = 0
    name: str | None = None
    size: int | None = None


def members(
    file: BinaryIO | BufferedIOBase, start: int, end: int, *, of_sample: bool = False
) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar in their order: name, type, size, offset (of the first header), offset_data.

    file: is read from byte `start` to `end`, and only forwards, so that it may be decompressed on the fly. of_sample:
    the limits of a sample apply too. Ends at the tar's own end, or at `end` between members. Raises BadHeader.
    """
    offset = first = start
    extended, num_headers, num_extended, extended_bytes = _Extended(), 0, 0, 0
    while offset < end:
        file.seek(offset)
        header = file.read(min(BLOCK, end - offset))
        if not any(header):
            break
        num_headers += 1
        if of_sample and num_headers > MAX_SAMPLE_HEADERS:
            raise BadHeader(f"byte {offset}: more than {MAX_SAMPLE_HEADERS} headers in one sample")
        info = _parsed(header, offset, end)
        data = offset + BLOCK
        if info.type in _EXTENDED:
            num_extended += 1
            extended_bytes += info.size
            if of_sample and num_extended > MAX_SAMPLE_MEMBERS:
                raise BadHeader(f"byte {offset}: more than {MAX_SAMPLE_MEMBERS} extended headers in one sample")
            if of_sample and extended_bytes > MAX_SAMPLE_EXTENDED_BYTES:
                raise BadHeader(
                    f"byte {offset}: more than {MAX_SAMPLE_EXTENDED_BYTES} bytes of extended headers in one sample"
                )
            _read_extended(extended, info.type, file.read(_in_blocks(info.size)), offset)
            offset = data + _in_blocks(info.size)
            continue
        if extended.name is not None:
            info.name = extended.name.rstrip("/") if info.isdir() else extended.name
        info.size = info.size if extended.size is None else extended.size
        info.offset, info.offset_data = first, data
        if _has_data(info):
            _check_left(info.size, offset, end)
        offset = first = end_of(info)
        extended = _Extended()
        yield info
    if extended.count:
        raise BadHeader(f"byte {first}: an extended header without its member")


def end_of(member: tarfile.TarInfo) -> int:
    """Returns the byte behind a member, where the next one's header is."""
    return member.offset_data + (_in_blocks(member.size) if _has_data(member) else 0)


def _has_data(info: tarfile.TarInfo) -> bool:
    """tarfile's rule: links, folders and devices have none, whatever their size says."""
    return info.isreg() or info.type not in tarfile.SUPPORTED_TYPES


def _in_blocks(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK) * BLOCK


def _parsed(header: bytes, offset: int, end: int) -> tarfile.TarInfo:
    """One header block as tarfile reads it, its size checked before it is followed."""
    try:
        info = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError as error:
        raise BadHeader(f"byte {offset}: no tar header ({error})") from None
    if info.type == tarfile.GNUTYPE_SPARSE:
        raise _sparse(offset)
    if info.size < 0:
        raise BadHeader(f"byte {offset}: a size of {info.size} bytes, expected at least 0")
    if info.type in _EXTENDED:
        if info.size > MAX_EXTENDED_BYTES:
            raise BadHeader(f"byte {offset}: an extended header of {info.size} bytes, at most {MAX_EXTENDED_BYTES}")
        _check_left(info.size, offset, end)
    return info


def _check_left(size: int, offset: int, end: int) -> None:
    left = max(0, end - offset - BLOCK)
    if size > left:
        raise BadHeader(f"byte {offset}: a member of {size} bytes, but {left} are left")


def _read_extended(extended: _Extended, kind: bytes, data: bytes, offset: int) -> None:
    """Adds what one extended header says. data: with the padding of its last block, which tarfile searches too."""
    extended.count += 1
    if extended.count > MAX_EXTENDED_HEADERS:
        raise BadHeader(f"byte {offset}: more than {MAX_EXTENDED_HEADERS} extended headers before a member")
    if kind in (_LONG_NAME, _LONG_LINK):
        name, size = data.partition(b"\0")[0] if kind == _LONG_NAME else None, None
    else:
        records = _records(data, offset)
        name, size = records.get(b"path"), records.get(b"size")
        if any(key.startswith(b"GNU.sparse") for key in records):
            raise _sparse(offset)
        if kind == _GLOBAL and (name is not None or size is not None):
            raise BadHeader(f"byte {offset}: a path or size for all members")
        name = None if name is None else name.rstrip(b"/")
    if name is not None and len(name) > MAX_NAME_BYTES:
        raise BadHeader(f"byte {offset}: a name of {len(name)} bytes, at most {MAX_NAME_BYTES}")
    if size is not None and not _SIZE.fullmatch(size):
        raise BadHeader(f"byte {offset}: a size of {size[:20]!r}, expected digits")
    if extended.name is None and name is not None:
        extended.name = name.decode(tarfile.ENCODING, "surrogateescape")
    if extended.size is None and size is not None:
        extended.size = int(size)


def _records(data: bytes, offset: int) -> dict[bytes, bytes]:
    """The records of a PAX header, the last one of each key."""
    if _MANY_DIGITS.search(data):
        raise BadHeader(f"byte {offset}: PAX records with more than {MAX_DIGITS} digits in a row")
    records, place = {}, 0
    while place < len(data) and data[place]:
        match = _RECORD.match(data, place, min(len(data), place + MAX_EXTENDED_BYTES))
        stop = place + int(match[1]) if match else 0
        if not match or not match.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise BadHeader(f"byte {offset}: PAX records that are not LENGTH KEY=VALUE")
        records[match[2]] = data[match.end() : stop - 1]
        place = stop
    return records


def _sparse(offset: int) -> BadHeader:
    return BadHeader(f"byte {offset}: a sparse member, which can become gigabytes; pack it plainly")

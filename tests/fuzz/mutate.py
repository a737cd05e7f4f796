"""Changes of bytes, JSON, YAML and npy headers; and of tars, zips, PNG and records, whose checksums are repaired."""

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

NESTED_10K = "[" * 10_000 + "]" * 10_000
# What stands in place of a value of JSON: types, signs, sizes, spellings and text that somebody may not expect.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 1 << 16, 1_000_000, (1 << 31) - 1, 1 << 31, (1 << 32) + 1, 1 << 63,
    1 << 64,
    -(1 << 63), 10**12, 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 2.0, 16.0, 1e-300, 1e30, 1e308, float("nan"),
    float("inf"),
    float("-inf"), "", " ", "0", "1", "-1", "1.0", "nan", "true", "a", "a" * 5000, "\ud800", "\0", "a\0b", "\n",
    "\x1b[2J",
    "../../etc/passwd", "/etc/passwd", ".", "..", "%s%n", "${oc.env:HOME}", "${name}", "<script>", "٣", "\u202e",
    [], [[]], [None], [1], [1, 2, 3], [1.5] * 3, ["a"], [{}], [-1] * 2, [10**6] * 4, ["a"] * 1000, [[1]] * 3, {},
    {"": None},
    {"a": 1}, {"0": "a"}, {"height": 16, "width": 16}, {"a": {"b": {"c": []}}},
)  # fmt: skip
# As text, so that several ways to write a value in YAML are tried.
ODD_YAML: tuple[str, ...] = (
    "", "~", "null", "true", "yes", "0", "-1", "1", "2", "1_0", "1e3", "1e400", "-1e400", ".inf", "-.inf", ".nan",
    "0x10", "0o17",
    "017", "12:30:45", "2024-01-01", "2024-01-01T00:00:00Z", "10000000000000000000000", "9" * 5000, "1.5", "'1'",
    "'a'", '"\\0"',
    '"\\ud800"', '"\\u2028"', "a: b", "[]", "[1]", "[1, 2]", "[.nan, .nan]", "[a, b, c]", "[[1], [2]]", "{}", "{a: b}",
    "{1: 2}", "{null: null}", "{[1]: 2}", "{? {a: b} : c}", "&a [*a]", "&a {b: *a}", "*a",
    "!!python/object/apply:os.system [id]",
    "!!python/name:os.system", "!!binary aGVsbG8=", "!!binary '='", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]",
    "!!float x",
    "!!int x", "!!bool x", "!!null x", "!!timestamp x", "!!str", "!x y", "${oc.env:HOME}", "${name}", "${${name}}",
    "${",
    "${}", "${.}", "${..}", "${a.b.c}", "${data}", "${output}", "'${output}/${name}'", "???", "|\n    text",
    ">\n    text", "- a",
    "? a", "%a", "@a", "`a`", "<<: {a: b}", "# nothing", "\t", "\0", "\x85", "\ufeff", "'" , '"', "[", "{", "]",
    "[" * 500,
    "{a: " * 300 + "1" + "}" * 300, "[" * 300 + "]" * 300, "a" * 5000, "../../etc/passwd", "/dev/zero",
    "timm:resnet50", "1,2",
)  # fmt: skip
ODD_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40)


def changed_bytes(data: bytes, random: Random) -> bytes:
    """Returns bytes with one to eight changes: flips, odd numbers, pieces taken out, doubled, moved or cut off."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        size = len(changed)
        at, length = random.randrange(size + 1), min(random.choice((1, 1, 2, 4, 8, 16, 100, 512)), size)
        match random.randrange(9):
            case 0 | 1 if size:
                changed[at % size] ^= 1 << random.randrange(8)
            case 2 if size:
                changed[at % size] = random.randrange(256)
            case 3:
                width, order = random.choice("BHIQ"), random.choice("<>")
                number = random.choice(ODD_NUMBERS) % (1 << 8 * struct.calcsize(width))
                packed = struct.pack(order + width, number)
                changed[at : at + len(packed)] = packed
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = changed[at : at + length] * random.choice((1, 1, 2, 50))
            case 6:
                changed[at:at] = bytes(random.randrange(256) for _ in range(length))
            case 7:
                changed[at : at + length] = random.choice((b"\0", b"\xff", b" ", b"9")) * length
            case 8 if random.random() < 0.3:
                del changed[at:]
    return bytes(changed)


# --- JSON and YAML ---------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of each value inside JSON values, of the whole one first."""
    yield path
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def with_value(value: Any, path: Sequence[Any], new: Any) -> Any:
    """Returns JSON values with another one at `path`."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_value(copy[path[0]], path[1:], new)
    return copy


def without_value(value: Any, path: Sequence[Any]) -> Any:
    """Returns JSON values without what is at `path`."""
    if len(path) > 1:
        return with_value(value, path[:1], without_value(value[path[0]], path[1:]))
    copy = dict(value) if isinstance(value, dict) else list(value)
    del copy[path[0]]
    return copy


def json_seeds(value: Any) -> list[bytes]:
    """Returns what attacks any JSON, then each value left out and replaced by each odd one, in mixed order."""
    text = json.dumps(value)
    attacks = [
        b"", b"\0", b"null", b"[]", b"{}", b"1", b'"a"', b"nan", text.encode()[: len(text) // 2], text.encode("utf-16"),
        b"\xef\xbb\xbf" + text.encode(), b"[" * 200_000, b'{"a":' * 200_000, NESTED_10K.encode(), text.encode() * 2,
        b"9" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b'"\\ud800"', b'{"\\ud800": 1}', b"\xff\xfe",
        text.encode() + b"\0",
    ]  # fmt: skip
    changed = [without_value(value, path) for path in places(value) if path]
    changed += [with_value(value, path, odd) for path in places(value) for odd in ODD_VALUES]
    texts = [json.dumps(one).encode() for one in changed]
    texts += [
        json.dumps(with_value(value, path, "@@")).replace('"@@"', raw).encode()
        for path in places(value)
        for raw in (NESTED_10K, "1e999", "-0", "9" * 5000)
    ]
    Random(0).shuffle(texts)
    return attacks + texts


def changed_json(data: bytes, random: Random) -> bytes:
    """Returns a text of JSON with one to three values replaced, left out, renamed or exchanged; or changed bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return changed_bytes(data, random)
    if random.random() < 0.2:
        return changed_bytes(data, random)
    for _ in range(random.choice((1, 1, 2, 3))):
        paths = list(places(value))
        path = random.choice(paths)
        match random.randrange(6):
            case 0 if path:
                value = without_value(value, path)
            case 1:
                other = random.choice(paths)
                value = with_value(value, path, _at(value, other))
            case 2 if path and isinstance(path[-1], str):
                moved = _at(value, path)
                value = without_value(value, path)
                value = with_value(value, path[:-1], _at(value, path[:-1]) | {str(random.choice(ODD_VALUES)): moved})
            case 3:
                value = with_value(value, path, [_at(value, path)] * random.choice((1, 2, 1000)))
            case _:
                value = with_value(value, path, random.choice(ODD_VALUES))
    return json.dumps(value).encode()


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed_lines(data: bytes, random: Random) -> bytes:
    """Returns lines of JSON, some of them changed, doubled, left out or torn."""
    lines = data.splitlines()
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(lines)) if lines else 0
        if lines and random.random() < 0.7:
            lines[at] = changed_json(lines[at], random)
        else:
            lines[at : at + random.randrange(2)] = [changed_bytes(b"\n".join(lines[at : at + 2]), random)]
    return b"\n".join(lines) + random.choice((b"\n", b"\n", b""))


def line_seeds(data: bytes) -> list[bytes]:
    """Returns lines of JSON followed by each seed of a single one."""
    first = data.splitlines()[0]
    return [data + seed + b"\n" for seed in json_seeds(json.loads(first))] + [b"", b"\n" * 1000, b"\xff\n", data[:-9]]


# --- tars ------------------------------------------------------------------------------------------------------------

_FIELDS = (  # name, first byte and length of what a header holds
    ("name", 0, 100), ("mode", 100, 8), ("uid", 108, 8), ("gid", 116, 8), ("size", 124, 12), ("mtime", 136, 12),
    ("checksum", 148, 8), ("type", 156, 1), ("link", 157, 100), ("magic", 257, 8), ("uname", 265, 32), ("prefix", 345,
    155),
    ("size", 124, 12), ("type", 156, 1), ("name", 0, 100), ("sparse", 386, 97),
)  # fmt: skip
_ODD_NUMBERS = (
    b"\xff" + (256**11 - 512).to_bytes(11, "big"), b"\xff" * 12, b"\xff" + (256**11 - 1024).to_bytes(11, "big"),
    b"\x80" + (1 << 62).to_bytes(11, "big"), b"\x80" + b"\xff" * 11, b"\x80" + bytes(11), b"77777777777\0",
    b"77777777777 ",
    b"-0000000001\0", b"-7777777777\0", b"           \0", b"0x10\0", b"1e3\0", b"9999\0", b"\0" * 12, b" " * 12,
    b"1_0\0",
    b"00000000001\0", b"00000001000\0", b"00000001001\0", b"00040000000\0", b"\xd9\xa3\0",
)  # fmt: skip
_ODD_NAMES = (
    b"", b".", b"..", b"/", b"/etc/passwd", b"../../x.png", b"a/", b"a", b".png", b"a.", b"__a__.png", b"\xff\xfe.png",
    b"a.png/", b"a.cls", b"b.png", b"././@LongLink", b"GNUSparseFile.0/a.png", b"a.PNG", b"a.pyd", b"a.b.c.d.png",
    b"a\nb.png", b"\x1b[2J.png", b".hidden/a.png", b"PaxHeader/a.png", b"a" * 100,
)  # fmt: skip
_ODD_RECORDS = (
    b"13 size=1000\n", b"11 size=-1\n", b"13 size=-512\n", b"26 size=99999999999999999\n", b"12 size=nan\n",
    b"12 size=1e9\n",
    b"14 path=b.cls\n", b"9 path=\n", b"12 path=..\n", b"25 path=/etc/passwd.png..\n", b"0 a=b\n", b"5 a=b\n",
    b"99 a=b\n",
    b"-1 a=b\n", b"1" * 5000, b"22 GNU.sparse.major=1\n", b"22 GNU.sparse.minor=0\n", b"26 GNU.sparse.size=100000\n",
    b"25 GNU.sparse.map=0,1,2\n", b"27 GNU.sparse.numblocks=9\n", b"30 GNU.sparse.realsize=100000\n",
    b"19 hdrcharset=BINARY\n",
    b"11 mtime=x\n", b"14 linkpath=a\n", b"\0" * 100, b"11 \xff\xff=\xff\xff\n", b"= =", b"5 =\n\n",
    b"1000000000000 a=b\n",
)  # fmt: skip


def tar_header(name: bytes, size: int, kind: bytes = b"0", field: bytes | None = None) -> bytes:
    """Returns a ustar header whose checksum is right; `field` is its size as it is to stand there."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:156] = b"%07o\0%07o\0%07o\0%011o\0%011o\0%8s" % (0o644, 0, 0, size, 0, b"")
    header[156:157], header[257:265] = kind, b"ustar\x0000"
    header[124:136] = header[124:136] if field is None else field
    return bytes(with_checksum(header))


def with_checksum(header: bytes | bytearray) -> bytearray:
    """Returns a block of 512 bytes with the checksum of a tar header in it."""
    block = bytearray(header)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def member(name: bytes, data: bytes, kind: bytes = b"0", field: bytes | None = None) -> bytes:
    """Returns a member of a tar: header and content."""
    return tar_header(name, len(data), kind, field) + data + bytes(-len(data) % 512)


def changed_tar(data: bytes, random: Random) -> bytes:
    """Returns a tar with fields of headers changed, members added, doubled, moved or left out, or bytes changed."""
    if random.random() < 0.15:
        return changed_bytes(data, random)
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for _ in range(random.choice((1, 1, 2, 3))):
        headers = [at for at, block in enumerate(blocks) if block[257:262] == b"ustar"]
        at = random.choice(headers) if headers else 0
        match random.randrange(8):
            case 0 | 1 | 2 if headers:
                block = _changed_header(blocks[at], random)
                blocks[at] = bytes(with_checksum(block)) if random.random() < 0.5 else bytes(block)
            case 3:
                name, size = random.choice(_ODD_NAMES), random.choice((0, 1, 511, 513))
                added = member(name, b"1" * size, random.choice(b"01234567LKxgSVDMNA\0").to_bytes(1, "big"))
                blocks[at:at] = [added[i : i + 512] for i in range(0, len(added), 512)]
            case 4:
                records = b"".join(random.choice(_ODD_RECORDS) for _ in range(random.choice((1, 1, 2, 4, 20))))
                added = member(b"PaxHeader", records, random.choice((b"x", b"g", b"X")))
                blocks[at:at] = [added[i : i + 512] for i in range(0, len(added), 512)] * random.choice((1, 1, 3, 40))
            case 5 if blocks:
                other = random.randrange(len(blocks))
                blocks[at:at] = blocks[other : other + random.choice((1, 2, 4))]
            case 6:
                del blocks[at : at + random.choice((1, 2, 3))]
            case 7 if blocks:
                other = random.randrange(len(blocks))
                blocks[other] = random.choice((bytes(512), changed_bytes(blocks[other], random)))
    return b"".join(blocks)


def _changed_header(block: bytes, random: Random) -> bytearray:
    header = bytearray(block)
    name, at, length = random.choice(_FIELDS)
    if name == "type":
        new = random.choice(b"01234567LKxgSVDMNXA\0 \xff").to_bytes(1, "big")
    elif name in ("name", "link", "prefix", "uname"):
        new = random.choice(_ODD_NAMES)
    elif name == "magic":
        new = random.choice((b"ustar  \0", b"ustar\00000", b"GNUtar \0", bytes(8), b"ustar\0\0\0"))
    else:
        new = random.choice(_ODD_NUMBERS)
    header[at : at + length] = new[:length].ljust(length, b"\0")
    return header


# --- zips and npy ----------------------------------------------------------------------------------------------------

_DTYPES = (
    "'<f4'", "'<f8'", "'>f4'", "'<f2'", "'|V2'", "'|V0'", "'|V4'", "'<V1000000000'", "'|O'", "'|S0'", "'<U0'",
    "'<U9999999999'",
    "'<c8'", "'|b1'", "'<i8'", "'<M8[s]'", "'<m8'", "'f'", "''", "None", "[('a', '<f4')]", "[('a', '|O')]", "[]",
    "'<f4', 1", "('<f4', (2,))",
    "[('a', '<f4', (1000000000,))]", "'<f4,<f4'", "'junk'", "1", "True", "{'names': [], 'formats': []}", "b'<f4'",
    "'\\ud800'",
)  # fmt: skip
_SHAPES = (
    "()", "(1,)", "(0,)", "(-1,)", "(-16, -5)", "(0, 1000000000000)", "(1000000000,)", "(10**30,)", "(1.0,)",
    "(True,)", "(None,)",
    "('1',)", "[1]", "1", "None", "(1000000, 1000000)", "(9223372036854775807,)", "(18446744073709551616,)",
    "(1,) * 100",
    "(" + "1, " * 65 + ")", "(" * 300 + ")" * 300, "((1,),)", "(1, 2, 3", "(1j,)", "(-0,)", "(1_0,)", "(0x10,)",
    "(1e9,)", "(...,)",
)  # fmt: skip
_HEADERS = (
    "", " ", "{", "{'descr': (\n", "{}", "[]", "None", "1", "{'descr': '<f4'", "{'descr': '<f4'}", "'" , '"""', "\\",
    "\0", "(" * 5000,
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}",
    "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}",
    "{1: 2}", "-" * 5000 + "1", "lambda: 1", "__import__('os')",
    "{'descr': '<f4', 'fortran_order': None, 'shape': ()}", "\n\n\t x",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1L,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n" * 3,
    "{**{}}", "{'a': [" * 50, "0o8", "1__0", "{'descr': u'<f4'}", "9" * 5000, "  x\n y", "\x0c", "é",
    "{'shape': (1,\n", "#", "$", "?",
)  # fmt: skip


def npy(header: str, payload: bytes, version: int = 1, *, length: int | None = None) -> bytes:
    """Returns an .npy file with this header, whatever it says."""
    text = header.encode("utf-8", "surrogatepass")
    size = len(text) if length is None else length
    packed = struct.pack("<H", size % (1 << 16)) if version == 1 else struct.pack("<I", size % (1 << 32))
    return b"\x93NUMPY" + bytes([version % 256, 0]) + packed + text + payload


def changed_npy(data: bytes, random: Random) -> bytes:
    """Returns an .npy file with another type, shape, order, header, version, length or content."""
    if not data.startswith(b"\x93NUMPY\x01") or len(data) < 10 or random.random() < 0.15:
        return changed_bytes(data, random)
    size = int.from_bytes(data[8:10], "little")
    header, payload = data[10 : 10 + size].decode("latin-1"), data[10 + size :]
    match random.randrange(8):
        case 0 | 1:
            header = re.sub(r"'descr': [^,]*,", lambda _: f"'descr': {random.choice(_DTYPES)},", header)
        case 2 | 3:
            header = re.sub(r"'shape': \([^)]*\)", lambda _: f"'shape': {random.choice(_SHAPES)}", header)
        case 4:
            header = random.choice(_HEADERS)
        case 5:
            header = header.replace("False", random.choice(("True", "None", "0", "1", "''", "[]")))
        case 6:
            header = changed_bytes(header.encode("latin-1", "replace"), random).decode("latin-1")
        case 7:
            payload = changed_bytes(payload, random)
            payload = random.choice((payload, b"", payload * 2, b"\xff" * len(payload)))  # NaN
    version = random.choice((1, 1, 1, 1, 2, 3, 0, 255))
    length = random.choice((None,) * 8 + (0, 1, 65535, 1 << 31, 10_001))
    return npy(header, payload, version, length=length)


def unzipped(data: bytes) -> list[tuple[str, bytes]]:
    """Returns the members of a zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def zipped(members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """Returns a zip of these members, two of a name included; its checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


_ODD_MEMBERS = (
    "", "a", ".npy", "cls.npy/", "../x.npy", "/x.npy", "head/kernel.npy", "head/bias.npy", "a" * 5000 + ".npy",
    "\x1b.npy",
    "Transformer/encoderblock_99999999/x.npy", "Transformer/encoderblock_-1/x.npy", "Transformer/encoderblock/x.npy",
    "é.npy",
    "params/x.npy", "opt/target/x.npy", "img/x.npy", "label.npy", "blob.npy", "classes.npy",
)  # fmt: skip


def changed_zip(data: bytes, random: Random, content: Callable[[bytes, Random], bytes] = changed_npy) -> bytes:
    """Returns a zip with members changed, renamed, doubled or left out, all checksums right; or with changed bytes."""
    if random.random() < 0.25:
        return changed_bytes(data, random)
    try:
        members = unzipped(data)
    except Exception:  # a seed that is no zip any more
        return changed_bytes(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(members)) if members else 0
        match random.randrange(8):
            case 0 if members:
                members[at] = random.choice((random.choice(_ODD_MEMBERS), random.choice(members)[0])), members[at][1]
            case 1 if members:
                del members[at]
            case 2 if members:
                members.append((random.choice((random.choice(_ODD_MEMBERS), members[at][0])), members[at][1]))
            case _ if members:
                members[at] = members[at][0], content(members[at][1], random)
    result = zipped(members, random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
    return result


def bomb(unit: bytes, count: int, head: bytes = b"", name: str = "a.npy", others: bytes = b"") -> bytes:
    """Returns a zip whose last member is `head`, then `unit` repeated `count` times, which costs nothing to pack.

    others: a zip whose members come first.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    repeated = packer.compress(unit) + packer.flush(zlib.Z_FULL_FLUSH)
    stream = first + repeated * count + packer.flush(zlib.Z_FINISH)
    size, crc, encoded = len(head) + len(unit) * count, zlib.crc32(head), name.encode()
    for _ in range(count):
        crc = zlib.crc32(unit, crc)
    number, at, central = 0, 0, b""
    if others:
        number, central_size, at = struct.unpack("<HII", others[-12:-2])
        central = others[at : at + central_size]
    sizes = struct.pack("<IIIH", crc, len(stream), size, len(encoded))
    local = struct.pack("<4sHHHHH", b"PK\3\4", 20, 0, 8, 0, 33) + sizes + bytes(2) + encoded
    central += (
        struct.pack("<4sHHHHHH", b"PK\1\2", 20, 20, 0, 8, 0, 33) + sizes + bytes(12) + struct.pack("<I", at) + encoded
    )
    body = others[:at] + local + stream
    return (
        body + central + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, number + 1, number + 1, len(central), len(body), 0)
    )


def gzip_bomb(unit: bytes, count: int, head: bytes = b"") -> bytes:
    """Returns a gzip file of `head`, then `unit` repeated; its checksum is wrong."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    repeated = packer.compress(unit) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\2\xff" + first + repeated * count + packer.flush(zlib.Z_FINISH) + bytes(8)


# --- pictures --------------------------------------------------------------------------------------------------------


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Returns a PNG's chunks: kind and content."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def png_of(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Returns a PNG of these chunks, with the right checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


_CHUNKS = (
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"IEND",
    b"tRNS",
    b"zTXt",
    b"iTXt",
    b"tEXt",
    b"iCCP",
    b"eXIf",
    b"acTL",
    b"fcTL",
    b"fdAT",
    b"gAMA",
)


def changed_picture(data: bytes, random: Random) -> bytes:
    """Returns a picture with changed bytes, or a PNG with changed chunks, or a JPEG with changed segments."""
    if data.startswith(b"\x89PNG") and random.random() < 0.7:
        chunks = png_chunks(data)
        for _ in range(random.choice((1, 1, 2))):
            at = random.randrange(len(chunks)) if chunks else 0
            match random.randrange(5):
                case 0 if chunks:
                    del chunks[at]
                case 1 if chunks:
                    chunks.insert(at, (random.choice(_CHUNKS), chunks[at][1]))
                case 2 if chunks:
                    chunks[at:at] = [chunks[at]] * random.choice((1, 1, 200))
                case _ if chunks:
                    chunks[at] = chunks[at][0], changed_bytes(chunks[at][1], random)
        return png_of(chunks)
    if data.startswith(b"\xff\xd8") and random.random() < 0.5:
        markers = [match.start() for match in re.finditer(rb"\xff[\xc0-\xfe]", data)]
        at, other = random.choice(markers), random.choice(markers)
        match random.randrange(5):
            case 0:  # within a segment's first bytes: lengths, sizes, numbers of components, sampling
                return data[:at] + changed_bytes(data[at : at + 20], random) + data[at + 20 :]
            case 1:
                return data[:at] + data[max(at, other) :]
            case 2:
                return data[:at] + data[min(at, other) : max(at, other)] * random.choice((1, 2, 100)) + data[at:]
            case 3:
                return data[: random.randrange(len(data))] + b"\xff\xd9"
            case 4:  # nothing but a few short segments
                return b"\xff\xd8" + b"".join(_short_segment(random) for _ in range(random.choice((1, 2, 2, 3))))
    return changed_bytes(data, random)


def _short_segment(random: Random) -> bytes:
    """A JPEG's marker, a length, and fewer bytes than its kind has: the file ends soon behind it, or within it."""
    marker = random.choice((b"\xff\xc0", b"\xff\xc2", b"\xff\xda", b"\xff\xda", b"\xff\xc4", b"\xff\xe1"))
    length = random.choice((0, 2, 3, 8, 11))
    return marker + struct.pack(">H", length) + random.randbytes(random.choice((0, 1, max(0, length - 2))))

"""Reads a byte range of a file over the network (http, https, s3, gs), with one loop of our own.

It resumes at the byte reached, checks status, range and length of every response, and times out within seconds of
silence. s3 and gs are read through signed URLs. Credentials come from the environment; no message shows one.
"""

import base64
import http.client
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

from pretrain.errors import StorageError, UserError
from pretrain.json_files import brief

SCHEMES = ("http", "https", "s3", "gs")
SILENCE_S = 3.0  # time-out between two arrivals of bytes, and for connecting
MAX_TRIES = 11  # in a row without progress; their waits add up to 14 to 29 seconds, 22 on average
REFUSED_TRIES = 5  # in a row, for status 403 and the like; 3 to 6 s. Of 10^10 requests in six weeks some are refused
_LATER = 3  # added to the number of such a try for `wait_before`: the waits are up to 0.4 to 3.2 s
FIRST_WAIT_S, MAX_WAIT_S = 0.05, 8.0  # before the second try; doubled for each further one
MIN_PROGRESS_BYTES = 64 << 10  # that reset the count of tries: otherwise a server could send a byte at a time for ever
MAX_REDIRECTS = 5
SIGNED_FOR_S = 900  # a signed URL is used at once
_PIECE_BYTES = 256 << 10  # received at a time; with 64 KB it takes twice the CPU time
_URL = re.compile("[!-~]{1,2048}")  # printable ASCII: urlsplit would silently drop line ends
_REDIRECTED = re.compile("[!-~]{1,16384}")  # a signed one may be long
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_GOOGLE_HASH = re.compile(r"crc32c=([A-Za-z0-9+/]{6}==)")
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 425, 429)  # of 4xx: the same request may succeed later


def is_url(text: str) -> bool:
    """Returns whether a text names a scheme, known or not, rather than a path."""
    return "://" in text or text.startswith("pipe:")


def check_url(text: str) -> str:
    """Returns a file's URL. Raises UserError, showing no secrets, when it cannot be read or holds a secret."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise UserError(f"{brief(without_secrets(text))}: is no URL") from None
    where = brief(without_secrets(text))
    if parts.scheme not in SCHEMES:
        raise UserError(f"{where}: is not read, expected a path or a URL of {', '.join(SCHEMES)}")
    if not _URL.fullmatch(text) or not parts.hostname or port == 0:
        raise UserError(f"{where}: is no URL of at most 2048 printable ASCII characters; write others as %20")
    if not _is_host(parts.hostname):
        raise UserError(f"{where}: names no host")
    if "@" in text or parts.query or parts.fragment or "?" in text:
        raise UserError(
            f"{where}: holds a user, a query or a fragment, which may be a secret and would be saved; give the URL "
            "without (an @ in it as %40), credentials in the environment, and s3:// or gs:// for what needs a signature"
        )
    return text


def without_secrets(url: str) -> str:
    """Returns a URL without user, password, query and fragment."""
    return re.sub("//.*@", "//", re.split("[?#]", url, maxsplit=1)[0])


def _is_host(name: str) -> bool:
    """Whether a host name can be looked up: its parts are neither empty nor longer than DNS allows."""
    return all(0 < len(part) < 64 for part in name.rstrip(".").split("."))


def file_name(url: str) -> str:
    """Returns the name of a URL's file."""
    return unquote(PurePosixPath(urlsplit(url).path).name)


def download(
    url: str,
    start: int,
    end: int,
    num_bytes: int,
    write: Callable[[bytes], object],
    stopped: threading.Event | None = None,
) -> None:
    """Passes bytes start .. end-1 of a file of `num_bytes` to `write`, in order, in pieces.

    An error of `write` passes through. Raises StorageError when the network or the server fails MAX_TRIES times in a
    row, UserError when the file does not exist or may not be read, REFUSED_TRIES times in a row, or is not of
    `num_bytes`, and KeyboardInterrupt, within SILENCE_S, when another thread has set `stopped`.
    """
    at, tries, arrived, refused = start, 0, 0, 0
    pieces = _received(url, at, end, num_bytes)
    while at < end:
        try:
            piece = next(pieces)
        except _Refused:
            refused += 1
            if refused == REFUSED_TRIES:
                raise
            wait_before(_LATER + refused, stopped)
            pieces = _received(url, at, end, num_bytes)
        except UserError:
            raise
        except (OSError, http.client.HTTPException) as error:
            tries = 0 if arrived >= MIN_PROGRESS_BYTES else tries
            arrived, tries = 0, tries + 1
            if tries == MAX_TRIES:
                raise _given_up(url, error, f"bytes {at} to {end}") from None
            wait_before(tries, stopped)
            pieces = _received(url, at, end, num_bytes)
        else:
            _go_on_unless(stopped)
            write(piece)
            at += len(piece)
            arrived += len(piece)
            refused = 0


class Facts(NamedTuple):
    """What a server says of a file."""

    num_bytes: int
    crc32c: str | None  # 8 hex digits, of the whole file; Google's storage sends it


def num_bytes_of(url: str, stopped: threading.Event | None = None) -> int:
    """Returns the size of a file. Raises as `download` does."""
    return facts_of(url, stopped=stopped).num_bytes


def facts_of(url: str, max_tries: int = MAX_TRIES, stopped: threading.Event | None = None) -> Facts:
    """Returns what the server says of a file. Raises as `download` does, after max_tries tries."""
    for tries in range(1, max_tries + 1):
        try:
            response = _answer(url, 0, 1)
            total = _total(response, 0, 1)
            if len(response.read(2)) != 1:
                raise OSError("the answer is not the byte that was asked for")
            return Facts(total, _crc32c(response))
        except UserError:
            raise
        except (OSError, http.client.HTTPException) as error:
            _forget_connections()
            if tries == max_tries:
                raise _given_up(url, error, "its first byte", max_tries) from None
            wait_before(tries, stopped)
    raise AssertionError


def _crc32c(response: http.client.HTTPResponse) -> str | None:
    """The checksum in Google's header: four bytes in base64."""
    match = _GOOGLE_HASH.search(", ".join(response.headers.get_all("x-goog-hash", [])))
    return base64.b64decode(match[1]).hex() if match else None


def wait_before(tries: int, stopped: threading.Event | None = None) -> None:
    """Waits before the next try: exponential back-off, with random jitter so that processes do not retry together."""
    seconds = min(MAX_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)) * random.uniform(0.5, 1)
    stopped.wait(seconds) if stopped else time.sleep(seconds)
    _go_on_unless(stopped)


def _go_on_unless(stopped: threading.Event | None) -> None:
    if stopped and stopped.is_set():
        raise KeyboardInterrupt


class _Refused(UserError):
    """An answer of 4xx to a request for a file's bytes: seldom one that passes, as while credentials are renewed."""


class _NotTheRange(OSError):
    """A response that is no part of the expected file; if that persists, no later try will help."""


def _given_up(url: str, error: Exception, what: str, tries: int = MAX_TRIES) -> UserError | StorageError:
    if isinstance(error, _NotTheRange):
        return UserError(f"{url}: {error}")
    return StorageError(f"{url}: {what} cannot be read for now ({_reason(error)}, after {tries} tries)")


def _reason(error: Exception) -> str:
    """What went wrong, without the address, which may be signed."""
    if isinstance(error, TimeoutError):
        return f"nothing arrived for {SILENCE_S:g} s"
    if isinstance(error, http.client.HTTPException):
        return f"no HTTP answer, {type(error).__name__}"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _received(url: str, at: int, end: int, num_bytes: int) -> Iterator[bytes]:
    """Yields the bytes of one response as they arrive. Raises OSError or HTTPException, also when it ends early."""
    left = end - at
    try:
        response = _answer(url, at, end)
        if (total := _total(response, at, end)) != num_bytes:
            raise _NotTheRange(f"has {total} bytes, the manifest says {num_bytes}; index it again")
        while left:
            piece = response.read1(min(left, _PIECE_BYTES))
            if not piece:
                raise OSError(f"the answer ended {left} bytes early")
            if left == len(piece) and response.read(1):  # reads the end, so the connection is free for the next request
                raise OSError("more arrives than was asked for")
            left -= len(piece)
            yield piece
    finally:
        if left:  # the rest of this response must not be taken for the next one
            _forget_connections()


def _total(response: http.client.HTTPResponse, at: int, end: int) -> int:
    """The size of the whole file, from a response that is checked to hold its bytes at .. end-1."""
    if response.status == 200:
        raise _NotTheRange("the server sends the whole file where a part was asked for; it has to know byte ranges")
    if response.status != 206:
        raise OSError(f"status {response.status}")
    match = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range", "").strip())
    length = response.getheader("Content-Length", str(end - at)).strip()
    if not match or (int(match[1]), int(match[2])) != (at, end - 1) or length != str(end - at):
        raise OSError("the answer is another range than was asked for")
    if response.getheader("Content-Encoding", "identity") != "identity":
        raise _NotTheRange("the server sends it compressed")
    return int(match[3])


def _answer(url: str, at: int, end: int) -> http.client.HTTPResponse:
    """The response to a range request, redirects followed. Raises UserError where no later try would help."""
    scheme = urlsplit(url).scheme
    address = url if scheme in ("http", "https") else _signed(scheme, url)
    for _ in range(MAX_REDIRECTS + 1):
        parts = urlsplit(address)
        connection = _connection(parts.scheme, parts.netloc)
        headers = {"Range": f"bytes={at}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers=headers)
            response = connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"{url}: {parts.hostname} is not trusted ({error.verify_message})") from None
        if response.status not in _REDIRECTS:
            try:
                _refuse(url, response.status)
            except UserError as error:
                raise _Refused(*error.args) from None
            return response
        _forget_connections()
        address = _redirected(url, address, response.getheader("Location", ""))
    raise UserError(f"{url}: leads from address to address, more than {MAX_REDIRECTS} times")


def _refuse(url: str, status: int) -> None:
    if status in (401, 403):
        raise UserError(f"{url}: may not be read (status {status}); credentials are taken from the environment")
    if status in (404, 410):
        raise UserError(f"{url}: not found (status {status})")
    if status == 416:
        raise UserError(f"{url}: ends before a sample that its index lists (status 416); index it again")
    if 400 <= status < 500 and status not in _PASSING:
        raise UserError(f"{url}: the server refuses it (status {status})")


def _redirected(url: str, address: str, location: str) -> str:
    secure = urlsplit(address).scheme == "https"
    try:
        target = urljoin(address, location)
        parts = urlsplit(target)
        _ = parts.port  # ValueError if malformed
        is_address = bool(_REDIRECTED.fullmatch(target)) and _is_host(parts.hostname or "none")
    except ValueError:
        target, is_address = location, False
    if not is_address:
        raise UserError(f"{url}: leads to {brief(without_secrets(target))}, which is no address")
    if not location or urlsplit(target).scheme not in (("https",) if secure else ("http", "https")):
        raise UserError(
            f"{url}: leads to {brief(without_secrets(target))}; only {'https' if secure else 'http and https'} is "
            "followed from there"
        )
    return target


def _signed(scheme: str, url: str) -> str:
    """The address of a file, signed with the environment's credentials."""
    try:
        import fsspec

        # The instance is this process's own: a parent's does not survive a fork, which fsspec takes care of.
        return fsspec.filesystem(scheme).sign(url, expiration=SIGNED_FOR_S)
    except ImportError:
        raise UserError(f"{url}: {scheme}:// needs a package that is missing: pip install -e '.[remote]'") from None
    except Exception as error:  # botocore's and google's own; their texts may hold parts of a key
        name, status = type(error).__name__, _status_of(error)
        if name in _NO_CREDENTIALS:
            raise UserError(
                f"{url}: no credentials in the environment; a public file is read by its https:// address"
            ) from None
        _refuse(url, status)
        if isinstance(error, _NO_LATER_TRY) or (name in _LASTING and not _may_pass(error)):
            raise UserError(f"{url}: cannot be signed with the environment's credentials ({name})") from None
        raise OSError(f"cannot be signed, {name}") from None


_NO_CREDENTIALS = ("NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError")
_NO_LATER_TRY = (PermissionError, FileNotFoundError, ValueError, TypeError, AttributeError)  # google's: no private key
# Of botocore and google.auth, which need not be installed: errors that no later try will mend. All others may pass.
_LASTING = (
    *("ProfileNotFound", "ConfigNotFound", "ConfigParseError", "InvalidConfigError", "NoRegionError"),
    *("ParamValidationError", "InvalidRegionError", "UnknownSignatureVersionError", "UnsupportedSignatureVersionError"),
    *("SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "UnknownCredentialError"),
    *("RefreshError", "MalformedError", "InvalidValue"),
)


def _may_pass(error: Exception) -> bool:
    """Whether an error of google.auth is marked retryable, or comes from its connection."""
    return bool(getattr(error, "retryable", False)) or type(error.__cause__).__name__ == "TransportError"


def _status_of(error: Exception) -> int:
    """The HTTP status that an error of botocore or google carries, 0 for none."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    found = (metadata.get("HTTPStatusCode"), getattr(error, "status", None), getattr(error, "code", None))
    return next((status for status in found if isinstance(status, int)), 0)


class _Connections(dict[tuple[str, str], http.client.HTTPConnection]):
    """Open connections by scheme and host; closed when their thread ends."""

    def __del__(self) -> None:
        while self:
            self.popitem()[1].close()


class _Local(threading.local):
    """Thread-local state; __init__ runs at each thread's first use."""

    def __init__(self) -> None:
        self.connections = _Connections()


_local = _Local()


def _connection(scheme: str, place: str) -> http.client.HTTPConnection:
    """This thread's connection to a host."""
    open_ones = _local.connections
    if (scheme, place) not in open_ones:
        if scheme == "https":
            made = http.client.HTTPSConnection(place, timeout=SILENCE_S, context=_tls())
        else:
            made = http.client.HTTPConnection(place, timeout=SILENCE_S)
        open_ones[scheme, place] = made
    return open_ones[scheme, place]


def _forget_connections() -> None:
    """Closes this thread's connections: a response was not read to its end, or they are a parent process's."""
    _local.connections = _Connections()


os.register_at_fork(after_in_child=_forget_connections)  # a child would share its parent's sockets


_tls = cache(ssl.create_default_context)

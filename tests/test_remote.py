"""Remote files: what is read over the network is what lies there, or the reason is told in one line without secrets."""

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.data import remote
from pretrain.data.remote import check_url, download, num_bytes_of, without_secrets
from pretrain.errors import StorageError, UserError
from tests.web import FAULTS, Site, at_random, every, s3_server, served

DATA = os.urandom(700_000)
LASTING = {  # a fault in every answer: the error, and what it says
    "503": (StorageError, r"cannot be read for now \(status 503, after 11 tries\)"),
    "429": (StorageError, "status 429"),
    "silence": (StorageError, "nothing arrived for 0.3 s"),
    "range": (StorageError, "another range than was asked for"),
    "short": (StorageError, "another range"),
    "nonsense": (StorageError, "no HTTP answer"),
    "total": (UserError, r"has 700512 bytes, the manifest says 700000; index it again"),
    "whole": (UserError, "sends the whole file where a part was asked for"),
    "gzip": (UserError, "compressed"),
    "404": (UserError, r"not found \(status 404\)"),
    "403": (UserError, r"may not be read \(status 403\); credentials are taken from the environment"),
    "400": (UserError, "refuses it"),
    "416": (UserError, "ends before a sample"),
    "to:file:///etc/passwd": (UserError, "leads to 'file:///etc/passwd'; only http and https"),
    "to:pipe:id": (UserError, "leads to 'pipe:id'"),
    "to:/a.tar": (UserError, "more than 5 times"),
}


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are short: it is their outcome that matters here."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "MAX_WAIT_S", 0.01)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A server of one file, DATA."""
    (tmp_path / "a.tar").write_bytes(DATA)
    with served(Site(tmp_path)) as site:
        yield site


def read(url: str, start: int = 0, end: int = len(DATA), num_bytes: int = len(DATA)) -> bytes:
    """The bytes of a range."""
    pieces = bytearray()
    download(url, start, end, num_bytes, pieces.extend)
    return bytes(pieces)


def test_ranges_are_the_bytes_that_lie_there(site: Site) -> None:
    """Any range, over one connection; nothing is asked for twice."""
    for start, end in ((0, 1), (5, 300_000), (0, len(DATA)), (len(DATA) - 1, len(DATA))):
        assert read(f"{site.url}/a.tar", start, end) == DATA[start:end]
    assert num_bytes_of(f"{site.url}/a.tar") == len(DATA)
    assert len(site.requests) == 5 and site.connections == 1


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "bytes"])
def test_a_fault_that_passes_costs_nothing(site: Site, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second answer fails: the bytes are exact, and those that had arrived are not sent again."""
    if kind in ("stall", "silence"):
        monkeypatch.setattr(remote, "SILENCE_S", 0.3)
    site.fault = every(2, kind)
    for start in range(0, len(DATA), 100_000):
        assert read(f"{site.url}/a.tar", start, start + 100_000) == DATA[start : start + 100_000]
    assert site.faults[kind] >= 3
    if kind == "half-way":
        assert site.sent == len(DATA), "bytes that had arrived were asked for again"


@pytest.mark.parametrize("kind", LASTING)
def test_a_fault_that_lasts_is_told(site: Site, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying later is left to exit code 75; what no later try would mend is the user's."""
    if kind == "silence":
        monkeypatch.setattr(remote, "SILENCE_S", 0.3)
    site.fault = lambda _: kind
    error, said = LASTING[kind]
    with pytest.raises(error, match=said) as caught:
        read(f"{site.url}/a.tar")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{site.url}/a.tar: ")
    assert len(site.requests) <= remote.MAX_TRIES


@pytest.mark.parametrize("status", ["400", "403", "404"])
def test_a_refusal_that_passes_costs_nothing(site: Site, status: str) -> None:
    """A run of weeks makes billions of requests, and would end for good at the first that is refused by mistake."""
    site.fault = lambda number: status if number < remote.REFUSED_TRIES - 1 else ""
    assert read(f"{site.url}/a.tar") == DATA and site.faults[status] == 4
    site.requests.clear()
    site.fault = lambda _: status
    with pytest.raises(UserError, match=status):
        read(f"{site.url}/a.tar")
    assert len(site.requests) == remote.REFUSED_TRIES
    with pytest.raises(UserError, match=status):  # a user who asks for a file's size is told at once
        num_bytes_of(f"{site.url}/a.tar")
    assert len(site.requests) == remote.REFUSED_TRIES + 1


def test_progress_makes_tries_new_but_a_byte_is_none(site: Site) -> None:
    """Answers that each break off half-way are fine; a server that sends single bytes is given up."""
    site.fault = lambda number: "half-way" if number < 3 else "503" if number % 9 else ""
    assert read(f"{site.url}/a.tar") == DATA
    site.fault = lambda _: "one byte"
    with pytest.raises(StorageError, match="ended .* bytes early"):
        read(f"{site.url}/a.tar")


def test_redirects_are_followed_to_http_alone(site: Site) -> None:
    """A redirect leads to the file; its query, which may be a signature, is in no message."""
    site.fault = lambda number: "to:/a.tar?signature=secret" if number == 0 else "403"
    with pytest.raises(UserError) as caught:
        read(f"{site.url}/b.tar")
    assert "secret" not in str(caught.value)
    site.requests.clear()
    site.fault = lambda number: "to:/a.tar" if number % 2 == 0 else ""
    assert read(f"{site.url}/b.tar") == DATA


@pytest.mark.parametrize("target", ["http://h/b", "HTTP://h/b"])
def test_https_is_never_followed_to_http(target: str) -> None:
    """Anyone on the way could read a signature, and change what arrives. Other addresses of https are followed."""
    with pytest.raises(UserError, match="leads to .*; only https is followed from there"):
        remote._redirected("https://h/a", "https://h/a", target)
    for secure in ("/b", "//other/b", "https://other/b"):
        assert remote._redirected("https://h/a", "https://h/a", secure).startswith("https://")
    assert remote._redirected("http://h/a", "http://h/a", "https://h/b") == "https://h/b"


@pytest.mark.parametrize("target", ["/\u00e4.tar", "http://[bad/x.tar", "http://a..b/x.tar", "http://h:port/x.tar"])
def test_redirects_to_no_address_are_told(site: Site, target: str) -> None:
    """One line, as for any redirect that is not followed."""
    site.fault = lambda _: f"to:{target}"
    with pytest.raises(UserError, match="leads to") as caught:
        read(f"{site.url}/b.tar")
    assert "\n" not in str(caught.value)


def test_no_more_is_read_than_was_asked_for() -> None:
    """A server that never ends, in an answer without a length, is not read into memory."""
    data, sent = b"x" * 1000, []

    def serve(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, suppress(OSError):
                    connection.recv(4096)
                    head = (
                        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-999/1000\r\nConnection: close\r\n\r\n"
                    )
                    connection.sendall(head.encode() + data)
                    for _ in range(400):
                        connection.sendall(bytes(1 << 16))
                        sent.append(1)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        with pytest.raises(StorageError, match="more arrives than was asked for"):
            read(f"http://127.0.0.1:{listening.getsockname()[1]}/a.tar", 0, 1000, 1000)
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert len(sent) < remote.MAX_TRIES * 100  # what sockets hold on their way


def test_nobody_there() -> None:
    """A port that nobody listens to is a matter of time; neither is a name that is not known the user's mistake."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(StorageError, match="refused"):
            read(f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar")


def test_errors_of_the_writer_pass(site: Site) -> None:
    """A full disk is not taken for a failing network."""

    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        download(f"{site.url}/a.tar", 0, 1000, len(DATA), full)
    assert not isinstance(caught.value, StorageError) and len(site.requests) == 1
    assert read(f"{site.url}/a.tar", 0, 1000) == DATA[:1000], "the rest of the answer was taken for the next one"


@pytest.mark.parametrize(
    "url",
    [
        *("pipe:cat x.tar", "file:///x.tar", "ftp://h/x.tar", "://x.tar", "http://x.tar:port/x.tar", "http:///x.tar"),
        *(
            "http://h/a b.tar",
            "http://h/a\n.tar",
            "http://h/ä.tar",
            "http://h:0/x.tar",
            "s3:///x.tar",
            "http://[/x.tar",
        ),
        *("https://me:secret@h/x.tar", "https://secret@h/x.tar", "https://h/x.tar?secret", "s3://b/x.tar#secret"),
        "https://h/x.tar?X-Amz-Signature=secret",
        *("https://me:12/secret@h/x.tar", "http://a..b/x.tar", f"http://{'a' * 64}/x.tar"),
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    """One line without secrets; a URL that could hold one is never saved."""
    with pytest.raises(UserError) as caught:
        check_url(url)
    assert "secret" not in str(caught.value).replace("a secret", "") and "\n" not in str(caught.value)
    assert "secret" not in without_secrets(url)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3 and gs need an optional dependency."""
    import fsspec

    def missing(*args: object, **more: object) -> object:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match=re.escape("s3://b/x.tar: s3:// needs a package")):
        read("s3://b/x.tar")


def like(name: str, cause: str = "", **values: object) -> Exception:
    """An error as botocore and google.auth, which need not be installed, name theirs; its text holds a secret."""
    error = type(name, (Exception,), values)("secret")
    error.__cause__ = like(cause) if cause else None
    return error


def answered(status: int, code: str) -> Exception:
    """What botocore raises for an answer of AWS."""
    response = {"Error": {"Code": code, "Message": "secret"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return like("ClientError", response=response)


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (like("NoCredentialsError"), UserError, "no credentials in the environment; a public file is read by"),
        (like("PartialCredentialsError"), UserError, "no credentials in the environment"),
        (
            like("ProfileNotFound"),
            UserError,
            r"cannot be signed with the environment's credentials \(ProfileNotFound\)",
        ),
        (like("UnauthorizedSSOTokenError"), UserError, "cannot be signed with"),
        (like("RefreshError"), UserError, "cannot be signed with"),
        (AttributeError("secret"), UserError, "cannot be signed with"),  # google: these credentials have no key
        (PermissionError("secret"), UserError, "cannot be signed with"),
        (FileNotFoundError("secret"), UserError, "cannot be signed with"),
        (answered(403, "AccessDenied"), UserError, r"may not be read \(status 403\)"),
        (answered(404, "NoSuchBucket"), UserError, r"not found \(status 404\)"),
        (answered(400, "ExpiredToken"), UserError, r"the server refuses it \(status 400\)"),
        (like("Forbidden", code=403), UserError, "may not be read"),
        (answered(503, "SlowDown"), StorageError, r"\(cannot be signed, ClientError, after 11 tries\)"),
        (answered(429, "TooManyRequests"), StorageError, "after 11 tries"),
        (like("RefreshError", retryable=True), StorageError, "after 11 tries"),
        (like("RefreshError", cause="TransportError"), StorageError, "after 11 tries"),
        (like("EndpointConnectionError"), StorageError, "cannot be signed, EndpointConnectionError"),
        (TimeoutError("secret"), StorageError, "cannot be signed, TimeoutError"),
    ],
    ids=str,
)
def test_errors_of_signing(error: Exception, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, no bucket, access denied: no later try helps, exit 2. What may pass is tried again, then 75."""
    import fsspec

    tried = []

    class Files:
        def sign(self, *args: object, **options: object) -> str:
            tried.append(1)
            raise error

    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: Files())
    with pytest.raises(kind, match=said) as caught:
        num_bytes_of("s3://b/x.tar")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(tried) == (1 if kind is UserError else remote.MAX_TRIES)


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed addresses of an S3 server: exact ranges, a missing key told, no signature in the message."""
    with s3_server(monkeypatch) as client:
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="a.tar", Body=DATA)
        assert num_bytes_of("s3://bucket/a.tar") == len(DATA)
        assert read("s3://bucket/a.tar", 5, 300_000) == DATA[5:300_000]
        with pytest.raises(UserError, match="not found") as caught:
            read("s3://bucket/b.tar")
        assert "ignature" not in str(caught.value)


def test_many_faults_at_random(site: Site) -> None:
    """A fifth of the answers fail in some way: every byte arrives, once."""
    site.fault = at_random(0.2, tuple(kind for kind in FAULTS if kind not in ("bytes", "silence", "stall")))
    for start in range(0, len(DATA), 10_000):
        assert read(f"{site.url}/a.tar", start, start + 10_000) == DATA[start : start + 10_000]
    assert site.faults.total() > 5


def test_the_waits_of_all_tries_are_as_long_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/data.md: 11 times in a row, in about 20 s; the longest wait is reached."""
    waited: list[float] = []
    monkeypatch.undo()  # `hasty`
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: (low + high) / 2)
    for tries in range(1, remote.MAX_TRIES):
        remote.wait_before(tries)
    assert remote.MAX_TRIES == 11 and 18 < sum(waited) < 24 and max(waited) == 0.75 * remote.MAX_WAIT_S

"""Weights by name, against servers of this machine that stand in for Google's bucket and the hub."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import google_crc32c
import pytest
import torch
from huggingface_hub import constants
from torch import nn
from web import Site, served
from weights_on_disk import ROOT, in_memory, one_line, one_line_error, randomised, run_tool, tiny_model

from pretrain.data import remote
from pretrain.errors import StorageError, UserError
from pretrain.models.build import build_model
from pretrain.models.by_name import check_name, fetched, is_name, licence_of
from pretrain.models.google import write_google
from pretrain.models.google_files import BUCKET, FILES, SHORT, google_file
from pretrain.models.timm_folder import write_timm_folder
from pretrain.models.transformers_folder import PROCESSOR, write_transformers_folder
from pretrain.models.weights import load_model, read_weights, results_folder

NAME, IN_BUCKET = "google:ViT-B_16", "imagenet21k/ViT-B_16.npz"
OWNED, COMMIT = "hf-hub:somebody/tiny", "0123456789abcdef0123456789abcdef01234567"
DEAD = "http://127.0.0.1:9"  # the port of "discard", where nobody listens


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of the test's own, short waits, and no server but the one that a test names."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PRETRAIN_GOOGLE_MODELS", DEAD)
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "MAX_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """What the servers hold."""
    return randomised(build_model(tiny_model(), 5))


@pytest.fixture(scope="module")
def bucket(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Google's bucket. Never change it."""
    folder = tmp_path_factory.mktemp("bucket")
    (folder / IN_BUCKET).parent.mkdir()
    write_google(in_memory(model, tiny_model()), folder / IN_BUCKET, "released")
    return folder


@pytest.fixture(scope="module")
def repository(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm writes it. Never change it."""
    folder = tmp_path_factory.mktemp("repository")
    write_timm_folder(in_memory(model, tiny_model(gelu="exact")), folder)
    return folder


def same(path: Path | str, model: nn.Module) -> bool:
    """Whether weights are those of a model, tensor by tensor."""
    found, expected = load_model(path).state_dict(), model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# --- Google ----------------------------------------------------------------------------------------------------------


def crc(data: bytes) -> dict[str, str]:
    """The header by which Google's storage tells a checksum."""
    return {"x-goog-hash": f"crc32c={base64.b64encode(google_crc32c.Checksum(data).digest()).decode()},md5=AAAA"}


@contextmanager
def google(bucket: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Iterator[Site]:
    """The bucket, served."""
    with served(Site(bucket, **{"headers": crc((bucket / IN_BUCKET).read_bytes()), **options})) as site:  # pyright: ignore[reportArgumentType]
        monkeypatch.setenv("PRETRAIN_GOOGLE_MODELS", site.url)
        yield site


def test_googles_file_is_fetched_once_and_said(
    bucket: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The right weights; a line with address, size, licence and place; without the server the cache serves."""
    with google(bucket, monkeypatch) as site:
        assert same(NAME, model)
    told = capsys.readouterr()
    kept = tmp_path / "cache" / "google" / IN_BUCKET
    (line,) = told.err.splitlines()
    assert line.startswith(f"{NAME}: fetching {site.url}/{IN_BUCKET} (0.1 MiB, Apache-2.0) to {kept}") and not told.out
    monkeypatch.setenv("PRETRAIN_GOOGLE_MODELS", DEAD)
    assert same("google:imagenet21k/ViT-B_16", model) and capsys.readouterr().err == ""
    assert licence_of(NAME) == "apache-2.0"  # for the card
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize(
    ("fault", "headers", "error", "message"),
    [
        ("404", {}, UserError, "not found (status 404)"),
        ("bytes", None, UserError, "has crc32c "),
        ("", {"x-goog-hash": "crc32c=AAAAAA=="}, UserError, "removed, the same command fetches it anew"),
    ],
)
def test_a_wrong_answer_of_google_is_one_line_and_leaves_nothing(
    fault: str,
    headers: dict[str, str] | None,
    error: type[Exception],
    message: str,
    bucket: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not there, damaged on the way, another file than was published: no file stays that a later call would take."""
    faults: dict[str, object] = {"fault": lambda number: fault if number or fault == "404" else ""}
    with google(bucket, monkeypatch, **faults, **({} if headers is None else {"headers": headers})):
        with pytest.raises(error, match=re.escape(message)) as raised:
            fetched(NAME)
    assert NAME in one_line(raised.value)
    assert not list((tmp_path / "cache" / "google" / "imagenet21k").iterdir())


def test_a_mirror_without_a_scheme_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the variable, before anything is tried."""
    monkeypatch.setenv("PRETRAIN_GOOGLE_MODELS", "mirror.example/vit_models")
    with pytest.raises(
        UserError, match="^PRETRAIN_GOOGLE_MODELS=mirror.example/vit_models: expected an address"
    ) as told:
        fetched(NAME)
    one_line(told.value)


def test_a_published_sha256_is_compared(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table knows a checksum, the server's own word does not count."""
    row = google_file("ViT-B_16")
    for sha256, fits in ((hashlib.sha256((bucket / IN_BUCKET).read_bytes()).hexdigest(), True), ("0" * 64, False)):
        monkeypatch.setitem(FILES, SHORT["ViT-B_16"], row._replace(sha256=sha256))
        with google(bucket, monkeypatch, headers={}):
            if fits:
                fetched(NAME).unlink()
            else:
                with pytest.raises(UserError, match="has sha256 .*expected 0000"):
                    fetched(NAME)


def test_a_cut_download_goes_on_at_the_byte_reached(
    bucket: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut within a call, and for good: what has arrived is asked for no second time, and the weights are right."""
    total = (bucket / IN_BUCKET).stat().st_size
    monkeypatch.setattr(remote, "MAX_TRIES", 2)
    with google(bucket, monkeypatch, fault=lambda number: "half-way" if number else "") as site:
        with pytest.raises(StorageError, match=r"cannot be read for now .*put it at .*ViT-B_16\.npz") as raised:
            fetched(NAME)
    part = tmp_path / "cache" / "google" / f"{IN_BUCKET}.part"
    reached = part.stat().st_size
    assert 0 < reached < total and one_line(raised.value) and sum(end - start for _, start, end in site.requests) > 0
    capsys.readouterr()
    with google(bucket, monkeypatch) as site:
        assert same(NAME, model)
    assert [start for _, start, _ in site.requests] == [0, reached] and site.sent == 1 + total - reached
    assert "going on at" in capsys.readouterr().err and not part.exists()


def test_two_processes_fetch_once(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a node ask at the same time: one fetches, the others wait for it."""
    with google(bucket, monkeypatch, chunk_bytes=4096) as site:
        found: list[Path] = []
        threads = [threading.Thread(target=lambda: found.append(fetched(NAME))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3 and len(site.requests) == 2 and found[0].read_bytes() == (bucket / IN_BUCKET).read_bytes()


def test_the_table_of_googles_files() -> None:
    """Names of the paper and of AugReg, each once, as an address; what is not in it is refused with the nearest."""
    assert google_file("ViT-B_16") == google_file("imagenet21k/ViT-B_16.npz") == FILES["imagenet21k/ViT-B_16"]
    assert google_file("B_16").path.startswith("augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz")
    assert all(path.path.count("/") == 1 and path.path.endswith(".npz") for path in FILES.values())
    assert set(SHORT.values()) < set(FILES) and len(FILES) > 50 and BUCKET.startswith("https://")
    with pytest.raises(UserError, match=r"Did you mean: 'ViT-B_16'\?"):
        google_file("ViT-B16")
    assert google_file("augreg/other-run+1.5").path == "augreg/other-run+1.5.npz"
    for wrong in ("", "../x", "other/x", *("augreg/" + x for x in ("", "../x", "..", "a" * 300, "a b", "a\n", "a\0"))):
        with pytest.raises(UserError, match="not in the table"):
            google_file(wrong)


def test_the_table_holds_what_timm_knows() -> None:
    """timm's addresses of Google's bucket, found in the installed timm: none is missing here."""
    import timm.models

    of_timm = Path(timm.models.__file__).parent.glob("vision_transformer*.py")
    urls = re.findall(rf"{BUCKET}/([^'\"]+)\.npz", "".join(path.read_text(encoding="utf-8") for path in of_timm))
    assert len(urls) > 30 and not set(urls) - FILES.keys()


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """A hub of this machine with one repository, `owner/name`, and planted faults."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.url = folder, [], ""
        self.fault: Callable[[str, str], str] = lambda method, file: ""
        self.repository = "somebody/tiny"
        self.revisions: dict[str, set[str]] = {}  # asked for, by file
        self.asked_in_vain: list[str] = []  # files that are not there

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answers the API's question for the repository, and those for its files."""
        path = handler.path.partition("?")[0]
        if path == f"/api/models/{self.repository}":
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(self.folder.iterdir())]
            about = {"id": self.repository, "siblings": files, "sha": COMMIT, "cardData": {"license": "mit"}}
            return self._send(handler, 200, {}, json.dumps(about).encode())
        match = re.fullmatch(f"/{self.repository}/resolve/([^/]+)/(.+)", path)
        if not match or not (file := self.folder / match[2]).is_file():
            code = "EntryNotFound" if match else "RepoNotFound"
            self.asked_in_vain += [match[2]] if match else []
            return self._send(handler, 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b"")
        self.revisions.setdefault(file.name, set()).add(match[1])
        start = re.match(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        first = int(start[1]) if start else 0
        self.requests.append((handler.command, file.name, first))
        data, fault = file.read_bytes(), self.fault(handler.command, file.name)
        large = file.suffix != ".json"
        etag = hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag.hexdigest()}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{etag.hexdigest()}"', "X-Linked-Size": str(len(data))} if large else {}
        if fault == "damaged":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if start:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._send(handler, 206 if start else 200, headers, data[first:], cut=fault == "cut")

    def _send(
        self, handler: BaseHTTPRequestHandler, code: int, headers: dict[str, str], body: bytes, cut=False
    ) -> None:
        handler.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body[: len(body) // 2] if cut else body)
        handler.close_connection = handler.close_connection or cut


@contextmanager
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, served."""
    site = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_repository_is_fetched_once_and_said(
    repository: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The right weights, all of one commit; a line with files, address, size and licence; then the cache serves."""
    with hub(repository, monkeypatch) as site:
        assert same(OWNED, model)
    assert site.revisions == {"config.json": {"main"}, "model.safetensors": {COMMIT}}  # main may move between them
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert f"{OWNED}: fetching config.json, model.safetensors of {site.url}/somebody/tiny (0.1 MiB, mit)" in line
    assert not told.out
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    assert same(OWNED, model) and capsys.readouterr().err == ""
    assert (licence_of(OWNED), licence_of("hf-hub:some/other"), licence_of("runs/x")) == ("mit", None, None)


def test_timms_name_is_its_repository_on_the_hub(
    repository: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm:NAME is the default tag's repository; a tag may be named; no such name is told with the nearest one."""
    with hub(repository, monkeypatch) as site:
        site.repository = "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"
        assert same("timm:vit_base_patch16_224", model)
    assert fetched("timm:vit_base_patch16_224.augreg2_in21k_ft_in1k").name == COMMIT
    with pytest.raises(UserError, match=r"no pretrained weights of this name. Did you mean: 'vit_base_patch16_224"):
        fetched("timm:vit_base_patch16_224.augreg2_in21k_ft_in2k")


def test_a_cut_transfer_from_the_hub_goes_on(
    repository: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request of the tensors begins where the first one broke off."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what has not filled a piece is asked for again
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with hub(repository, monkeypatch) as site:
        cut = ["cut"]
        site.fault = lambda method, file: cut.pop() if (method, file) == ("GET", "model.safetensors") and cut else ""
        assert same(OWNED, model)
    first, second = [start for method, name, start in site.requests if method == "GET" and name == "model.safetensors"]
    assert first == 0 < second


@pytest.fixture(scope="module")
def of_transformers(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it, with a mean and deviation of its own. Never change it."""
    folder = tmp_path_factory.mktemp("of_transformers")
    write_transformers_folder(in_memory(model, tiny_model()), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["pretrain"]  # of our conversion
    (folder / "config.json").write_text(json.dumps(config))
    seen = {"image_mean": [0.4] * 3, "image_std": [0.25] * 3, "resample": 3}
    (folder / PROCESSOR).write_text(json.dumps(seen))
    return folder


def test_transformers_processor_comes_along(
    of_transformers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """How its images are seen is a file of its own; a snapshot that transformers' model alone has fetched lacks it."""
    with hub(of_transformers, monkeypatch) as site:
        folder = fetched(OWNED)
        assert PROCESSOR in capsys.readouterr().err and read_weights(Path(OWNED)).interpolation == "bicubic"
        (folder / PROCESSOR).unlink()
        assert (fetched(OWNED) / PROCESSOR).is_file() and not site.asked_in_vain
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    assert fetched(OWNED) == folder
    (folder / PROCESSOR).unlink()
    with pytest.raises(StorageError, match="cannot be reached"):
        fetched(OWNED)


def test_a_repository_without_processor_is_told_and_asked_once(
    of_transformers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That it is not there is known without a network; its defaults are a warning at each use."""
    folder = Path(shutil.copytree(of_transformers, tmp_path / "repository"))
    (folder / PROCESSOR).unlink()
    with hub(folder, monkeypatch) as site:
        fetched(OWNED)
        assert site.asked_in_vain == [PROCESSOR] and not capsys.readouterr().err.count("warning")
    monkeypatch.setenv("HF_ENDPOINT", DEAD)
    assert read_weights(Path(OWNED)).interpolation == "bilinear"
    assert f"has no {PROCESSOR}: taken are the defaults" in capsys.readouterr().err


def test_another_model_of_transformers_is_refused_before_its_tensors(
    of_transformers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, with the way out; so is a folder."""
    folder = Path(shutil.copytree(of_transformers, tmp_path / "repository"))
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    told = "is transformers' 'dinov2'; of transformers only ViT is read; timm has such weights as timm:NAME"
    with hub(folder, monkeypatch) as site, pytest.raises(UserError, match=f"{OWNED}: config.json: {told}"):
        fetched(OWNED)
    assert {file for _, file, _ in site.requests} == {"config.json"}
    with pytest.raises(UserError, match=told):
        read_weights(folder)


@pytest.mark.parametrize("case", ["no repository", "no tensors", "damaged", "damaged text", "no network", "offline"])
def test_a_wrong_answer_of_the_hub_is_one_line(
    case: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong, and what to do; damaged bytes do not stay in the cache."""
    folder = Path(shutil.copytree(repository, tmp_path / "repository"))
    message, name = {
        "no repository": (r"/somebody/other is not there, or private: `hf auth login`", "hf-hub:somebody/other"),
        "no tensors": ("has no config.json with model.safetensors", OWNED),
        "damaged": (r"model\.safetensors has checksum .*; removed, the same command fetches it anew", OWNED),
        "damaged text": (r"config\.json has checksum ", OWNED),
        "no network": (r"cannot be reached or read .*download config\.json and model\.safetensors from there", OWNED),
        "offline": ("cannot be reached or read .*offline", OWNED),
    }[case]
    if case == "no tensors":
        (folder / "model.safetensors").unlink()
    if case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub(folder, monkeypatch) as site:
        damaged = {"damaged": "model.safetensors", "damaged text": "config.json"}.get(case)
        site.fault = lambda method, file: "damaged" if method == "GET" and file == damaged else ""
        if case == "no network":
            monkeypatch.setenv("HF_ENDPOINT", DEAD)
        error = StorageError if case in ("no network", "offline") else UserError
        with pytest.raises(error, match=message) as raised:
            fetched(name)
        assert one_line(raised.value).startswith((name, site.url))
        site.fault = lambda method, file: ""
        if damaged:
            assert load_model(OWNED) is not None


# --- both ------------------------------------------------------------------------------------------------------------


def test_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three schemes; a file of such a name is a file; results lie in a folder of the name, here."""
    monkeypatch.chdir(tmp_path)
    assert all(map(is_name, ("timm:x", "hf-hub:a/b", "google:x", Path("hf-hub:a/b"))))
    assert not any(map(is_name, ("x", "other:x", "a/timm:x", "timm", "C:x", "")))
    (tmp_path / "timm:x").mkdir()
    assert not is_name("timm:x")
    assert results_folder(Path("hf-hub:a/b"), "evaluation") == Path("hf-hub_a_b/evaluation")
    names = (
        "a a/b/c ../b%c ../x a/.. a/-b a/b- a/b.git a/b--c a/b@ a/b@../../x a/b@x/../y a/b@/x a/b@x@y a/b@x\n".split(
            " "
        )
    )
    for wrong in ("hf-hub:", *(f"hf-hub:{name}" for name in names)):
        with pytest.raises(UserError, match="expected hf-hub:OWNER/NAME"):
            check_name(wrong)
    for right in ("timm/vit_base_patch16_224.augreg_in21k", "a/b@refs/pr/1", "_a/b.c-d@v1.0-rc", f"a/b@{COMMIT}"):
        check_name(f"hf-hub:{right}")


@pytest.mark.parametrize(
    ("name", "told"), [("google:ViT-B16", "ViT-B_16"), ("hf-hub:a/..", "expected hf-hub:OWNER/NAME")]
)
def test_a_misspelt_name_is_told_without_torch(name: str, told: str, tmp_path: Path) -> None:
    """Before what takes seconds to import."""
    code = "import os, runpy, sys; os._exit = sys.exit; sys.argv = ['predict', sys.argv[1], 'x.jpg']\n"
    code += f"try: runpy.run_path({str(ROOT / 'tools' / 'predict.py')!r}, run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert told in one_line_error(done) and done.stdout == "False\n"


@pytest.mark.slow
def test_tools_take_names(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: from the hub that HF_ENDPOINT names into HF_HOME's cache; no network is one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with hub(repository, monkeypatch):
        done = run_tool("convert", OWNED, tmp_path / "out", "--to", "pretrain", "--no-verify")
    assert not done.returncode and f"{OWNED}: fetching" in done.stderr, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "home" / "hub").is_dir()
    (tmp_path / "red.png").touch()
    line = one_line_error(run_tool("predict", "google:B_16", tmp_path / "red.png"), 75)
    assert "download http" in line and "(391 MiB) where there is a network, and put it at" in line

"""Weights by name: `timm:NAME`, `hf-hub:OWNER/NAME` and `google:NAME` become files on this machine, fetched once.

Nothing is fetched silently: a line says what, from where, how much, under which licence. Google's files lie in
$PRETRAIN_CACHE (default ~/.cache/vit-pretrain), those of the hub in the hub's own cache ($HF_HOME), which timm shares.
Nothing that was fetched is executed. This module does not import torch, to report a misspelt name at once.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pretrain.config.checks import did_you_mean
from pretrain.data.downloads import Download, cache_folder, fetch, progress, tell, told_size
from pretrain.errors import StorageError, UserError, first_line
from pretrain.json_files import Fields
from pretrain.models.google_files import BUCKET, GoogleFile, google_file
from pretrain.storage import sha256, write_text

SCHEMES = ("timm", "hf-hub", "google")
# What the hub's client, a slow import, accepts: a name begins and ends with a letter, a digit or "_".
_REPOSITORY = re.compile(r"(?!.*(\.\.|--|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w.-]{0,95}(/\w[\w.-]{0,95}){0,3}", re.ASCII)
_TENSORS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # the first that is there
_PROCESSOR = "preprocessor_config.json"  # of transformers' repositories alone, some of which have none
_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


def is_name(weights: Path | str) -> bool:
    """Returns whether weights are given by name, not as a path. An existing file of such a name is taken as a path."""
    scheme, colon, _ = str(weights).partition(":")
    return bool(colon) and scheme in SCHEMES and not Path(weights).exists()


def check_name(weights: Path | str) -> None:
    """Raises UserError for a name that cannot be fetched, as far as that is known without asking a server."""
    scheme, _, name = str(weights).partition(":")
    if scheme == "google":
        google_file(name)
    repository, at, revision = name.partition("@")
    if scheme == "hf-hub" and not (_REPOSITORY.fullmatch(repository) and (not at or _REVISION.fullmatch(revision))):
        raise UserError(f"{weights}: expected hf-hub:OWNER/NAME, or hf-hub:OWNER/NAME@REVISION, as the hub writes them")


def folder_name(weights: Path | str) -> str:
    """Returns the name of a folder of results on such weights: timm_vit_base_patch16_224."""
    return re.sub(r"[^\w.+-]", "_", str(weights))


def fetched(weights: Path | str) -> Path:
    """Returns the file or folder of named weights; what is not in the cache is fetched first, with a line that says so.

    Several processes may call it at once. Raises UserError for a name that does not exist or a download that is not
    what was promised, StorageError when the server cannot be reached: both say what to download and where to put it.
    """
    check_name(weights)
    scheme, _, name = str(weights).partition(":")
    if scheme == "google":
        return _from_google(str(weights), google_file(name))
    repository, _, revision = (_timms(name) if scheme == "timm" else name).partition("@")
    return _from_hub(str(weights), repository, revision or None)


LICENCE = re.compile("[a-z0-9.-]{1,40}")  # a word of the hub's list


def licence_of(weights: Path | str) -> str | None:
    """Returns the licence of named weights in the hub's words, such as apache-2.0; None for others, or if unknown.

    For weights from the hub it is what the hub said when they were fetched.
    """
    if not is_name(weights):
        return None
    scheme, _, name = str(weights).partition(":")
    if scheme == "google":
        return google_file(name).licence.lower()
    repository = (_timms(name) if scheme == "timm" else name).partition("@")[0]
    try:
        told = _licence_file(repository).read_text()[:80].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return told if LICENCE.fullmatch(told) else None


def _licence_file(repository: str) -> Path:
    return cache_folder() / "licences" / f"{repository}.txt"


def _keep_licence(repository: str, licence: object) -> None:
    """Records the licence for the card of a later conversion; the weights are fetched even if it cannot be written."""
    path = _licence_file(repository)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{licence}\n", shared=True)


def _timms(name: str) -> str:
    """The hub's repository of a pretrained model of timm's."""
    import timm
    from timm.models import get_pretrained_cfg

    try:
        found = get_pretrained_cfg(name)
    except RuntimeError:  # a tag that timm does not have
        found = None
    if found is None:
        hint = did_you_mean(name, timm.list_models(pretrained=True))
        raise UserError(f"timm:{name}: timm {timm.__version__} has no pretrained weights of this name.{hint}")
    if not found.hf_hub_id or found.hf_hub_filename:
        place = found.url or f"{found.hf_hub_id}, {found.hf_hub_filename}"
        raise UserError(
            f"timm:{name}: is not on the hub as a folder of timm's, only as {place}; download that yourself"
        )
    return found.hf_hub_id


# --- Google ----------------------------------------------------------------------------------------------------------


def _from_google(name: str, file: GoogleFile) -> Path:
    """The file in the cache."""
    base = (os.environ.get("PRETRAIN_GOOGLE_MODELS") or BUCKET).rstrip("/")
    url, path = f"{base}/{quote(file.path)}", cache_folder() / "google" / file.path
    if not path.is_file() and not base.startswith(("https://", "http://")):
        raise UserError(f"PRETRAIN_GOOGLE_MODELS={base}: expected an address, such as {BUCKET}")
    about = f"{url} ({file.mebibytes:,} MiB)" if file.mebibytes else ""
    return fetch(Download(name, url, path, file.licence, file.sha256, told=about))


# --- the hub ---------------------------------------------------------------------------------------------------------


def _from_hub(name: str, repository: str, revision: str | None) -> Path:
    """The snapshot's folder in the hub's cache, with config.json and tensors in it."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    address = f"{endpoint}/{repository}" + (f"/tree/{revision}" if revision else "")
    with _one_line(name, address):
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import EntryNotFoundError

        if (folder := _cached(repository, revision)) is not None:
            return folder
        info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        wanted = _wanted(sizes, name, address)
        known = [size for file in wanted if (size := sizes[file]) is not None]
        total = sum(known) if len(known) == len(wanted) else None
        licence = getattr(info.card_data, "license", None) or "no licence told"
        _keep_licence(repository, licence)
        cache = constants.HF_HUB_CACHE
        tell(f"{name}: fetching {', '.join(wanted)} of {address} ({told_size(total)}, {licence}) to {cache}")
        with progress(name, total or 0) as advance, _quiet():
            paths = [_hub_file(repository, wanted[0], revision, endpoint, advance)]
            commit = paths[0].parent.name  # for the other files: a branch may move meanwhile
            _check_blob(paths[0], address)
            needs_processor = _needs_processor(paths[0].parent, name)  # refuses other models before the fetch
            paths += [_hub_file(repository, file, commit, endpoint, advance) for file in wanted[1:]]
            if needs_processor and _PROCESSOR not in wanted:
                with suppress(EntryNotFoundError):  # requested for the cache to record that it is absent
                    _hub_file(repository, _PROCESSOR, commit, endpoint, advance)
    for path in paths[1:]:
        _check_blob(path, address)
    return paths[0].parent


def _cached(repository: str, revision: str | None) -> Path | None:
    """The folder of a snapshot that is complete in the cache, else None; a file appears there once it is complete.

    The cache knows that a repository has no processor once the hub's client, ours or transformers', has asked for it.
    """
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    names = {path.name for path in folder.iterdir()}
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    complete = names & {_TENSORS[0], _TENSORS[2]} or (
        _TENSORS[1] in names and bool(shards) and len(shards) == int(shards[0][1])
    )
    if complete and _PROCESSOR not in names and _needs_processor(folder, repository):
        complete = try_to_load_from_cache(repository, _PROCESSOR, revision=folder.name) is _CACHED_NO_EXIST
    return folder if complete else None


def _needs_processor(folder: Path, name: str) -> bool:
    """Whether a snapshot is of transformers' ViT. Raises UserError where it is of another of its models."""
    from pretrain.models.tensors import read_fields  # imports torch, which reading the tensors needs anyway
    from pretrain.models.transformers_folder import is_of_transformers

    return is_of_transformers(Fields(read_fields(folder, "config.json").values, f"{name}: config.json"))


def _wanted(sizes: dict[str, Any], name: str, address: str) -> list[str]:
    """The files to fetch, config.json first. Raises UserError when the repository does not hold what can be read."""
    tensors = next((file for file in _TENSORS if file in sizes), None)
    if "config.json" not in sizes or tensors is None:
        raise UserError(f"{name}: {address} has no config.json with {', '.join(_TENSORS)}; nothing else is read")
    shards = sorted(filter(_SHARD.fullmatch, sizes)) if tensors == _TENSORS[1] else []
    return ["config.json", *([_PROCESSOR] if _PROCESSOR in sizes else []), tensors, *shards]


def _hub_file(repository: str, file: str, revision: str | None, endpoint: str, advance: Callable[[int], None]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Told(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return Path(hf_hub_download(repository, file, revision=revision, endpoint=endpoint, tqdm_class=Told))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the hub's own warning at each retry; the final failure is raised."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_blob(path: Path, address: str) -> None:
    """Compares a fetched file with the server's checksum, its name in the cache: SHA-256, or git's SHA-1 of a text."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        found = sha256(blob)
    elif re.fullmatch("[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:
        return  # a mirror's own etag
    if found != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{address}: {path.name} has checksum {found}, expected {blob.name}: damaged on the way; removed, the same "
            "command fetches it anew"
        )


@contextmanager
def _one_line(name: str, address: str) -> Iterator[None]:
    """Turns the hub client's errors, of many kinds and lines, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from huggingface_hub import errors

        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            raise UserError(
                f"{name}: accept the licence at {address} first, then `hf auth login`, or set HF_TOKEN"
            ) from None
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
            raise UserError(f"{name}: {address} is not there, or private: `hf auth login`, or set HF_TOKEN") from None
        if isinstance(error, errors.HFValidationError):
            raise UserError(f"{name}: {first_line(error)}") from None
        # Errors of its HTTP client, OSError, RuntimeError of its chunked transfer: none is a defect of ours.
        raise StorageError(
            f"{name}: {address} cannot be reached or read ({first_line(error)}); where there is a network, download "
            f"config.json and {_TENSORS[0]} from there into a folder, and give that folder"
        ) from None

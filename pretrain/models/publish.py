"""Results on disk appear complete or not at all: written under another name beside the place, then renamed."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pretrain.errors import UserError
from pretrain.storage import fsync_path

# What a conversion writes; an overwritten folder keeps all else that is in it.
WRITTEN = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "model.onnx", "model.onnx.data")
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)  # another try would not help


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out`, on the same disk, that is gone afterwards.

    Raises UserError where none may be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".tmp-{out.name}-")
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another place") from None
    with made as folder:
        yield Path(folder)


def check_free(out: Path, files: Sequence[Path], *, overwrite: bool) -> None:
    """Raises UserError when something is in the way: `out`, a folder with anything in it, or one of `files`."""
    if files:
        taken = next((path for path in (out, *files) if path.exists()), None)
        if taken is not None and (taken.is_dir() or not overwrite):
            told = "exists; give another name, or --overwrite"
            raise UserError(f"{taken}: {'is a folder; give the name of a file' if taken.is_dir() else told}")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder that is new or empty")
    if _aside(out).exists():
        raise UserError(f"{_aside(out)}: was kept when an --overwrite was interrupted; move it back, or remove it")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"{out}: is not empty; give another folder, or --overwrite to replace the weights in it")


def publish_folder(folder: Path, out: Path) -> None:
    """Moves the complete `folder` to `out`; the old weights there are kept until that is done."""
    _bring_to_disk(folder)
    if not out.exists() or not any(out.iterdir()):
        os.replace(folder, out)
        return fsync_path(out.parent)
    aside = _aside(out)
    os.replace(out, aside)
    try:
        os.replace(folder, out)
    except OSError:
        os.replace(aside, out)
        raise
    for path in aside.iterdir():
        if path.name not in WRITTEN and not (out / path.name).exists():
            os.replace(path, out / path.name)
    fsync_path(out.parent)
    shutil.rmtree(aside)


def publish_files(folder: Path, out: Path, files: Sequence[Path]) -> None:
    """Moves what `folder` holds to `files`, then to `out`, each by one rename; removes old files without a new one."""
    _bring_to_disk(folder)
    for path in [*files, out]:
        if (folder / path.name).exists():
            os.replace(folder / path.name, path)
        else:
            path.unlink(missing_ok=True)
    fsync_path(out.parent)


def _aside(out: Path) -> Path:
    return out.with_name(f".old-{out.name}")


def _bring_to_disk(folder: Path) -> None:
    for path in folder.iterdir():
        fsync_path(path)
    fsync_path(folder)

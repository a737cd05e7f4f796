"""Which checkpoint counts: the newest that is complete and undamaged."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pretrain.checkpoint.layout import DamagedError, read_manifest, step_folders, step_of
from pretrain.cluster import agreement, ranks
from pretrain.errors import UserError
from pretrain.log import warn
from pretrain.storage import crc32c


def newest_valid(folder: Path) -> Path | None:
    """Returns the newest checkpoint that is complete and undamaged, None when there is none. Called by all ranks.

    Each damaged one is passed over with a warning that names the file at fault; ranks share the reading. Raises
    DamagedError when there are checkpoints but none is valid: a silent fresh start would lose the run.
    """
    folders = agreement.from_main(lambda: step_folders(folder))
    for path in folders:
        problems = _damages_shared(path)
        if not problems:
            return path
        if ranks.is_main():
            warn(f"{path}: {problems[0]}; trying the checkpoint before it")
    if folders:
        raise DamagedError(f"{folder}: none of the {len(folders)} checkpoints is valid; move them away to start afresh")
    return None


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint at `path`: a step folder, or the newest valid one of a run. Called by all ranks.

    Raises UserError when there is none, DamagedError when it cannot be used.
    """
    if agreement.from_main(lambda: (path / "MANIFEST.json").is_file()):
        if problems := _damages_shared(path):
            raise DamagedError(f"{path}: {problems[0]}")
        return path
    if agreement.from_main(lambda: (path / "checkpoints").is_dir()):
        newest = newest_valid(path / "checkpoints")
        if newest is not None:
            return newest
    raise UserError(f"{path}: has no checkpoint; expected a run's folder or one of its checkpoints/step-N")


def set_aside_newer(checkpoint: Path) -> None:
    """Renames the checkpoints newer than the one in use, which are damaged, to damaged-step-N. Rank 0 only.

    The run goes on before their step: they must not count as checkpoints kept.
    """
    if ranks.is_main():
        for path in step_folders(checkpoint.parent):
            if step_of(path) > step_of(checkpoint):
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                warn(f"{path} is now {aside.name}: delete it when you have looked at it")


def validate(path: Path) -> None:
    """Checks a checkpoint folder. Raises DamagedError, naming the file and what is wrong with it."""
    if problem := next(_damages(path, share=False), None):
        raise DamagedError(f"{path}: {problem}")


def _damages_shared(path: Path) -> list[str]:
    """What is wrong with a checkpoint, on every rank alike; each reads a share of it."""
    return [problem for found in agreement.gather(list(_damages(path))) for problem in found]


def _damages(path: Path, share: bool = True) -> Iterator[str]:
    """Yields what is wrong, over this rank's share of the files."""
    try:
        files = [(entry["path"], entry["bytes"], entry["crc32c"]) for entry in read_manifest(path)["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"MANIFEST.json cannot be used ({error})"
        return
    rank, world = (ranks.rank(), ranks.world_size()) if share else (0, 1)
    for name, num_bytes, checksum in files[rank::world]:
        file = path / Path(name).name
        try:
            if not file.is_file():
                yield f"{name} is missing"
            elif file.stat().st_size != num_bytes:
                yield f"{name} has {file.stat().st_size} bytes, MANIFEST.json says {num_bytes}"
            elif (found := crc32c(file)) != checksum:
                yield f"{name} has CRC {found}, MANIFEST.json says {checksum}"
        except OSError as error:  # a bad sector, for example
            yield f"{name} cannot be read ({error.strerror})"

"""A run's folder: who may write in it, what it records of each start, and when it is done.

runs/NAME/
  config.yaml  deepspeed.json    the complete config of the last start, and what DeepSpeed was given
  recipe.yaml                    the file that the last start's config was read from, as it was written
  starts.jsonl                   each start: step, versions, commit, ranks, command
  metrics.jsonl  tensorboard/    the curves
  wandb/                         what Weights & Biases keeps here, when asked for
  batch.png  batch.json          the first augmented batch, and where in the picture each image lies, with its classes
  bad_samples.jsonl  skipped_steps.jsonl  damaged_samples.jsonl    what was left out, or used though damaged
  samples-RANK.jsonl             the order, when asked for
  checkpoints/                   see pretrain/checkpoint/layout.py
  copies.json                    with checkpoint.copy_to: the id that tells whose copies they are
  profile/                       traces of steps (profile.py), when asked for: by the config, or by a file PROFILE here
  DONE                           proof of the end: the last step and its validation
  STOP.json                      why the last start ended before it, and whether to start again (ending.py)
  lost-rank-N.txt waiting-rank-N.txt    of a rank that hung, or of one that waited for it: a line, its start, stacks
  .room-for-DONE                 until the end: reserves room for DONE on a disk that logs may fill

Somebody else may have made the folder: nothing is written through a symbolic link in it.
"""

import errno
import fcntl
import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pretrain.cluster import agreement, ranks, restarts, watchdog
from pretrain.cluster.jobs import PART_OF
from pretrain.config import MAX_STEP, Config, config_to_yaml
from pretrain.errors import PASSING_ERRORS, LostProcessError, StorageError, TakenOverError, UserError
from pretrain.json_files import Fields, read_bytes
from pretrain.log import TIME_FORMAT, JsonLines, not_a_link, rewind, warn
from pretrain.provenance import UNKNOWN, commit, versions
from pretrain.storage import fsync_path, write_text

_RESTARTS = ("SLURM_RESTART_COUNT", restarts.COUNT, "TORCHELASTIC_RESTART_COUNT")
_JOB = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", *_RESTARTS)
_STARTS, _LOCK, _ROOM = "starts.jsonl", "lock", ".room-for-DONE"
_ROOM_BYTES = 4096  # more than DONE ever has: a step and some scores
_MAX_RECIPE_BYTES = 1 << 20
SEEN_WITHIN_S = 60.0  # an NFS client may remember for so long that a file was not there
_CLAIM_TRIES = 20  # half a second each: a killed run's last processes may need seconds to go


@dataclass(frozen=True)
class Claim:
    """A run's folder in which this start may write until it closes the claim, or another start takes it over.

    Locks do not prevent that where the file system has none, or only for each node (Lustre's localflock), or where a
    server gave up the lock of a node that was cut off and comes back.
    """

    folder: Path
    token: str  # in the lock's file
    lock: TextIO | None  # open on rank 0, None on others

    def check(self) -> None:
        """Raises TakenOverError, on all ranks, when another start has claimed the folder since. Called by all ranks."""
        agreement.from_main(self._check)

    def _check(self) -> None:
        assert self.lock is not None
        with suppress(OSError):  # the disk is away, as whatever is written next will find
            # Through the descriptor that holds the lock: whoever closes another one of the same file loses it.
            if os.pread(self.lock.fileno(), len(self.token), 0).decode(errors="replace") != self.token:
                raise TakenOverError(
                    f"{self.folder}: another start of this run has taken it over, and this one ends without a save; "
                    "let only one at a time train in a folder"
                )

    def close(self) -> None:
        """Gives the lock back."""
        if self.lock is not None:
            self.lock.close()


def claim(folder: Path) -> Claim:
    """Makes the run's folder and takes its lock, which is held as long as the returned claim is open.

    Raises UserError, on all ranks, when another process trains in it, when it cannot be written, or when a rank's node
    does not see it; StorageError when it cannot be written for now; LostProcessError when a restart finds it locked.
    """
    held: list[TextIO] = []
    token = agreement.from_main(lambda: _take_lock(folder, held))

    seen, until = False, time.monotonic() + SEEN_WITHIN_S
    while True:
        # Rank 0 must not read the file: a process that closes any descriptor of a file loses its lock on it.
        seen = seen or ranks.is_main() or _holds(folder / _LOCK, token)
        if not agreement.any_rank(not seen and time.monotonic() < until):
            break
        time.sleep(0.5)
    why = f"{folder}: rank {ranks.rank()} does not see it; give output= on a disk that all share"
    with again_if_started(folder):
        agreement.raise_together(None if seen else UserError(why))
    watchdog.belongs_to(token)  # now that all ranks know it: a rank lost earlier is reported without it
    return Claim(folder, token, held[0] if held else None)


def _holds(path: Path, token: str) -> bool:
    with suppress(OSError):
        return path.read_text() == token
    return False


def _take_lock(folder: Path, held: list[TextIO]) -> str:
    """Locks the folder, appends the open lock file to `held`, and returns the token that it wrote into it."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "a+", opener=not_a_link)
    except OSError as error:
        if error.errno in PASSING_ERRORS or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{folder}: cannot be written for now ({error.strerror}); the same command goes on when it can"
            ) from None
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another output=") from None
    held.append(file)
    try:
        _lock(file, folder)
    except (UserError, LostProcessError):
        file.close()
        raise
    token = uuid.uuid4().hex
    with _named(folder / _LOCK):
        file.truncate(0)
        file.write(token)
        file.flush()
        os.fsync(file.fileno())  # otherwise an NFS client may not send it as long as the file is open
    return token


def _lock(file: TextIO, folder: Path) -> None:
    for _attempt in range(_CLAIM_TRIES):
        try:
            return fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loaders, gone with a kill
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # these two mean that somebody holds the lock
                return warn(
                    f"{folder}: its file system does not support locks ({error.strerror}); "
                    "make sure that no second process trains in this folder"
                )
            time.sleep(0.5)
    if any(os.environ.get(name, "0") != "0" for name in _RESTARTS):
        # A node that the scheduler has lost may still train, and a server keeps the lock of a dead node for 90 s.
        raise LostProcessError(
            f"{folder}: is still locked, perhaps by the start before this one, whose node does not answer; "
            "the same command goes on when it is gone"
        )
    # If another command started this one, name= is not an option that its user can give.
    instead = ", or choose another folder" if PART_OF in os.environ else ", or choose another name="
    raise UserError(f"{folder}: another process trains in this folder; wait for it{instead}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns an OSError, which for a full disk names no file, into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror}); make room, and the same command goes on"
        ) from None


def has_started(folder: Path) -> bool:
    """Returns whether an earlier start came as far as its first step."""
    return (folder / _STARTS).is_file()


@contextmanager
def again_if_started(folder: Path) -> Iterator[None]:
    """Gives a UserError exit code 75 if an earlier start of the run came further: a node has changed, not the command.

    As when a GPU has failed, or a disk is not mounted there: the next start may get another node.
    """
    try:
        yield
    except UserError as error:
        if has_started(folder):
            error.exit_code = StorageError.exit_code
        raise


def is_done(folder: Path, config: Config) -> bool:
    """Returns whether the run has reached config.total_steps, on every rank alike."""

    def reached() -> bool:
        path = folder / "DONE"
        try:
            return Fields.read(path).integer("step", 0, MAX_STEP) >= config.total_steps
        except (OSError, UserError):
            return False

    return agreement.from_main(reached)


def mark_done(folder: Path, step: int, metrics: dict[str, float]) -> None:
    """Writes DONE, on rank 0: an exit status alone proves nothing, as launchers lose it.

    It goes into the room that the start reserved for it, so that it can be written to a disk that logs have filled.
    """
    if not ranks.is_main():
        return
    with _named(folder / "DONE"):
        with open(folder / _ROOM, "wb", opener=_keep_blocks) as file:
            file.write(json.dumps({"step": step, **metrics}).encode() + b"\n")
            file.truncate()
        fsync_path(folder / _ROOM)
        os.replace(folder / _ROOM, folder / "DONE")
        fsync_path(folder)


def _keep_blocks(path: str, flags: int) -> int:
    return not_a_link(path, flags & ~os.O_TRUNC)


def record_start(
    folder: Path,
    config: Config,
    deepspeed_config: dict[str, Any],
    step: int,
    recipe: Path | None,
    *,
    branched: bool,
    facts: Mapping[str, Any],
) -> None:
    """Records what this start runs with, and drops log lines after `step`, which will be written again. For rank 0.

    recipe: the file that the config was read from. branched: it goes on from another run's checkpoint.
    facts: what a reader of the report asks first: parameters, data set, device.
    Raises StorageError where the config cannot be written.
    """
    with _named(folder):
        logs = [path for path in folder.glob("*.jsonl") if path.name != _STARTS]  # which records all starts
    reached = max((rewind(path, step) for path in logs), default=step)
    texts = {"config.yaml": config_to_yaml(config), "deepspeed.json": json.dumps(deepspeed_config, indent=2) + "\n"}
    for name, text in {**texts, _ROOM: " " * _ROOM_BYTES}.items():
        with _named(folder / name):
            write_text(folder / name, text)
    with _named(folder / "DONE"):
        (folder / "DONE").unlink(missing_ok=True)  # of a run with a smaller total_steps
    if recipe is not None:
        _keep_recipe(recipe, folder)
    if unknown := [name for name, version in versions().items() if version == UNKNOWN]:
        warn(f"the versions of {', '.join(unknown)} cannot be read, and are recorded as {UNKNOWN}")
    _cut_torn_start(folder / _STARTS)
    start = {
        "step": step,
        **({"branched": True} if branched else {}),
        "lost_steps": reached - step,  # that were logged, and are done again
        "time": time.strftime(TIME_FORMAT),
        "world_size": ranks.world_size(),
        "seed": config.seed,
        "global_batch": config.data.global_batch,
        "held_out": config.data.held_out,
        "subset": config.data.subset,
        "repeats": config.data.repeats,
        "samples_logged": config.log.samples,
        "starts_before": digest_of_starts(folder),
        "job": {name: os.environ[name] for name in _JOB if name in os.environ},
        "command": sys.argv,
        "recipe": None if recipe is None else str(recipe),
        "commit": commit(),
        "versions": versions(),
        **facts,
    }
    JsonLines(folder / _STARTS).append(start)


def _cut_torn_start(path: Path) -> None:
    """Drops a last line that a power loss left half written: the next record must not be appended to it."""
    try:
        text = read_bytes(path)
        if torn := len(text) - (text.rfind(b"\n") + 1):
            with open(path, "r+b", opener=not_a_link) as file:
                file.truncate(len(text) - torn)
            warn(f"{path}: removed {torn} bytes, the incomplete record of an earlier start")
    except FileNotFoundError:
        return
    except (OSError, UserError) as error:
        warn(f"{path}: its last line could not be checked ({error})")


def digest_of_starts(folder: Path) -> str:
    """Returns the SHA-256 of starts.jsonl so far; of an empty file if it cannot be read.

    The next start and each checkpoint record it, so that tools/audit.py detects a start that was changed or removed.
    """
    try:
        return hashlib.sha256(read_bytes(folder / _STARTS)).hexdigest()
    except (OSError, UserError):
        return hashlib.sha256(b"").hexdigest()


def _keep_recipe(recipe: Path, folder: Path) -> None:
    """Copies the recipe, whose header states the expected score: the report reads no file outside the folder."""
    try:
        with recipe.open("rb") as file:
            text = file.read(_MAX_RECIPE_BYTES)
        write_text(folder / "recipe.yaml", text.decode(errors="replace"))
    except OSError as error:
        warn(f"{recipe}: could not be copied to {folder / 'recipe.yaml'} ({error.strerror})")

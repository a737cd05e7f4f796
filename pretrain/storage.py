"""Files on disk: complete or absent, synced, and their checksums.

A file is written under a temporary name in its own folder, synced, and renamed: a kill, a full disk or a power cut
leaves the old file or the new one, never a torn one.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import google_crc32c


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a name in the same folder to write to; when the block ends well, that file becomes `path`.

    After an error it is removed and `path` is as before. shared: several processes, also on other nodes, may write the
    same file at the same time; the last one wins. Raises OSError.
    """
    own, name = f"{_machine()}-{os.getpid()}-" if shared else "", path.name
    if len(os.fsencode(own + name)) > _MAX_NAME_BYTES:
        name = f"{zlib.crc32(os.fsencode(name)):08x}"
    temporary = path.with_name(f".tmp-{own}{name}")
    if temporary.is_symlink():  # somebody else's, and writing would follow it
        temporary.unlink()
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(path)  # write() does not say which disk is full
        raise
    fsync_path(path.parent)


_MAX_NAME_BYTES = 255 - len(".tmp-")  # as most file systems allow
_START_LETTERS = 12  # of the random boot id: enough to tell all machines apart


@cache
def _machine() -> str:
    """Names where process ids count: the host's name and boot id and, as a container may have its own, the namespace.

    Machines may share a name, as copies of one image do, and the first namespace has the same number everywhere; boot
    ids differ.
    """
    started, numbering = "", 0
    with suppress(OSError):  # not Linux
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:_START_LETTERS]
        numbering = os.stat("/proc/self/ns/pid").st_ino
    return f"{socket.gethostname()}-{started}-{numbering}"


def remove_left_over(folder: Path) -> None:
    """Removes temporary files of `shared` writes whose processes, on this machine, have ended.

    Nothing is known of processes on other machines. Raises OSError.
    """
    for path in folder.iterdir():  # glob hides errors
        found = re.fullmatch(rf"\.tmp-{re.escape(_machine())}-([0-9]{{1,9}})(-.*)?", path.name, re.DOTALL)
        if found and not _runs(int(found[1])):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    try:  # a zombie has ended; in a container without an init nobody reaps it
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def write_text(path: Path, text: str, *, errors: str = "strict", shared: bool = False) -> None:
    """Makes `path` a UTF-8 file with this text, or leaves it as it was; see `replacing`."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


# Some network and FUSE file systems cannot sync a folder; there a rename is as safe as it gets.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def fsync_path(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a folder with all in it, or a link, never what it leads to. Nothing there is fine.

    Raises OSError.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


_READ_BYTES = 1 << 20  # short, because a sum holds the GIL and training runs beside it


def crc32c(path: Path) -> str:
    """Returns the CRC-32C of a file as 8 hex digits."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            checksum.update(block)
    return checksum.hexdigest().decode()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_MOUNTS = Path("/proc/self/mounts")
# By the type in the system's table of mounts: file systems that ask another machine for each read.
_NETWORK_FILE_SYSTEMS = {"nfs": "NFS", "nfs4": "NFS", "lustre": "Lustre", "gpfs": "GPFS", "beegfs": "BeeGFS"}
_NETWORK_FILE_SYSTEMS |= {"ceph": "CephFS", "wekafs": "WekaFS", "panfs": "PanFS", "cifs": "CIFS", "smb3": "CIFS"}
_NETWORK_FILE_SYSTEMS |= {"afs": "AFS", "9p": "9p", "autofs": "autofs"}
_OF_CONTAINERS = "fuse.fuse-overlayfs"  # of file systems called fuse.NAME the one that is local


def network_file_system(path: Path) -> str | None:
    """Returns the name of the network file system that a path lies on, None if it is local or not known.

    The path need not exist yet. What is mounted by FUSE (gcsfuse, sshfs, JuiceFS ...) counts, by its own name.
    """
    try:
        place, lines = path.resolve(), _MOUNTS.read_text(errors="surrogateescape").split("\n")
    except OSError:
        return None
    kind, depth = "", 0
    for line in filter(None, lines):
        _, point, its_kind, *_ = line.split(" ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))  # a blank is \040
        if place.is_relative_to(point) and len(point.parts) >= depth:  # of two at one point the later hides the first
            kind, depth = its_kind, len(point.parts)
    if kind.startswith("fuse.") and kind != _OF_CONTAINERS:
        return kind.removeprefix("fuse.")
    return _NETWORK_FILE_SYSTEMS.get(kind)

"""Finds the data files of a folder: hidden and system files are skipped, and counted by kind.

Links to folders are followed; a file reached twice is found twice (see `sources.same_files`).
"""

import errno
import os
from collections import Counter
from pathlib import Path

from pretrain.errors import UserError

# Of Windows, macOS, Synology and QNAP, Linux; hidden ones (.DS_Store, .Trash-1000, ._x.jpg) begin with a dot.
_SYSTEM_NAMES = {
    "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information",
    "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
}  # fmt: skip


def is_of_the_system(name: str) -> bool:
    """Returns whether a file or folder of this name is hidden or belongs to an operating system."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def files_below(folder: Path, passed_over: Counter[str] | None = None) -> list[Path]:
    """Returns the files below a folder, sorted; adds to `passed_over` how many were not taken, by kind.

    Links to folders are followed, except one that leads back up. Raises UserError on a link to nothing, on a loop of
    links, or on a folder that cannot be read: images would be missing silently.
    """
    skipped = Counter() if passed_over is None else passed_over
    found = []
    for place, folders, names in os.walk(folder, onerror=_cannot_list, followlinks=True):
        here = Path(place)
        for name in list(folders):
            if is_of_the_system(name):
                skipped["files in hidden and system folders"] += num_files(here / name)
                folders.remove(name)
            elif (here / name).is_symlink() and leads_up(here / name):
                skipped["links that lead back up"] += 1
                folders.remove(name)
        for name in names:
            if is_of_the_system(name):
                skipped["hidden and system files"] += 1
            else:
                refuse_broken_link(here / name)
                if (here / name).is_file():  # sockets and devices are none
                    found.append(here / name)
    return sorted(found)


def leads_up(link: Path) -> bool:
    """Returns whether a link leads to a folder that it lies in."""
    return link.parent.resolve().is_relative_to(link.resolve())


def refuse_broken_link(path: Path) -> None:
    """Raises UserError when a link leads to nothing or in a circle."""
    try:
        os.stat(path)
    except OSError as error:
        if not path.is_symlink():
            raise UserError(f"{path}: cannot be used ({error.strerror})") from None
        why = "leads in a circle" if error.errno == errno.ELOOP else "is not there"
        raise UserError(f"{path}: is a link to {os.readlink(path)}, which {why}; mend or remove it") from None


def num_files(folder: Path) -> int:
    """Returns how many files lie below a folder."""
    return sum(len(names) for _, _, names in os.walk(folder))


def _cannot_list(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror})")

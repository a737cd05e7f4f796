"""Compiled code is kept where the next start finds it: /tmp, torch's own place, is another one on another node.

It lies in the user's cache folder, not in the run's: it is executed, and a run's folder may come from somebody else.
torch looks it up by all that it was made of (the graph, the releases, the device), so that ranks and runs share it; a
file appears complete or not at all, whatever kills its writer.
"""

import fcntl
import os
import stat
import tempfile

from pretrain.cluster import ranks
from pretrain.data.downloads import cache_folder
from pretrain.log import warn

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # torch's variable; Triton's kernels lie in the same folder


def keep_compiled() -> None:
    """Has torch.compile keep its code in PRETRAIN_CACHE, unless TORCHINDUCTOR_CACHE_DIR names a folder.

    A folder that cannot be written or locked, or that others may write to, is a warning: torch's own place serves.
    """
    if _FOLDER in os.environ:
        return
    folder = None
    try:
        folder = cache_folder() / f"compiled-{os.geteuid()}"  # the rest of the cache may be a group's
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(0, "others may write to it")
        with tempfile.TemporaryFile(dir=folder) as file:  # two ranks compile the same, and one waits
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, RuntimeError) as error:  # the latter: nobody knows this user's home
        if ranks.local_rank() == 0:
            why = getattr(error, "strerror", None) or error
            place = folder or "PRETRAIN_CACHE"
            warn(f"{place}: compiled code is not kept there, the next start may compile again ({why})")
        return
    os.environ[_FOLDER] = str(folder)

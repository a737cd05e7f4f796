"""Fetches the public files of evaluation sets, for make_shards --task NAME --download."""

import os
from pathlib import Path

from pretrain.data.downloads import Download, cache_folder, fetch
from pretrain.errors import UserError
from pretrain.tasks.public_files import PUBLIC
from pretrain.tasks.table import Task


def downloaded(task: Task) -> Path:
    """Returns what the reader of a task's original files takes: their folder, or the file itself if it is only one.

    Files lie in $PRETRAIN_CACHE/tasks, each under its server's path; what is there is not downloaded again. With
    PRETRAIN_TASK_MIRROR they come from that address, by their names. Raises UserError for a set without public files,
    and as `fetch`.
    """
    if task.name not in PUBLIC:
        raise UserError(
            f"{task.name} cannot be downloaded here; get it from {task.url} ({task.licence}) and give its files; "
            f"--download has {', '.join(PUBLIC)}"
        )
    mirror = os.environ.get("PRETRAIN_TASK_MIRROR", "").rstrip("/")
    paths = [
        fetch(
            Download(
                name=f"{task.name}: {file.url.rpartition('/')[2]}",
                url=f"{mirror}/{file.url.rpartition('/')[2]}" if mirror else file.url,
                path=cache_folder() / "tasks" / file.url.partition("://")[2],
                licence=task.licence,
                sha256=file.sha256,
                md5=file.md5,
                num_bytes=file.num_bytes,
            )
        )
        for file in PUBLIC[task.name]
    ]
    return paths[0] if len(paths) == 1 else paths[0].parent

"""Runs tasks on a Ray cluster, or in Ray's processes on this machine, with the interface of `results` in pool.py.

For corpora that many machines make together: `ray start` on each, then `make_shards --engine ray` on one of them. Ray
hands out tasks and restarts them when a machine is lost; images do not pass through it, since tasks read and write.
"""

import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pretrain.errors import LostProcessError, StorageError, UserError, first_line
from pretrain.shards.pool import Progress, Result, Task

_ROOT = Path(__file__).resolve().parents[2]  # the package must lie at the same path on all machines


def ray_results(
    function: Callable[[Task, Progress], Result], tasks: Iterable[Task], workers: int, progress: Progress
) -> Iterator[Result]:
    """Yields the result of `function` for each task, in any order; workers: tasks at a time, 0: one per cluster core.

    Connects to the cluster of $RAY_ADDRESS or of this machine, else starts one here. `progress` counts whole tasks.
    Raises what `function` raises, LostProcessError when Ray gives a task up, UserError where Ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--engine ray needs a package: pip install -e '.[ray]'") from None
    try:
        if not ray.is_initialized():
            ray.init(runtime_env={"env_vars": _environment()}, log_to_driver=False, logging_level=logging.ERROR)
        at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray cluster ({first_line(error)})") from None
    counted, left, running = ray.remote(_counted), iter(tasks), []
    shared = ray.put(function)  # once: it may hold megabytes
    folder = os.getcwd()
    try:
        while running := running + [
            counted.remote(shared, task, folder) for task in islice(left, at_once - len(running))
        ]:
            (done,), running = ray.wait(running)
            try:
                result, count = ray.get(done)
            except RayError as error:  # of a task: a class made at run time, with a traceback as its text
                cause = error.cause if isinstance(error, RayTaskError) else error
                if isinstance(cause, Exception) and not isinstance(cause, RayError):
                    raise cause from None
                why = (str(cause) or type(cause).__name__).splitlines()[0]
                raise LostProcessError(
                    f"Ray has given up a task ({why}); the same command goes on with the shards that are complete"
                ) from None
            progress(count)
            yield result
    finally:
        for reference in running:
            ray.cancel(reference)


def _environment() -> dict[str, str]:
    """What tasks need to import this package, where it is not installed."""
    return {"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def _counted(function: Callable[[Any, Progress], Any], task: Any, folder: str) -> tuple[Any, int]:
    """A task's result, and how many samples it has reported. folder: what relative paths are relative to."""
    told: list[int] = []
    with suppress(OSError):  # absolute paths work on a machine without that folder
        os.chdir(folder)
    try:
        return function(task, told.append), sum(told)
    except FileNotFoundError as error:
        raise StorageError(
            f"{error.filename}: not found on {platform.node()}; machines have to see SOURCE and OUT by the same path"
        ) from None

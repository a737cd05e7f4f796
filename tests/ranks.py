"""Runs a function on several gloo ranks, or a command. Processes are forked from one that has imported torch and
DeepSpeed."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pretrain.cluster.local import free_port, on_cpu, rank_variables

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the forkserver starts: gloo ranks on the CPU, GPU or not

_context = multiprocessing.get_context("forkserver")
# These imports take seconds: once instead of once a rank. The second one is DeepSpeed's, in the midst of initialize.
_context.set_forkserver_preload(["pretrain.train.run", "deepspeed.runtime.zero.muon.muon_optimizer"])


def start_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Starts `function(*args)` on each rank and returns the processes, with `.results` to read from."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process: Any = _context.Process(target=_run_rank, args=(theirs, rank, world_size, port, function, args))
        with warnings.catch_warnings():
            # multiprocessing starts its tracker again when a test that ended a whole process group has ended it too
            warnings.filterwarnings("ignore", message="resource_tracker: process died", category=UserWarning)
            process.start()
        theirs.close()
        process.results = ours
        processes.append(process)
    return processes


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """Returns the results of `function(*args)` on every rank. Raises AssertionError with a rank's traceback."""
    processes = start_ranks(function, world_size, *args)
    deadline = time.monotonic() + timeout_s
    try:
        outcomes = [_outcome(process, deadline) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [error for error, _ in outcomes if error]
    assert not failures, "\n".join(failures)
    return [result for _, result in outcomes]


def _outcome(process: Any, deadline: float) -> tuple[str | None, Any]:
    if not process.results.poll(max(0.0, deadline - time.monotonic())):
        return "timeout", None
    try:
        return process.results.recv()
    except EOFError:
        return f"died with exit code {process.exitcode}", None


def _run_rank(pipe: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any) -> None:
    os.environ.update({**rank_variables(rank, world_size, port), **on_cpu(1)})
    try:
        pipe.send((None, function(*args)))
    except BaseException:
        pipe.send((f"rank {rank}: {traceback.format_exc()}", None))
    pipe.close()
    os._exit(0)  # a clean exit would wait for the other ranks' collectives


def run_forked(script: Path, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a Python script as `python SCRIPT ARGUMENTS` does, but for the seconds of its imports."""
    with tempfile.TemporaryDirectory() as folder:
        process: Any = _context.Process(
            target=_run_script, args=(script, arguments, Path(folder), dict(os.environ), Path.cwd())
        )
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(script), *arguments], timeout_s)
        told = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([str(script), *arguments], process.exitcode, *told)


def _run_script(script: Path, arguments: Sequence[str], output: Path, environment: dict[str, str], cwd: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv, sys.path[0:0] = [str(script), *arguments], [str(script.parent)]
    code = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

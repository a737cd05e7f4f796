"""What every command line shares: launchers' arguments, one-line errors, exit codes."""

import argparse
import errno
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pretrain.errors import StorageError

_WAIT_FOR_RANK_0_S = 5.0  # the launcher ends all ranks at the first exit, and rank 0 must have spoken


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """Returns a parser whose --help ends with an example, and which accepts what launchers add."""
    result = argparse.ArgumentParser(
        description=description, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by `deepspeed`
    return result


def run(main: Callable[[], int | None]) -> None:
    """Runs a command and exits: 0 when it was done, else the error's `exit_code` after one line on stderr.

    Errors without an exit code are defects of ours and keep their traceback (exit 1). An interrupt exits with 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8, terminals need not know accents
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except KeyboardInterrupt:
        code = _say("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `tool | head`: nobody reads on
        code = 0
    except OSError as error:
        code = _on_os_error(error)
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        if code == 1:
            traceback.print_exc()
        else:
            _say(f"error: {error}", code)
    _leave(code)


# Of the disk, not of the program: full, over quota, read-only, not permitted, failing.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


def _on_os_error(error: OSError) -> int:
    if isinstance(error, StorageError):
        return _say(f"error: {error}", error.exit_code)
    if error.errno in _DISK_ERRORS:
        return _say(f"error: {error.filename or 'writing'}: {error.strerror}; make room, or choose another folder", 75)
    traceback.print_exc()
    return 1


def _say(message: str, code: int) -> int:
    """Rank 0 tells what all ranks met. Another rank tells it only if rank 0, whose exit ends this one too, does not."""
    if _rank() > 0:
        time.sleep(_WAIT_FOR_RANK_0_S)
        message = f"rank {_rank()}: {message}"
    print(message, file=sys.stderr, flush=True)
    return code


def _rank() -> int:
    # Not by pretrain.cluster.ranks: it imports torch, and a wrong key is told at once.
    return int(os.environ.get("RANK", 0))


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)  # other ranks may wait in a collective: a clean shutdown would wait for them
    sys.exit(code)


def shown(text: object) -> str:
    """Returns a text that any terminal and any file can take: what is not UTF-8 in a name is escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def is_text(name: str) -> bool:
    """Returns whether a name from the disk is UTF-8."""
    return shown(name) == name


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on a terminal, nothing elsewhere; yields a function that is told how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    with Progress(*columns, disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)

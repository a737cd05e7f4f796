"""What every command line shares: launchers' arguments, one-line errors, exit codes."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pretrain import distributed
from pretrain.errors import StorageError

_WAIT_FOR_RANK_0_S = 10.0  # at most: rank 0's exit ends this one too


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
    try:
        code = main() or 0
    except KeyboardInterrupt:
        code = _say("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `tool | head`: nobody reads on
        code = 0
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        if code == 1:
            traceback.print_exc()
        else:
            _say(f"error: {error}", code)
    _leave(code)


def _say(message: str, code: int) -> int:
    """Every rank meets the same user's mistake: rank 0 alone tells it, another rank only what it alone knows."""
    if distributed.is_main():
        print(message, file=sys.stderr, flush=True)
    elif code == StorageError.exit_code:  # met by this rank alone
        print(f"rank {distributed.rank()}: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(_WAIT_FOR_RANK_0_S)  # the launcher ends all ranks at the first exit: rank 0 must have spoken
    return code


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if code and distributed.world_size() > 1:
        os._exit(code)  # other ranks may wait in a collective: a clean shutdown would wait for them
    sys.exit(code)


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on a terminal, nothing elsewhere; yields a function that is told how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn()
    with Progress(*columns, disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)

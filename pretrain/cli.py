"""What every command line shares: launchers' arguments, one-line errors, exit codes."""

import argparse
import atexit
import errno
import gc
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO, TypeGuard

from pretrain.cluster.jobs import PART_OF
from pretrain.cluster.signals import end_at_sigterm
from pretrain.cluster.slurm import num_tasks, rank_so_far  # not of ranks, which imports torch: errors come at once
from pretrain.errors import PASSING_ERRORS, StorageError, UserError
from pretrain.escape import shown

_WAIT_FOR_RANK_0_S = 5.0  # the launcher ends all ranks at the first exit, so rank 0 must report first
_ON_ANOTHER_NODE_S = 3.0  # likewise; a lost node is to be reported within 5 s, of which asking the others takes one
_OTHERS_ARRIVE_S = 2.0  # for srun's other tasks to meet the same user's error; less than they wait for rank 0
_INTERRUPTED = 130  # exit code, as of shells
_AGAIN_S = 0.01  # until an interrupt that could not be raised is sent again
# The import names of pyproject.toml's dependencies. Any other module that is missing is a defect.
DEPENDENCIES = frozenset(
    "PIL braceexpand deepspeed google_crc32c huggingface_hub jinja2 matplotlib numpy omegaconf rich safetensors scipy "
    "sklearn tensorboard timm torch torchvision webdataset yaml".split()
)


def _interrupted(*_: object) -> None:
    """Ends the process with the word "interrupted", where Python would show a traceback or die of the signal.

    It flushes nothing: the command's own output is out by then, and a stream may be in the middle of a write.
    """
    if _speaks_first():
        with suppress(OSError):
            os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)


def _end_when_interrupted() -> bool:
    """Makes an interrupt end the process at once; returns False if SIGINT is already handled or ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, _interrupted)
    return True


def _speaks_first() -> bool:
    """Whether this process reports an interrupt: it is rank 0, and no other command of ours has started it."""
    return PART_OF not in os.environ and not rank_so_far(os.environ)


def _in_imports(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Handles errors outside `run`: while a command imports what it needs, or an interrupt after its work."""
    if _is_not_installed(error):
        _leave(_say_not_installed(error))
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    _interrupted()


def _is_not_installed(error: BaseException) -> TypeGuard[ModuleNotFoundError]:
    """Returns whether this Python lacks a dependency, so that it is not the one that `make install` prepared."""
    return isinstance(error, ModuleNotFoundError) and error.name in DEPENDENCIES


def _say_not_installed(error: ModuleNotFoundError) -> int:
    out = "source .venv/bin/activate, or make install first"
    return _say(f"error: {sys.executable} has no {error.name}: {out}", UserError.exit_code)


def _in_destructors(unraisable: "sys.UnraisableHookArgs") -> None:
    """Sends an interrupt again that Python cannot raise, as in callbacks of imports, but would print and lose."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        return _unraisablehook(unraisable)
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(_AGAIN_S, signal.pthread_kill, (main, signal.SIGINT)).start()  # raised in the surrounding code


_unraisablehook = sys.unraisablehook
sys.excepthook, sys.unraisablehook = _in_imports, _in_destructors


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """Returns a parser whose --help ends with an example, and which accepts what launchers add."""
    result = argparse.ArgumentParser(
        description=description, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # added by `deepspeed`
    return result


def check_found(path: Path, expected: str) -> None:
    """Raises UserError when nothing is at `path`: a check before imports that take seconds."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: not found; expected {expected}") from None
    except (OSError, ValueError):  # reported when it is opened
        pass


def check_writable(option: str, file: Path) -> None:
    """Raises UserError if there can be no such file, before measurements of minutes. option: the one that names it."""
    if not file.parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise UserError(f"{option} {file}: is a folder, expected a file")


@contextmanager
def writing(path: Path, option: str = "--out") -> Iterator[None]:
    """Turns an OSError of the block, which writes `path`, into a UserError. option: the one that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); give another {option}") from None


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raises UserError for the first of these options, named as attributes, that is given and below its least."""
    for name, lowest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least {lowest}")


def refuse(arguments: argparse.Namespace, options: Iterable[str], where: str) -> None:
    """Raises UserError for the first of these options, named as they are typed, that is given: it has no effect."""
    for option in options:
        value = getattr(arguments, option[2:].replace("-", "_"))
        if value is not None and value is not False:
            raise UserError(f"{option} has no effect {where}; leave it out")


@contextmanager
def loading() -> Iterator[None]:
    """Wraps imports that take seconds: makes them faster, and tells a user at a terminal.

    An interrupt ends the process at once: nothing is written yet, and torch's C++ code aborts (SIGABRT) when a call of
    it into Python raises.
    """
    word = threading.Timer(2.0, lambda: print("loading torch", file=sys.stderr, flush=True))
    word.daemon = True
    if sys.stderr.isatty():
        word.start()
    gc.disable()  # imports create much and discard nothing: saves a fifth of the time
    had_none = _end_when_interrupted()
    try:
        yield
    finally:
        if had_none:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.enable()
        word.cancel()
        if word.ident is not None:
            word.join()  # forks.can_fork refuses a process with threads


def run(main: Callable[[], int | None]) -> None:
    """Runs a command and ends the process: 0 when it was done, else the error's `exit_code` after one line on stderr.

    Errors without an exit code are defects of ours and keep their traceback (exit 1). An interrupt exits with 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8, terminals need not know accents
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except SystemExit as end:  # argparse has printed what was asked for, or what is wrong
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = _say("interrupted", _INTERRUPTED) if _speaks_first() else _INTERRUPTED
    except BrokenPipeError:  # `tool | head`: nobody reads on
        code = 0
    except OSError as error:
        code = _on_os_error(error)
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        if _is_not_installed(error):
            code = _say_not_installed(error)
        elif code == 1:
            traceback.print_exc()
        else:
            _say(f"error: {error}", code)
    _leave(code)


# Errors of the disk, not of the program: full, over quota, read-only, not permitted, failing.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


def _on_os_error(error: OSError) -> int:
    if isinstance(error, StorageError):
        return _say(f"error: {error}", error.exit_code)
    if error.errno in _DISK_ERRORS or (error.errno in PASSING_ERRORS and error.filename):  # without one: a socket's
        out = "the disk may be away" if error.errno in PASSING_ERRORS else "make room, or choose another folder"
        return _say(f"error: {error.filename or 'writing'}: {error.strerror}; {out}", 75)
    traceback.print_exc()
    return 1


def _say(message: str, code: int) -> int:
    """Reports an error. Ranks other than 0 wait first: if rank 0 reports it too, its exit ends them silently."""
    if (rank := rank_so_far(os.environ)) > 0:
        end_at_sigterm(code)
        beside_rank_0 = os.environ.get("LOCAL_RANK", str(rank)) == str(rank)
        time.sleep(_WAIT_FOR_RANK_0_S if beside_rank_0 else _ON_ANOTHER_NODE_S)
        message = f"rank {rank}: {message}"
    with suppress(OSError):  # nobody reads it; the code still says what happened
        tell(message, sys.stderr)
    return code


def _leave(code: int) -> None:
    unwritten = _flush()
    code = code or unwritten
    if code == UserError.exit_code and num_tasks(os.environ) > 1:  # when this one ends, srun ends the others
        end_at_sigterm(code)
        time.sleep(_OTHERS_ARRIVE_S)
    if code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(code)  # other ranks may wait in a collective: a clean shutdown would wait for them
    end_process(code)


def end_process(code: int) -> None:
    """Ends this process after its threads and exit handlers.

    Not by sys.exit: Python's cleanup of all modules of torch and DeepSpeed takes a second, in which an interrupt would
    kill the process by the signal.
    """
    _end_when_interrupted()  # Python only prints what exit handlers raise
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - as the interpreter waits for threads
    atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _flush() -> int:
    """Flushes what was printed; returns 0, or the exit code for a disk that refuses it. A closed pipe is no error."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # it was closed when this process began
            continue
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # the interpreter would end with 120 for it
            if not isinstance(error, BrokenPipeError):
                code = _say(f"error: the output cannot be written: {error.strerror}", StorageError.exit_code)
    return code


def tell(line: object, stream: TextIO | None = None) -> None:
    """Prints a line, escaped: names of files and classes in it must not control the terminal."""
    print(shown(line), file=stream or sys.stdout, flush=True)


def tell_next(what: str) -> None:
    """Prints what to do next, unless another command has started this one and will say it."""
    if PART_OF not in os.environ:
        with suppress(OSError):  # a full disk, a closed pipe: what was done is done
            tell(f"next: {what}")


def print_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: Sequence[int] = (0,),
    caption: str | None = None,
) -> None:
    """Prints a table in the terminal's width, elsewhere in 80 columns: text_columns, aligned left, are folded to fit.

    The others hold figures, which are never cut or folded: if they alone need more room, the table is wider.
    """
    from rich.console import Console  # 0.1 s to import, only where it is used
    from rich.table import Table
    from rich.text import Text  # a str would be markup, in which a name may open or close a tag

    table = Table(title=Text(shown(title)), caption=None if caption is None else Text(shown(caption)))
    cells = [[Text(shown(cell)) for cell in row] for row in rows]
    least = 1 + len(header) * _BETWEEN
    for number, name in enumerate(map(shown, header)):
        is_text = number in text_columns
        widest = max((row[number].cell_len for row in cells), default=0)
        own = min(_FOLDED, widest) if is_text else widest
        words = max((len(word) for word in name.split()), default=0)  # a column's name is folded between words
        least += max(own, words)
        justify = "left" if is_text else "right"
        table.add_column(Text(name), justify=justify, overflow="fold", min_width=max(own, words))
    for row in cells:
        table.add_row(*row)
    wide = Console().width if sys.stdout.isatty() else _WIDTH
    Console(width=max(wide, least)).print(table)


_WIDTH = 80  # columns of a table where there is no terminal
_FOLDED = 12  # columns that a text keeps at least, if it is as long
_BETWEEN = 3  # columns that a table's line and its blanks take between two cells
_TELL_EVERY_S = 30.0  # progress, where there is no terminal, as in a job's log


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar with rate and time left on a terminal, elsewhere a line on stderr every 30 s.

    Yields a function to call with how many more are done; the first call may count what an earlier start has done.
    """
    if not sys.stdout.isatty():
        yield _Lines(shown(title), total, unit).advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Task as BarTask
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: BarTask) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed else "")

    name = TextColumn("{task.description}", markup=False)  # it may be a data set's
    columns = name, BarColumn(), MofNCompleteColumn(), TextColumn(unit), Rate(), TimeRemainingColumn()
    console = Console()  # rich's global one keeps the stdout of its first use
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(shown(title), total=total)
        yield lambda count: bar.advance(task, count)


class _Lines:
    """Progress as lines, each with the rate since the line before."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done, self._told, self._told_at = 0, 0, time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        seconds = time.monotonic() - self._told_at
        if seconds < _TELL_EVERY_S:
            return
        rate = (self._done - self._told) / seconds
        left = f", {(self._total - self._done) / rate / 60:,.0f} minutes left" if rate else ""
        done = f"{self._done:,} of {self._total:,} {self._unit}"
        tell(f"{self._title}: {done}, {rate:,.0f}/s{left}", sys.stderr)
        self._told, self._told_at = self._done, time.monotonic()

"""Runs a target's inputs in forked workers with limits on time and memory, and says what came out of each."""

import faulthandler
import gc
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from pretrain.data.reader import BadSample
from pretrain.errors import StorageError, UserError

LIMIT_S = 2.0  # of processor time for one input: a slow or busy machine is no fault
LIMIT_BYTES = 300 << 20  # of resident memory above what the worker had before
ADDRESS_BYTES = 1 << 30  # of address space above it: beyond that an allocation fails, so that the machine is safe
FILE_BYTES = 1 << 30  # of one written file
WALL_S = 60.0  # without a word from a worker: it waits for something
RENEW_INPUTS = 1000  # of one worker: its garbage must not count as the next input's memory
EXPECTED: tuple[type[Exception], ...] = (UserError, BadSample, StorageError)
_NO_MEMORY = re.compile(r"allocate memory|unable to allocate|out of memory|bad_alloc", re.IGNORECASE)
_ROOT = f"{Path(__file__).resolve().parents[2]}/"
_OWN_CODE = re.compile(r"/(pretrain|tools|launch)/[\w/]+\.py$")

Seed = bytes | Callable[[], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file, and what reads it."""

    good: Sequence[bytes]  # inputs that are in order: the first has to be accepted
    seeds: Sequence[Seed]  # hand-made ones, tried as they are
    slow: Sequence[Seed]  # the same, of seconds each even when all is well: not for a short run
    mutate: Callable[[bytes, Random], bytes]  # of a good one, or of a hand-made one
    call: Callable[[bytes, Path], object]  # what reads an input; it may write into the folder, which is its own
    errors: tuple[type[Exception], ...] = EXPECTED

    def input(self, name: str, seed: int, number: int, quick: bool) -> bytes:
        """Returns input `number`: half of them hand-made until these are used up, the others changed at random."""
        if number == 0:
            return self.good[0]
        made = self.seeds if quick else (*self.slow, *self.seeds)
        if number % 2 and number // 2 < len(made):
            chosen = made[number // 2]
            return chosen if isinstance(chosen, bytes) else chosen()
        random = Random(f"{name} {seed} {number}")
        light = [data for data in self.seeds[:50] if isinstance(data, bytes) and len(data) < 20_000]
        return self.mutate(random.choice(light if light and random.random() < 0.25 else self.good), random)


@dataclass
class Finding:
    """What must not come out, and the smallest input that brings it out."""

    kind: str  # the exception's type, "time", "memory", "no answer" or a signal's name
    place: str  # the last line of the project's code that ran
    number: int  # of the first input
    count: int = 1
    text: str = ""
    data: bytes = b""


@dataclass
class Report:
    """What came out of a target's inputs."""

    name: str
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    seconds: float = 0.0
    slowest_s: float = 0.0  # processor time of one input
    most_bytes: int = 0  # of memory above the worker's own

    def note(self, number: int, result: dict[str, Any]) -> None:
        """Counts the outcome of one input."""
        self.inputs += 1
        self.slowest_s = max(self.slowest_s, result.get("seconds", 0.0))
        self.most_bytes = max(self.most_bytes, result.get("bytes", 0))
        self.outcomes[result["kind"] if result["ok"] else "FAULT"] += 1
        if not result["ok"]:
            key = result["kind"], result["place"]
            if key in self.findings:
                self.findings[key].count += 1
            else:
                self.findings[key] = Finding(*key, number, text=result.get("text", ""))


def fuzz(
    name: str, target: Target, *, seed: int, first: int, inputs: int, seconds: float, quick: bool = False
) -> Report:
    """Runs inputs from number `first` until there were enough of them, or the time is over."""
    _try_out(target)
    report, begun = Report(name), time.monotonic()
    numbers = iter(range(first, first + inputs))
    while report.inputs < inputs and (left := seconds - (time.monotonic() - begun)) > 0:
        chosen = ((n, lambda n=n: target.input(name, seed, n, quick)) for n in numbers)
        for number, result in _run_worker(target, chosen, left):
            report.note(number, result)
        numbers = iter(range(first + report.inputs, first + inputs))
    report.seconds = time.monotonic() - begun
    return report


def verdict(target: Target, data: bytes) -> dict[str, Any]:
    """Returns what comes out of one input, in a worker of its own."""
    return next(iter(_run_worker(target, iter([(0, lambda: data)]), WALL_S)))[1]


def smallest(target: Target, finding: Finding, data: bytes, seconds: float) -> bytes:
    """Returns a smaller input that brings the same finding out: pieces are taken away until none can go."""
    end, piece = time.monotonic() + seconds, 1 << max(0, len(data).bit_length() - 1)
    while piece and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            shorter = data[:at] + data[at + piece :]
            result = verdict(target, shorter)
            if not result["ok"] and (result["kind"], result["place"]) == (finding.kind, finding.place):
                data = shorter
            else:
                at += piece
        piece //= 2
    return data


def _try_out(target: Target) -> None:
    """Reads a good input here, where all workers come from: what is imported for it is not imported by each of them."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            target.call(target.good[0], Path(folder))
    gc.freeze()  # or each worker's collections look at, and copy, all that was imported


# --- the worker's parent ---------------------------------------------------------------------------------------------


def _run_worker(
    target: Target, inputs: Iterator[tuple[int, Callable[[], bytes]]], seconds: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the results of inputs until a worker ends: by itself, or because an input killed it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(reader)
        _work(target, inputs, time.monotonic() + seconds, writer, folder)
    os.close(writer)
    current, status = None, None
    try:
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            for message in _messages(pipe, child):
                if "kind" in message:
                    yield message["number"], message
                    current = None
                else:
                    current = message["number"]
        _, status = os.waitpid(child, 0)
        child = 0
        if current is not None:
            yield current, _death(status, folder)
        elif status:
            told = (folder / "stderr").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the worker itself failed, status {status}: {told}")
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _messages(pipe: Any, child: int) -> Iterator[dict[str, Any]]:
    """Yields a worker's lines; one that says nothing for WALL_S is killed."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], WALL_S)[0]:
            os.kill(child, signal.SIGKILL)
        if not (part := pipe.read(1 << 16)):
            return
        *lines, rest = (rest + part).split(b"\n")
        yield from map(json.loads, lines)


def _death(status: int, folder: Path) -> dict[str, Any]:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    kind = {signal.SIGPROF: "time", signal.SIGKILL: "no answer", 0: f"exit {os.WEXITSTATUS(status)}"}.get(number)
    stack = (folder / "stderr").read_text(errors="replace")
    if "bad_alloc" in stack or "Unable to allocate" in stack:
        kind = "memory"
    # faulthandler names the innermost call first
    found = re.findall(r'File "([^"]+)", line \d+ in (\S+)', stack)
    lines = (f"{file.removeprefix(_ROOT)} {name}" for file, name in found if name[0] != "<" and _OWN_CODE.search(file))
    own = next(lines, "?")
    return {"ok": False, "kind": kind or signal.Signals(number).name, "place": own, "text": stack[-2000:]}


# --- the worker ------------------------------------------------------------------------------------------------------


def _work(
    target: Target, inputs: Iterator[tuple[int, Callable[[], bytes]]], end: float, writer: int, folder: Path
) -> None:
    """Tells the number of each input before it is read, and the result afterwards. Never returns."""
    code = 3
    try:
        _prepare(folder)
        _one(target, target.good[0], folder / "warm", 0)
        gc.collect()
        base = _resident_bytes()
        soft = _address_bytes() + ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        for done, (number, make) in enumerate(inputs):
            data = make()
            os.write(writer, b'{"number": %d}\n' % number)
            result = {"number": number, **_one(target, data, folder / str(number), base)}
            os.write(writer, json.dumps(result).encode() + b"\n")
            is_used_up = done + 1 >= RENEW_INPUTS or result["bytes"] > LIMIT_BYTES // 2
            if is_used_up or time.monotonic() > end:
                break
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _prepare(folder: Path) -> None:
    output = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable(sys.__stderr__)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    faulthandler.register(signal.SIGPROF, sys.__stderr__, chain=True)  # says where, then dies of it
    warnings.simplefilter("ignore")
    os.fsync = lambda descriptor: None  # nothing here has to outlive the machine
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))


def _one(target: Target, data: bytes, folder: Path, base: int) -> dict[str, Any]:
    """Returns what came out of one input."""
    folder.mkdir()
    os.ftruncate(2, 0)
    result: dict[str, Any] = {"ok": True, "kind": "accepted", "place": "", "text": ""}
    begun = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        target.call(data, folder)
    except BaseException as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        result = _judged(error, target.errors)
        del error
    signal.setitimer(signal.ITIMER_PROF, 0)
    result["seconds"] = time.process_time() - begun
    result["bytes"] = max(0, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - base)
    if base and result["ok"] and result["bytes"] > LIMIT_BYTES:
        result |= {"ok": False, "kind": "memory", "text": f"{result['bytes'] >> 20} MB, then {result['kind']}"}
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _judged(error: BaseException, expected: tuple[type[Exception], ...]) -> dict[str, Any]:
    chain, inner = [], error
    while inner is not None:
        chain.append(inner)
        inner = inner.__cause__ or inner.__context__
    place = _place(error)
    text = f"{type(error).__name__}: {str(error)[:500]!r}"
    if any(isinstance(link, MemoryError) or _NO_MEMORY.search(str(link)) for link in chain):
        return {"ok": False, "kind": "memory", "place": place, "text": text}
    ok = isinstance(error, expected)
    if ok and "\n" in str(error):
        return {"ok": False, "kind": "several lines", "place": place, "text": text}
    if not ok:
        text = "".join(traceback.format_exception(error, limit=-6))[-3000:]
    return {"ok": ok, "kind": type(error).__name__, "place": "" if ok else place, "text": "" if ok else text}


def _place(error: BaseException) -> str:
    """The innermost line of the project's code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _OWN_CODE.search(frame.filename) and frame.name[0] != "<"]
    return f"{own[-1].filename.removeprefix(_ROOT)}:{own[-1].lineno} {own[-1].name}" if own else "?"


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _address_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

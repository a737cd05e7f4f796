"""Compares loops, each in processes of its own, with rounds in turns. Imports no torch.

So other load on the machine, and its heat, affects all of them alike, and no loop's process state affects another.
On a CPU they may share a process (Schedule.in_one), and with it our engine's malloc settings.
"""

import json
import math
import statistics
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from typing import IO, Any, NamedTuple

from pretrain.benchmark.cells import command_of, environment_of, why_it_failed
from pretrain.cluster.local import free_port, rank_variables

# Found in the error when loops cannot share a device: for its memory, or since a GPU is in EXCLUSIVE_PROCESS mode.
_OF_SHARING = ("out of memory", "ALLOC_FAILED", "busy or unavailable")


class LoopFailed(Exception):
    """A loop ended before it printed its row; names the loop and the reason."""

    def __init__(self, loop: str, why: str) -> None:
        super().__init__(f"{loop}: {why}")
        self.loop, self.why = loop, why


class RunningLoop:
    """The processes, one per rank, of a loop or of several loops that share them.

    Rank 0 waits for a line on its stdin before each round.
    """

    def __init__(self, cell: dict[str, Any], num_ranks: int, threads: int | None) -> None:
        self._name: str = cell["loop"]
        self._errors: IO[str] = tempfile.TemporaryFile("w+")
        environment, port = environment_of(threads), free_port()
        self._processes = [
            subprocess.Popen(
                command_of("train", cell),
                env=environment | rank_variables(rank, num_ranks, port),
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=self._errors,
                text=True,
            )
            for rank in range(num_ranks)
        ]
        first = self._processes[0]
        assert first.stdin is not None and first.stdout is not None
        self._stdin, self._stdout = first.stdin, first.stdout

    def wait(self) -> None:
        """Waits until the loop has warmed up, or a round is done. Raises LoopFailed."""
        for line in self._stdout:
            if line.strip().isdigit():
                return
        raise self._failed()

    def begin_round(self) -> None:
        """Starts the steps of a round."""
        with suppress(BrokenPipeError):  # the loop has ended: `wait` says why
            self._stdin.write("go\n")
            self._stdin.flush()

    def rows(self) -> dict[str, dict[str, Any]]:
        """Ends the processes and returns their row by loop. Raises LoopFailed."""
        self._stdin.close()
        rows = [json.loads(line) for line in self._stdout if line.startswith('{"model"')]
        if any(process.wait() for process in self._processes) or not rows:
            raise self._failed()
        return {row["loop"]: row for row in rows}

    def end(self) -> None:
        """Kills the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        for file in (self._stdin, self._stdout, self._errors):
            with suppress(BrokenPipeError):
                file.close()

    def _failed(self) -> LoopFailed:
        code = self._processes[0].wait()
        self._errors.seek(0)
        return LoopFailed(self._name, why_it_failed(code, self._errors.read()))


class Schedule(NamedTuple):
    """How often loops are started and measured, and on how many ranks and threads."""

    num_ranks: int
    threads: int | None  # of a rank on a CPU
    rounds: int
    processes: int = 1  # of a loop, in succession, over which the rounds are spread
    in_one: bool = False  # all loops in the same process

    def rounds_of_processes(self) -> list[int]:
        """Returns how many rounds each of a loop's processes takes."""
        least, more = divmod(self.rounds, self.processes)
        return [least + (number < more) for number in range(self.processes)]


def compared(
    loops: list[str], cell: dict[str, Any], schedule: Schedule, *, together: bool = True
) -> list[dict[str, Any]]:
    """Returns a row for each loop, the first of them ours; each row has `ratio`, our rate divided by its rate.

    Loops that cannot all share the device run one after the other, and `interleaved` is False. together: False if it is
    known beforehand that they cannot. A peer that fails has a row with only the reason, `failed`. Raises LoopFailed
    when ours fails, or one of those that share a process.
    """
    kinds = [" ".join(loops)] if schedule.in_one else loops
    cells = [{**cell, "loop": kind, "options": {**cell["options"], "paced": True}} for kind in kinds]
    interleaved = together or len(cells) == 1
    try:
        found = _measured([cells] if interleaved else [[each] for each in cells], schedule)
    except LoopFailed as failure:
        if interleaved and len(cells) > 1 and any(text in failure.why for text in _OF_SHARING):
            return compared(loops, cell, schedule, together=False)
        if failure.loop == cells[0]["loop"]:
            raise
        # The others remain comparable without it.
        rows = compared([loop for loop in loops if loop != failure.loop], cell, schedule, together=together)
        rows.insert(loops.index(failure.loop), _failed_row(cell, schedule, failure))
        return rows
    ours, rows = found[loops[0]], []
    assert isinstance(ours, dict)
    for row in (found[loop] for loop in loops):
        if isinstance(row, LoopFailed):
            rows.append(_failed_row(cell, schedule, row))
        else:
            how = {"interleaved": interleaved, "in_one": schedule.in_one}
            rows.append(row | how | {"ratio": ratio(ours, row)})
    return rows


def _failed_row(cell: dict[str, Any], schedule: Schedule, failure: LoopFailed) -> dict[str, Any]:
    about = {"model": cell["model"], "loop": failure.loop, "compile": cell["compiled"], "ranks": schedule.num_ranks}
    return about | {"failed": failure.why}


def _measured(groups: list[list[dict[str, Any]]], schedule: Schedule) -> dict[str, dict[str, Any] | LoopFailed]:
    """Runs groups of loops one after the other, every second time in reverse; returns each loop's row or failure.

    Raises LoopFailed when a loop fails in a group of several, or the first group does.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, LoopFailed] = {}
    for number, rounds in enumerate(schedule.rounds_of_processes()):
        for cells in groups if number % 2 == 0 else reversed(groups):
            if cells[0]["loop"] in failed:
                continue
            try:
                found = _in_turns(cells if number % 2 == 0 else cells[::-1], schedule, rounds)
            except LoopFailed as failure:
                if len(cells) > 1 or cells is groups[0]:
                    raise
                failed[failure.loop] = failure
                continue
            for name, row in found.items():
                rows.setdefault(name, []).append(row)
    return {name: joined(of_processes) for name, of_processes in rows.items()} | failed


def _in_turns(cells: list[dict[str, Any]], schedule: Schedule, rounds: int) -> dict[str, dict[str, Any]]:
    """Runs loops with rounds in turns, each in one set of processes; returns their rows."""
    with ExitStack() as stack:
        running = []
        for cell in cells:  # started one after the other: first steps should not disturb each other either
            loop = RunningLoop(cell, schedule.num_ranks, schedule.threads)
            stack.callback(loop.end)
            loop.wait()
            running.append(loop)
        for number in range(rounds):
            for loop in running if number % 2 == 0 else reversed(running):
                loop.begin_round()
                loop.wait()
        return {name: row for loop in running for name, row in loop.rows().items()}


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of a loop's process with the median step time (of two, the shorter), but with all rounds.

    Figures of a single process are consistent with each other.
    """
    in_order = sorted(rows, key=lambda row: statistics.median(row["rounds_ms"]))
    every = {name: [value for row in rows for value in row[name]] for name in ("rounds_ms", "rounds_gpu")}
    return in_order[(len(rows) - 1) // 2] | every | {"processes": len(rows)}


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Returns our rate divided by theirs: the median of the rounds, and its interval.

    The interval is from the smallest round to the largest, which for five independent rounds encloses the true median
    with a probability of 94 %, for fewer with less; of more rounds, as many are left out on both sides as 94 % allow.
    Rounds of one process are not independent: they share its memory layout, which is a matter of luck.
    """
    pairs = zip(ours["rounds_ms"], theirs["rounds_ms"], strict=True)
    ratios = sorted(their_ms / our_ms for our_ms, their_ms in pairs)
    out = _rounds_left_out(len(ratios))
    values = {"median": statistics.median(ratios), "low": ratios[out], "high": ratios[-1 - out]}
    return {name: round(value, 4) for name, value in values.items()}


def _rounds_left_out(rounds: int) -> int:
    """Returns how many to leave out per side, so that P(the true median is outside of the rest) is at most 2 / 2^5."""
    out, beyond = 0, 1
    while 2 * (beyond := beyond + math.comb(rounds, out + 1)) <= 2 / 2**5 * 2**rounds:
        out += 1
    return out

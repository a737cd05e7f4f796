"""Loops beside each other: each in processes of its own, their rounds taken in turn. Imports no torch.

What else the machine does, and its heat, meets all of them alike; what one leaves in a process meets none.
On a CPU they may share a process (Schedule.in_one), and with it what our engine asks of malloc there.
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

# What the reason says where loops cannot share a device: its memory, or a GPU in the mode EXCLUSIVE_PROCESS.
_OF_SHARING = ("out of memory", "ALLOC_FAILED", "busy or unavailable")


class LoopFailed(Exception):
    """A loop that ended before its row; says which, and why."""

    def __init__(self, loop: str, why: str) -> None:
        super().__init__(f"{loop}: {why}")
        self.loop, self.why = loop, why


class RunningLoop:
    """The processes of a loop, one for each rank, or of several loops that share them.

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
        """Returns when the loop has warmed up, or a round is done. Raises LoopFailed."""
        for line in self._stdout:
            if line.strip().isdigit():
                return
        raise self._failed()

    def begin_round(self) -> None:
        """Lets it take the steps of a round."""
        with suppress(BrokenPipeError):  # it has ended: `wait` says why
            self._stdin.write("go\n")
            self._stdin.flush()

    def rows(self) -> dict[str, dict[str, Any]]:
        """Ends it and returns what it measured, by loop. Raises LoopFailed."""
        self._stdin.close()
        rows = [json.loads(line) for line in self._stdout if line.startswith('{"model"')]
        if any(process.wait() for process in self._processes) or not rows:
            raise self._failed()
        return {row["loop"]: row for row in rows}

    def end(self) -> None:
        """Ends its processes, whatever they do."""
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
    """How often loops are started and measured, and on what."""

    num_ranks: int
    threads: int | None  # of a rank on a CPU
    rounds: int
    processes: int = 1  # of a loop, one after the other, which the rounds are spread over
    in_one: bool = False  # all loops in the same process

    def rounds_of_processes(self) -> list[int]:
        """Returns how many rounds each of a loop's processes takes."""
        least, more = divmod(self.rounds, self.processes)
        return [least + (number < more) for number in range(self.processes)]


def compared(
    loops: list[str], cell: dict[str, Any], schedule: Schedule, *, together: bool = True
) -> list[dict[str, Any]]:
    """Returns a row for each loop, the first of them ours; each row has `ratio`, our rate by its rate.

    Where not all can share the device they run one after the other, and `interleaved` is False; not together: it is
    known before. A peer that fails has a row with nothing but the reason, `failed`. Raises LoopFailed when ours does,
    or one of those that share a process.
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
        # The others would be as comparable without it.
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
    """Runs groups of loops one after the other, each second time backwards; returns each loop's row, or why it failed.

    Raises LoopFailed for a loop that runs beside others, and for the first of all.
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
    """Runs loops beside each other, in one process of each; returns their rows."""
    with ExitStack() as stack:
        running = []
        for cell in cells:  # one after the other: their first steps, too, should not disturb each other
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
    """Returns the row of that process of a loop whose step takes the middle time (of two the shorter), with all rounds.

    So the figures of a row follow from each other.
    """
    in_order = sorted(rows, key=lambda row: statistics.median(row["rounds_ms"]))
    every = {name: [value for row in rows for value in row[name]] for name in ("rounds_ms", "rounds_gpu")}
    return in_order[(len(rows) - 1) // 2] | every | {"processes": len(rows)}


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Returns our rate divided by theirs: the median of the rounds, and its interval.

    That is from the least round to the greatest, which of five independent ones enclose the true median with a
    probability of 94 %, of fewer with less; of more rounds as many are left out on both sides as 94 % allow. Rounds of
    one process are not independent: where its memory lies is a matter of luck, and all of them share it.
    """
    pairs = zip(ours["rounds_ms"], theirs["rounds_ms"], strict=True)
    ratios = sorted(their_ms / our_ms for our_ms, their_ms in pairs)
    out = _rounds_left_out(len(ratios))
    values = {"median": statistics.median(ratios), "low": ratios[out], "high": ratios[-1 - out]}
    return {name: round(value, 4) for name, value in values.items()}


def _rounds_left_out(rounds: int) -> int:
    """The most on each side, so that the true median lies beyond the rest with a probability of at most 2 / 2^5."""
    out, beyond = 0, 1
    while 2 * (beyond := beyond + math.comb(rounds, out + 1)) <= 2 / 2**5 * 2**rounds:
        out += 1
    return out

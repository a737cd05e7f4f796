"""Loops beside each other: each in processes of its own, their rounds taken in turn. Imports no torch.

What the machine does meanwhile, and its heat, meets all of them alike; what one leaves behind in a process none.
"""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import IO, Any

from pretrain.benchmark.cells import command_of, environment_of, why_it_failed
from pretrain.cluster.local import free_port, rank_variables


class LoopFailed(Exception):
    """A loop that ended before its row; says why."""


class RunningLoop:
    """The processes of a loop, one for each rank. Rank 0 waits for a line on its stdin before each round."""

    def __init__(self, cell: dict[str, Any], num_ranks: int, threads: int | None) -> None:
        self.name: str = cell["loop"]
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

    def wait(self) -> None:
        """Returns when the loop has warmed up, or a round is done. Raises LoopFailed."""
        for line in self._output:
            if line.strip().isdigit():
                return
        raise self._failed()

    def begin_round(self) -> None:
        """Lets it take the steps of a round."""
        stdin = self._processes[0].stdin
        assert stdin is not None
        stdin.write("go\n")
        stdin.flush()

    def row(self) -> dict[str, Any]:
        """Ends it and returns what it measured. Raises LoopFailed."""
        stdin = self._processes[0].stdin
        assert stdin is not None
        stdin.close()
        rows = [json.loads(line) for line in self._output if line.startswith('{"model"')]
        if any(process.wait() for process in self._processes) or not rows:
            raise self._failed()
        return rows[-1]

    def end(self) -> None:
        """Ends its processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with suppress(BrokenPipeError):
                    pipe.close()
        self._errors.close()

    @property
    def _output(self) -> Iterator[str]:
        stdout = self._processes[0].stdout
        assert stdout is not None
        return iter(stdout.readline, "")

    def _failed(self) -> LoopFailed:
        code = self._processes[0].wait()
        self._errors.seek(0)
        return LoopFailed(f"{self.name}: {why_it_failed(code, self._errors.read())}")


def compared(
    loops: list[str],
    cell: dict[str, Any],
    *,
    num_ranks: int,
    threads: int | None,
    rounds: int,
    together: bool = True,
) -> list[dict[str, Any]]:
    """Returns a row for each loop, the first of them ours; each row has `ratio`, our rate by its rate.

    Where not all fit into the device's memory together they run one after the other, and `interleaved` is False; not
    together: it is known before. Raises LoopFailed.
    """
    cells = [{**cell, "loop": loop, "options": {**cell["options"], "paced": True}} for loop in loops]
    try:
        if not together and len(cells) > 1:
            raise LoopFailed("out of memory, by the plan")
        rows, interleaved = _together(cells, num_ranks, threads, rounds), True
    except LoopFailed as failure:
        if "out of memory" not in str(failure) or len(cells) == 1:
            raise
        rows = [_together([each], num_ranks, threads, rounds)[0] for each in cells]
        interleaved = False
    return [row | {"interleaved": interleaved, "ratio": ratio(rows[0], row)} for row in rows]


def _together(cells: list[dict[str, Any]], num_ranks: int, threads: int | None, rounds: int) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        running = []
        for cell in cells:  # one after the other: their first steps, too, should not disturb each other
            loop = RunningLoop(cell, num_ranks, threads)
            stack.callback(loop.end)
            loop.wait()
            running.append(loop)
        for number in range(rounds):
            for loop in running if number % 2 == 0 else reversed(running):
                loop.begin_round()
                loop.wait()
        return [loop.row() for loop in running]


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Returns our rate divided by theirs: the median of the rounds, and the least and the greatest of them.

    Of five rounds the two enclose the true median with a probability of 94 %.
    """
    ratios = [their_ms / our_ms for our_ms, their_ms in zip(ours["rounds_ms"], theirs["rounds_ms"], strict=True)]
    values = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {name: round(value, 4) for name, value in values.items()}

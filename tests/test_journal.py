"""What the ranks agree on in each step, and when: begun before the step, taken behind it."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import changed, make_shards, tiny_config

from pretrain.cluster import agreement, ranks, watchdog
from pretrain.config import Config
from pretrain.data.loader import REASONS, BadRecord, Batch
from pretrain.engine.step import Engine, StepResult
from pretrain.errors import BadSamplesError
from pretrain.train import journal
from pretrain.train.run import train
from pretrain.train.state import TrainState

STEPS = 3


class Work:
    """An all_reduce under way, whose `wait` is noted."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self._work, self._events = work, events
        self.is_completed = work.is_completed

    def wait(self) -> None:
        self._work.wait()
        self._events.append("answered")


def noted(config: Config, place: Path) -> tuple[list[str], list[bool]]:
    """Trains; rank 1 does not ask before rank 0 is in the step. Returns this rank's events in order, and whether the
    watchdog took it for waiting, in each step and behind its agreement."""
    events: list[str] = []
    waits: list[bool] = []
    all_reduce, train_step, note = dist.all_reduce, Engine.train_step, journal.Journal.note

    def asked(tensor: torch.Tensor, *args: Any, async_op: bool = False, **named: Any) -> Any:
        if tensor.dtype != torch.float64 or tensor.shape != (5 + len(REASONS),):
            return all_reduce(tensor, *args, async_op=async_op, **named)
        events.append("asked")
        until = time.monotonic() + 60
        while ranks.rank() == 1 and not (place / str(events.count("asked"))).exists():
            assert time.monotonic() < until, "rank 0 waits for an answer before its step"
            time.sleep(0.01)
        work = all_reduce(tensor, *args, async_op=async_op, **named)
        return Work(work, events) if async_op else work

    def stepped(engine: Engine, *args: Any) -> Any:
        waits.append(waiting())
        (place / str(events.count("asked"))).touch()
        result = train_step(engine, *args)
        events.append("step")
        return result

    def taken(self: Any, *args: Any) -> Any:
        agreed = note(self, *args)
        waits.append(waiting())
        return agreed

    def waiting() -> bool:
        assert watchdog._watch is not None
        return watchdog._watch._waits_for_others()

    dist.all_reduce, Engine.train_step, journal.Journal.note = asked, stepped, taken
    train(config)
    return events, waits


def test_the_ranks_agree_beside_the_step(tmp_path: Path) -> None:
    """Rank 0 steps while rank 1 has not yet said anything: what it waits for is known, also in a step that hangs."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, total_steps=STEPS)
    (events, waits), (others, _) = run_ranks(noted, 2, config, tmp_path)
    assert events == others == ["asked", "step", "answered"] * STEPS
    assert waits == [True, False] * STEPS


def bad_in_most_steps(folder: Path) -> list[int]:
    """Eight steps with bad samples on rank 1, and some on rank 0; returns the steps in which records were gathered."""
    ranks.start(60)
    config, gathered, to_main = tiny_config(folder, folder, log__samples=False), [], agreement.to_main
    stop: Any = SimpleNamespace(signal_name=None)
    saver: Any = SimpleNamespace(done=False)
    one, state = journal.Journal(folder, config), TrainState()

    def noted(value: Any) -> Any:
        gathered.append(state.step)
        return to_main(value)

    agreement.to_main = noted
    slots = torch.ones(6, dtype=torch.long)
    for step in range(1, 9):
        state.step = step
        bad = [
            BadRecord(0, 10 * step + n, f"{ranks.rank()}.tar", "decode", "no image") for n in range(ranks.rank() + 1)
        ]
        bad = bad if ranks.rank() or step % 2 else []
        batch = Batch(slots, slots[:, None], slots[:, None], slots.bool(), slots, slots, bad, bad[:1])
        one.note(state, batch, StepResult(torch.ones(3), 1.0, True), one.ask(batch, None, stop, saver))
    one.write_down()
    one.write_down()
    lost = batch._replace(valid=slots < 0)
    with pytest.raises(BadSamplesError, match="step 8: none of its 12 images"):
        one.note(state, lost, StepResult(torch.ones(3), 1.0, True), one.ask(lost, None, stop, saver))
    return gathered


def test_bad_samples_are_gathered_when_they_are_written(tmp_path: Path) -> None:
    """Not in each step that has one: where a count is told, at log lines and before saves, and before an error. Both
    lists are as if each step had been written at once: by step, rank and slot."""
    gathered, others = run_ranks(bad_in_most_steps, 2, tmp_path)
    # Bad: 3 in odd steps, 2 in even ones; told are the first count and powers of two. Damaged: 2 and 1.
    assert gathered == others == [1, 1, 3, 5, 8, 8, 8, 8]
    for name, most in (("bad_samples.jsonl", 2), ("damaged_samples.jsonl", 1)):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        expected = [
            (step, f"{rank}.tar", 10 * step + n)
            for step in [*range(1, 9), 8]
            for rank in range(2)
            for n in range(min(most, rank + 1))
            if rank or step % 2
        ]
        assert [(row["step"], row["shard"], row["index"]) for row in rows] == expected


# --- measured --------------------------------------------------------------------------------------------------------

LATE_S = 0.03  # what an agreement takes at 512 ranks, by estimate
STEP_S = 0.06  # a step is longer by this, so that it is longer than that anywhere
TURNS = [(False, False), (False, True), (True, False), (True, True)]  # beside the step or behind it; late or not


class Late:
    """An all_reduce whose answer comes LATE_S after the last rank has asked."""

    def __init__(self, work: Any) -> None:
        self._work, self._came = work, 0.0
        self.is_completed = work.is_completed
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        self._work.wait()
        self._came = time.perf_counter()

    def wait(self) -> None:
        self._thread.join()
        time.sleep(max(0.0, self._came + LATE_S - time.perf_counter()))


def timed(config: Config) -> list[float]:
    """Trains; the steps take the TURNS one after the other. Returns the seconds of each, from note to note:
    a tenth is faster, for other work on the machine makes steps longer and never shorter."""
    all_reduce, train_step, note, begin_add_up = (
        dist.all_reduce,
        Engine.train_step,
        journal.Journal.note,
        agreement.begin_add_up,
    )
    seconds: list[list[float]] = [[], [], [], []]
    turn, last = [0], [time.perf_counter()]

    def slow(*args: Any, async_op: bool = False, **named: Any) -> Any:
        work = all_reduce(*args, async_op=async_op, **named)
        return Late(work) if async_op and TURNS[turn[0]][1] else work

    def in_turns(numbers: torch.Tensor) -> Callable[[], torch.Tensor]:
        return begin_add_up(numbers) if TURNS[turn[0]][0] else lambda: begin_add_up(numbers)()

    def stepped(engine: Engine, *args: Any) -> Any:
        time.sleep(STEP_S)
        return train_step(engine, *args)

    def taken(self: Any, *args: Any) -> Any:
        agreed = note(self, *args)
        seconds[turn[0]].append(time.perf_counter() - last[0])
        turn[0], last[0] = (turn[0] + 1) % len(TURNS), time.perf_counter()
        return agreed

    dist.all_reduce, Engine.train_step, journal.Journal.note, agreement.begin_add_up = slow, stepped, taken, in_turns
    train(config)
    return [sorted(of_turn)[len(of_turn) // 10] for of_turn in seconds]


@pytest.mark.long
def test_a_late_answer_costs_nothing_beside_the_step(tmp_path: Path) -> None:
    """4 ranks, agreements that are 30 ms late: behind the step they cost that, beside it less than half."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, log__every_steps=1000, total_steps=200)
    config = changed(config, checkpoint__every_steps=1000)
    behind, behind_late, beside, beside_late = (1000 * one for one in run_ranks(timed, 4, config)[0])
    print(
        f"\nms of a step: asked behind it {behind:.1f}, late {behind_late:.1f}; beside {beside:.1f}, {beside_late:.1f}"
    )
    assert beside_late - beside < (behind_late - behind) / 2 and behind_late - behind > 1000 * LATE_S / 2


def test_a_step_that_is_not_finite_is_a_fault_at_the_least_loss_scale(tmp_path: Path) -> None:
    """In fp16 a finite loss with infinite gradients lowers the scale, as long as that is possible."""
    own, state = journal.Journal(tmp_path, tiny_config(tmp_path, tmp_path)), TrainState()
    batch: Any = SimpleNamespace(index=torch.arange(3))
    for searches, in_a_row in ((True, 0), (False, 1), (False, 2), (True, 0), (False, 1)):
        own._note_skipped(state, batch, StepResult(torch.ones(3), 0.0, applied=False, searches_scale=searches))
        assert state.skipped_in_a_row == in_a_row

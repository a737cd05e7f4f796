"""Traces of steps: what stands in them, and that none of them ends a training."""

import io
import json
import resource
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import make_shards, tiny_config

from pretrain.config import Config
from pretrain.train.profile import ASKED, Profile
from pretrain.train.run import train


def finish(config: Config) -> None:
    train(config)


def marks_of(path: Path) -> Counter[str]:
    """The names that our code has marked, and how often; the file is whole JSON."""
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("cat") == "cpu_op" and event["name"] == "aten::addmm" for event in events)
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    """Two steps from step 4 on, and two more for the file that was found in the run's folder; of rank 0 alone."""
    config = tiny_config(make_shards(tmp_path / "squares"), tmp_path, total_steps=7)
    config.profile.at_step, config.profile.num_steps = 4, 2
    (config.output / config.name).mkdir()
    (config.output / config.name / ASKED).touch()
    run_ranks(finish, 2, config)
    folder = config.output / config.name / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:010d}.pt.trace.json" for n in (1, 4)]
    for path, first in zip(sorted(folder.iterdir()), (1, 4)):
        marks = marks_of(path)
        assert {name: marks[name] for name in ("forward", "backward", "optimizer")} == dict.fromkeys(
            ("forward", "backward", "optimizer"), 2
        )
        assert {name for name in marks if name.startswith("step ")} == {f"step {first}", f"step {first + 1}"}
    assert not (config.output / config.name / ASKED).exists()


def test_a_trace_ends_before_an_evaluation_and_with_the_training(tmp_path: Path) -> None:
    """What it has by then is written: two steps of five, and one of three."""
    squares = make_shards(tmp_path / "squares")
    config = tiny_config(squares, tmp_path, total_steps=5, data__val=str(squares), evaluation__every_steps=3)
    config.profile.at_step, config.profile.num_steps = 2, 5
    run_ranks(finish, 1, config)
    folder = config.output / config.name / "profile"
    (path,) = folder.iterdir()
    assert {name for name in marks_of(path) if name.startswith("step ")} == {"step 2", "step 3"}
    config.name, config.evaluation.every_steps, config.data.val = "other", 0, None
    config.profile.at_step, config.profile.num_steps = 5, 3
    run_ranks(finish, 1, config)
    (path,) = (config.output / "other" / "profile").iterdir()
    assert {name for name in marks_of(path) if name.startswith("step ")} == {"step 5"}


def errs(config: Config) -> str:
    """Ends in the middle of a trace, whose profiler does not begin a second time."""
    engine: Any = SimpleNamespace(mark=None)
    with pytest.raises(ZeroDivisionError), Profile(config, engine) as profile, profile.step(1):
        torch.ones(3).sum() / (1 // 0)

    def start(profiler: Any) -> None:
        raise RuntimeError("Profiler is already enabled")

    torch.profiler.profile.start = start
    with redirect_stderr(io.StringIO()) as told, Profile(config, engine) as profile, profile.step(1):
        torch.ones(3).sum()
    return told.getvalue()


def test_an_error_ends_a_trace_and_a_profiler_that_does_not_begin_costs_it(tmp_path: Path) -> None:
    """Neither is an error of its own."""
    config = tiny_config(tmp_path, tmp_path)
    config.profile.at_step, config.profile.num_steps = 1, 9
    (tmp_path / "tiny").mkdir()
    (told,) = run_ranks(errs, 1, config)
    assert len(list((tmp_path / "tiny" / "profile").iterdir())) == 1
    assert "the training goes on without a trace" in told


def traced(config: Config, room: int) -> Any:
    """Traces a step where files may have no more than `room` bytes; returns how a part of a step is marked then."""
    engine: Any = SimpleNamespace(mark=None)
    profile = Profile(config, engine)
    with profile.step(1):
        with engine.mark("forward"):
            torch.ones(3).sum()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    profile.end()  # nothing is under way: the one step was all
    return engine.mark.__name__


@pytest.mark.parametrize(("room", "files", "linked"), [(1 << 30, 1, False), (2000, 0, False), (1 << 30, 0, True)])
def test_a_full_disk_or_a_link_costs_the_trace_alone(room: int, files: int, linked: bool, tmp_path: Path) -> None:
    """Half a trace is none; the steps that follow are marked no more. Nothing is written through a link."""
    config = tiny_config(tmp_path, tmp_path)
    config.profile.at_step = config.profile.num_steps = 1
    (tmp_path / "tiny").mkdir()
    if linked:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "tiny" / "profile").symlink_to(tmp_path / "elsewhere")
    assert run_ranks(traced, 1, config, room) == ["nullcontext"]
    assert len(list((tmp_path / "tiny" / "profile").iterdir())) == files

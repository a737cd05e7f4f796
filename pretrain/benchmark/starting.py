"""Wall-clock time of starting and resuming: from command to first step and to exit, compared with another checkout.

The run is so small that its start is nearly all of it: two blocks, four steps, no loader processes. It is resumed from
its second step.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from pretrain.benchmark.cells import ROOT, why_it_failed
from pretrain.checkpoint.layout import step_folders
from pretrain.cluster.local import gpu_is_here, launcher_or_python, on_cpu, options_of_ranks
from pretrain.errors import UserError
from pretrain.provenance import commit, processor, versions
from pretrain.storage import write_text

_STEPS, _SAVED = 4, 2
_Times = dict[str, float]  # first_step_s, exit_s, processor_s


class _Way(NamedTuple):
    """A way to start a run: a checkout, and the words of the command before and after the script."""

    name: str
    checkout: Path
    before: list[str]
    behind: list[str]


def start_lines(world_sizes: list[int], rounds: int, other: Path | None) -> Iterator[dict[str, Any]]:
    """Yields, for each number of ranks and each way to start them, a row for a new run and one for a resumed one.

    Medians over `rounds`, in which the ways take turns, in reverse in every second round. other: a checkout of another
    commit; ratios are ours divided by its: least, median and greatest over the rounds. Raises UserError when a run
    fails.
    """
    checkouts = [ROOT, other] if other else [ROOT]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_photos(folder / "photos")
        configs = {checkout: _make_set(checkout, folder, number) for number, checkout in enumerate(checkouts)}
        for world_size in world_sizes:
            yield from _rows(configs, world_size, rounds, other)


def _rows(configs: dict[Path, Path], world_size: int, rounds: int, other: Path | None) -> Iterator[dict[str, Any]]:
    ways = _ways(world_size, other)
    found: dict[str, list[list[_Times]]] = {way.name: [] for way in ways}
    for way in ways:
        _new_and_resumed(way, configs[way.checkout])  # fills the bytecode and page caches
    for turn in range(rounds):
        for way in ways if turn % 2 == 0 else ways[::-1]:
            found[way.name].append(_new_and_resumed(way, configs[way.checkout]))
    for way in ways:
        for number, start in enumerate(("new", "resumed")):
            times = [of_round[number] for of_round in found[way.name]]
            row = {"row": "start", "ranks": world_size, "way": way.name, "start": start, "rounds": rounds}
            row |= {key: round(statistics.median(time[key] for time in times), 2) for key in times[0]}
            if other and way is not ways[-1]:
                theirs = [of_round[number] for of_round in found[ways[-1].name]]
                row["ratios"] = {key: _ratios(key, times, theirs) for key in times[0]}
            yield row | {"machine": processor(), "versions": versions(), "commit": commit()}


def _ratios(key: str, ours: list[_Times], theirs: list[_Times]) -> list[float]:
    """Returns least, median and greatest of ours / theirs over the rounds."""
    ratios = [a[key] / b[key] for a, b in zip(ours, theirs)]
    return [round(value, 3) for value in (min(ratios), statistics.median(ratios), max(ratios))]


def _ways(world_size: int, other: Path | None) -> list[_Way]:
    """Returns the ways to start so many ranks; last, the other checkout's, by a command that every version has."""
    before = launcher_or_python(world_size)
    launched = "python" if world_size == 1 else "deepspeed"
    ways = [_Way(launched, ROOT, before, [])]
    if world_size > 1:
        ways.append(_Way("--restarts", ROOT, [sys.executable], options_of_ranks(world_size)))
    if other:
        ways.append(_Way(f"{launched}, {other}", other, before, []))
    return ways


def _write_photos(folder: Path) -> None:
    for number in range(64):
        path = folder / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number, 255 - number, 3 * number)).save(path)


def _make_set(checkout: Path, folder: Path, number: int) -> Path:
    """Makes shards with the checkout's own tool, since it may not read other versions' shards; returns a config."""
    data, folder = folder / "photos", folder / str(number)
    words = [sys.executable, str(checkout / "tools" / "make_shards.py"), str(data), str(folder / "set")]
    made = subprocess.run(words, cwd=checkout, env=_environment(checkout), capture_output=True, text=True)
    if made.returncode:
        raise UserError(f"{checkout}: no shards: {why_it_failed(made.returncode, made.stderr)}")
    values = {
        "name": "start",
        "output": str(folder / "runs"),
        "total_steps": _STEPS,
        "model": {"name": "Ti", "width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "image_size": 32, "patch_size": 8},
        "data": {"train": str(folder / "set"), "global_batch": 16, "workers": 0},
        "optim": {"lr": 1e-3},
        "engine": {"precision": "fp32"},
        "evaluation": {"every_steps": 0},
        "log": {"every_steps": 1},
        "checkpoint": {"every_steps": _SAVED},
    }
    path = folder / "start.yaml"
    write_text(path, json.dumps(values))  # JSON is YAML
    return path


def _new_and_resumed(way: _Way, config: Path) -> list[_Times]:
    """Times a new run, then one resumed from the middle, as if its last checkpoint had not been saved."""
    run = config.parent / "runs" / "start"
    shutil.rmtree(run, ignore_errors=True)
    new = _timed(way, config, first=1)
    (run / "DONE").unlink()
    newest, *_ = step_folders(run / "checkpoints")
    shutil.rmtree(newest)
    return [new, _timed(way, config, first=_SAVED + 1)]


def _environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout)} | ({} if gpu_is_here() else on_cpu(1))


def _timed(way: _Way, config: Path, first: int) -> _Times:
    """Runs a command to its end; returns its times. first: the step whose console line ends first_step_s."""
    words = [*way.before, str(way.checkout / "launch" / "pretrain.py"), "--config", str(config), *way.behind]
    first_step_s, errors = None, config.with_name("stderr")
    with errors.open("wb") as stderr:
        began = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=way.checkout, env=_environment(way.checkout), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if first_step_s is None and f"step {first}/{_STEPS} " in line:
                first_step_s = time.perf_counter() - began
        _, status, used = os.wait4(process.pid, 0)  # includes the child processes that it has waited for
        exit_s = time.perf_counter() - began
    process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or first_step_s is None:
        why = why_it_failed(process.returncode, errors.read_text(errors="replace"))
        raise UserError(f"{way.name}: the run failed, or has no line of step {first}: {why}")
    return {"first_step_s": first_step_s, "exit_s": exit_s, "processor_s": used.ru_utime + used.ru_stime}

"""Times saving: how long training waits for a checkpoint that is written at once, or in the background."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pretrain.benchmark.cells import NUM_CLASSES, cell_config
from pretrain.benchmark.measure import build_engine, plan_cell, random_batch, summary_ms
from pretrain.checkpoint.behind import HostCopies
from pretrain.checkpoint.layout import step_folders
from pretrain.checkpoint.retention import apply_retention
from pretrain.checkpoint.write import Save
from pretrain.engine.step import Engine
from pretrain.models.build import outline
from pretrain.models.profile import num_parameters
from pretrain.provenance import versions


def measure(model: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the row of a model; options: of tools/benchmark.py save."""
    plan = plan_cell(options)
    config = cell_config(model, options["image_size"], plan.batch, options["precision"])
    engine, batch = build_engine(config, plan.device), random_batch(config, plan.device)
    for _ in range(plan.warmup):
        engine.train_step(batch, 1e-4)
    with tempfile.TemporaryDirectory(dir=options["folder"]) as folder:
        saves = _Saves(engine, lambda: engine.train_step(batch, 1e-4).sums[0].item(), Path(folder))
        saves.save(None)  # brings file system and allocator to the state of a running training
        first = saves.save(copies := HostCopies())
        rounds = [(saves.save(None), saves.save(copies)) for _ in range(plan.steps)]
        undisturbed_s = [saves.timed_step() for _ in range(plan.steps)]
        size = sum(file.stat().st_size for file in step_folders(Path(folder))[0].iterdir())
    waited, behind = ([part[n] for part in rounds] for n in (0, 1))
    yield {
        "model": model,
        "parameters": num_parameters(outline(config.model, NUM_CLASSES)),
        "checkpoint_gb": round(size / 1e9, 3),
        "precision": config.engine.precision,
        "blocked_ms_at_once": summary_ms([1000 * save["blocked_s"] for save in waited]),
        "blocked_ms_behind_first": round(1000 * first["blocked_s"], 1),
        "blocked_ms_behind": summary_ms([1000 * save["blocked_s"] for save in behind]),
        "ratio": round(statistics.median(a["blocked_s"] / b["blocked_s"] for a, b in rounds), 1),
        "check_ms": summary_ms([1000 * save["check_s"] for save in waited + behind]),
        "until_published_ms": summary_ms([1000 * save["published_s"] for save in behind]),
        "ms_per_step_meanwhile": summary_ms([1000 * s for save in [first, *behind] for s in save["steps_s"]]),
        "ms_per_step": summary_ms([1000 * s for s in undisturbed_s]),
        "saves": plan.steps,
        "device": plan.name,
        "versions": versions(),
    }


class _Saves:
    """Saves of one engine, one after the other, each with the steps that run during it."""

    def __init__(self, engine: Engine, train_step: Callable[[], Any], folder: Path) -> None:
        self._engine, self._train_step, self._folder, self._step = engine, train_step, folder, 0

    def save(self, copies: HostCopies | None) -> dict[str, Any]:
        """Saves as training does, and trains until the checkpoint is published; returns seconds.

        blocked_s: how long training waits, including the calls between steps that advance the save. It does not
        include check_s, the engine's check before each save.
        """
        engine, self._step = self._engine, self._step + 1
        began = time.perf_counter()
        engine.check()
        checked = time.perf_counter()
        tensors = engine.weights(), engine.moments(), engine.generators()
        save = Save(self._folder, self._step, *tensors, {}, engine.averages(), copies=copies, when_published=self._keep)
        if copies is None:
            save.finish()
        blocked_s, steps_s = time.perf_counter() - checked, []
        while save.published is None:
            steps_s.append(self.timed_step())
            before = time.perf_counter()
            if save.done:
                save.advance()
            blocked_s += time.perf_counter() - before
        assert save.published
        return {
            "check_s": checked - began,
            "blocked_s": blocked_s,
            "published_s": time.perf_counter() - checked,
            "steps_s": steps_s,
        }

    def timed_step(self) -> float:
        """Takes a step and returns its seconds."""
        began = time.perf_counter()
        self._train_step()
        return time.perf_counter() - began

    def _keep(self) -> None:
        apply_retention(self._folder, keep_last=2, keep_every_steps=0, keep_best=False)

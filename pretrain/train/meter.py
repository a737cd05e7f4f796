"""What is measured between two log lines."""

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch

from pretrain.cluster import agreement, ranks, watchdog
from pretrain.config import Config
from pretrain.data.loader import Batch
from pretrain.engine.step import Engine, StepResult
from pretrain.gpus import mfu
from pretrain.log import say
from pretrain.models.profile import train_flops
from pretrain.train.datasets import DataSets
from pretrain.train.outliers import LossSpikes, SlowRanks
from pretrain.train.state import TrainState

MAX_STEPS = 1000  # before a log line, whose losses are examined one by one


class Meter:
    """What is measured between two log lines: loss and accuracy over all ranks, rate, waiting for data."""

    def __init__(self, config: Config, num_classes: int, state: TrainState, engine: Engine) -> None:
        self._config, self._device = config, engine.device
        self._flops_per_image = train_flops(config.model, num_classes)
        self._gpu = gpu_name(engine.device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        if ranks.is_main():  # what was saved is the sum over all ranks
            self._sums += torch.tensor(state.window, dtype=torch.float64, device=self._device)
        self._spikes, self._slow_ranks = LossSpikes(), SlowRanks()
        self._hosts = agreement.gather(socket.gethostname())
        # Under ZeRO 3 a forward pass waits for other ranks' weights: then only the wait for data is a rank's own time.
        if config.engine.zero_stage < 3 and ranks.world_size() > 1:
            engine.on_forward(self._add_forward)
        self._restart()

    def _restart(self) -> None:
        self._started, self._steps = time.perf_counter(), 0
        self._waited_s = self._forward_s = self._paused_s = 0.0
        self._step_sums: list[torch.Tensor] = []

    def _add_forward(self, seconds: float) -> None:
        self._forward_s += seconds

    def wait_for(self, batches: Iterator[Batch], step: int) -> Batch | None:
        """Returns the next batch, None after the last, and adds up the time. step: the last finished step."""
        began = time.perf_counter()
        watchdog.section("data", step)
        batch = next(batches, None)
        watchdog.section("step")
        self._waited_s += time.perf_counter() - began
        return batch

    def add(self, result: StepResult) -> None:
        """Counts a step, without a host sync."""
        if result.applied:
            self._sums += result.sums
            self._step_sums = [*self._step_sums[1 - MAX_STEPS :], result.sums]
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves evaluation and saving out of the rate."""
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def window(self) -> list[float]:
        """Returns loss, correct answers and images since the last reading, summed over all ranks."""
        return agreement.add_up(self._sums).tolist()

    def read(
        self, state: TrainState, data: DataSets, lr: float, result: StepResult, engine: Engine
    ) -> dict[str, float]:
        """Returns the numbers of a log line, and resets the meter."""
        (loss, correct, images), waited_s, forward_s, losses = self._gathered()
        elapsed = time.perf_counter() - self._started - self._paused_s
        rate = self._steps * self._config.data.global_batch / elapsed
        self._sums.zero_()
        numbers = {
            "train/loss": loss / max(1.0, images),
            "train/top1": correct / max(1.0, images),
            "train/lr": lr,
            "train/images_per_s": rate,
            "train/tflop_per_s": rate * self._flops_per_image / 1e12,
            "train/data_wait": self._waited_s / elapsed,
            "train/memory_gb": peak_memory_bytes(self._device) / 1e9,
            "train/epoch": data.order.epochs(state.step),
            "train/bad_samples": sum(state.bad_samples.values()),
            "train/damaged_samples": state.damaged_samples,
            "train/skipped_steps": state.skipped_steps,
            "train/loss_spikes": self._spikes.count(losses),
            **self._told_of_slow(waited_s, forward_s, elapsed),
        }
        if result.applied:
            numbers["train/grad_norm"] = float(result.grad_norm)
        if engine.loss_scale is not None:
            numbers["train/loss_scale"] = engine.loss_scale
        if share := mfu(rate * self._flops_per_image / ranks.world_size(), self._gpu):
            numbers["train/mfu"] = share
        self._restart()
        return numbers

    def _gathered(self) -> tuple[list[float], list[float], list[float], list[float]]:
        """Returns, by one all-reduce: the window's sums; each rank's seconds for data and forward; each step's loss."""
        world, steps = ranks.world_size(), len(self._step_sums)
        own = torch.zeros(2, world, dtype=torch.float64)
        own[:, ranks.rank()] = torch.tensor([self._waited_s, self._forward_s])
        of_steps = torch.stack(self._step_sums) if steps else self._sums.new_zeros(0, 3)  # [steps, 3]
        read: torch.Tensor = watchdog.from_device(lambda: torch.cat([self._sums, of_steps.view(-1)]).cpu())
        parts = read[:3], own.view(-1), read[3:]
        sums, waited_s, forward_s, per_step = agreement.add_up(torch.cat(parts)).split([3, world, world, 3 * steps])
        losses = [loss / images for loss, _, images in per_step.view(steps, 3).tolist() if images]
        return sums.tolist(), waited_s.tolist(), forward_s.tolist(), losses

    def _told_of_slow(self, waited_s: list[float], forward_s: list[float], elapsed_s: float) -> dict[str, float]:
        """Warns of a slow rank, if there is one; returns median and maximum of the ranks' own times for the log."""
        if len(waited_s) < 2:
            return {}
        own_s = [waited + forward for waited, forward in zip(waited_s, forward_s)]
        per_step = 1 / max(1, self._steps)
        numbers = {"train/own_s": median(own_s) * per_step, "train/own_s_max": max(own_s) * per_step}
        slow = self._slow_ranks.find(own_s, elapsed_s, self._steps)
        if slow is not None:
            numbers["train/slow_rank"] = slow
            say(
                f"warning: rank {slow} on {self._hosts[slow]} is slow: {own_s[slow] * per_step:.3g} s of its own per "
                f"step, data {waited_s[slow] * per_step:.3g} s, forward {forward_s[slow] * per_step:.3g} s; "
                f"the median is {median(own_s) * per_step:.3g} s"
            )
        return numbers


def gpu_name(device: torch.device) -> str:
    """Returns what torch calls this rank's GPU, "" on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory that this rank has used: of its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

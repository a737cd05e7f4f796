"""What is measured between two log lines."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.cluster import agreement, ranks
from pretrain.config import Config
from pretrain.data.loader import Batch
from pretrain.engine.step import Engine, StepResult
from pretrain.models.profile import train_flops
from pretrain.train.datasets import DataSets
from pretrain.train.state import TrainState


class Meter:
    """What is measured between two log lines: loss and accuracy over all ranks, rate, waiting for data."""

    def __init__(self, config: Config, num_classes: int, state: TrainState, device: torch.device) -> None:
        self._config, self._device = config, device
        self._flops_per_image = train_flops(config.model, num_classes)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        if ranks.is_main():  # what was saved is the sum over all ranks
            self._sums += torch.tensor(state.window, dtype=torch.float64, device=device)
        self._restart()

    def _restart(self) -> None:
        self._started, self._steps, self._waited_s, self._paused_s = time.perf_counter(), 0, 0.0, 0.0

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """Returns the next batch and counts the time until it came."""
        began = time.perf_counter()
        batch = next(batches)
        self._waited_s += time.perf_counter() - began
        return batch

    def add(self, result: StepResult) -> None:
        """Counts a step; nothing is read from the device."""
        if result.applied:
            self._sums += result.sums
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
        """Returns the numbers of a log line and starts anew."""
        loss, correct, images = self.window()
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
            "train/epoch": state.step * self._config.data.global_batch / data.order.num_train,
            "train/bad_samples": sum(state.bad_samples.values()),
            "train/damaged_samples": state.damaged_samples,
            "train/skipped_steps": state.skipped_steps,
        }
        if result.applied:
            numbers["train/grad_norm"] = float(result.grad_norm)
        if engine.loss_scale is not None:
            numbers["train/loss_scale"] = engine.loss_scale
        self._restart()
        return numbers


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory that this rank has used: of its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

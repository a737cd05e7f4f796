"""Bad samples and skipped steps on any rank: agreed on by all ranks, counted, logged; and whether to stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.cluster import agreement, ranks, signals
from pretrain.config import Config
from pretrain.data.loader import REASONS, BadRecord, Batch, check_bad_fraction, count_reasons, count_recent
from pretrain.engine.step import StepResult
from pretrain.errors import BadSamplesError, NonFiniteError
from pretrain.log import JsonLines, say, warn
from pretrain.train.save import Saver
from pretrain.train.state import TrainState

MAX_RECORDS_KEPT = 10_000  # over all ranks: some MB on rank 0 when they are gathered
MAX_SKIPPED_IN_A_ROW = 3  # steps whose loss or gradients are not finite; then the run stops


class Journal:
    """Agrees with the other ranks during each step, counts what was left out, and logs it."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._config = config
        self._bad, self._skipped = _Records(folder / "bad_samples.jsonl"), JsonLines(folder / "skipped_steps.jsonl")
        self._damaged = _Records(folder / "damaged_samples.jsonl")
        self._samples = JsonLines(folder / f"samples-{ranks.rank():05d}.jsonl") if config.log.samples else None

    def ask(
        self, batch: Batch, following: Batch | None, stop: signals.StopRequest, saver: Saver
    ) -> Callable[[], torch.Tensor]:
        """Starts the all-reduce of this step's flags, so that it overlaps the step; `note` gets the result.

        It takes tens of ms at hundreds of ranks. A signal that arrives meanwhile counts from the next step on.
        """
        flags = [
            float(stop.signal_name is not None),
            float(following is not None and following.error is not None),
            float(batch.valid.sum()),
            float(len(batch.damaged)),
            float(saver.done),
        ]
        told = torch.cat([torch.tensor(flags, dtype=torch.float64), count_reasons(batch.bad)])  # [5 + reasons]
        return agreement.begin_add_up(told)

    def note(
        self, state: TrainState, batch: Batch, result: StepResult, answer: Callable[[], torch.Tensor]
    ) -> tuple[bool, bool]:
        """Counts and logs the samples that the step used and lost, over all ranks.

        Returns two flags, the same on all ranks: whether to stop, by request or for an error in any rank's following
        batch; whether all ranks are done with the current part of a save. Raises BadSamplesError, NonFiniteError.
        """
        stopping, failed, num_valid, damaged, done, *bad = answer().tolist()
        try:
            if any(bad):
                self._note_bad(state, batch, [int(count) for count in bad])
            if damaged:
                self._note_damaged(state, batch, int(damaged))
            if not num_valid:  # its loss would be logged as 0, and a small set never reaches max_bad_fraction
                raise BadSamplesError(
                    f"step {state.step}: none of its {self._config.data.global_batch} images can be used; "
                    "bad_samples.jsonl in the run's folder names them; "
                    "tools/make_shards.py --verify checks all of a set"
                )
            if self._samples is not None:
                used = [[e, i] for e, i in zip(batch.epoch.tolist(), batch.index.tolist()) if i >= 0]
                self._samples.append({"step": state.step, "samples": used})
            if result.applied:
                state.skipped_in_a_row = 0
            else:
                self._note_skipped(state, batch, result)
        except (BadSamplesError, NonFiniteError):
            self.write_down()  # the message refers to these files
            raise
        return bool(stopping or failed), done == ranks.world_size()

    def write_down(self) -> None:
        """Writes, on rank 0, what all ranks have left out since the last call. Called by all ranks.

        Needed at log lines and before saves only: a resumed run meets again what came after its checkpoint.
        """
        self._bad.write()
        self._damaged.write()

    def _note_bad(self, state: TrainState, batch: Batch, counts: list[int]) -> None:
        for reason, count in zip(REASONS, counts):
            state.bad_samples[reason] += count
        self._bad.add(state.step, batch.bad, sum(counts))
        size = self._config.data.global_batch
        seen = state.step * size
        total = sum(state.bad_samples.values())
        state.recent_bad = count_recent(state.recent_bad, seen, sum(counts))
        if _worth_telling(total, sum(counts)) and (last := self._bad.write()):
            say(
                f"warning: {total} of {seen} samples so far could not be used, the last: "
                f"{last['shard']}: {last['detail']}"
            )
        check_bad_fraction(state.bad_samples, state.recent_bad, seen, size, self._config.data.max_bad_fraction)

    def _note_damaged(self, state: TrainState, batch: Batch, count: int) -> None:
        state.damaged_samples += count
        self._damaged.add(state.step, batch.damaged, count)
        if _worth_telling(total := state.damaged_samples, count) and (last := self._damaged.write()):
            say(
                f"warning: {total} damaged images so far, used all the same (data.strict_images=true leaves them out; "
                f"damaged_samples.jsonl names them), the last: {last['shard']}: {last['detail']}"
            )

    def _note_skipped(self, state: TrainState, batch: Batch, result: StepResult) -> None:
        loss = agreement.add_up(result.sums)[0].item()
        state.skipped_steps += 1
        # In fp16 a finite loss with infinite gradients is part of the search for the loss scale, above its minimum.
        searches = result.searches_scale and np.isfinite(loss)
        state.skipped_in_a_row = 0 if searches else state.skipped_in_a_row + 1
        indices = [index for of_rank in agreement.to_main(batch.index.tolist()) for index in of_rank if index >= 0]
        if ranks.is_main():
            self._skipped.append({"step": state.step, "loss": str(loss), "indices": indices})
            warn(f"step {state.step} skipped on all ranks: loss or gradients not finite (loss sum {loss})")
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"step {state.step}: loss or gradients not finite in {state.skipped_in_a_row} steps in a row. Lower "
                "optim.lr, set optim.clip_norm, or look at the samples in skipped_steps.jsonl"
            )


class _Records:
    """A log of all ranks' records. Each rank keeps its own until `write`: a gather takes ms at hundreds of ranks."""

    def __init__(self, path: Path) -> None:
        self._log = JsonLines(path)
        self._rows: list[dict[str, Any]] = []  # of this rank, in order
        self._count = 0  # of all ranks

    def add(self, step: int, records: list[BadRecord], count: int) -> None:
        """Keeps this rank's records of a step in which all ranks together have `count`. Called by all ranks."""
        self._rows += [{"step": step, **record._asdict()} for record in records]
        self._count += count
        if self._count >= MAX_RECORDS_KEPT:
            self.write()

    def write(self) -> dict[str, Any] | None:
        """Writes all ranks' records on rank 0 in one piece, sorted by step, then by rank; returns the last one there.

        Called by all ranks. Returns None on the other ranks, and when there was nothing to write.
        """
        if not self._count:
            return None
        gathered = [row for of_rank in agreement.to_main(self._rows) for row in of_rank]
        gathered.sort(key=lambda row: row["step"])
        self._log.append(*gathered)
        self._rows, self._count = [], 0
        return gathered[-1] if gathered else None


def _worth_telling(total: int, added: int) -> bool:
    """Whether to report a count: the first one, then each power of two."""
    return total & (total - 1) == 0 or total == added

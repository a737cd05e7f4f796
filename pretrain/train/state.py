"""The state from which a run resumes, apart from tensors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint.layout import MAX_RANKS
from pretrain.checkpoint.read import read_state
from pretrain.data.loader import REASONS
from pretrain.json_files import Fields

MAX_COUNT = 2**63 - 1  # of steps or samples, over a whole run


@dataclass
class TrainState:
    """All that a resumed run continues from, apart from tensors."""

    step: int = 0  # global batches consumed; skipped steps count
    validation_due: bool = False  # after this step; still set when a stop cut it short
    features_due: bool = False  # few-shot accuracy, likewise
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    bad_samples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    recent_bad: list[list[int]] = field(default_factory=list)  # see pretrain.data.loader.count_recent
    damaged_samples: int = 0  # used nevertheless
    metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation after this very step, if there was one
    window: list[float] = field(default_factory=lambda: [0.0] * 3)  # loss, correct, images since the last log line

    @classmethod
    def of(cls, saved: Fields) -> "TrainState":
        """Returns the state that a checkpoint's state.json holds as "train". Raises UserError for another type."""
        none = cls()
        counts = ("step", "skipped_steps", "skipped_in_a_row", "damaged_samples")
        flags = ("validation_due", "features_due")
        bad, metrics = saved.part("bad_samples"), saved.part("metrics")
        window = saved.values.get("window", none.window)
        if not isinstance(window, list) or len(window) != 3 or not all(map(_is_number, window)):
            saved.wrong("window", "three numbers")
        recent = saved.values.get("recent_bad", [])  # an older run has none
        if not isinstance(recent, list) or not all(map(_is_pair, recent)):
            saved.wrong("recent_bad", "pairs of numbers")
        for name, value in metrics.values.items():
            if not _is_number(value):
                metrics.wrong(name, "a number")
        return cls(
            **{name: saved.integer(name, 0, MAX_COUNT, getattr(none, name)) for name in counts},
            **{name: saved.flag(name, getattr(none, name)) for name in flags},
            bad_samples={reason: bad.integer(reason, 0, MAX_COUNT, 0) for reason in REASONS},
            recent_bad=recent,
            metrics=dict(metrics.values),
            window=window,
        )


class Resumed(NamedTuple):
    """What a run takes from the state.json of the checkpoint that it resumes from."""

    train: TrainState
    engine: dict[str, Any]  # `Engine.state`
    world_size: int


def resumed(checkpoint: Path) -> Resumed:
    """Returns what a run resumes from. Raises UserError for a value that is missing or of another type."""
    saved = Fields.of(read_state(checkpoint), f"{checkpoint}/state.json")
    engine = saved.part("engine")
    engine.number("optimizer_step", 0, MAX_COUNT)
    scaler = engine.part("loss_scaler") if engine.values.get("loss_scaler") else Fields({}, "")
    for name in scaler.values:
        scaler.number(name, -1, MAX_COUNT)
    return Resumed(TrainState.of(saved.part("train")), engine.values, saved.integer("world_size", 1, MAX_RANKS))


def _is_number(value: object) -> bool:
    """NaN included: a validation may have given it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    """Whether a value is the number of a stretch of samples, and a count (data.loader.count_recent)."""
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 <= n <= MAX_COUNT for n in value)

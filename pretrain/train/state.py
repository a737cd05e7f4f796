"""What a resumed run goes on from, apart from tensors."""

from dataclasses import dataclass, field

from pretrain.data.loader import REASONS


@dataclass
class TrainState:
    """All that a resumed run continues from, apart from tensors."""

    step: int = 0  # global batches consumed; skipped steps count
    validation_due: bool = False  # after this step; still set when a stop cut it short
    features_due: bool = False  # few-shot accuracy, likewise
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    bad_samples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    damaged_samples: int = 0  # used nevertheless
    metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation after this very step, if there was one
    window: list[float] = field(
        default_factory=lambda: [0.0, 0.0, 0.0]
    )  # loss, correct, images since the last log line

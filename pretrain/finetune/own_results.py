"""Results of fine-tuning on own data: accuracy with its interval, class by class, and the confusions.

`accuracy` reads the predictions of the final run's evaluation and returns the content of OUT/accuracy.json, which
report/own_page.py shows.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.config import MAX_CLASSES, Config, model_name
from pretrain.data.manifest import MAX_SAMPLES, load_manifest
from pretrain.errors import UserError
from pretrain.finetune.own_data import OwnData
from pretrain.finetune.own_runs import differences, final_run, predictions_of
from pretrain.finetune.results import over_seeds, reached, write_results
from pretrain.finetune.scores import RunScore, final_sha256
from pretrain.finetune.sweep import Sweep, write_out
from pretrain.json_files import Fields
from pretrain.shards.pool import num_cores

FILE = "accuracy.json"
FORMAT, VERSION = "pretrain-accuracy", 1
_Z = 1.959963984540054  # 95 % of the normal distribution lie within +- this
_MOST_RANKS = 1 << 20
_MAX_LINE_BYTES = 1 << 16  # of predictions.jsonl; ours have about 300


def wilson(correct: int, number: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of the share correct / number; number > 0.

    It lies within [0, 1] and is sensible at 0 and at 1, where the normal approximation has no width.
    """
    share, z2 = correct / number, _Z**2
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = _Z * math.sqrt(share * (1 - share) / number + z2 / (4 * number**2)) / (1 + z2 / number)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(sweep: Sweep, data: OwnData, *, weights: str, seconds: float | None) -> dict[str, Any]:
    """Returns the final run's accuracy on the test images, and how the run was made.

    weights: what was fine-tuned, as the user named it. seconds: what the runs took; None where that is not known.
    Raises UserError when the predictions cannot be read.
    """
    config = final_run(sweep)
    pairs = list(_pairs(predictions_of(config)))
    if not pairs:
        raise UserError(f"{config.output / config.name}: none of the test images could be scored")
    line = reached(sweep)
    assert line is not None and line["seeds"][0] == 0  # the final run is done
    correct = sum(label == predicted for label, predicted in pairs)
    return {
        "format": FORMAT,
        "version": VERSION,
        "data": sweep.task.name,
        "weights": weights,
        "from_scratch": sweep.start.weights is None,
        "model": model_name(sweep.start.model),
        "device": _device(config.output / config.name),
        "run": config.name,
        "run_sha256": final_sha256(config),  # these show whether wrong.json belongs to this result
        "test_sha256": load_manifest(sweep.test).sha256,
        "image_size": config.model.image_size,
        "steps": config.total_steps,
        "batch": config.data.global_batch,
        "lr": config.optim.lr,
        # Seed 0's value is this evaluation's, in float32; the others' are from the end of their training runs.
        "seeds": [correct / len(pairs), *line["values"][1:]],
        "selection": line["selection"],
        "seconds": seconds,
        "num_train": data.num_train,
        "num_test": data.num_test,
        "classes": list(data.class_names),
        **_share(correct, len(pairs)),
        "per_class": _per_class(pairs, data.class_names),
        "confusion": [[*pair, number] for pair, number in sorted(Counter(pairs).items())],
        "told": list(data.told),
        "differs": differences(sweep) + _precisions(config, len(line["values"])),
    }


def _precisions(config: Config, num_seeds: int) -> list[str]:
    if num_seeds < 2 or config.engine.precision == "fp32":
        return []
    return [f"seed 0 scored in fp32, the others in {config.engine.precision}"]


def _device(folder: Path) -> str:
    """Returns the GPUs of a run's last start in words; this machine's cores where it ran on a CPU or is unknown."""
    try:
        lines = (folder / "starts.jsonl").read_bytes().splitlines()
        start = Fields.parse(lines[-1], str(folder))
        ranks, device = start.integer("world_size", 1, _MOST_RANKS), start.text("device")
        on_gpu = start.text("device_type") == "cuda"
    except (OSError, IndexError, UserError):  # its line was lost on a full disk: no reason to refuse the result
        on_gpu = False
    if on_gpu:
        return f"one {device}" if ranks == 1 else f"{ranks} x {device}"
    cores = num_cores()
    return f"{cores} CPU core" + "s" * (cores > 1)


def _pairs(path: Path) -> Iterator[tuple[int, int]]:
    """Yields label and predicted class of each scored image."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b"")):
                if number >= MAX_SAMPLES:
                    return
                values = Fields.parse(line, f"{path}: line {number + 1}")
                yield values.integer("label", 0, MAX_CLASSES), values.integer("prediction", 0, MAX_CLASSES)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); remove it, and the same command makes it"
        ) from None


def _share(correct: int, number: int) -> dict[str, Any]:
    return {"correct": correct, "n": number, "top1": correct / number, "interval": list(wilson(correct, number))}


def _per_class(pairs: Sequence[tuple[int, int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns an entry for each class that has a test image, in the order of labels."""
    number = Counter(label for label, _ in pairs)
    correct = Counter(label for label, predicted in pairs if label == predicted)
    return [
        {"label": label, "name": names[label], **_share(correct[label], number[label])}
        for label in range(len(names))
        if number[label]
    ]


def write_accuracy(sweep: Sweep, found: dict[str, Any]) -> None:
    """Writes accuracy.json, and the same figures to results.json, which reports of the weights show. Raises UserError.

    A task.json beside own shards does not describe them, so differences from a task of the table are left out.
    """
    line = reached(sweep)
    assert line is not None
    line |= over_seeds([RunScore(top1, found["n"]) for top1 in found["seeds"]])
    # "own data" keeps such a score from being compared with a paper's.
    write_results(sweep.folder, {**line, "differs": ["own data", *found["differs"]]})
    write_out(sweep.folder / FILE, json.dumps(found, indent=1))

"""What a reader wants first, in a sentence: what was trained, on which data, how long, where, with which result."""

from datetime import datetime
from typing import Any

from pretrain.config import model_name
from pretrain.escape import portable
from pretrain.log import TIME_FORMAT
from pretrain.report.runs import Run


def training_seconds(run: Run) -> float | None:
    """Returns the time of the logged steps by their logged rates, without starts, validation and repeated steps.

    None where the log has no rates or the batch is not known.
    """
    if run.config is None or "train/images_per_s" not in run.curves:
        return None
    steps, rates = run.curves["train/images_per_s"]
    before, seconds = run.starts[0]["step"] if run.starts else 0, 0.0
    for step, rate in zip(steps.tolist(), rates.tolist()):
        if rate > 0 and step > before:
            seconds += (step - before) * run.config.data.global_batch / rate
            before = step
    return seconds or None


def goodput(run: Run) -> float | None:
    """Returns the time of the logged steps divided by the time from the first start to the last log line, at most 1.

    Repeated steps count once; validation, saves, later starts and the time between them do not count. The first start
    is recorded when its engine is ready. None where the log does not say.
    """
    seconds, began = training_seconds(run), _time(run.starts[0]["time"] if run.starts else None)
    ended = _time(run.logged_at)
    if not seconds or began is None or ended is None or ended <= began:
        return None
    return min(1.0, seconds / (ended - began).total_seconds())


def _time(text: str | None) -> datetime | None:
    try:
        return datetime.strptime(text or "", TIME_FORMAT)
    except ValueError:
        return None


def lost_steps(run: Run) -> int | None:
    """Returns how many steps were logged and then repeated; None where a start does not say, as in old versions."""
    told = [start["lost_steps"] for start in run.starts]
    return sum(told) if told and None not in told else None


def duration(seconds: float) -> str:
    """Returns a time in words: 40 s, 12 minutes, 3.4 hours, 12 days."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            number = seconds / length
            return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{seconds:.0f} s"


def millions(count: int) -> str:
    """Returns a count as 0.82M, 5.7M, 86M, 1.1B."""
    if count >= 1e9:
        return f"{count / 1e9:.1f}B"
    return f"{count / 1e6:.0f}M" if count >= 1e7 else f"{count / 1e6:.{1 if count >= 1e6 else 2}f}M"


def sentence(run: Run, values: dict[str, Any]) -> str:
    """Returns a sentence on a run, without its result: model, data, length, time, machine, as far as known."""
    start, config = (run.starts[-1] if run.starts else {}), run.config
    if config is None or values["steps"] is None:
        return "Results only: no training log here." if values["steps"] is None else f"{values['steps']:,} steps."
    model = ("" if config.model.timm_name else "A ") + model_name(config.model)
    size = f" ({millions(start['parameters'])} parameters)" if start.get("parameters") else ""
    how = f"fine-tuned from {portable(str(config.init_from))}" if config.init_from else "trained from random weights"
    steps = values["steps"]
    if config.branch_from:  # its log begins at the other run's step
        begun = min(run.starts[0]["step"] if run.starts else 0, steps)
        how, steps = f"branched from {portable(str(config.branch_from))} at step {begun:,}", steps - begun
    seen = steps * config.data.global_batch
    data, images = start.get("train_set") or "", start.get("train_images")
    of = f" of {start['num_classes']:,} classes" if start.get("num_classes") else ""
    on = f" on {data} ({images:,} images{of})" if data and images else ""
    length = f"{steps:,} steps of {config.data.global_batch:,} images"
    length += f" ({seen / images:.1f} epochs)" if images else ""
    seconds = training_seconds(run)
    took = f" in {duration(seconds)}" if seconds else ""
    return f"{model}{size}, {how}{on}: {length}{took}{_machine(start)}."


def _machine(start: dict[str, Any]) -> str:
    ranks, device = start.get("world_size"), start.get("device")
    if not ranks:
        return ""
    if not device:
        return f" on {ranks} rank{'s' * (ranks > 1)}"
    if start.get("device_type") == "cpu":
        return f" on {ranks} CPU rank{'s' * (ranks > 1)} ({device})"
    return f" on {ranks} x {device}"


def headline(values: dict[str, Any]) -> tuple[str, str] | None:
    """Returns the result as a figure and its description: the last validation, else the last training loss; or None."""
    last, best = values["last"], values["best"].get("val/top1")
    if (top1 := last.get("val/top1")) is not None:
        words = "of the validation images right (top-1), at the last validation"
        if best and best["value"] > top1:
            words += f"; {best['value']:.2%} at step {best['step']:,}"
        return f"{top1:.2%}", words
    if (loss := last.get("train/loss")) is not None:
        return f"{loss:.4f}", "last training loss; never validated"
    return None

"""Goodput: which share of the time since a run's first start went into steps that count."""

from datetime import datetime

from pretrain.log import TIME_FORMAT
from pretrain.report.runs import Run
from pretrain.report.story import training_seconds


def goodput(run: Run) -> float | None:
    """Returns the time of the logged steps divided by the time from the first start to the last log line, at most 1.

    Steps that were done again count once; validation, saves, later starts and the time between them do not count. The
    first start is noted when its engine is ready. None where the log does not say.
    """
    seconds, began = training_seconds(run), _time(run.starts[0]["time"] if run.starts else None)
    ended = _time(run.logged_at)
    if not seconds or began is None or ended is None or ended <= began:
        return None
    return min(1.0, seconds / (ended - began).total_seconds())


def lost_steps(run: Run) -> int | None:
    """Returns how many steps were logged and then done again; None where a start does not say, as in old versions."""
    told = [start["lost_steps"] for start in run.starts]
    return sum(told) if told and None not in told else None


def _time(text: str | None) -> datetime | None:
    try:
        return datetime.strptime(text or "", TIME_FORMAT)
    except ValueError:
        return None

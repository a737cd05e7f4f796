"""Outliers in a window of steps: slow ranks, loss spikes. By medians, which a single outlier does not move."""

from collections import deque
from collections.abc import Sequence
from statistics import median

SLOW_FACTOR = 1.5  # a rank is slow if its own time exceeds the others' median by this factor
SLOW_SHARE = 0.05  # and by this share of the total time: smaller differences do not matter
SLOW_STEP_S = 0.01  # and by this much per step: less is noise, in the short steps of small models
SPIKE_DEVIATIONS = 6.0  # a loss this many robust standard deviations above the median is a spike
SPIKE_WINDOW, SPIKE_MIN = 128, 32  # the most and the fewest earlier losses to compare with
_DEVIATION = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
_UPPER, _UPPER_DEVIATIONS = 0.95, 1.645  # a quantile, and how many standard deviations it lies above a normal median


def slow_rank(own_s: Sequence[float], elapsed_s: float, num_steps: int) -> int | None:
    """Returns the slowest rank if it is slow, else None. own_s: each rank's seconds less its waits for other ranks."""
    if len(own_s) < 2:
        return None
    slowest = max(range(len(own_s)), key=own_s.__getitem__)
    others = median([*own_s[:slowest], *own_s[slowest + 1 :]])
    matters_s = max(SLOW_SHARE * elapsed_s, SLOW_STEP_S * num_steps)
    slow = own_s[slowest] > SLOW_FACTOR * others and own_s[slowest] - others > matters_s
    return slowest if slow else None


class SlowRanks:
    """Compares the ranks' own times from log line to log line: a rank that is slow at only one of them is noise."""

    def __init__(self) -> None:
        self._before: int | None = None

    def find(self, own_s: Sequence[float], elapsed_s: float, num_steps: int) -> int | None:
        """Returns the rank that is slow in these steps and was slow at the previous log line, else None."""
        slow, before = slow_rank(own_s, elapsed_s, num_steps), self._before
        self._before = slow
        return slow if slow == before else None


class LossSpikes:
    """Compares each step's loss with those of the steps before it, since the start of this process."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def count(self, losses: Sequence[float]) -> int:
        """Returns how many of the next steps' losses are spikes.

        Spikes count among the losses before the next one, so that a level which stays higher is soon no news. The
        quantile is for mixup with one draw per step: few steps are mixed strongly, and their losses are higher.
        """
        found = 0
        for loss in losses:
            if len(self._losses) >= SPIKE_MIN:
                middle, upper = median(self._losses), sorted(self._losses)[int(_UPPER * len(self._losses))]
                spread = _DEVIATION * median(abs(value - middle) for value in self._losses)
                spread = max(spread, (upper - middle) / _UPPER_DEVIATIONS, 1e-6 * abs(middle))
                found += loss > middle + SPIKE_DEVIATIONS * spread
            self._losses.append(loss)
        return found

"""What stands out in a window of steps, by medians, which one outlier does not move: slow ranks, spikes of the loss."""

from collections import deque
from collections.abc import Sequence
from statistics import median

SLOW_FACTOR = 1.5  # a rank is slow whose own time is so many times the others' median
SLOW_SHARE = 0.05  # and above it by this share of the whole time: milliseconds of nothing are no news
SLOW_STEP_S = 0.01  # and by this much per step: of small models' steps less is the noise of a machine
SPIKE_DEVIATIONS = 6.0  # a loss so many robust standard deviations above the median is a spike
SPIKE_WINDOW, SPIKE_MIN = 128, 32  # losses compared with; fewer say little
_DEVIATION = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
_UPPER, _UPPER_DEVIATIONS = 0.98, 2.054  # a quantile, and how many standard deviations it lies above a normal median


def slow_rank(own_s: Sequence[float], elapsed_s: float, num_steps: int) -> int | None:
    """Returns the slowest rank, when it is slow, by the seconds of each rank that were not spent waiting for others."""
    if len(own_s) < 2:
        return None
    slowest = max(range(len(own_s)), key=own_s.__getitem__)
    others = median([*own_s[:slowest], *own_s[slowest + 1 :]])
    matters_s = max(SLOW_SHARE * elapsed_s, SLOW_STEP_S * num_steps)
    slow = own_s[slowest] > SLOW_FACTOR * others and own_s[slowest] - others > matters_s
    return slowest if slow else None


class SlowRanks:
    """Compares the ranks' own times, one log line after the other: a rank that is slow in one alone is noise."""

    def __init__(self) -> None:
        self._before: int | None = None

    def find(self, own_s: Sequence[float], elapsed_s: float, num_steps: int) -> int | None:
        """Returns the rank that is slow in these steps and was in those of the log line before."""
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

"""What failures and saves cost: the interval that loses least, and the share of the time that trains.

Young's interval and Daly's model: failures are independent and as likely at any moment (Daly, A higher order estimate
of the optimum checkpoint interval, 2006).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """How often a GPU takes the run with it, and what each end costs."""

    mtbf_gpu_h: float  # hours between two interruptions of a run on one GPU
    detect_s: float  # until the ranks that are left have ended
    restart_s: float  # until the run is at the checkpoint again: scheduler, imports, first step

    def mtbf_s(self, num_gpus: int) -> float:
        """Returns the seconds between two interruptions of a run on so many GPUs."""
        return 3600 * self.mtbf_gpu_h / num_gpus


def best_interval_s(save_s: float, mtbf_s: float) -> float:
    """Returns the seconds of training between two saves that lose least time (Young)."""
    return math.sqrt(2 * save_s * mtbf_s)


def goodput(interval_s: float, save_s: float, failures: Failures, num_gpus: int) -> float:
    """Returns the share of the time that ends up in the weights (Daly's expectation).

    save_s: how long a save keeps training waiting.
    """
    mtbf = failures.mtbf_s(num_gpus)
    lost = math.exp(min(700.0, (failures.detect_s + failures.restart_s) / mtbf))
    return interval_s / mtbf / (lost * math.expm1(min(700.0, (interval_s + save_s) / mtbf)))

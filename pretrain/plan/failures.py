"""The cost of failures and saves: the best interval between saves, and the share of the time that trains.

Young's interval and Daly's model: failures are independent and equally likely at any time (Daly, A higher order
estimate of the optimum checkpoint interval, 2006).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """How often the loss of a GPU ends the run, and what each end costs."""

    mtbf_gpu_h: float  # hours between two interruptions of a run on one GPU
    detect_s: float  # until the remaining ranks have ended
    restart_s: float  # until the run is at the checkpoint again: scheduler, imports, first step

    def mtbf_s(self, num_gpus: int) -> float:
        """Returns the seconds between two interruptions of a run on so many GPUs."""
        return 3600 * self.mtbf_gpu_h / num_gpus


# Fixed costs of a save, however small a rank's part: the check before it and the agreements between ranks; in the
# background, fsyncs and waiting for the steps in which ranks report that they are done. Assumed.
_LEAST_WAIT_S, _LEAST_BEHIND_S = 0.05, 1.0


@dataclass(frozen=True)
class Saves:
    """What a checkpoint costs. Each GPU copies its own part into host memory, each node writes those of its GPUs."""

    num_bytes: int
    behind: bool  # written in the background: training waits only for the copies
    copy_rate: float  # of a GPU, bytes per second
    write_rate: float  # of a node, bytes per second
    gpus_per_node: int
    waits_given_s: float | None  # --save-s: on any number of GPUs

    def waits_s(self, num_gpus: int) -> float:
        """Returns how long a save keeps training waiting."""
        if self.waits_given_s is not None:
            return self.waits_given_s
        return _LEAST_WAIT_S + self.num_bytes / num_gpus / self.copy_rate if self.behind else self._written_s(num_gpus)

    def behind_s(self, num_gpus: int) -> float:
        """Returns how long a save takes in the background: until its end it does not count, nor can the next begin."""
        return self._written_s(num_gpus) if self.behind else 0.0

    def _written_s(self, num_gpus: int) -> float:
        nodes = -(-num_gpus // self.gpus_per_node)
        return _LEAST_BEHIND_S + self.num_bytes / nodes / self.write_rate


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

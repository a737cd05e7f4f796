"""Mean and std of images, per channel."""

from collections.abc import Iterator
from math import isfinite
from typing import NamedTuple


class Normalisation(NamedTuple):
    """How pixels x in [0, 1] become a model's input: (x - mean) / std, per channel."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def is_near(self, other: "Normalisation") -> bool:
        """Returns whether both are the same numbers, up to the rounding of files."""
        return all(abs(a - b) < 1e-6 for mine, its in zip(self, other) for a, b in zip(mine, its))

    def problems(self, where: str = "") -> Iterator[str]:
        """Yields a sentence for each of mean and std that is not valid."""
        for name, lowest in (("mean", -1e3), ("std", 1e-6)):
            values = getattr(self, name)
            numbers = [v for v in values if isinstance(v, int | float) and isfinite(v) and lowest <= v <= 1e3]
            if len(numbers) != 3 or len(values) != 3:
                yield f"{where}{name} is {values}, expected three numbers of {lowest:g} to 1000"


MINUS_ONE_TO_ONE = Normalisation()  # Google's: pixels in [-1, 1]

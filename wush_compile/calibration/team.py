"""Who else works on the run. A stage is the same for one process and for many: only these calls look outside.

`calibrate` asks its team, in this order in every stage: `smallest` (did the micro-batch fit everybody's memory?), `reduce`
(moments over all ranks), `solve` (every group once, somewhere), `smallest` again after the propagation.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from ..data import Batch
from ..passes.calibration.observe import Observation

T = TypeVar("T")


class Alone:
    """The team of one process. Others have the same methods and attributes."""

    rank, size = 0, 1

    def connect(self) -> None:
        """Makes the connections to the others that `reduce` and `solve` use, so that these need not; may be left out."""

    def share(self, batches: list[Batch]) -> list[Batch]:
        """The batches that this rank runs; together the ranks run each batch once."""
        return batches

    def smallest(self, number: int) -> int:
        """The least of all ranks' numbers; waits for every rank."""
        return number

    def reduce(self, seen: Mapping[int, Observation], costs: Mapping[int, float]) -> None:
        """Makes the observations of a stage those of all ranks' batches, in place. By group number: what was seen, and what
        solving the group costs, in any unit."""

    def solve(self, numbers: Iterable[int], solve: Callable[[int], T]) -> dict[int, T]:
        """`solve(number)` of each group of a stage, from one rank each; every rank gets identical results of all."""
        return {number: solve(number) for number in numbers}

    def fail(self, error: Exception) -> None:
        """Tells the others, who wait in one of the calls above, that this rank stops with an error."""


ALONE = Alone()

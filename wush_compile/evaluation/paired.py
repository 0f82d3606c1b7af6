"""Two models on the same items of a task: the difference, the recovery, and confidence intervals of both.

Both models answer the same items, so most of the noise of a score, which items are in the task, is common to both. The
interval is that of the mean of differences item by item, not of two scores apart. It is the normal interval: 1.96
standard errors to each side. It wants some tens of items.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

# The quantile of the normal distribution that leaves 2.5 % on each side.
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Stratum:
    """Items whose mean enters a score with a weight: a task, or a subtask of a group. The weights add up to 1."""

    weight: float
    values: Sequence[float]
    reference: Sequence[float]


@dataclass(frozen=True)
class Paired:
    """A score beside a reference's.

    `difference` is score − reference; `recovery` is 100 · score / reference in percent, None for a reference of 0.
    Both have a 95 % interval, [low, high]; None where a stratum has a single item.
    """

    score: float
    reference: float
    difference: float
    difference_interval: tuple[float, float] | None
    recovery: float | None
    recovery_interval: tuple[float, float] | None
    items: int

    def to_dict(self) -> dict:
        return asdict(self)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def paired(strata: Sequence[Stratum]) -> Paired:
    """Compares two models whose scores are weighted means of the strata's means.

    The recovery is a quotient of two means; its interval follows from the linear term (the delta method): item i counts
    as (score_i − recovery · reference_i) / reference.
    """
    score = math.fsum(s.weight * mean(s.values) for s in strata)
    reference = math.fsum(s.weight * mean(s.reference) for s in strata)
    ratio = score / reference if reference else None
    around = _interval(strata, 1.0, 1.0)
    recovered = None if ratio is None else _interval(strata, 1 / reference, ratio / reference)
    return Paired(
        score,
        reference,
        score - reference,
        None if around is None else (score - reference - around, score - reference + around),
        None if ratio is None else 100 * ratio,
        None if recovered is None else (100 * (ratio - recovered), 100 * (ratio + recovered)),
        sum(len(s.values) for s in strata),
    )


def average(tasks: Sequence[Sequence[Stratum]]) -> Paired:
    """The plain average of the scores of several tasks, each given by its strata."""
    return paired([Stratum(s.weight / len(tasks), s.values, s.reference) for task in tasks for s in task])


def _interval(strata: Sequence[Stratum], a: float, b: float) -> float | None:
    """Half the 95 % interval of the weighted mean of a · score_i − b · reference_i."""
    variance = 0.0
    for stratum in strata:
        count = len(stratum.values)
        if count < 2:
            return None
        differences = [a * x - b * y for x, y in zip(stratum.values, stratum.reference, strict=True)]
        center = mean(differences)
        own = math.fsum((d - center) ** 2 for d in differences) / (count - 1)
        variance += stratum.weight**2 * own / count
    return NORMAL_95 * math.sqrt(variance)

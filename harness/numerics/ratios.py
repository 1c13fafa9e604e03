"""The ratio of two speeds from paired measurements: an interval, and when there are enough of them.

Shape legend: N pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

#: Pairs after which the interval is looked at. Each look is given its own share of the error, so looking costs nothing.
LOOKS = (8, 16, 32, 64)
#: Share of the pairs that is left out at each end: what else the machine does lengthens some by any factor.
TRIM = 0.2
_RESAMPLES = 2000
_SEED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A ratio and the interval that holds it with the stated confidence."""

    low: float
    middle: float
    high: float


def interval(logs: Float64, *, below: float, above: float) -> Interval:
    """The typical ratio of pairs, with its bootstrap interval, whose ends may miss it unequally often.

    The trimmed mean of the pairs' logarithms, plus and minus Student's quantile times its bootstrap standard error.
    The degrees of freedom are those of Tukey and McLaughlin's interval for a trimmed mean (Sankhya A 25, 1963): one
    less than the pairs that are left. The standard error is widened by sqrt(N / (N - 1)), since resamples of few pairs
    scatter less than the pairs do (Hesterberg, The American Statistician 69, 2015).

    Args:
        logs: logarithms of the ratios, [N].
        below: how often the ratio may be below the interval.
        above: how often it may be above.

    Raises:
        ValueError: for fewer than four pairs.
    """
    from scipy import stats

    count = len(logs)
    if count < 4:
        raise ValueError(f"{count} pairs are too few for an interval")
    cut = int(TRIM * count)
    kept = slice(cut, count - cut)
    middle = float(np.sort(logs)[kept].mean())
    drawn = np.random.default_rng(_SEED).integers(count, size=(_RESAMPLES, count))
    means = np.sort(logs[drawn], axis=1)[:, kept].mean(axis=1)
    spread = float(means.std(ddof=1)) * math.sqrt(count / (count - 1))
    low, high = (spread * float(stats.t.isf(error, count - 2 * cut - 1)) for error in (below, above))
    return Interval(low=math.exp(middle - low), middle=math.exp(middle), high=math.exp(middle + high))


def shares(error: float, measures: int) -> dict[str, float]:
    """What of an error each end of each interval is given, as `interval` takes it.

    Both are shared by the looks (Bonferroni). To fail, one measure of several is enough, so they share the error of low
    ends too. To pass, every measure has to: a candidate beyond the limit in one of them passes no more often than that
    one does, so high ends need share nothing (Berger, Technometrics 24, 1982: intersection-union tests).
    """
    return {"below": error / (len(LOOKS) * measures), "above": error / len(LOOKS)}

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
LOOKS = (8, 16, 32)
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


def interval(logs: Float64, *, error: float) -> Interval:
    """The typical ratio of pairs, with its bootstrap interval.

    The trimmed mean of the pairs' logarithms, plus and minus Student's quantile times its bootstrap standard error.
    The degrees of freedom are those of Tukey and McLaughlin's interval for a trimmed mean (Sankhya A 25, 1963): one
    less than the pairs that are left. The standard error is widened by sqrt(N / (N - 1)), since resamples of few pairs
    scatter less than the pairs do (Hesterberg, The American Statistician 69, 2015).

    Args:
        logs: logarithms of the ratios, [N].
        error: how often the interval may miss the ratio, both sides together.

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
    reach = spread * float(stats.t.ppf(1 - error / 2, count - 2 * cut - 1))
    return Interval(low=math.exp(middle - reach), middle=math.exp(middle), high=math.exp(middle + reach))


def share(error: float, measures: int) -> float:
    """What of the whole error each interval is given: Bonferroni over the looks and the measures."""
    return error / (len(LOOKS) * measures)

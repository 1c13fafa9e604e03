"""Bounds: each carries its value and its derivation in words, and decides nothing.

The rule (numerics 2.5): a statistic is significant when z = (S - m) / (s sqrt(1 + 1/K)) exceeds a
Student t quantile, m and s being mean and spread over K replicas; a significant one fails only when
the effect is large as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.numerics.constants import EFFECT, MIN_EFFECTIVE, SPREAD_FLOOR


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Limits on the log of an error ratio.

    Attributes:
        centre: mean of the replicas' statistic, what a correct implementation shows.
        significant: beyond this it is not chance.
        failing: beyond this it is also too large to be called round-off.
        why: the derivation, for people.
    """

    centre: float
    significant: float
    failing: float
    why: str


def replica_bound(
    replicas: NDArray[np.floating], *, effective: float, precision: str, alpha: float, tests: int
) -> Bound:
    """Bound of one statistic from its K replica values [K].

    Args:
        replicas: the statistic (a log) of each replica.
        effective: effective number of replicas.
        precision: declared precision, for the effect size.
        alpha: share of the false-alarm rate given to this family of tests.
        tests: how many tests share it.
    """
    finite = replicas[np.isfinite(replicas)].astype(np.float64)
    centre = float(finite.mean()) if len(finite) else 0.0
    effect = EFFECT[precision]
    # A replica without any error on this unit (its log is -inf) says nothing about the spread of the others.
    effective = min(effective, len(finite))
    if effective < MIN_EFFECTIVE:
        highest = float(finite.max()) if len(finite) else 0.0
        limit = highest + math.log(effect)
        why = f"{effect:g} x the largest of {len(finite)} replicas, of which only {effective:.1f} are independent"
        return Bound(centre=centre, significant=limit, failing=limit, why=why)
    spread = max(SPREAD_FLOOR, float(finite.std(ddof=1)))
    quantile = student_quantile(1 - alpha / max(1, tests), effective - 1)
    significant = centre + quantile * spread * math.sqrt(1 + 1 / len(finite))
    failing = max(significant, centre + math.log(effect))
    why = (
        f"t({effective - 1:.0f}) quantile {quantile:.2f} for rate {alpha:g} over {tests} tests, spread {spread:.2f} "
        f"over {len(finite)} replicas, and at least {effect:g} x the reference's own round-off"
    )
    return Bound(centre=centre, significant=significant, failing=failing, why=why)


def student_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t."""
    from scipy import stats

    return float(stats.t.ppf(probability, degrees))


def tie_factor(steps: int, alpha: float) -> float:
    """Multiple of a step's noise that no harmless flip exceeds: c = sqrt(2 ln(N / alpha)) (numerics 2.6, T1)."""
    return math.sqrt(2 * math.log(max(1, steps) / alpha))

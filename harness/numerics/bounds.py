"""Bounds: each carries its value and its derivation in words, and decides nothing.

The rule (numerics.md 2.5): a statistic is significant when z = (S - m) / (s sqrt(1 + 1/K)) exceeds a
quantile, m and s being mean and spread over K replicas; a significant one fails only when the effect is
large as well. docs/decisions/0008-the-rule.md tells where this departs from the note, and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from harness.numerics.constants import (
    CATCH,
    EFFECT,
    FEWEST_UNITS,
    LARGEST_PRIOR,
    SPREAD_DEFAULT,
    SPREADS,
    VARIETY_ERRORS,
)

Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Limits on one statistic; -inf or inf on a side that does not speak against a candidate.

    Attributes:
        centre: mean over the replicas, what a correct implementation shows.
        own: standard deviation over the replicas.
        spread: the same with the scatter between families of correct implementations added.
        error: standard deviation of (value - centre) for one more correct implementation.
        significant: beyond these (low, high) it is not chance.
        failing: beyond these it is also too large to be called round-off.
        why: the derivation, for people.
    """

    centre: float
    own: float
    spread: float
    error: float
    significant: tuple[float, float]
    failing: tuple[float, float]
    why: str

    def z(self, value: float) -> float:
        """How many standard deviations a value lies from the centre."""
        return (value - self.centre) / self.error if self.error else math.copysign(math.inf, value - self.centre)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A standard deviation with the degrees of freedom behind it.

    ``own`` is that of the replicas, ``value`` has the scatter between families of correct implementations added:
    one more implementation differs from the replicas by both, and only the first shrinks on a larger suite.
    """

    own: float
    value: float
    degrees: float


def spread_of(replicas: Float64, effective: float, families: float) -> Spread:
    """Standard deviation over K replicas [K], ``families`` added, with effective - 1 degrees of freedom."""
    known = replicas[np.isfinite(replicas)]
    degrees = max(1.0, min(effective, float(len(known))) - 1)
    own = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    return Spread(own=own, value=math.hypot(own, families), degrees=degrees)


def moderated(replicas: Float64, effective: float, families: float) -> list[Spread]:
    """Spreads of U units of one kind from their K replicas [K, U], each drawn towards what all units have.

    With K = 24 a unit's own standard deviation is known to 15 %, and the far tail of Student's t pays for that
    with limits 1.5 times as wide. Units of one kind (prompts of a suite) have similar spreads: the posterior
    mean of the variance under a scaled inverse chi-square prior, fitted to all units by the moments of their log
    variances, has the degrees of freedom of the prior as well (Smyth 2004, "Linear models and empirical Bayes
    methods", section 6.2).
    """
    own = [spread_of(column, effective, 0.0) for column in replicas.T]
    known = [one for one in own if one.value > 0]
    if len(known) < FEWEST_UNITS:
        return [Spread(own=one.own, value=math.hypot(one.own, families), degrees=one.degrees) for one in own]
    prior = _prior(np.array([one.value**2 for one in known]), np.array([one.degrees for one in known]))
    spreads = []
    for one in own:
        degrees = prior.degrees + one.degrees
        value = math.sqrt((prior.degrees * prior.value**2 + one.degrees * one.value**2) / degrees)
        spreads.append(Spread(own=value, value=math.hypot(value, families), degrees=degrees))
    return spreads


def _prior(variances: Float64, degrees: Float64) -> Spread:
    """Scale and degrees of freedom of the prior, by the mean and variance of log variances.

    The variance that chance gives the logs is known (trigamma), and known is the standard error of an observed
    variance: sqrt(2 / (U - 1)) times it.
    """
    from scipy import special

    logs = np.log(variances) - special.digamma(degrees / 2) + np.log(degrees / 2)
    chance = float(np.mean(special.polygamma(1, degrees / 2)))
    error = chance * math.sqrt(2 / (len(logs) - 1))
    excess = max(0.0, float(np.var(logs, ddof=1)) - chance) + VARIETY_ERRORS * error
    prior = min(2 * _inverse_trigamma(excess), LARGEST_PRIOR)
    scale = float(np.mean(logs) + special.digamma(prior / 2) - np.log(prior / 2))
    return Spread(own=math.exp(scale / 2), value=math.exp(scale / 2), degrees=prior)


def _inverse_trigamma(value: float) -> float:
    from scipy import optimize, special

    def excess(log_x: float) -> float:
        return math.log(float(special.polygamma(1, math.exp(log_x)))) - math.log(value)

    # trigamma(x) lies between 1/x and 1/x + 1/x^2, so the root lies between the inverses of these.
    low, high = math.log(1 / value) - 1, math.log(1 / value + 1 / math.sqrt(value)) + 1
    return math.exp(float(optimize.brentq(excess, low, high)))


def magnitude_bound(
    replicas: Float64, spread: Spread, *, alpha: float, tests: int, precision: str, hull: bool = False
) -> Bound:
    """Bound of a log magnitude from its replicas [K]: beyond chance, and beyond the effect size of the precision.

    Args:
        replicas: the statistic of each replica.
        spread: of one more correct implementation.
        alpha: share of the false-alarm rate given to this kind of test.
        tests: how many tests share it.
        precision: names the effect size.
        hull: ask also that it lies outside the hull of the replicas by more than its width.
    """
    return _upper(replicas, spread, student_quantile, "t", alpha, tests, precision, hull)


def maximum_bound(replicas: Float64, spread: Spread, *, alpha: float, tests: int, precision: str) -> Bound:
    """Bound of the log of a maximum over rows: as magnitude_bound, with the tail of a Gumbel distribution.

    The largest of many rows is skewed to the right; a Student quantile five standard deviations out would be
    passed by chance a hundred times too often.
    """
    return _upper(replicas, spread, gumbel_quantile, "Gumbel", alpha, tests, precision, False)


def _upper(
    replicas: Float64,
    spread: Spread,
    quantile_of: Callable[[float, float], float],
    name: str,
    alpha: float,
    tests: int,
    precision: str,
    hull: bool,
) -> Bound:
    known = _finite(replicas)
    centre, error = _centre(known, spread)
    quantile = quantile_of(1 - alpha / max(1, tests), spread.degrees)
    significant = centre + quantile * error
    failing = max(significant, centre + math.log(EFFECT[precision]))
    if hull:
        failing = max(failing, float(2 * known.max() - known.min()))
    why = (
        f"{name}({spread.degrees:.0f}) quantile {quantile:.2f} for rate {alpha:.2g} over {tests} tests, "
        f"{_words(spread)}, and at least {EFFECT[precision]:g} x what {len(known)} replicas show"
    ) + (", outside their hull by its width" if hull else "")
    return Bound(
        centre=centre,
        own=spread.own,
        spread=spread.value,
        error=error,
        significant=(-math.inf, significant),
        failing=(-math.inf, failing),
        why=why,
    )


def scatter_of(precision: str, name: str) -> float:
    """Scatter of a statistic between correct implementations beyond that of replicas (constants.SPREADS)."""
    return SPREADS.get(precision, {}).get(name, (SPREAD_DEFAULT, "", 0.0))[0]


def signed_bound(replicas: Float64, spread: Spread, *, alpha: float, tests: int) -> Bound:
    """Bounds of a signed statistic: beyond chance, and outside the hull of all replicas by more than its width."""
    known = _finite(replicas)
    centre, error = _centre(known, spread)
    quantile = student_quantile(1 - alpha / max(1, tests) / 2, spread.degrees)
    low, high = centre - quantile * error, centre + quantile * error
    width = float(known.max() - known.min())
    return Bound(
        centre=centre,
        own=spread.own,
        spread=spread.value,
        error=error,
        significant=(low, high),
        failing=(min(low, float(known.min()) - width), max(high, float(known.max()) + width)),
        why=(
            f"t({spread.degrees:.0f}) quantile {quantile:.2f} on each side for rate {alpha:.2g} over {tests} tests, "
            f"{_words(spread)}, and outside the hull of {len(known)} replicas by its width"
        ),
    )


def _words(spread: Spread) -> str:
    return f"spread {spread.value:.2g} ({spread.own:.2g} of it the replicas')"


def _finite(replicas: Float64) -> Float64:
    """A replica without any error on this unit (its log is -inf) says nothing about the spread of the others."""
    known = replicas[np.isfinite(replicas)]
    return known if len(known) else np.zeros(1)


def _centre(known: Float64, spread: Spread) -> tuple[float, float]:
    return float(known.mean()), spread.value * math.sqrt(1 + 1 / len(known))


def flips_limit(expected: float, variance: float, alpha: float) -> float:
    """Most flips that are chance (T2): the quantile of a negative binomial with that mean and variance.

    For independent steps it is a Poisson binomial, whose variance is below its mean; the flips of one prompt
    come together, since its errors do, and the replicas show by how much.
    """
    from scipy import stats

    if expected <= 0:
        return 0.0
    if variance <= expected:
        return float(stats.poisson.isf(alpha, expected))
    size = expected**2 / (variance - expected)
    return float(stats.nbinom.isf(alpha, size, size / (size + expected)))


def bernstein(variance: float, largest: float, alpha: float) -> float:
    """Excess over its mean that a sum of independent terms passes with a probability of at most ``alpha``.

    Bernstein's inequality for terms that exceed their means by at most ``largest``:
    P(S - m >= x) <= exp(-x^2 / (2 (v + c x / 3))), solved for x.
    """
    log_rate = math.log(1 / alpha)
    half = largest * log_rate / 3
    return half + math.sqrt(half**2 + 2 * variance * log_rate)


def smallest_caught(bound: Bound) -> float:
    """Smallest error of a bug, in units of round-off, that fails a log rms bound with probability CATCH.

    A bug adds its own error b to round-off of rms exp(m), independent of it, so that the statistic becomes
    ½ log(exp(2 m) + b²), with the spread that correct implementations have.
    """
    needed = bound.failing[1] + normal_quantile(CATCH) * bound.error
    return math.sqrt(max(0.0, exponential(2 * needed) - exponential(2 * bound.centre)))


def exponential(value: float) -> float:
    """Return e to the power of a log magnitude; infinite where that is beyond what a float holds."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def student_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t."""
    return _student(probability, degrees)


@lru_cache(maxsize=4096)
def _student(probability: float, degrees: float) -> float:
    from scipy import special

    # What scipy.stats.t.ppf is for finite degrees of freedom, without its half a millisecond.
    return float(special.stdtrit(degrees, probability))


@lru_cache(maxsize=1024)
def normal_quantile(probability: float) -> float:
    """Quantile of the normal distribution."""
    from scipy import stats

    return float(stats.norm.ppf(probability))


def gumbel_quantile(probability: float, degrees: float) -> float:
    """Quantile of a Gumbel distribution of mean 0 and variance 1, widened for a mean and spread that are estimated.

    The widening is that of Student's t against the normal at the same probability.
    """
    standard = -math.log(-math.log(probability))
    width = student_quantile(probability, degrees) / normal_quantile(probability)
    return (standard - float(np.euler_gamma)) * math.sqrt(6) / math.pi * width


def tie_factor(steps: int, alpha: float) -> float:
    """Multiple of a step's noise that no harmless flip exceeds: c = sqrt(2 ln(N / alpha)) (numerics 2.6, T1)."""
    return math.sqrt(2 * math.log(max(1, steps) / alpha))

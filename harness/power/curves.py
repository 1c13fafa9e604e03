"""Detection against S/N: a logistic curve through single trials, its 50 % and 95 % points, and rates in bins.

Shape legend: N trials, B sets of weights of the trials, 2 intercept and slope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

#: Detection that the two points are read off at.
EVEN, NEARLY = 0.5, 0.95

#: Confidence of all intervals here, half of the rest on each side.
CONFIDENCE = 0.95

#: S/N outside these is taken as the nearer one: an overflow is infinite, and the logarithm is not to be.
_RANGE = (1e-6, 1e8)

_DRAWS = 200
_STEPS = 60
_LARGEST_STEP = 5.0
_CONVERGED = 1e-5
_BINS_A_DECADE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """S/N at which a share of the bugs is found, and its interval; 0 is below all that was tried, inf above."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Trials with an S/N of ``low`` up to ``high``, and a Clopper-Pearson interval of the share that is found."""

    low: float
    high: float
    found: int
    total: int
    interval: tuple[float, float]

    @property
    def share(self) -> float:
        return self.found / self.total


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """P(found) = 1 / (1 + exp(-(intercept + slope log10 S/N))) between the smallest and largest S/N tried."""

    intercept: float
    slope: float
    smallest: float
    largest: float
    even: Point
    nearly: Point
    bins: tuple[Bin, ...]

    def share(self, signal: float) -> float:
        """The share of bugs of that S/N that is found."""
        return float(_expit(np.array(self.intercept + self.slope * math.log10(signal))))


def curve(
    signals: Sequence[float], found: Sequence[bool], names: Sequence[str], *, draws: int = _DRAWS, seed: int = 0
) -> Curve | None:
    """The curve through trials [N], None where there is none.

    Args:
        signals: S/N of each trial, above 0.
        found: whether it was found.
        names: the bug that each trial is of; the bootstrap draws bugs, since trials of one bug are alike.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """
    if not len(signals):
        return None
    x = np.log10(np.clip(np.asarray(signals, dtype=np.float64), *_RANGE))
    y = np.asarray(found, dtype=np.float64)
    whole = logistic(x, y, np.ones((1, len(x))))
    drawn = logistic(x, y, _resampled(names, draws, seed), start=whole)
    limits = (float(x.min()), float(x.max()))
    return Curve(
        intercept=float(whole[0, 0]),
        slope=float(whole[0, 1]),
        smallest=10 ** limits[0],
        largest=10 ** limits[1],
        even=_point(EVEN, whole, drawn, limits),
        nearly=_point(NEARLY, whole, drawn, limits),
        bins=_bins(x, y),
    )


def _resampled(names: Sequence[str], draws: int, seed: int) -> Float64:
    """How often each trial is there when bugs are drawn with replacement, [B, N]."""
    _, which = np.unique(np.asarray(names), return_inverse=True)
    bugs = int(which.max()) + 1
    counts = np.random.default_rng(seed).multinomial(bugs, np.full(bugs, 1 / bugs), size=draws)
    weights: Float64 = counts[:, which].astype(np.float64)
    return weights


def logistic(x: Float64, y: Float64, weights: Float64, start: Float64 | None = None) -> Float64:
    """Intercept and slope of a logistic regression of y [N] on x [N] for each set of weights [B, N], [B, 2].

    Firth's penalty, half the log determinant of the information (Firth 1993, Biometrika 80, 27-38), keeps both
    finite where x separates what is found from what is missed, without a constant to choose: the score of each
    trial gains leverage (1/2 - p). A slope below 0 is replaced by 0, with the intercept that then fits: a larger
    error is not harder to see.
    """
    centre = float(x.mean())
    design_N2 = np.stack([np.ones_like(x), x - centre], axis=1)
    fit = np.zeros((len(weights), 2))
    if start is not None:
        fit += start
        fit[:, 0] += fit[:, 1] * centre
    moving = np.arange(len(fit))
    for _ in range(_STEPS):
        step = _step(fit[moving], design_N2, y, weights[moving])
        # Far from the solution the quadratic model of the likelihood overshoots.
        step *= np.minimum(1.0, _LARGEST_STEP / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
        fit[moving] += step
        moving = moving[np.abs(step).max(axis=1) > _CONVERGED]
        if not len(moving):
            break
    falling = ~(fit[:, 1] > 0)
    shares = (weights @ y + 0.5) / (weights.sum(axis=1) + 1)
    fit[falling, 0] = np.log(shares / (1 - shares))[falling]
    fit[falling, 1] = 0.0
    fit[:, 0] -= fit[:, 1] * centre
    return fit


def _step(fit: Float64, design_N2: Float64, y: Float64, weights: Float64) -> Float64:
    """Fisher's scoring step with Firth's score, [B, 2]."""
    x = design_N2[:, 1]
    p = _expit(fit @ design_N2.T)
    information = p * (1 - p)
    weighted = weights * information
    a, b, c = weighted.sum(axis=1), weighted @ x, weighted @ (x * x)
    # Where all that was drawn has one S/N, nothing is known of the slope, and it stays.
    determined = a * c - b * b > 1e-12 * a * c
    inverse = 1 / np.where(determined, a * c - b * b, 1.0)
    leverage = information * (c[:, None] - 2 * b[:, None] * x + a[:, None] * x * x) * inverse[:, None]
    leverage = np.where(determined[:, None], leverage, information / np.maximum(a, 1e-300)[:, None])
    score = weights * (y - p + leverage * (0.5 - p))
    u, v = score.sum(axis=1), score @ x
    both = np.stack([(c * u - b * v) * inverse, (a * v - b * u) * inverse], axis=1)
    intercept_alone = np.stack([u / np.maximum(a, 1e-300), np.zeros_like(u)], axis=1)
    return np.where(determined[:, None], both, intercept_alone)


def _expit(values: Float64) -> Float64:
    from scipy.special import expit

    shares: Float64 = expit(values)
    return shares


def _point(share: float, whole: Float64, drawn: Float64, limits: tuple[float, float]) -> Point:
    value = _signal_at(share, whole, limits)[0]
    tail = (1 - CONFIDENCE) / 2
    # Values that were drawn, not interpolated ones: between 0 or inf and a number there is nothing.
    low, high = np.quantile(_signal_at(share, drawn, limits), [tail, 1 - tail], method="inverted_cdf")
    return Point(value=float(value), low=float(low), high=float(high))


def _signal_at(share: float, fits: Float64, limits: tuple[float, float]) -> Float64:
    """S/N at which a share is found, [B]; 0 and inf outside what was tried: nothing is extrapolated."""
    logit = math.log(share / (1 - share))
    with np.errstate(divide="ignore"):
        x = np.where(
            fits[:, 1] > 0,
            (logit - fits[:, 0]) / np.maximum(fits[:, 1], 1e-300),
            np.where(fits[:, 0] >= logit, -np.inf, np.inf),
        )
    inside = np.clip(x, *limits)
    signals: Float64 = np.where(x < limits[0], 0.0, np.where(x > limits[1], np.inf, 10**inside))
    return signals


def _bins(x: Float64, y: Float64) -> tuple[Bin, ...]:
    """Half decades with at least one trial."""
    place = np.floor(x * _BINS_A_DECADE).astype(int)
    bins = []
    for number in np.unique(place):
        inside = y[place == number]
        found, total = int(inside.sum()), len(inside)
        low, high = (10 ** (edge / _BINS_A_DECADE) for edge in (int(number), int(number) + 1))
        bins.append(Bin(low=low, high=high, found=found, total=total, interval=clopper_pearson(found, total)))
    return tuple(bins)


def clopper_pearson(found: int, total: int) -> tuple[float, float]:
    """Two-sided exact interval of a share of at least one trial."""
    from scipy.stats import binomtest

    interval = binomtest(found, total).proportion_ci(CONFIDENCE, method="exact")
    return (float(interval.low), float(interval.high))

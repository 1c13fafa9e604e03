"""Candidates drawn from the same distribution as the replicas: how often each kind of bound calls them significant.

What fails needs an effect size besides, and is rarer still. Limits are computed for all draws at once by the formula
of the source, which some draws are then held against.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from harness.numerics import bounds
from harness.numerics.constants import ALPHA, ALPHA_GROUPS, ALPHA_POOLED, BUCKETS, REPLICAS
from tests.numerics import nulls

DRAWS = 400_000
COUNTS = (12, 24)


def interval(hits: int, draws: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of a rate."""
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, hits, draws - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, draws - hits)) if hits < draws else 1.0
    return low, high


def measured(what: str, hits: int, draws: int) -> tuple[float, float]:
    """The interval, printed with the rate."""
    low, high = interval(hits, draws)
    print(f"{what}: {hits} of {draws:,}, rate {hits / draws:.3g} ({low:.3g} to {high:.3g})")
    return low, high


def away(replicas: np.ndarray, quantile: float) -> np.ndarray:
    """How far a limit lies from the mean of each draw's replicas [n, K], [n]."""
    return quantile * replicas.std(axis=1, ddof=1) * math.sqrt(1 + 1 / replicas.shape[1])


def magnitude(replicas: np.ndarray, alpha: float, effective: float | None = None) -> bounds.Bound:
    """The bound of a magnitude, nothing but its own replicas known."""
    spread = bounds.spread_of(replicas, len(replicas) if effective is None else effective, 0.0)
    return bounds.magnitude_bound(replicas, spread, alpha=alpha, tests=1, precision="bfloat16")


# --- one statistic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_a_magnitude_has_the_rate_asked_for(count):
    """One more draw like the replicas passes a one-sided limit with the rate alpha, no more and no less."""
    values = np.random.default_rng(1).normal(0.3, 0.5, size=(DRAWS, count + 1))
    candidate, replicas = values[:, 0], values[:, 1:]
    limits = replicas.mean(axis=1) + away(replicas, bounds.student_quantile(1 - ALPHA, count - 1))
    for i in range(100):
        assert limits[i] == pytest.approx(magnitude(replicas[i], ALPHA).significant[1])
    low, high = measured(f"magnitude, K = {count}", int((~(candidate <= limits)).sum()), DRAWS)
    assert low <= ALPHA <= high


@pytest.mark.parametrize("count", COUNTS)
def test_a_signed_statistic_has_the_rate_asked_for(count):
    """One more draw like the replicas passes one of the two limits with the rate alpha, half of it on each side."""
    values = np.random.default_rng(2).normal(-0.1, 0.02, size=(DRAWS, count + 1))
    candidate, replicas = values[:, 0], values[:, 1:]
    width = away(replicas, bounds.student_quantile(1 - ALPHA / 2, count - 1))
    for i in range(100):
        spread = bounds.spread_of(replicas[i], count, 0.0)
        bound = bounds.signed_bound(replicas[i], spread, alpha=ALPHA, tests=1)
        centre = replicas[i].mean()
        assert bound.significant == pytest.approx((centre - width[i], centre + width[i]))
    beyond = candidate - replicas.mean(axis=1)
    above, below = int((beyond > width).sum()), int((beyond < -width).sum())
    low, high = measured(f"signed, K = {count}", above + below, DRAWS)
    assert low <= ALPHA <= high
    for one in (above, below):
        low, high = interval(one, DRAWS)
        assert low <= ALPHA / 2 <= high


@pytest.mark.parametrize("count", COUNTS)
def test_the_rate_holds_at_the_limits_of_a_verdict(count):
    """At the rate of one of a hundred groups, far too small to count, the probability of passing is still alpha.

    The chance of a normal draw to lie beyond a limit is known; only its mean over replicas is simulated.
    """
    alpha = ALPHA_GROUPS / 100
    replicas = np.random.default_rng(3).normal(size=(DRAWS, count))
    limits = replicas.mean(axis=1) + away(replicas, bounds.student_quantile(1 - alpha, count - 1))
    chance = stats.norm.sf(limits)
    error = chance.std() / math.sqrt(DRAWS)
    print(f"K = {count}: {chance.mean():.3g} +- {error:.2g} for {alpha:.3g}")
    assert abs(chance.mean() - alpha) < 3 * error
    assert error < alpha / 8


def test_copies_among_the_replicas_do_not_raise_the_rate():
    """24 replicas of which 8 are copies: at the rates of a verdict their effective number pays for the copies."""
    values = np.random.default_rng(3).normal(0, 0.5, size=(DRAWS, 17))
    candidate, replicas = values[:, 0], np.concatenate([values[:, 1:], values[:, 1:9]], axis=1)
    # (sum of eigenvalues)^2 / sum of squares of 8 pairs and 8 singles is 14.4; one is spent on the mean.
    limits = replicas.mean(axis=1) + away(replicas, bounds.student_quantile(1 - ALPHA_POOLED, 13.4 - 1))
    assert limits[0] == pytest.approx(magnitude(replicas[0], ALPHA_POOLED, 13.4).significant[1])
    low, _ = measured("copies", int((~(candidate <= limits)).sum()), DRAWS)
    assert low <= ALPHA_POOLED


def test_a_shared_error_does_not_raise_the_rate():
    """A common mode that candidate and replicas share cancels: only what differs between them is judged."""
    rng = np.random.default_rng(4)
    values = rng.normal(0, 0.5, size=(DRAWS, REPLICAS + 1)) + rng.normal(0, 3, size=(DRAWS, 1))
    candidate, replicas = values[:, 0], values[:, 1:]
    limits = replicas.mean(axis=1) + away(replicas, bounds.student_quantile(1 - ALPHA, REPLICAS - 2))
    low, _ = measured("shared", int((~(candidate <= limits)).sum()), DRAWS)
    assert low <= ALPHA


def test_a_scatter_between_families_that_is_not_there_only_quietens():
    """Where correct implementations scatter less than is allowed for, next to no alarm is raised."""
    values = np.random.default_rng(5).normal(0, 0.08, size=(DRAWS, REPLICAS + 1))
    candidate, replicas = values[:, 0], values[:, 1:]
    spread = np.hypot(replicas.std(axis=1, ddof=1), 0.16) * math.sqrt(1 + 1 / REPLICAS)
    limits = replicas.mean(axis=1) + bounds.student_quantile(1 - 1e-2, REPLICAS - 1) * spread
    one = bounds.spread_of(replicas[0], REPLICAS, 0.16)
    bound = bounds.magnitude_bound(replicas[0], one, alpha=1e-2, tests=1, precision="bfloat16")
    assert limits[0] == pytest.approx(bound.significant[1])
    _, high = measured("families", int((~(candidate <= limits)).sum()), DRAWS)
    assert high <= 1e-3


@pytest.mark.parametrize("scatter", [0.0, 0.08, 0.16])
def test_a_family_that_scatters_as_allowed_keeps_the_rate(scatter):
    """A candidate of a family with an offset of its own passes the limit at most at the rate, as offsets vary."""
    rng = np.random.default_rng(6)
    values = rng.normal(0, 0.1, size=(DRAWS, REPLICAS + 1))
    candidate = values[:, 0] + rng.normal(0, scatter, size=DRAWS)
    replicas = values[:, 1:]
    spread = np.hypot(replicas.std(axis=1, ddof=1), 0.16) * math.sqrt(1 + 1 / REPLICAS)
    limits = replicas.mean(axis=1) + bounds.student_quantile(1 - ALPHA, REPLICAS - 1) * spread
    low, _ = measured(f"family with scatter {scatter}", int((~(candidate <= limits)).sum()), DRAWS)
    assert low <= ALPHA


@pytest.mark.parametrize("spread", [0.2, 0.5])
def test_no_alarm_in_three_thousand_nulls(spread):
    """Candidates drawn like the replicas never fail fp32: 0 of 3,000, at most 0.1 % with 95 % confidence."""
    draws, alarms = 3000, 0
    for values in np.random.default_rng(7).normal(0, spread, size=(draws, REPLICAS + 1)):
        one = bounds.spread_of(values[1:], REPLICAS, 0.16)
        bound = bounds.magnitude_bound(values[1:], one, alpha=1e-4, tests=1, precision="float32")
        alarms += not values[0] <= bound.failing[1]
    assert stats.beta.ppf(0.95, alarms + 1, draws - alarms) <= 1e-3


def test_a_large_error_is_seen():
    """An error three times the round-off fails nearly always in 16 bits, so the quiet above is not blindness."""
    seen = 0
    for values in np.random.default_rng(6).normal(0, 0.1, size=(300, REPLICAS + 1)):
        one = bounds.spread_of(values[1:], REPLICAS, 0.1)
        bound = bounds.magnitude_bound(values[1:], one, alpha=5e-4, tests=1, precision="bfloat16")
        seen += not values[0] + math.log(3) <= bound.failing[1]
    assert interval(seen, 300)[0] >= 0.9


# --- units whose spreads are drawn towards each other ----------------------------------------------

UNITS, SETS = 30, 2_000


def rate_of_a_family(count: int, variety: float, units: int, alpha: float, tests: int) -> tuple[float, float]:
    """(probability that any of some units is significant, its standard error), each with a share of the rate.

    Over sets of true spreads, whose logs have the standard deviation ``variety``, and of replicas. The chance of
    independent normal units to pass given limits is known, so that nothing has to be counted.
    """
    rng = np.random.default_rng(8)
    chances = []
    for _ in range(SETS):
        scales = 0.2 * np.exp(rng.normal(0, variety, units))
        replicas = rng.normal(size=(count, units)) * scales
        # All units of a set have as many degrees of freedom: one bound says what the quantile is.
        spreads = bounds.moderated(replicas, count, 0.0)
        first = bounds.magnitude_bound(replicas[:, 0], spreads[0], alpha=alpha, tests=tests, precision="bfloat16")
        quantile = (first.significant[1] - first.centre) / first.error
        error = np.array([one.value for one in spreads]) * math.sqrt(1 + 1 / count)
        limits = replicas.mean(axis=0) + quantile * error
        chances.append(-math.expm1(np.log1p(-stats.norm.sf(limits / scales)).sum()))
    rate, error = float(np.mean(chances)), float(np.std(chances) / math.sqrt(SETS))
    # So many sets are enough: the rate is known to a third of what is asked for, with 95 % confidence.
    assert 1.96 * error < alpha * units / tests / 3
    print(
        f"{units} moderated units of {tests} tests, K = {count}, variety {variety}: {rate:.3g} +- {error:.2g}, "
        f"asked for {alpha * units / tests:.3g}"
    )
    return rate, error


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_units_of_one_spread_share_the_rate(count):
    """Of 30 alike units any is significant at most at the rate alpha, and not idly less often."""
    rate, error = rate_of_a_family(count, 0.0, UNITS, ALPHA, UNITS)
    assert rate - 1.96 * error <= ALPHA
    assert rate + 1.96 * error >= ALPHA / 3


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("variety", [0.15, 0.6])
def test_units_of_unlike_spreads_stay_near_the_rate(count, variety):
    """Of 30 units with spreads of their own any is significant at most at twice the rate, and not idly less often.

    The prior is estimated too, which Student's t with its degrees of freedom does not know.
    """
    rate, error = rate_of_a_family(count, variety, UNITS, ALPHA, UNITS)
    assert rate - 1.96 * error <= 2 * ALPHA
    assert rate + 1.96 * error >= ALPHA / 3


@pytest.mark.slow
@pytest.mark.parametrize("variety", [0.1, 0.15, 0.25])
def test_a_few_units_stay_near_the_rate(variety):
    """Of the six ranges of positions, at their share of a verdict's rate, any is significant at most twice as often."""
    tests = 120
    rate, error = rate_of_a_family(REPLICAS, variety, BUCKETS, ALPHA_GROUPS, tests)
    assert rate - 1.96 * error <= 2 * ALPHA_GROUPS * BUCKETS / tests


@pytest.mark.slow
@pytest.mark.parametrize("variety", [0.1, 0.15, 0.25])
def test_a_dozen_units_stay_near_the_rate(variety):
    """Of twelve prompts, the fewest with a prior, any is significant at most three times as often as asked for.

    The prior is then known worst; it is twice at sixteen, and nearer from there on.
    """
    units, tests = 12, 120
    rate, error = rate_of_a_family(REPLICAS, variety, units, ALPHA_GROUPS, tests)
    assert rate - 1.96 * error <= 3 * ALPHA_GROUPS * units / tests


# --- maxima ----------------------------------------------------------------------------------------

ROWS = 500


def largest_of_rows(rng: np.random.Generator, shape: tuple[int, ...], shared: float) -> np.ndarray:
    """Logs of the largest of 500 log-normal ratios, which share some of their variance with all others of a draw."""
    common = rng.normal(size=shape)
    own = stats.norm.ppf(rng.random(shape) ** (1 / ROWS))
    return 0.2 * (math.sqrt(shared) * common + math.sqrt(1 - shared) * own)


def chance_of_rows(limits: np.ndarray, shared: float) -> np.ndarray:
    """Probability that `largest_of_rows` lies beyond each limit."""
    grid = np.linspace(-1.0, 4.0, 2001)
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    inner = stats.norm.logcdf((grid[:, None] / 0.2 - math.sqrt(shared) * nodes) / math.sqrt(1 - shared))
    chance = (-np.expm1(ROWS * inner) * weights).sum(axis=1) / weights.sum()
    return np.exp(np.interp(limits, grid, np.log(np.maximum(chance, 1e-300))))


def maximum_limits(replicas: np.ndarray, alpha: float) -> np.ndarray:
    """`maximum_bound` of each draw's replicas [n, K], [n]."""
    count = replicas.shape[1]
    limits = replicas.mean(axis=1) + away(replicas, bounds.gumbel_quantile(1 - alpha, count - 1))
    for i in range(100):
        spread = bounds.spread_of(replicas[i], count, 0.0)
        bound = bounds.maximum_bound(replicas[i], spread, alpha=alpha, tests=1, precision="bfloat16")
        assert limits[i] == pytest.approx(bound.significant[1])
    return limits


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_the_largest_of_many_rows_is_significant_at_most_at_the_rate(count, shared):
    """The log of the largest of 500 rows passes its limit no more often than alpha, half correlated or not.

    Asserted is that the observed rate itself, not only the lower end of its interval, is at most alpha.
    """
    values = largest_of_rows(np.random.default_rng(9), (DRAWS // 2, count + 1), shared)
    candidate, replicas = values[:, 0], values[:, 1:]
    hits = int((~(candidate <= maximum_limits(replicas, ALPHA))).sum())
    measured(f"maximum, K = {count}, {shared:.0%} shared", hits, len(values))
    assert hits / len(values) <= ALPHA


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shared", [0.0, 0.5])
def test_a_maximum_keeps_the_rate_of_a_verdict(count, shared):
    """At the rate of one of a hundred groups the chance to pass, which is known for each limit, is at most alpha."""
    alpha = ALPHA_GROUPS / 100
    limit = float(np.quantile(largest_of_rows(np.random.default_rng(11), (DRAWS,), shared), 0.99))
    assert chance_of_rows(np.array([limit]), shared)[0] == pytest.approx(0.01, rel=0.05)
    replicas = largest_of_rows(np.random.default_rng(10), (DRAWS // 2, count), shared)
    chance = chance_of_rows(maximum_limits(replicas, alpha), shared)
    error = float(chance.std()) / math.sqrt(len(chance))
    print(f"maximum, K = {count}, {shared:.0%} shared: {chance.mean():.3g} +- {error:.2g} for {alpha:.3g}")
    assert chance.mean() <= alpha


def test_students_limit_would_be_passed_too_often():
    """For independent rows a Student quantile gives several times the rate: the Gumbel tail is needed."""
    values = largest_of_rows(np.random.default_rng(13), (DRAWS // 2, REPLICAS + 1), 0.0)
    limits = values[:, 1:].mean(axis=1) + away(values[:, 1:], bounds.student_quantile(1 - ALPHA, REPLICAS - 1))
    low, _ = measured("maximum with Student's limit", int((values[:, 0] > limits).sum()), len(values))
    assert low > 3 * ALPHA


def test_the_largest_projected_error_is_significant_at_most_at_the_rate():
    """The same of the lengths of 500 projected errors, each half its own and half what all rows share."""
    rng = np.random.default_rng(12)
    shared = rng.normal(size=(40_000, 16))
    # The length of a normal vector about a fixed one is non-central chi square, half of the variance each.
    centres = (shared**2).sum(axis=1)
    pool = np.array([rng.noncentral_chisquare(16, centre, ROWS).max() for centre in centres])
    pool = 0.5 * np.log(pool / 2 / 16)
    draws = pool[rng.integers(0, len(pool), size=(DRAWS // 2, REPLICAS + 1))]
    hits = int((~(draws[:, 0] <= maximum_limits(draws[:, 1:], ALPHA))).sum())
    measured("largest projected error", hits, len(draws))
    assert hits / len(draws) <= ALPHA


# --- the whole rule --------------------------------------------------------------------------------

GOLDENS = 50


@pytest.fixture(scope="module")
def verdicts():
    """Counts over 1,000 verdicts on both questions; `benchmarks/null_simulation.py` draws 20,000."""
    counts = sum((nulls.judged(seed, 0.0) for seed in range(GOLDENS)), Counter())
    print({" ".join(key): count for key, count in counts.items()})
    assert counts["judged",] == GOLDENS * nulls.EACH
    return counts


@pytest.mark.slow
def test_the_whole_rule_fails_correct_candidates_at_most_at_the_rate(verdicts):
    """Of correct candidates no more fail than the 99.9 % quantile of a binomial count at the rate alpha."""
    assert verdicts["failing",] <= stats.binom.ppf(0.999, verdicts["judged",], ALPHA)


@pytest.mark.slow
def test_what_is_called_more_than_chance_keeps_the_rate_of_two_questions(verdicts):
    """No more correct candidates are beyond chance than chance gives at twice the rate: two questions are asked."""
    assert verdicts["significant",] <= stats.binom.ppf(0.999, verdicts["judged",], 2 * ALPHA)

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.numerics import bounds
from harness.numerics.bounds import Bound, Spread
from harness.numerics.constants import ALPHA, ALPHA_TOKENS, CATCH, EFFECT, LARGEST_PRIOR, MAX_SMALLEST, REPLICAS

FAMILIES = 0.16


def normal(count=REPLICAS, *, spread=0.3, mean=0.0, seed=0):
    """Replicas with exactly this mean and standard deviation."""
    values = np.random.default_rng(seed).normal(size=count)
    return mean + spread * (values - values.mean()) / values.std(ddof=1)


def bound_of(replicas, *, effective=None, families=0.0, precision="bfloat16", alpha=1e-3, tests=1, hull=False):
    """`magnitude_bound` of some replicas, all of them independent unless said otherwise."""
    replicas = np.asarray(replicas, dtype=np.float64)
    spread = bounds.spread_of(replicas, len(replicas) if effective is None else effective, families)
    return bounds.magnitude_bound(replicas, spread, alpha=alpha, tests=tests, precision=precision, hull=hull)


def signed_of(replicas, *, families=0.0, alpha=1e-3, tests=1):
    """`signed_bound` of independent replicas."""
    spread = bounds.spread_of(replicas, len(replicas), families)
    return bounds.signed_bound(replicas, spread, alpha=alpha, tests=tests)


def maximum_of(replicas, *, families=0.0, alpha=1e-3, tests=1, precision="bfloat16"):
    """`maximum_bound` of independent replicas."""
    spread = bounds.spread_of(replicas, len(replicas), families)
    return bounds.maximum_bound(replicas, spread, alpha=alpha, tests=tests, precision=precision)


def clopper_pearson(hits, draws, level=0.95):
    """One-sided lower and upper confidence limits of a rate."""
    lower = stats.beta.ppf(1 - level, hits, draws - hits + 1) if hits else 0.0
    upper = stats.beta.ppf(level, hits + 1, draws - hits) if hits < draws else 1.0
    return lower, upper


# --- quantiles and tie factor ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [(0.975, 10, 2.228), (0.95, 23, 1.714), (0.999, 23, 3.485), (0.9995, 11, 4.437), (0.5, 4, 0.0)],
)
def test_student_quantile_against_a_printed_table(probability, degrees, quantile):
    """Quantiles agree with the tables of textbooks to their three places."""
    assert bounds.student_quantile(probability, degrees) == pytest.approx(quantile, abs=6e-4)


def test_student_quantile_takes_fractions_of_a_degree():
    """Effective numbers are no whole numbers: the quantile falls smoothly between two degrees."""
    values = [bounds.student_quantile(0.999, degrees) for degrees in (12, 12.5, 13)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(("probability", "quantile"), [(0.975, 1.960), (0.995, 2.576), (0.9999, 3.719), (0.5, 0.0)])
def test_normal_quantile_against_a_printed_table(probability, quantile):
    """Quantiles of the normal distribution agree with the tables of textbooks."""
    assert bounds.normal_quantile(probability) == pytest.approx(quantile, abs=6e-4)


@pytest.mark.parametrize("probability", [0.9, 0.999, 1 - 1e-6])
def test_gumbel_quantile_is_that_of_scipy(probability):
    """With all degrees of freedom it is the Gumbel distribution's, of mean 0 and variance 1."""
    standard = stats.gumbel_r(loc=-np.euler_gamma * math.sqrt(6) / math.pi, scale=math.sqrt(6) / math.pi)
    assert standard.mean() == pytest.approx(0, abs=1e-12)
    assert standard.var() == pytest.approx(1)
    assert bounds.gumbel_quantile(probability, 1e9) == pytest.approx(standard.ppf(probability), rel=1e-4)


@pytest.mark.parametrize("probability", [0.999, 1 - 1e-6])
def test_gumbel_quantile_is_widened_like_student(probability):
    """Few degrees of freedom widen it by as much as they widen a normal quantile."""
    widened = bounds.gumbel_quantile(probability, 12) / bounds.gumbel_quantile(probability, 1e9)
    assert widened == pytest.approx(stats.t.ppf(probability, 12) / stats.norm.ppf(probability), rel=1e-4)


def test_the_largest_prior_is_nearly_normal():
    """At the degrees of freedom of the largest prior Student's t is the normal distribution to 1.2 %."""
    ratio = stats.t.isf(1e-7, LARGEST_PRIOR) / stats.norm.isf(1e-7)
    assert 1 < ratio <= 1.0125


@pytest.mark.parametrize(("steps", "alpha", "factor"), [(3072, 1e-3, 5.47), (3072, 1e-4, 5.87), (1, 1e-3, 3.72)])
def test_tie_factor_values(steps, alpha, factor):
    """The factor is sqrt(2 ln(N / alpha)): 5.5 at N = 3,072 and a rate of 1e-3, as the design note says."""
    assert bounds.tie_factor(steps, alpha) == pytest.approx(factor, abs=6e-3)
    assert bounds.tie_factor(steps, alpha) == math.sqrt(2 * math.log(steps / alpha))


@pytest.mark.parametrize("steps", [1, 64, 3072, 100_000])
def test_tie_factor_bounds_the_largest_of_many_normals(steps):
    """Beyond c, one of N harmless normal differences lies with a probability of at most alpha."""
    factor = bounds.tie_factor(steps, ALPHA_TOKENS)
    assert steps * stats.norm.sf(factor) <= ALPHA_TOKENS


def test_tie_factor_of_no_steps():
    """No steps have the factor of one: nothing is divided by zero."""
    assert bounds.tie_factor(0, 1e-3) == bounds.tie_factor(1, 1e-3)


# --- the bound of a magnitude ----------------------------------------------------------------------


def test_bound_by_hand():
    """What is significant begins at m + t s sqrt(1 + 1/K), with mean and spread of the replicas."""
    bound = bound_of(normal(mean=0.1, spread=0.4), alpha=1e-3, tests=4)
    quantile = stats.t.isf(1e-3 / 4, REPLICAS - 1)
    assert bound.centre == pytest.approx(0.1)
    assert bound.own == bound.spread == pytest.approx(0.4)
    assert bound.error == pytest.approx(0.4 * math.sqrt(1 + 1 / REPLICAS))
    assert bound.significant == (-math.inf, pytest.approx(0.1 + quantile * bound.error))
    assert bound.failing == bound.significant
    assert bound.z(0.1 + 2 * bound.error) == pytest.approx(2)


def test_a_significant_deviation_fails_only_beyond_the_effect_size():
    """With little spread the effect size decides what fails; what is significant stays where it was."""
    small = bound_of(normal(mean=0.1, spread=0.1), precision="float32", alpha=0.05)
    assert small.failing == (-math.inf, pytest.approx(0.1 + math.log(EFFECT["float32"])))
    assert small.significant[1] < small.failing[1]


def test_a_hull_moves_only_what_fails():
    """Where it is asked for, a failing value lies above all replicas by more than the width of their hull."""
    replicas = np.array([*np.zeros(REPLICAS - 1), 5.0])
    plain, hulled = bound_of(replicas), bound_of(replicas, hull=True)
    assert hulled.failing[1] == pytest.approx(10.0)
    assert hulled.significant == plain.significant
    assert bound_of(normal(spread=0.01), hull=True).failing[1] == pytest.approx(
        bound_of(normal(spread=0.01)).failing[1]
    )


def test_families_scatter_beside_replicas():
    """What families of correct implementations differ by is added to the replicas' own spread, as variances add."""
    bound = bound_of(normal(spread=0.3), families=0.4)
    assert bound.own == pytest.approx(0.3)
    assert bound.spread == pytest.approx(0.5)
    assert bound.significant[1] == pytest.approx(bound_of(normal(spread=0.5)).significant[1])


def test_replicas_without_spread_leave_that_between_families():
    """Replicas that agree to the last bit do not make a bound that nothing can meet."""
    bound = bound_of(np.zeros(REPLICAS), families=FAMILIES)
    assert bound.own == 0
    assert bound.significant[1] == pytest.approx(bound_of(normal(spread=FAMILIES)).significant[1])


@pytest.mark.parametrize("precision", sorted(EFFECT))
def test_the_bound_grows_with_the_number_of_tests(precision):
    """Sharing the rate among more tests never lowers the bound."""
    limits = [bound_of(normal(), precision=precision, tests=tests).significant[1] for tests in (1, 10, 100, 1000)]
    assert limits == sorted(limits)
    assert limits[0] < limits[-1]


def test_the_bound_falls_with_the_number_of_replicas():
    """More replicas of the same spread know it better, and leave less room."""
    limits = [bound_of(normal(count)).significant[1] for count in (6, 12, 16, 24, 48, 96)]
    assert limits == sorted(limits, reverse=True)


def test_dependent_replicas_leave_more_room():
    """The same values count for less where the replicas are near copies."""
    assert bound_of(normal(), effective=13).significant[1] > bound_of(normal(), effective=23).significant[1]


@pytest.mark.parametrize("precision", sorted(EFFECT))
def test_too_few_effective_replicas_see_too_little(precision):
    """Few independent replicas widen the limits until a check could not tell two precisions apart, and says so."""
    few = [bound_of(normal(spread=FAMILIES), effective=e, precision=precision) for e in (REPLICAS, 12, 6, 3)]
    seen = [bounds.smallest_caught(bound) for bound in few]
    assert seen == sorted(seen)
    assert seen[0] < MAX_SMALLEST
    assert seen[-1] > MAX_SMALLEST
    assert "t(2)" in few[-1].why


def test_the_derivation_holds_the_numbers():
    """`why` names quantile, degrees, rate, tests, spread, replicas and effect size."""
    why = bound_of(normal(spread=0.4), effective=20, alpha=5e-4, tests=3, hull=True).why
    quantile = stats.t.isf(5e-4 / 3, 19)
    for part in ("t(19)", f"{quantile:.2f}", "0.0005", "3 tests", "0.4 ", "24 replicas", "1.5 x", "hull"):
        assert part in why
    assert "hull" not in bound_of(normal()).why


def test_minus_infinity_among_replicas_is_left_out():
    """A replica without any error on a unit (its log is -inf) does not pull mean and spread to minus infinity."""
    values = normal(25)
    with_gap = values.copy()
    with_gap[3] = -np.inf
    assert bound_of(with_gap, effective=24) == bound_of(np.delete(values, 3), effective=24)


@pytest.mark.parametrize("kind", [bound_of, maximum_of, signed_of])
@pytest.mark.parametrize("count", [0, 1])
def test_hardly_any_finite_replica_gives_a_finite_bound(kind, count):
    """Where (nearly) no replica shows an error, as on one whose prompt is a single token, the bound is a number."""
    values = np.full(REPLICAS, -np.inf)
    values[:count] = 0.1
    bound = kind(values, families=FAMILIES)
    assert math.isfinite(bound.significant[1])
    assert bound.significant[1] <= bound.failing[1] < math.inf


@given(
    values=st.lists(st.floats(-50, 50) | st.just(-math.inf), min_size=2, max_size=30),
    effective=st.floats(1, 30),
    tests=st.integers(0, 10**5),
)
@settings(deadline=None, max_examples=100)
def test_what_fails_is_always_significant(values, effective, tests):
    """Whatever the replicas, limits are numbers in order: centre, significant, failing."""
    replicas = np.array(values)
    spread = bounds.spread_of(replicas, effective, FAMILIES)
    for bound in (
        bounds.magnitude_bound(replicas, spread, alpha=ALPHA, tests=tests, precision="bfloat16", hull=True),
        bounds.maximum_bound(replicas, spread, alpha=ALPHA, tests=tests, precision="bfloat16"),
        bounds.signed_bound(replicas, spread, alpha=ALPHA, tests=tests),
    ):
        assert bound.failing[0] <= bound.significant[0] < bound.centre < bound.significant[1] <= bound.failing[1]
        assert math.isfinite(bound.failing[1])
        assert math.isfinite(bound.z(bound.centre))


# --- the bound of a maximum ------------------------------------------------------------------------


@given(
    alpha=st.floats(1e-7, 0.05),
    tests=st.integers(1, 1000),
    count=st.integers(3, 60),
    spread=st.floats(0.01, 2),
)
@settings(deadline=None, max_examples=100)
def test_a_maximum_has_more_room(alpha, tests, count, spread):
    """The tail of a maximum is heavier: at equal inputs its limit lies above that of a mean."""
    replicas = normal(count, spread=spread)
    wide, narrow = maximum_of(replicas, alpha=alpha, tests=tests), bound_of(replicas, alpha=alpha, tests=tests)
    assert wide.significant[1] > narrow.significant[1]
    assert wide.failing[1] >= narrow.failing[1]
    assert (wide.centre, wide.spread, wide.error) == (narrow.centre, narrow.spread, narrow.error)
    assert "Gumbel" in wide.why


# --- signed statistics -----------------------------------------------------------------------------


def test_signed_bound_by_hand():
    """Significant lies t s sqrt(1 + 1/K) away on each side, failing outside the hull by more than its width."""
    replicas = normal(mean=-2.0, spread=0.5)
    bound = signed_of(replicas, alpha=1e-3, tests=5)
    away = stats.t.isf(1e-3 / 5 / 2, REPLICAS - 1) * 0.5 * math.sqrt(1 + 1 / REPLICAS)
    assert bound.significant == pytest.approx((-2 - away, -2 + away))
    width = replicas.max() - replicas.min()
    assert bound.failing == pytest.approx(
        (min(-2 - away, replicas.min() - width), max(-2 + away, replicas.max() + width))
    )


@given(seed=st.integers(0, 999), mean=st.floats(-5, 5), spread=st.floats(0.01, 5))
@settings(deadline=None, max_examples=50)
def test_signs_change_sides(seed, mean, spread):
    """Replicas of the opposite sign have the opposite limits."""
    replicas = normal(mean=mean, spread=spread, seed=seed)
    one, other = signed_of(replicas), signed_of(-replicas)
    for name in ("significant", "failing"):
        low, high = getattr(one, name)
        assert getattr(other, name) == pytest.approx((-high, -low))


# --- spreads ---------------------------------------------------------------------------------------


def test_spread_by_hand():
    """It is the standard deviation over the finite replicas, with one degree of freedom less than they count for."""
    values = normal(spread=0.4)
    one = bounds.spread_of(values, REPLICAS, 0.3)
    assert (one.own, one.value, one.degrees) == (pytest.approx(0.4), pytest.approx(0.5), REPLICAS - 1)
    assert bounds.spread_of(values, 14.5, 0.1).degrees == 13.5
    # More than the finite replicas there are cannot count.
    assert bounds.spread_of(np.array([1.0, 2.0, -np.inf]), 14.5, 0.1).degrees == 1
    assert bounds.spread_of(np.array([]), 14.5, 0.1) == Spread(own=0.0, value=0.1, degrees=1)


def drawn_units(scales, replicas=REPLICAS, seed=0):
    """Replicas [K, U] of units with the given true spreads."""
    return np.random.default_rng(seed).normal(size=(replicas, len(scales))) * np.asarray(scales)


def test_equal_spreads_are_pooled():
    """Units of one true spread know it far better together: degrees of freedom well beyond their own."""
    spreads = bounds.moderated(drawn_units(np.full(30, 0.3)), REPLICAS, 0.0)
    assert all(one.degrees > 4 * (REPLICAS - 1) for one in spreads)
    own = drawn_units(np.full(30, 0.3)).std(axis=0, ddof=1)
    found = np.array([one.value for one in spreads])
    assert found.std() < 0.3 * own.std()
    assert found.mean() == pytest.approx(0.3, rel=0.05)


def test_unlike_spreads_keep_to_themselves():
    """Units of very different spreads say little about each other: hardly more degrees, values as they are."""
    scales = 0.3 * np.exp(np.linspace(-3, 3, 30))
    units = drawn_units(scales)
    spreads = bounds.moderated(units, REPLICAS, 0.0)
    assert all(REPLICAS - 1 < one.degrees < REPLICAS + 2 for one in spreads)
    # A prior of one degree still lifts those far below it: to the safe side.
    own, found = units.std(axis=0, ddof=1), np.array([one.value for one in spreads])
    assert found[own > 0.3] == pytest.approx(own[own > 0.3], rel=0.05)
    assert (found[own <= 0.3] >= 0.98 * own[own <= 0.3]).all()


def test_the_prior_is_found_again():
    """Spreads drawn from a prior of 20 degrees of freedom and scale 0.3 give about these back."""
    rng = np.random.default_rng(3)
    scales = 0.3 / np.sqrt(rng.chisquare(20, 3000) / 20)
    spreads = bounds.moderated(drawn_units(scales, seed=4), REPLICAS, 0.0)
    assert spreads[0].degrees - (REPLICAS - 1) == pytest.approx(20, rel=0.2)
    # Of a unit whose own spread is the prior's, the posterior spread is that as well.
    nearest = min(spreads, key=lambda one: abs(one.value - 0.3))
    assert nearest.value == pytest.approx(0.3, rel=0.01)


def test_the_posterior_is_the_mean_of_variances():
    """Each variance is the prior's and its own, weighted with their degrees of freedom."""
    units = drawn_units(0.3 * np.exp(np.random.default_rng(8).normal(0, 0.3, 12)))
    own, spreads = units.var(axis=0, ddof=1), bounds.moderated(units, REPLICAS, 0.0)
    prior = spreads[0].degrees - (REPLICAS - 1)
    # All of them lie on one line of the own variance, with the slope of its weight.
    found = np.array([one.value**2 for one in spreads])
    slope = (REPLICAS - 1) / (prior + REPLICAS - 1)
    assert found - slope * own == pytest.approx(np.full(12, (found - slope * own)[0]), rel=1e-9)


@given(
    units=st.integers(1, 12),
    replicas=st.integers(2, 26),
    effective=st.floats(1, 30),
    ranges=st.floats(0, 8),
    families=st.floats(0, 10),
    seed=st.integers(0, 999),
    dead=st.integers(0, 4),
)
@settings(deadline=None, max_examples=150)
def test_moderated_spreads_hold_what_families_scatter_and_their_own_degrees(
    units, replicas, effective, ranges, families, seed, dead
):
    """Whatever the units, also those without any spread or error, none is below what families scatter."""
    scales = np.exp(np.random.default_rng(seed).uniform(-ranges, ranges, units))
    values = drawn_units(scales, replicas, seed)
    values[:, :dead] = -np.inf if dead % 2 else 0.25
    spreads = bounds.moderated(values, effective, families)
    assert len(spreads) == units
    for column, one in zip(values.T, spreads, strict=True):
        assert one.value == pytest.approx(math.hypot(one.own, families))
        assert math.isfinite(one.value)
        assert one.degrees >= bounds.spread_of(column, effective, families).degrees
        assert one.degrees <= LARGEST_PRIOR + replicas


@pytest.mark.parametrize("units", [1, 2, 6, 11])
def test_few_units_have_no_prior(units):
    """Of a few units too little is learned about the others: they keep what they have."""
    values = drawn_units(np.full(units, 0.3))
    expected = [bounds.spread_of(column, 20.0, 0.1) for column in values.T]
    assert bounds.moderated(values, 20.0, 0.1) == expected


# --- flips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [0.01, 0.5, 7.5, 40.0])
@pytest.mark.parametrize("alpha", [1e-3, 1e-5])
def test_flips_of_independent_steps_are_poisson(expected, alpha):
    """Without bunching the limit is the smallest n that a Poisson count exceeds with at most the rate."""
    for variance in (expected, 0.8 * expected):
        limit = bounds.flips_limit(expected, variance, alpha)
        assert limit == int(limit)
        assert stats.poisson.sf(limit, expected) <= alpha
        assert limit == 0 or stats.poisson.sf(limit - 1, expected) > alpha


def test_a_poisson_binomial_is_below_its_poisson():
    """Steps with their own probabilities exceed the limit no more often than a Poisson count does."""
    rng = np.random.default_rng(0)
    probability = rng.beta(0.3, 3, size=200)
    flips = (rng.random((20_000, 200)) < probability).sum(axis=1)
    variance = float((probability * (1 - probability)).sum())
    limit = bounds.flips_limit(float(probability.sum()), variance, 1e-3)
    assert clopper_pearson(int((flips > limit).sum()), len(flips))[0] <= 1e-3


@pytest.mark.parametrize(("prompts", "bunching"), [(24, 4.0), (8, 1.0), (60, 0.5)])
def test_flips_that_come_in_bunches_stay_below_the_limit(prompts, bunching):
    """Where the flips of a prompt come together, the variance says so, and the rate is kept."""
    rng = np.random.default_rng(1)
    rates = rng.gamma(bunching, 0.4 / bunching, size=(100_000, prompts))
    flips = rng.poisson(rates).sum(axis=1)
    expected, variance = float(flips.mean()), float(flips.var())
    assert variance > 1.05 * expected
    limit = bounds.flips_limit(expected, variance, 1e-3)
    assert clopper_pearson(int((flips > limit).sum()), len(flips))[0] <= 1e-3
    # The Poisson limit would be passed too often, and one lower than the limit is too low, or nearly so.
    assert limit > bounds.flips_limit(expected, expected, 1e-3) or bunching * 0.4 < 0.3
    assert (flips > 0.7 * limit).mean() > 1e-3


def test_no_flip_is_expected_of_no_noise():
    """Where no step can flip, none may."""
    assert bounds.flips_limit(0.0, 0.0, 1e-3) == 0


@given(expected=st.floats(1e-6, 1e3), more=st.floats(0, 100), alpha=st.floats(1e-6, 0.1))
@settings(deadline=None, max_examples=100)
def test_more_bunching_never_lowers_the_limit(expected, more, alpha):
    """The limit is a number, not below the Poisson one by more than a step, and grows with the rate asked for."""
    limit = bounds.flips_limit(expected, expected * (1 + more), alpha)
    assert math.isfinite(limit)
    assert limit >= bounds.flips_limit(expected, expected * (1 + more), 2 * alpha)


# --- sums of rare, deep ties -----------------------------------------------------------------------


@pytest.mark.parametrize(("variance", "largest", "alpha"), [(0.01, 5.5, 1e-5), (4.0, 5.5, 1e-3), (400.0, 1.0, 1e-6)])
def test_bernstein_solves_its_inequality(variance, largest, alpha):
    """At the limit the right side of the inequality is the rate asked for."""
    x = bounds.bernstein(variance, largest, alpha)
    assert math.exp(-(x**2) / (2 * (variance + largest * x / 3))) == pytest.approx(alpha)


@pytest.mark.parametrize("steps", [3, 40, 800])
@pytest.mark.parametrize("alpha", [1e-2, 1e-3])
def test_sums_of_rare_ties_stay_below_bernstein(steps, alpha):
    """The summed depth of ties, each turned with its own probability, exceeds the limit at most at the rate."""
    rng = np.random.default_rng(14)
    draws = 20_000
    for _ in range(3):
        depth = rng.uniform(0, 5.5, steps)
        probability = stats.norm.sf(depth)
        limit = (probability * depth).sum() + bounds.bernstein(float((probability * depth**2).sum()), 5.5, alpha)
        total = np.zeros(draws)
        for one, chance in zip(depth, probability, strict=True):
            total += one * (rng.random(draws) < chance)
        assert clopper_pearson(int((total > limit).sum()), draws)[0] <= alpha


# --- what a bound catches --------------------------------------------------------------------------


def test_smallest_caught_by_hand():
    """A bug of that size moves the statistic to the failing limit and as far beyond as noise may pull it back."""
    bound = bound_of(normal(mean=0.1, spread=0.2))
    size = bounds.smallest_caught(bound)
    moved = 0.5 * math.log(math.exp(2 * 0.1) + size**2)
    assert moved - bound.failing[1] == pytest.approx(stats.norm.ppf(CATCH) * bound.error)


def test_nothing_is_caught_by_a_limit_below_the_centre():
    """A limit that round-off itself passes catches a bug of any size."""
    bound = Bound(centre=1.0, own=0.1, spread=0.1, error=0.1, significant=(-9, -9), failing=(-9, -9), why="")
    assert bounds.smallest_caught(bound) == 0


def noise_norms(rng, draws, rows, columns=16):
    """Lengths in units of round-off of projected errors [draws, rows], the same for all rows."""
    return np.sqrt(rng.chisquare(columns, size=(draws, rows)) / columns)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [40, 400])
def test_the_smallest_error_is_caught_as_often_as_promised(precision, rows):
    """A bug of that size beside round-off like the replicas' fails about 99 times of 100, half of it hardly ever.

    The rate is over golden and candidate: a single golden's replicas may be luckier or not.
    """
    rng, goldens, candidates, columns = np.random.default_rng(11), 200, 100, 16
    caught = missed = 0
    for _ in range(goldens):
        replicas = np.log(np.mean(noise_norms(rng, REPLICAS, rows) ** 2, axis=1)) / 2
        bound = bound_of(replicas, alpha=5e-4, tests=6, precision=precision)
        size = bounds.smallest_caught(bound)
        # An error of fixed length has the product with the noise of one row beside its square.
        squares = noise_norms(rng, candidates, rows) ** 2
        product = rng.normal(size=(candidates, rows)) / math.sqrt(columns)
        for share in (1.0, 0.5):
            values = 0.5 * np.log(np.mean(squares + 2 * share * size * product + (share * size) ** 2, axis=1))
            hits = int((values > bound.failing[1]).sum())
            caught += hits if share == 1 else 0
            missed += candidates - hits if share < 1 else 0
    lower, upper = clopper_pearson(caught, goldens * candidates, level=0.975)
    print(f"{precision}, {rows} rows: caught {caught / (goldens * candidates):.4f} ({lower:.4f} to {upper:.4f})")
    assert upper >= CATCH - 0.005
    assert caught / (goldens * candidates) >= CATCH - 0.005
    assert missed / (goldens * candidates) > 0.9


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, 1.0), (-math.inf, 0.0), (709.0, math.exp(709)), (710.0, math.inf)]
)
def test_an_exponential_is_a_number(value, expected):
    """A log magnitude beyond what a float holds is infinite, and NaN stays NaN."""
    assert bounds.exponential(value) == expected
    assert math.isnan(bounds.exponential(math.nan))


@given(mean=st.floats(-3, 3), spread=st.floats(0.01, 3), effective=st.floats(1, 24))
@settings(deadline=None, max_examples=100)
def test_what_is_caught_is_a_number(mean, spread, effective):
    """However few and wide the replicas, the smallest error is a number, or infinite: never an exception."""
    size = bounds.smallest_caught(bound_of(normal(mean=mean, spread=spread), effective=effective, tests=1000))
    assert size >= 0

import math

import numpy as np
import pytest
from scipy import stats

from harness.numerics import bounds
from harness.numerics.constants import ALPHA_POOLED, ALPHA_TOKENS, EFFECT, MIN_EFFECTIVE, REPLICAS, SPREAD_FLOOR


def bound_of(replicas, *, effective=None, precision="bfloat16", alpha=1e-3, tests=1):
    """`replica_bound` of some replicas, all of them independent unless said otherwise."""
    replicas = np.asarray(replicas, dtype=np.float64)
    number = len(replicas) if effective is None else effective
    return bounds.replica_bound(replicas, effective=number, precision=precision, alpha=alpha, tests=tests)


def normal(count=REPLICAS, *, spread=0.3, mean=0.0, seed=0):
    """Replicas with exactly this mean and standard deviation."""
    values = np.random.default_rng(seed).normal(size=count)
    return mean + spread * (values - values.mean()) / values.std(ddof=1)


def clopper_pearson(alarms, draws, level=0.95):
    """One-sided lower and upper confidence limits of a rate."""
    lower = stats.beta.ppf(1 - level, alarms, draws - alarms + 1) if alarms else 0.0
    upper = stats.beta.ppf(level, alarms + 1, draws - alarms) if alarms < draws else 1.0
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


# --- the bound -------------------------------------------------------------------------------------


def test_bound_by_hand():
    """What is significant begins at m + t s sqrt(1 + 1/K), with mean and spread of the replicas."""
    bound = bound_of(normal(mean=0.1, spread=0.4), alpha=1e-3, tests=4)
    quantile = stats.t.isf(1e-3 / 4, REPLICAS - 1)
    assert bound.centre == pytest.approx(0.1)
    assert bound.significant == pytest.approx(0.1 + quantile * 0.4 * math.sqrt(1 + 1 / REPLICAS))
    assert bound.failing == bound.significant


def test_a_significant_deviation_fails_only_beyond_the_effect_size():
    """With little spread the effect size decides what fails; what is significant stays where it was."""
    small = bound_of(normal(spread=SPREAD_FLOOR), precision="float32", alpha=0.05)
    assert small.failing == pytest.approx(math.log(EFFECT["float32"]))
    assert small.significant < small.failing


def test_the_spread_has_a_floor():
    """Replicas that agree to the last bit do not make a bound that nothing can meet."""
    bound = bound_of(np.zeros(REPLICAS))
    assert bound.significant == pytest.approx(bound_of(normal(spread=SPREAD_FLOOR)).significant)


@pytest.mark.parametrize("precision", sorted(EFFECT))
def test_the_bound_grows_with_the_number_of_tests(precision):
    """Sharing the rate among more tests never lowers the bound."""
    limits = [bound_of(normal(), precision=precision, tests=tests) for tests in (1, 10, 100, 1000)]
    assert [each.significant for each in limits] == sorted(each.significant for each in limits)
    assert limits[0].significant < limits[-1].significant


def test_the_bound_falls_with_the_number_of_replicas():
    """More replicas of the same spread know it better, and leave less room."""
    limits = [bound_of(normal(count)).significant for count in (12, 16, 24, 48, 96)]
    assert limits == sorted(limits, reverse=True)


def test_dependent_replicas_leave_more_room():
    """The same values count for less where the replicas are near copies."""
    assert bound_of(normal(), effective=13).significant > bound_of(normal(), effective=23).significant


@pytest.mark.parametrize("precision", sorted(EFFECT))
def test_too_few_effective_replicas_leave_the_ratio_alone(precision):
    """Below MIN_EFFECTIVE only the effect size beyond the largest replica speaks, and says so."""
    values = normal()
    bound = bound_of(values, effective=MIN_EFFECTIVE - 0.1, precision=precision)
    assert bound.significant == bound.failing == pytest.approx(values.max() + math.log(EFFECT[precision]))
    assert "only 11.9 are independent" in bound.why
    assert "quantile" in bound_of(values, effective=MIN_EFFECTIVE, precision=precision).why


def test_the_derivation_holds_the_numbers():
    """`why` names quantile, degrees, rate, tests, spread, replicas and effect size."""
    why = bound_of(normal(spread=0.4), effective=20, alpha=5e-4, tests=3).why
    quantile = stats.t.isf(5e-4 / 3, 19)
    for part in ("t(19)", f"{quantile:.2f}", "0.0005", "3 tests", "0.40", "24 replicas", "1.5 x"):
        assert part in why


def test_minus_infinity_among_replicas_is_left_out():
    """A replica without any error on a unit (its log is -inf) does not pull mean and spread to minus infinity."""
    values = normal(25)
    with_gap = values.copy()
    with_gap[3] = -np.inf
    assert bound_of(with_gap, effective=24) == bound_of(np.delete(values, 3), effective=24)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("effective", [1.0, 20.0])
def test_hardly_any_finite_replica_gives_a_finite_bound(count, effective):
    """Where (nearly) no replica shows an error, as on one whose prompt is a single token, the bound is a number."""
    values = np.full(REPLICAS, -np.inf)
    values[:count] = 0.1
    bound = bound_of(values, effective=effective)
    assert math.isfinite(bound.significant)
    assert bound.significant <= bound.failing < math.inf


# --- false alarms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.2, 0.5])
def test_no_alarm_in_three_thousand_nulls(spread):
    """Candidates drawn like the replicas never fail fp32: 0 of 3,000, at most 0.1 % with 95 % confidence."""
    rng = np.random.default_rng(7)
    draws, alarms = 3000, 0
    for values in rng.normal(0, spread, size=(draws, REPLICAS + 1)):
        alarms += not values[0] <= bound_of(values[1:], precision="float32", alpha=1e-4).failing
    assert clopper_pearson(alarms, draws)[1] <= 1e-3


def simulated_rate(candidates, replicas, *, effective, alpha, tests=1):
    """Alarms of `significant` over draws [n], replicas [n, K]: the formula of `replica_bound`, all draws at once."""
    spread = np.maximum(SPREAD_FLOOR, replicas.std(axis=1, ddof=1))
    quantile = bounds.student_quantile(1 - alpha / tests, effective - 1)
    limits = replicas.mean(axis=1) + quantile * spread * math.sqrt(1 + 1 / replicas.shape[1])
    for i in range(3):
        one = bound_of(replicas[i], effective=effective, alpha=alpha, tests=tests)
        assert limits[i] == pytest.approx(one.significant), "the simulation must use the formula of the source"
    return int((~(candidates <= limits)).sum())


@pytest.mark.parametrize("alpha", [0.05, 0.01, 1e-3])
def test_the_false_alarm_rate_is_the_one_asked_for(alpha):
    """Independent normal replicas of a spread above the floor: the rate is alpha, neither more nor idly less."""
    draws = 200_000
    values = np.random.default_rng(1).normal(0, 0.5, size=(draws, REPLICAS + 1)).astype(np.float32)
    alarms = simulated_rate(values[:, 0], values[:, 1:], effective=REPLICAS, alpha=alpha)
    lower, upper = clopper_pearson(alarms, draws, level=0.9999)
    assert lower <= alpha <= upper


def test_a_family_of_tests_shares_the_rate():
    """Of candidates judged by twenty statistics each, no more raise any alarm than the family's rate allows."""
    draws, tests, alpha = 1000, 20, 0.05
    rng = np.random.default_rng(2)
    alarmed = np.zeros(draws, dtype=np.bool_)
    values = rng.normal(0, 0.5, size=(tests, draws, REPLICAS + 1))
    quantile = bounds.student_quantile(1 - alpha / tests, REPLICAS - 1)
    for unit in values:
        spread = np.maximum(SPREAD_FLOOR, unit[:, 1:].std(axis=1, ddof=1))
        limit = unit[:, 1:].mean(axis=1) + quantile * spread * math.sqrt(1 + 1 / REPLICAS)
        alarmed |= unit[:, 0] > limit
    assert clopper_pearson(int(alarmed.sum()), draws, level=0.9999)[0] <= alpha


def test_copies_among_the_replicas_do_not_raise_the_rate():
    """24 replicas of which 8 are copies: at the rates of a verdict their effective number pays for the copies."""
    draws = 200_000
    values = np.random.default_rng(3).normal(0, 0.5, size=(draws, 17)).astype(np.float32)
    replicas = np.concatenate([values[:, 1:], values[:, 1:9]], axis=1)
    # (sum of eigenvalues)^2 / sum of squares of 8 pairs and 8 singles is 14.4; one is spent on the mean.
    alarms = simulated_rate(values[:, 0], replicas, effective=13.4, alpha=ALPHA_POOLED)
    assert clopper_pearson(alarms, draws, level=0.9999)[0] <= ALPHA_POOLED


def test_a_shared_error_does_not_raise_the_rate():
    """A common mode that candidate and replicas share cancels: only what differs between them is judged."""
    draws, alpha = 50_000, 1e-2
    rng = np.random.default_rng(4)
    values = rng.normal(0, 0.5, size=(draws, REPLICAS + 1)) + rng.normal(0, 3, size=(draws, 1))
    alarms = simulated_rate(values[:, 0], values[:, 1:], effective=REPLICAS - 1, alpha=alpha)
    assert clopper_pearson(alarms, draws, level=0.9999)[0] <= alpha


def test_below_the_floor_the_rate_is_far_below():
    """Replicas that spread less than the floor raise next to no alarm: the floor errs to the quiet side."""
    values = np.random.default_rng(5).normal(0, SPREAD_FLOOR / 2, size=(50_000, REPLICAS + 1))
    alarms = simulated_rate(values[:, 0], values[:, 1:], effective=REPLICAS, alpha=1e-2)
    assert clopper_pearson(alarms, len(values))[1] <= 1e-3


def test_a_large_error_is_seen():
    """An error three times the round-off fails nearly always in 16 bits, so the quiet above is not blindness."""
    rng = np.random.default_rng(6)
    seen = 0
    for values in rng.normal(0, SPREAD_FLOOR, size=(300, REPLICAS + 1)):
        seen += not values[0] + math.log(3) <= bound_of(values[1:], alpha=5e-4).failing
    assert clopper_pearson(seen, 300)[0] >= 0.9

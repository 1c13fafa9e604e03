"""Detection curves: fits against an optimiser, points, bootstrap intervals, separation, bins."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from harness.power.curves import Point, clopper_pearson, curve, logistic

NAMES = [f"bug-{number}" for number in range(40)]


def drawn(*, even=2.0, slope=3.0, bugs=100, each=8, seed=0):
    """S/N, outcome and bug of trials from a known curve."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 3, size=bugs * each)
    found = rng.random(len(x)) < 1 / (1 + np.exp(-slope * (x - math.log10(even))))
    return 10**x, found, [f"bug-{number % bugs}" for number in range(len(x))]


def penalised(beta, x, y):
    """Minus log likelihood and half the log determinant of the information."""
    p = 1 / (1 + np.exp(-(beta[0] + beta[1] * x)))
    weights = p * (1 - p)
    determinant = weights.sum() * (weights * x * x).sum() - (weights * x).sum() ** 2
    return -np.log(np.where(y, p, 1 - p)).sum() - math.log(determinant) / 2


@pytest.mark.parametrize("y", [(0, 0, 1, 0, 1, 1), (0, 0, 0, 1, 1, 1), (0, 1, 0, 0, 1, 1)])
def test_the_fit_maximises_the_penalised_likelihood(y):
    """A general optimiser finds the same intercept and slope, also where S/N separates found from missed."""
    x, y = np.array([-1, 0, 0.5, 1, 2, 3]), np.array(y, dtype=float)
    expected = minimize(penalised, [0.0, 1.0], args=(x, y), tol=1e-12).x
    assert logistic(x, y, np.ones((1, 6)))[0] == pytest.approx(expected, abs=1e-4)


def test_weights_are_how_often_a_trial_is_there():
    """A weight of 2 is the trial twice, and of 0 not at all."""
    x, y = np.array([-1, 0, 1, 2.0]), np.array([0, 1, 0, 1.0])
    weighted = logistic(x, y, np.array([[2.0, 1, 1, 0], [1, 1, 1, 1]]))
    one = logistic(np.array([-1, -1, 0, 1.0]), np.array([0, 0, 1, 0.0]), np.ones((1, 4)))
    assert weighted[0] == pytest.approx(one[0], abs=1e-4)
    assert weighted[1] == pytest.approx(logistic(x, y, np.ones((1, 4)))[0], abs=1e-4)


def test_a_known_curve_is_found_again():
    """Even odds at S/N 2, 19 in 20 at 2 x 10^(ln 19 / 3), each inside its interval, which is not wide."""
    found = curve(*drawn())
    nearly = 2 * 10 ** (math.log(19) / 3)
    assert found.even.low < 2.0 < found.even.high < 1.6 * found.even.low
    assert found.nearly.low < nearly < found.nearly.high
    assert found.share(found.even.value) == pytest.approx(0.5)
    assert found.share(found.nearly.value) == pytest.approx(0.95)


def test_intervals_cover_the_truth():
    """Of 60 drawn data sets about 95 % have the true point of even odds in their interval."""
    inside = 0
    for seed in range(60):
        point = curve(*drawn(bugs=40, each=3, seed=seed)).even
        inside += point.low <= 2.0 <= point.high
    assert inside >= 51  # of 60 at 95 %: fewer has a probability of 0.1 %


def test_bugs_are_drawn_and_not_trials():
    """Ten trials of each bug that agree are no more evidence than one: the interval hardly narrows."""
    signals, found, names = drawn(bugs=60, each=1)
    single = curve(signals, found, names).even
    tenfold = curve(np.repeat(signals, 10), np.repeat(found, 10), np.repeat(names, 10)).even
    assert math.log(tenfold.high / tenfold.low) > 0.7 * math.log(single.high / single.low)


def test_separation_is_no_obstacle():
    """All found above S/N 2 and none below: even odds between the neighbours of 2, and a finite slope."""
    signals = np.geomspace(0.02, 200, 41)[:40]
    found = curve(signals, signals > 2, NAMES)
    below, above = signals[signals <= 2].max(), signals[signals > 2].min()
    assert below < found.even.value < above
    assert math.isfinite(found.slope)
    assert found.even.low <= found.even.value <= found.even.high


@pytest.mark.parametrize(("outcome", "value"), [(True, 0.0), (False, math.inf)])
def test_nothing_is_extrapolated(outcome, value):
    """Where all or none are found, the points lie below or above all that was tried, with certainty."""
    found = curve(np.geomspace(0.1, 10, 40), [outcome] * 40, NAMES)
    assert found.even == found.nearly == Point(value=value, low=value, high=value)


def test_larger_errors_are_not_harder_to_see():
    """Data that falls with S/N gives a level line at the share found, not a falling one."""
    signals = np.geomspace(0.1, 10, 40)
    found = curve(signals, signals < 1, NAMES)
    assert found.slope == 0.0
    assert found.share(5.0) == pytest.approx(20.5 / 41)


def test_one_trial_and_none():
    """A single trial has a curve, no trial has none."""
    assert curve([], [], []) is None
    assert curve([3.0], [True], ["a"]).bins[0].total == 1


def test_infinite_signals_are_large_ones():
    """An overflow is taken as the largest S/N there is."""
    found = curve([0.1, 1.0, math.inf], [False, False, True], ["a", "b", "c"])
    assert found.largest == pytest.approx(1e8)
    assert math.isfinite(found.slope)


def test_bins_are_half_decades():
    """1, 2 and 3 are in the half decade from 1, 4 and 9 in the next; edges belong to the upper one."""
    found = curve([1.0, 2.0, 3.0, 4.0, 9.0, 10.0], [False, True, False, True, True, True], list("abcdef"))
    assert [(one.found, one.total) for one in found.bins] == [(1, 3), (2, 2), (1, 1)]
    assert [one.low for one in found.bins] == pytest.approx([1, math.sqrt(10), 10])
    assert found.bins[0].high == pytest.approx(math.sqrt(10))


def test_clopper_pearson_by_hand():
    """None of 10: up to 1 - 0.025^(1/10); all of 10 mirrors it."""
    limit = 1 - 0.025**0.1
    assert clopper_pearson(0, 10) == pytest.approx((0.0, limit))
    assert clopper_pearson(10, 10) == pytest.approx((1 - limit, 1.0))


def test_the_same_trials_give_the_same_curve():
    """The bootstrap is drawn from a fixed seed."""
    assert curve(*drawn(bugs=20, each=2)) == curve(*drawn(bugs=20, each=2))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(1e-3, 1e5), st.booleans(), st.sampled_from("abcd")), min_size=1, max_size=40))
def test_curves_never_fall(trials):
    """Whatever the outcomes, shares lie in 0..1 and rise with S/N, and the 95 % point is not below the 50 % one."""
    signals, found, names = zip(*trials, strict=True)
    line = curve(signals, found, names, draws=20)
    shares = [line.share(signal) for signal in np.geomspace(1e-3, 1e5, 30)]
    assert all(0 <= low <= high <= 1 for low, high in itertools.pairwise(shares))
    for point in (line.even, line.nearly):
        assert point.low <= point.high
    assert line.even.value <= line.nearly.value
    assert sum(one.total for one in line.bins) == len(trials)


def test_the_fit_has_converged():
    """On ordinary data the score with its penalty is 0."""
    signals, found, _ = drawn(bugs=50, each=4)
    x, y = np.log10(signals), found.astype(float)
    fits = logistic(x, y, np.ones((1, len(x))))
    design = np.stack([np.ones_like(x), x], axis=1)
    p = 1 / (1 + np.exp(-design @ fits[0]))
    information = design.T @ (design * (p * (1 - p))[:, None])
    leverage = np.einsum("ni,ij,nj->n", design, np.linalg.inv(information), design) * p * (1 - p)
    assert design.T @ (y - p + leverage * (0.5 - p)) == pytest.approx([0, 0], abs=1e-3)

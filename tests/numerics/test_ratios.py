"""The interval of a ratio, and that looking several times does not inflate its error."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.numerics.ratios import LOOKS, TRIM, interval, shares

_DRAWS = 400


def both(logs, error):
    """An interval that misses the ratio so often, by half on either side."""
    return interval(logs, below=error / 2, above=error / 2)


def noisy(rng, count):
    """Logarithms as a shared machine makes them: a normal core, and one in eight a good deal longer on either side."""
    core = 0.05 * rng.standard_normal(count)
    return core + np.where(rng.random(count) < 0.125, rng.choice([-1, 1], count) * rng.exponential(0.5, count), 0.0)


@pytest.mark.parametrize("count", LOOKS)
def test_an_interval_holds_the_ratio_as_often_as_it_says(count):
    """Of 400 draws no more miss the ratio than chance allows at an error of 5 %, outliers among them."""
    rng = np.random.default_rng(count)
    missed = 0
    for _ in range(_DRAWS):
        found = both(noisy(rng, count) + math.log(1.05), 0.05)
        missed += not found.low <= 1.05 <= found.high
    assert missed <= stats.binom.ppf(0.999, _DRAWS, 0.05)
    assert missed > 0, "an interval that never misses says nothing"


def test_a_smaller_error_is_a_wider_interval_and_more_pairs_a_narrower_one():
    """What is asked of an interval shows in its width."""
    logs = noisy(np.random.default_rng(1), 96)
    wide, narrow, few = both(logs, 0.001), both(logs, 0.1), both(logs[:12], 0.1)
    assert wide.low < narrow.low < narrow.middle < narrow.high < wide.high
    assert few.high / few.low > narrow.high / narrow.low


@given(st.lists(st.floats(-2, 2), min_size=4, max_size=40), st.floats(-1, 1))
def test_an_interval_moves_with_its_pairs(logs, shift):
    """Times that are all longer by one factor have all ends longer by it; exchanged sides have the inverse middle."""
    before = both(np.array(logs), 0.05)
    after = both(np.array(logs) + shift, 0.05)
    for one, other in zip((before.low, before.middle, before.high), (after.low, after.middle, after.high), strict=True):
        assert other == pytest.approx(one * math.exp(shift), rel=1e-6)
    assert both(-np.array(logs), 0.05).middle == pytest.approx(1 / before.middle, rel=1e-9)
    assert before.low <= before.middle <= before.high


def test_outliers_move_nothing_while_they_are_few():
    """One pair in ten that takes a thousand times as long leaves the middle within the core."""
    logs = 0.01 * np.random.default_rng(2).standard_normal(40)
    logs[:4] += math.log(1000)
    assert 0.98 < both(logs, 0.05).middle < 1.02
    assert TRIM > 0.1


def test_too_few_pairs_have_no_interval():
    """Three pairs say nothing of their scatter."""
    with pytest.raises(ValueError, match="3 pairs"):
        both(np.zeros(3), 0.05)


def test_ends_may_miss_unequally_often():
    """A larger chance to be above moves the upper end alone."""
    logs = noisy(np.random.default_rng(4), 32)
    even, uneven = interval(logs, below=0.01, above=0.01), interval(logs, below=0.01, above=0.1)
    assert (uneven.low, uneven.middle) == (even.low, even.middle)
    assert uneven.middle < uneven.high < even.high


def test_looking_does_not_inflate_the_error():
    """Whoever looks at all of the stated counts, and stops when it pleases, is wrong no more often than was said."""
    rng = np.random.default_rng(3)
    error, passed, failed = 0.1, 0, 0
    for _ in range(_DRAWS):
        logs = noisy(rng, LOOKS[-1])
        found = [interval(logs[:look], **shares(error, 1)) for look in LOOKS]
        passed += any(one.high < 1.0 for one in found)
        failed += any(one.low > 1.0 for one in found)
    assert max(passed, failed) <= stats.binom.ppf(0.999, _DRAWS, error)


def test_what_is_beyond_in_one_of_several_measures_passes_no_more_often_than_that():
    """Upper ends share no error among measures; lower ends do, since one of them is enough to fail."""
    one, four = shares(0.05, 1), shares(0.05, 4)
    assert four["above"] == one["above"]
    assert four["below"] == pytest.approx(one["below"] / 4)
    rng = np.random.default_rng(5)
    passed = failed = 0
    for _ in range(_DRAWS):
        # At its limit in one measure of four, and far below it in the others.
        found = [interval(noisy(rng, 16) - shift, **shares(0.2, 4)) for shift in (0.0, 1.0, 1.0, 1.0)]
        passed += all(each.high < 1.0 for each in found)
        same = [interval(noisy(rng, 16), **shares(0.2, 4)) for _ in range(4)]
        failed += any(each.low > 1.0 for each in same)
    assert max(passed, failed) <= stats.binom.ppf(0.999, _DRAWS, 0.2)

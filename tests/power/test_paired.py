"""Paired comparisons against published numbers and hand-made ones."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.power.paired import Paired, paired, wilson

COUNTS = st.integers(min_value=0, max_value=200)


def table(both, first, second, neither):
    """Trials by who finds them."""
    return Paired(both=both, first=first, second=second, neither=neither)


def test_counts_by_who_finds_it():
    """Each trial is in one cell."""
    pairs = [(True, True), (True, False), (True, False), (False, True), (False, False)]
    assert paired(pairs) == table(1, 2, 1, 1)


def test_mcnemar_by_hand():
    """10 against 2: twice the tail of 12 fair coins, (1 + 12 + 66) / 4096."""
    assert table(36, 10, 2, 0).p == pytest.approx(2 * 79 / 4096)
    assert table(5, 0, 0, 5).p == 1.0
    assert table(0, 5, 0, 0).p == pytest.approx(2 / 32)


def test_wilson_by_hand():
    """Half of 10: 0.5 +- z sqrt(1/40 + z^2/400) / (1 + z^2/10) with z = 1.959964; none of 10: 0 to z^2 / (10 + z^2)."""
    assert wilson(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson(0.0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)


def test_newcombe_without_discordant_pairs():
    """54 pairs that neither finds: both limits are Wilson's, z^2 / (54 + z^2)."""
    limit = 3.841459 / 57.841459
    assert table(0, 0, 0, 54).interval == pytest.approx((-limit, limit), abs=1e-6)


def test_newcombe_with_independent_judges():
    """Where the correlation is 0 the squared distances to Wilson's limits add: 40 and 20 of 80, crossed evenly."""
    counts = table(10, 30, 10, 30)
    low_one, high_one = wilson(0.5, 80)
    low_other, high_other = wilson(0.25, 80)
    low = 0.25 - math.hypot(0.5 - low_one, high_other - 0.25)
    high = 0.25 + math.hypot(high_one - 0.5, 0.25 - low_other)
    assert counts.interval == pytest.approx((low, high), abs=1e-12)


def test_newcombe_with_a_correlation():
    """(36, 12, 2, 0): phi is -24 / sqrt(48 x 2 x 38 x 12); the limits by a calculator."""
    assert table(36, 12, 2, 0).interval == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_agreement_makes_the_interval_narrower():
    """Of equal totals, judges that find the same trials are known to differ less; the numerator loses n / 2."""
    apart, together = table(20, 30, 20, 30).interval, table(40, 10, 0, 50).interval
    assert together[1] - together[0] < 0.7 * (apart[1] - apart[0])
    phi = (40 * 50 - 50) / math.sqrt(50 * 50 * 40 * 60)
    (low_one, _), (_, high_other) = wilson(0.5, 100), wilson(0.4, 100)
    one, other = 0.5 - low_one, high_other - 0.4
    assert together[0] == pytest.approx(0.1 - math.sqrt(one**2 - 2 * phi * one * other + other**2))


def test_nothing_is_known_without_trials():
    """The widest interval, no difference, and a p of 1."""
    empty = paired([])
    assert (empty.difference, empty.interval, empty.p) == (0.0, (-1.0, 1.0), 1.0)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_swapping_the_judges_turns_everything_round(both, first, second, neither):
    """McNemar's p stays, the difference and its limits change sign, and the difference lies within them."""
    one, other = table(both, first, second, neither), table(both, second, first, neither)
    assert one.p == pytest.approx(other.p)
    assert one.difference == -other.difference
    low, high = other.interval
    assert one.interval == pytest.approx((-high, -low), abs=1e-12)
    assert -1 <= low <= other.difference <= high <= 1

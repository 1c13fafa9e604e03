import math

import numpy as np
import pytest

from harness.criteria.case import View
from harness.criteria.neuron import _overlap, _shift, _top_errors
from tests.criteria.cases import alarms, forced, score


def spread(width=8, largest=10.0):
    """One row of logits from the largest down to its negative."""
    return np.linspace(largest, -largest, width)[None]


def test_the_shift_is_that_of_least_squares():
    """The constant is the intercept that numpy's own fit finds; equal sides have none, also where a row is flat."""
    rng = np.random.default_rng(0)
    same, candidate = rng.normal(3, 2, size=(2, 5, 40))
    view = View(case=forced(same, candidate))
    for row, one in enumerate(_shift(view)[:5]):
        assert one == pytest.approx(np.polyfit(same[row], candidate[row], 1)[1], rel=1e-9)
    for flat in (same, np.ones((1, 4))):
        assert not _shift(View(case=forced(flat))).any()
    assert _shift(View(case=forced(np.ones((1, 4)), np.full((1, 4), 3.0)))) == pytest.approx(np.array([2, 2]))


def test_a_constant_is_removed():
    """A constant added to all logits is not seen, nor is it in the three-way comparison."""
    for name in ("neuron", "neuron-ulp"):
        assert score(name, forced(spread(), spread() + 5)) == pytest.approx(0, abs=1e-6)
    exact = spread() + np.random.default_rng(0).normal(size=8)
    assert score("neuron-3way", forced(spread(), spread() + 5, exact)) == pytest.approx(1 / 1.5)


def test_each_depth_has_its_own_errors():
    """An error of the reference's eighth best token counts among all and not among the best five."""
    same = spread(largest=7.0)
    # Row and error both have a mean of 0, and so has the intercept.
    bend = np.array([[0, 0, 0, 0, 0, 0, -1.0, 1.0]])
    errors = _top_errors(View(case=forced(same, same + bend)))
    assert errors[5] == 0
    assert errors[0] == errors[1000] == errors[50] == pytest.approx((1 - 1e-5) / 7)
    errors = _top_errors(View(case=forced(same, same + bend[:, ::-1])))
    assert list(errors.values()) == pytest.approx([(1 - 1e-5) / 7] * 4)


@pytest.mark.parametrize(("name", "limit"), [("neuron", 0.01), ("neuron-ulp", 0.011)])
def test_the_best_five_by_hand(name, limit):
    """An error among the best five is measured in the largest logit, less 1e-5."""
    same = np.array([[10.0, 0, 0, -10.0]])
    for factor in (0.99, 1.01):
        size = (10 * limit) * factor
        # Orthogonal to the row and to a constant, so that nothing of it is fitted away.
        candidate = same + np.array([[0, size, -size, 0]])
        assert score(name, forced(same, candidate)) == pytest.approx((size - 1e-5) / 10 / limit, rel=1e-9)
        assert alarms(name, forced(same, candidate)) == (factor > 1)


def flipped(gap, level):
    """Two tokens at about one level that change order, the candidate's best leading by ``gap``; 98 others far away."""
    same = np.concatenate([[level, level - 1e-9], np.linspace(-level, level / 2, 98)])
    candidate = same.copy()
    candidate[:2] = level - gap, level
    return same[None], candidate[None]


def test_a_flip_may_have_a_thousandth():
    """The gap of a flip is over 0.001 logits, whatever the logits' magnitude."""
    for gap, expected in ((0.0009, False), (0.0011, True)):
        assert alarms("neuron", forced(*flipped(gap, 40.0))) == expected
    assert score("neuron", forced(*flipped(0.05, 40.0))) == pytest.approx(50, rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "level", "unit"),
    [("bfloat16", 19.0, 0.125), ("bfloat16", 40.0, 0.25), ("float16", 19.0, 2**-6), ("float32", 19.0, 2**-19)],
)
def test_a_flip_may_have_a_unit_in_the_last_place(precision, level, unit):
    """The unit is that of the precision at the logits' magnitude: 0.125 for bfloat16 from 16 to 32."""
    for factor in (0.5, 1.5):
        case = forced(*flipped(factor * unit, level), precision=precision)
        assert score("neuron-ulp", case) == pytest.approx(factor, rel=1e-3)


def test_masked_tokens_are_left_out():
    """-inf on both sides is left out; on one side, and any NaN, it alarms."""
    same = np.array([[3.0, 1, -2, -math.inf]])
    error = np.array([[0.0, 0.01, 0, 0]])
    kept = forced(same[:, :3], same[:, :3] + error[:, :3])
    for name in ("neuron", "neuron-ulp"):
        assert score(name, forced(same, same + error)) == pytest.approx(score(name, kept), rel=1e-9)
        assert 0 < score(name, kept) < math.inf
        assert score(name, forced(np.nan_to_num(same, neginf=-9), same)) == math.inf
        assert score(name, forced(same[:, :3], [[3.0, math.nan, -2]])) == math.inf


def test_three_ways_by_hand():
    """Errors along one direction: the candidate's are twice the reference's, of which 1.5 times are allowed."""
    exact = np.array([[10.0, 0, 0, -10.0]])
    bend = np.array([[0, 1.0, -1.0, 0]])
    close = [score("neuron-3way", forced(exact + bend, exact + factor * bend, exact)) for factor in (1.0, -1.0)]
    assert close == pytest.approx([2 / 3, 2 / 3])
    # Histograms of (0, 1, 1, 0) and (0, 2, 2, 0): half of both in the first bin.
    assert score("neuron-3way", forced(exact + bend, exact + 2 * bend, exact)) == pytest.approx(0.5 / 0.01)
    assert score("neuron-3way", forced(exact, exact + bend, exact)) == math.inf
    assert score("neuron-3way", forced(exact)) == 0


def test_three_ways_ratio_of_a_single_row():
    """Where histograms agree, one row with 1.4 times the error passes and one with 1.6 times does not."""
    exact = np.tile(np.array([[10.0, 0, 0, -10.0]]), (2000, 1))
    bend = np.random.default_rng(1).normal(size=(2000, 1)) * np.array([[0, 1.0, -1.0, 0]])
    for factor in (1.4, 1.6):
        one = bend.copy()
        one[1000] *= factor
        case = forced(exact + bend, exact + one, exact)
        assert score("neuron-3way", case) == pytest.approx(factor / 1.5)
        assert alarms("neuron-3way", case) == (factor > 1.5)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [([1, -1, 0, 0, 0, 0], [1, -1, 1, -1, 1, -1], math.sqrt(3)), ([1, -1, 1, -1, 1, -1], [2, -2, 0, 0, 0, 0], 2)],
)
def test_three_ways_has_two_norms(reference, candidate, expected):
    """One row whose errors are more, though none larger, or larger, though no more, is found by one norm each."""
    exact = np.tile(np.array([10.0, 0, 0, 0, 0, 0, 0, -10]), (2000, 1))
    errors = np.zeros((2, 2000, 8))
    errors[:, :, 1:7] = reference
    errors[1, 1000, 1:7] = candidate
    case = forced(exact + errors[0], exact + errors[1], exact)
    assert score("neuron-3way", case) == pytest.approx(expected / 1.5)


def test_overlap_by_hand():
    """Equal samples overlap by 1, distant ones by 0, and half of one by the root of 1/2."""
    low, high = np.zeros(4), np.ones(4)
    assert _overlap(low, low) == 1
    assert _overlap(low, high) == 0
    assert _overlap(np.array([0.0, 0, 1, 1]), high) == pytest.approx(math.sqrt(0.5))

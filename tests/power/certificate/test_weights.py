"""What templates say of bugs: by hand, and beside real checks of the tiny golden."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import flow
from harness.numerics import statistics
from harness.numerics.bounds import exponential, normal_quantile
from harness.power.certificate import weights
from harness.power.certificate.weights import Weight
from tests.templates import tiny


def units():
    """Two rows of which the second counts twice, as one unit and as two."""
    rows = np.array([0, 1])
    return [
        weights.Units(statistic="error", names=["all"], unit=np.zeros(2, dtype=int), weight=np.array([1.0, 2.0])),
        weights.Units(statistic="error", names=["a", "b"], unit=rows, weight=np.ones(2)),
    ]


def test_a_template_beside_the_limits():
    """By hand: ratios 9 and 0 give an S/N of sqrt(9 / 3) in all and of 3 in the first row; z is 1 / error."""
    squares, sigma = np.array([[36.0, 0.0]]), np.array([2.0, 1.0])
    smallest = {("error", "all"): 1.8, ("error", "a"): 3.1, ("error", "b"): 0.1}
    (one,) = weights.weigh(squares, sigma, units(), smallest, np.array([0.25]), 6.0)
    assert one.signal == pytest.approx(3**0.5)
    assert not one.large
    assert one.z == 4.0
    assert one.tokens == pytest.approx(((6.0 + normal_quantile(0.99)) * 0.25) ** 2)
    for name, value in (("all", 1.7), ("a", 2.9)):
        (other,) = weights.weigh(squares, sigma, units(), smallest | {("error", name): value}, np.array([0.25]), 6)
        assert other.large
    (blind,) = weights.weigh(squares, sigma, units(), {}, np.array([np.inf]), np.inf)
    assert not blind.large
    assert blind.tokens == np.inf
    assert blind.z == 0


@given(st.floats(1.0, 100.0), st.floats(1e-3, 10.0))
def test_a_larger_bug_is_never_seen_less(factor, error):
    """A template ``factor`` times as large has a coefficient known so much better, and a larger error."""
    squares, smallest = np.array([[1.0, 4.0]]), {("error", "all"): 2.0}
    small, large = (
        weights.weigh(squares * each**2, np.ones(2), units(), smallest, np.array([error / each]), 6.0)[0]
        for each in (1.0, factor)
    )
    assert large.signal >= small.signal
    assert large.large >= small.large
    assert large.tokens <= small.tokens * (1 + 1e-12)


def weight(*, large=False, tokens=2.0):
    """A template of no particular size."""
    return Weight(signal=1.0, large=large, z=5.0, tokens=tokens)


def test_the_strongest_decides_and_the_weakest_that_is_seen_is_told():
    """By size before by name; a multiple of the tokens only where it is not seen."""
    sight = weights.sight_of_templates
    one = sight({1.0: weight(large=True), 0.1: weight(tokens=0.9), 0.01: weight()})
    assert (one.seen, one.weakest, one.tokens) == ("size", 0.1, None)
    one = sight({1.0: weight(tokens=1.0), 0.1: weight(tokens=1.1)})
    assert (one.seen, one.weakest, one.tokens) == ("name", 1.0, None)
    one = sight({1.0: weight(tokens=7.5)})
    assert (one.seen, one.weakest, one.tokens) == ("not", None, 7.5)
    assert sight({1.0: weight(tokens=np.inf)}).tokens is None


def test_units_are_named_as_a_check_names_them(plain):
    """Each error that a check judges by its size has a unit here, or it would be left out in silence."""
    ours = {
        (one.statistic, one.names[index])
        for one in weights.units_of(tiny.golden(), tiny.bank())
        for index in np.unique(one.unit)
    }
    judged = {(one.name, one.unit) for one in plain["float32"].statistics if one.name in weights.SIZES}
    assert judged == ours
    assert {name for name, _ in judged} == {statistics.ERROR, statistics.PROMPT, statistics.RANGE}


def test_the_size_of_an_error_is_that_of_the_check():
    """What a gross bug's template foretells for each unit is what a check of the bug measures there."""
    golden, bank = tiny.golden(), tiny.bank()
    index = bank.names.index(("x-rows-swapped", 1.0))
    sigma = golden.floors["float32"].sigma[bank.place].astype(np.float64)
    ratios = weights.squares_of(bank)[index] / sigma**2
    with tiny.broken("float32", "x-rows-swapped") as engine:
        verdict = flow.check(golden, tiny.traced(engine))
    measured = {(one.name, one.unit): exponential(one.value) for one in verdict.statistics}
    for one in weights.units_of(golden, bank):
        signals = one.signals(ratios)
        for index in np.unique(one.unit):
            name, signal = one.names[index], signals[index]
            # 16 projections know a row's length to 35 %, and six rows to 15 %.
            assert measured[one.statistic, name] == pytest.approx(signal, rel=0.1 if name == "all" else 0.5), name

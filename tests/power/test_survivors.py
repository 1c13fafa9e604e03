"""Why a bug was missed: one test a reason, and how many tokens would be needed."""

import math

import pytest

from harness.power.curves import Curve, Point
from harness.power.survivors import survivor, tokens_needed
from tests.power.synthetic import mutation, trial


def line(even=2.0):
    """A curve with even odds at an S/N."""
    point = Point(value=even, low=even, high=even)
    return Curve(intercept=0.0, slope=1.0, smallest=0.01, largest=100.0, even=point, nearly=point, bins=())


def reason(one, bug=None, **more):
    """The reason of a missed trial."""
    return survivor(one, bug or mutation(), **more).reason


@pytest.mark.parametrize("sizes", [(3.0, 1.0), (0.5, 3.0), (None, 3.0), (math.inf, None), (math.nan, None)])
def test_what_is_large_and_missed_is_a_hole(sizes):
    """An S/N or an error of 3 times round-off is a hole in the verdict, and so is what is no number."""
    signal, error = sizes
    assert reason(trial(signal=signal, error=error)) == "HOLE"


def test_just_below_is_no_hole():
    """2.99 times round-off is below the floor."""
    assert reason(trial(signal=2.99, error=2.99)) == "below the floor"


def test_tokens_that_no_correct_port_changes_are_a_hole():
    """A bug that shows in tokens is a hole where more differ than of any correct implementation, and not otherwise."""
    bug, one = mutation(shows="tokens"), trial(signal=0.0, error=1.0, tokens=3)
    found = survivor(one, bug, flips=2)
    assert found.reason == "HOLE"
    assert "3 tokens differ, of correct ones at most 2" in found.explanation
    assert reason(one, bug, flips=3) == "equivalent"
    assert reason(one, mutation(), flips=2) == "equivalent"


def test_below_the_floor_says_how_many_tokens():
    """S/N 1.5 where odds are even at 2: (2 / 1.5)^4 = 3.16 times as many."""
    found = survivor(trial(signal=1.5), mutation(), line=line())
    assert found.reason == "below the floor"
    assert found.more_tokens == pytest.approx(256 / 81)
    assert found.explanation == "below the floor: S/N 1.5, even odds at 3.2 x as many tokens or more"


@pytest.mark.parametrize(
    ("signal", "even", "expected"),
    [(1.2, 2.4, 16.0), (2.0, 2.0, 1.0), (2.5, 2.0, 1.0), (1.1, 2.0, None), (1.5, math.inf, None), (1.5, 0.0, None)],
)
def test_tokens_needed(signal, even, expected):
    """The fourth power of the ratio; none below the effect size sqrt(1.25) of 16 bits, or without even odds."""
    assert tokens_needed(signal, line(even), "bfloat16") == (None if expected is None else pytest.approx(expected))


def test_tokens_needed_in_float32():
    """There an error has to be 3 times round-off, an S/N of sqrt(8); without a curve nothing is known."""
    assert tokens_needed(2.8, line(5.0), "float32") is None
    assert tokens_needed(2.9, line(5.8), "float32") == pytest.approx(16.0)
    assert tokens_needed(1.5, None, "bfloat16") is None


def test_half_precision_bugs_have_the_size_of_their_error():
    """Active in 16 bits alone: float64 shows nothing, and sqrt(1.3^2 - 1) = 0.83 of the error is the bug's."""
    bug = mutation(active=frozenset({"half"}))
    assert "S/N 0.83" in survivor(trial(signal=0.0, error=1.3), bug).explanation
    assert "no change in float64, S/N 0, error 0.9" in survivor(trial(signal=0.0, error=0.9), bug).explanation
    assert reason(trial(signal=0.0, error=0.9), bug) == "below the floor"
    assert reason(trial(signal=0.0, error=0.9, precision="float32"), bug) == "not active in this suite"


@pytest.mark.parametrize(("axes", "options", "expected"), [
    ({"fp32", "decode", "padding", "batch", "free", "single", "second"}, (), "equivalent"),
    ({"fp32", "long"}, (), "not active in this suite"),
    ({"fp32", "chunk"}, (), "not active in this suite"),
    ({"fp32", "chunk"}, (("chunk", "16"),), "equivalent"),
])  # fmt: skip
def test_what_changes_nothing_lacks_an_axis_or_is_equivalent(axes, options, expected):
    """The catalogue says what a bug needs; an option that it brings is there."""
    bug = mutation(active=frozenset(axes), options=options)
    found = survivor(trial(signal=0.0, error=1.0), bug)
    assert found.reason == expected
    assert ("needs" in found.explanation) is (expected != "equivalent")


def test_unknown_sizes():
    """Without an S/N the error stands in; without both nothing is known."""
    assert "S/N 0.98" in survivor(trial(signal=None, error=1.4), mutation()).explanation
    assert reason(trial(signal=None, error=None)) == "not known"


def test_finders_are_kept():
    """The peers that find it stand with it."""
    assert survivor(trial(), mutation(), finders=["x"]).finders == ("x",)

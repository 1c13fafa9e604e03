"""Efficiency over ranks, and the SPECs that have them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engines.spec import parse_spec
from harness.errors import UsageError
from harness.speed.kinds import scaling
from harness.speed.kinds.latency import Latency
from harness.speed.kinds.scaling import Point, Scaling
from harness.speed.kinds.spread import spread


def taking(seconds):
    """A latency of so many seconds a token."""
    one = spread([seconds])
    return Latency(prompt=7, new=100, repeats=1, first=one, later=one, token=one, memory=0)


def test_efficiency_is_speed_over_ranks_times_the_speed_of_one():
    """Two ranks that are 1.6 times as fast use 80 % of themselves; whatever did not run has none."""
    points = [Point(ranks=n, spec="tp", latency=taking(s)) for n, s in ((1, 0.8), (2, 0.5), (4, 0.2))]
    found = Scaling(points=(*points, Point(ranks=8, spec="tp", reason="no")))
    assert [found.efficiency(one) for one in found.points] == [1.0, pytest.approx(0.8), pytest.approx(1.0), None]
    alone = Scaling(points=(Point(ranks=1, spec="tp", reason="no"), points[1]))
    assert alone.efficiency(points[1]) is None


def test_ranks_begin_with_one():
    """What the others are compared with."""
    assert scaling.counts((3, 1, 2, 1)) == (1, 2, 3)
    for asked in ((2, 3), ()):
        with pytest.raises(UsageError, match="do not begin with 1"):
            scaling.counts(asked)


@pytest.mark.parametrize(
    ("text", "ranks", "expected"),
    [
        ("tp:size=2,dtype=float32", 3, "tp:size=3,dtype=float32"),
        ("pp:dtype=float32,stages=2", 1, "pp:dtype=float32,stages=1"),
        ("tp", 2, "tp:size=2"),
        ("tp:model='a,b',size=2", 4, 'tp:model="a,b",size=4'),
    ],
)
def test_the_same_engine_gets_another_number_of_ranks(text, ranks, expected):
    """All other keys stay as they are."""
    assert scaling.at_ranks(text, ranks) == expected


@given(st.text(alphabet="ab ,=/'", min_size=1).filter(lambda text: text == text.strip()))
def test_a_directory_of_any_name_survives(name):
    """What is quoted is read as it was."""
    text = f'tp:model="{name}",size=2'
    assert parse_spec(scaling.at_ranks(text, 5)).options == {"model": name, "size": "5"}


@pytest.mark.parametrize(
    ("text", "word"), [("hf", "hf has no ranks"), ("py:a:b", "py has no ranks"), ("tp:size=2,stages=2", "two ways")]
)
def test_what_has_no_ranks_to_vary_says_so(text, word):
    """And what has some does not."""
    assert word in scaling.why_not(text)
    assert scaling.why_not("tp:size=2") == scaling.why_not("pp:stages=3,size=1") == ""

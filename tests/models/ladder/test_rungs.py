import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.models.ports.ladder import rungs


@given(st.sets(st.sampled_from(list(rungs.RUNGS))))
def test_what_is_joined_is_parsed_again(names):
    """Any set of rungs survives being written into a SPEC and read from it."""
    assert rungs.parse(rungs.join(frozenset(names))) == names


def test_all_and_none():
    """The two words for the whole ladder and for the baseline."""
    assert rungs.parse("all") == set(rungs.RUNGS)
    assert rungs.parse("none") == set()


@pytest.mark.parametrize("text", ["", "alibi+", "Alibi", "alibi,layout", "fast"])
def test_an_unknown_rung_is_refused(text):
    """The message lists what there is."""
    with pytest.raises(ValueError, match=r"alibi\+layout\+gelu"):
        rungs.parse(text)


def test_the_ladder_adds_one_rung_at_a_time():
    """From the baseline to all of them, each has what the one before has and one more."""
    steps = rungs.ladder()
    assert steps[0] == frozenset()
    assert steps[-1] == frozenset(rungs.RUNGS)
    assert all(lower < higher and len(higher - lower) == 1 for lower, higher in itertools.pairwise(steps))

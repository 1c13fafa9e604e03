"""Sequences are grouped so that each is there once, whole, and padding costs little."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engines.streaming.grouping import groups


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=30))
def test_every_sequence_is_in_one_group(lengths):
    """Each that is not empty stands in exactly one row, at its start; the rest of the row is padding."""
    sequences = [[1000 * index + place for place in range(length)] for index, length in enumerate(lengths)]
    found = groups(sequences, heads=4)
    members = [index for group in found for index in group.members]
    assert sorted(members) == [index for index, length in enumerate(lengths) if length]
    for group in found:
        for row, index in enumerate(group.members):
            assert group.ids_BT[row, : group.lengths[row]].tolist() == sequences[index]


def test_padding_is_cheaper_than_it_could_be():
    """Short and long prompts are kept apart where padding would cost more than another group, and not otherwise."""
    found = groups([[1] * 600, [1] * 600, [2] * 30, [2] * 29, [2] * 31])
    assert [group.members for group in found] == [(3, 2, 4), (0, 1)]
    assert len(groups([[1] * 20, [1] * 60])) == 1


def test_attention_bounds_a_group():
    """Long sequences of a model with many heads are not put together: their scores would not fit."""
    assert len(groups([[1] * 2000] * 2, heads=112)) == 2
    assert len(groups([[1] * 2000] * 2, heads=2)) == 1

"""Stages, shards and their numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engines.ranks.layout import Layout, refusal, stage_layers

_SIZES = st.integers(1, 9)


@given(layers=st.integers(1, 200), stages=st.integers(1, 40))
def test_stages_hold_every_block_once_in_order_and_evenly(layers, stages):
    """Ranges are consecutive from the first block to the last, and their sizes differ by at most one."""
    ranges = stage_layers(layers, stages)
    assert len(ranges) == stages
    assert [block for one in ranges for block in one] == list(range(layers))
    sizes = [len(one) for one in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("layers", "stages", "ranges"),
    [
        (8, 2, [range(4), range(4, 8)]),
        (8, 3, [range(3), range(3, 6), range(6, 8)]),
        (5, 4, [range(2), range(2, 3), range(3, 4), range(4, 5)]),
    ],
)
def test_the_remainder_goes_to_the_first_stages(layers, stages, ranges):
    """Blocks that do not divide by the stages."""
    assert stage_layers(layers, stages) == ranges


@given(tensor=_SIZES, stages=_SIZES)
def test_every_rank_has_a_place_of_its_own(tensor, stages):
    """Ranks of a stage are neighbours; every pair of stage and shard is one rank's; the head is of the last stage."""
    layout = Layout(tensor=tensor, stages=stages)
    places = [layout.place(rank) for rank in range(layout.world)]
    assert [(one.stage, one.shard) for one in places] == [(a, b) for a in range(stages) for b in range(tensor)]
    assert [one.rank for one in places] == list(range(layout.world))
    assert [one.rank for one in places if one.last] == list(layout.ranks_of(stages - 1))
    assert [one.rank for one in places if one.first] == list(layout.ranks_of(0))
    assert layout.head == layout.ranks_of(stages - 1)[0]


def _config(heads, blocks, shared=None):
    text = SimpleNamespace(num_attention_heads=heads, num_hidden_layers=blocks)
    if shared is not None:
        text.num_key_value_heads = shared
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("layout", "config", "words"),
    [
        (Layout(tensor=2), _config(6, 2), ""),
        (Layout(tensor=4), _config(6, 2), "its 6 attention heads cannot be divided among 4 ranks"),
        (Layout(tensor=2), _config(6, 2, 3), "its 3 key/value heads cannot be divided among 2 ranks"),
        (Layout(tensor=3), _config(6, 2, 3), ""),
        (Layout(stages=3), _config(6, 2), "its 2 blocks are fewer than 3 stages"),
        (Layout(stages=2, tensor=2), _config(6, 2), ""),
    ],
)
def test_what_does_not_divide_is_refused_in_words(layout, config, words):
    """Heads that a rank would get a part of, and stages without a block."""
    assert refusal(layout, config) == words

"""How a tensor is cut into shards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.engines.ranks.plans import STYLES, Cut, cut_of


@given(length=st.integers(1, 40), other=st.integers(1, 4), size=st.integers(1, 8), dim=st.integers(0, 1))
def test_the_pieces_of_all_shards_are_the_tensor(length, other, size, dim):
    """Put together in the order of the shards, the pieces are the tensor, of any length; the last may be empty."""
    shape = (length, other) if dim == 0 else (other, length)
    tensor = torch.arange(length * other).reshape(shape)
    pieces = [Cut(dim=dim).of(tensor, shard, size) for shard in range(size)]
    assert torch.equal(torch.cat(pieces, dim=dim), tensor)
    assert [len(piece) for piece in torch.arange(length).chunk(size)] == [
        piece.shape[dim] for piece in pieces if piece.shape[dim]
    ]


@given(heads=st.integers(1, 6), size=st.integers(1, 6), dim=st.integers(0, 1))
def test_three_groups_are_cut_each_by_itself(heads, size, dim):
    """Of q, k and v side by side every shard gets its part of each, in this order."""
    lengths = heads * size
    parts = [torch.arange(lengths) + 1000 * group for group in range(3)]
    fused = torch.cat(parts) if dim == 0 else torch.cat(parts).expand(2, -1)
    for shard in range(size):
        own = slice(shard * heads, (shard + 1) * heads)
        expected = torch.cat([part[own] for part in parts])
        found = Cut(dim=dim, groups=3).of(fused, shard, size)
        assert torch.equal(found, expected if dim == 0 else expected.expand(2, -1))


def test_contiguous_chunks_of_a_fused_tensor_are_another_cut():
    """The usual bug: cut as one tensor, the first of two shards would hold q and half of k."""
    fused = torch.arange(12)
    assert Cut(dim=0, groups=3).of(fused, 0, 2).tolist() == [0, 1, 4, 5, 8, 9]
    assert Cut(dim=0).of(fused, 0, 2).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("style", "weight", "bias"),
    [
        ("colwise", Cut(dim=0), Cut(dim=0)),
        ("rowwise", Cut(dim=1), None),
        ("conv1d_colwise_qkv", Cut(dim=1, groups=3), Cut(dim=0, groups=3)),
        ("conv1d_rowwise", Cut(dim=0), None),
    ],
)
def test_a_bias_is_cut_with_the_outputs_alone(style, weight, bias):
    """What is summed over the ranks keeps its bias whole."""
    assert cut_of(style, "h.0.mlp.weight") == weight
    assert cut_of(style, "h.0.mlp.bias") == bias


def test_an_unknown_style_is_no_whole_tensor():
    """A style of a later transformers is not taken for one that cuts nothing."""
    assert "local_colwise_of_tomorrow" not in STYLES
    with pytest.raises(KeyError):
        cut_of("local_colwise_of_tomorrow", "h.0.weight")

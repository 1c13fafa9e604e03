"""How a tensor is cut into shards."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.engines.ranks.plans import SPLIT, STYLES, SUMMED, Cut, cut_of, summed_layers, why_not


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


_SHAPES = {"bias": (14,), "weight": (14, 18), "experts": (3, 14, 18)}
_EXPERTS = ("colwise", "rowwise", "packed_colwise", "packed_rowwise", "replicate", "moe_tp_experts")


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_what_transformers_does(monkeypatch, style, size):
    """The pieces that transformers' own style would place on each rank are those of the cut, even or not."""
    from transformers.distributed import tensor_parallel
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    from harness.engines.ranks import conv1d

    placed = []

    def record(tensor, _mesh, placements, **_):
        placed.append(placements[0])
        return tensor

    for module in (tensor_parallel, conv1d):
        monkeypatch.setattr(module, "distribute_tensor", record)
    theirs = conv1d.STYLES[style] if style in conv1d.STYLES else ALL_PARALLEL_STYLES[style]
    for name, shape in _SHAPES.items():
        if (name == "bias" and "embedding" in style) or (name == "experts" and style not in _EXPERTS):
            continue
        tensor = torch.arange(float(np.prod(shape))).reshape(shape)
        parameter, module = ("gate_up_proj" if name == "experts" else name), torch.nn.Module()
        module.register_parameter(parameter, torch.nn.Parameter(tensor))
        placed.clear()
        theirs.shard_param(module, parameter, None)
        cut = cut_of(style, f"h.0.{parameter}", tensor.ndim)
        if not placed or placed[0].is_replicate():
            assert cut is None
            continue
        # What transformers' classes count from the end, torch counts from the start once the tensor is known.
        place = type(placed[0])(placed[0].dim % tensor.ndim, **_factor(placed[0]))
        pieces, _ = place._split_tensor(tensor, size, with_padding=False)
        for shard, piece in enumerate(pieces):
            assert torch.equal(cut.of(tensor, shard, size), piece), (style, name)


def _factor(place):
    return {"split_factor": place.split_factor} if hasattr(place, "split_factor") else {}


def test_what_is_summed_is_cut_along_its_input():
    """Each style of a sum has its weight cut, and its bias whole."""
    for style in SUMMED:
        assert cut_of(style, "h.0.weight") is not None
        assert cut_of(style, "h.0.bias") is None


def test_the_summed_layers_of_a_model_are_its_plans():
    """A cut model's own plan counts, before ours for its type; styles can be asked for one by one."""
    model = torch.nn.Module()
    model.h = torch.nn.ModuleList([torch.nn.ModuleDict({"up": torch.nn.Linear(2, 2), "down": torch.nn.Linear(2, 2)})])
    model.config = SimpleNamespace(model_type="another")
    assert summed_layers(model) == frozenset()
    model.tp_plan = {"h.*.up": "rowwise_rep", "h.*.down": "rowwise"}
    assert summed_layers(model) == {"h.0.up", "h.0.down"}
    assert summed_layers(model, SPLIT) == {"h.0.down"}


def test_an_unknown_style_is_no_whole_tensor():
    """A style of a later transformers is not taken for one that cuts nothing."""
    assert "local_colwise_of_tomorrow" not in STYLES
    with pytest.raises(KeyError):
        cut_of("local_colwise_of_tomorrow", "h.0.weight")

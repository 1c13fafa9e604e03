"""Logits that come in slices are condensed to what they give as a whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.numerics.sketch import Sketcher
from harness.numerics.sliced import SlicedSketch

COLUMNS, ROWS = 61, 7


def both(logits_NV, cuts, *, vocabulary=COLUMNS, basis=None):
    """Rows of the Sketcher on whole logits, and of the sliced one on the same cut at ``cuts``."""
    count, columns = logits_NV.shape
    keys = {
        "request": np.zeros(count, dtype=np.int32),
        "position": np.arange(1, count + 1, dtype=np.int32),
        "generated": np.arange(count) % 3 != 0,
    }
    following = torch.arange(count) * 11 % columns
    whole = Sketcher(vocabulary, fingerprints=True, basis=basis)
    whole.add(logits_NV, following, **keys)
    sliced = SlicedSketch(vocabulary, columns, following.numpy(), fingerprints=True, basis=basis, **keys)
    edges = sorted({0, *cuts, columns})
    for start, stop in pairwise(edges):
        sliced.add(0, start, logits_NV[: count // 2, start:stop])
        sliced.add(count // 2, start, logits_NV[count // 2 :, start:stop])
    return whole.rows(), sliced.rows()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cuts=st.sets(st.integers(1, COLUMNS - 1), max_size=8),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    masked=st.sets(st.integers(0, COLUMNS - 1), max_size=30),
    vocabulary=st.sampled_from([COLUMNS, 40]),
)
@example(seed=1, cuts=set(), scale=1e4, dtype=torch.bfloat16, masked=set(), vocabulary=COLUMNS)
def test_slices_give_what_the_whole_gives(seed, cuts, scale, dtype, masked, vocabulary):
    """Wherever the vocabulary is cut, all numbers are those of whole rows, and whole numbers exactly."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (torch.randn((ROWS, COLUMNS), generator=generator, dtype=torch.float64) * scale).to(dtype)
    logits_NV[:, sorted(masked)] = -torch.inf
    basis = np.random.default_rng(seed).standard_normal((vocabulary, 3))
    whole, sliced = both(logits_NV, cuts, vocabulary=vocabulary, basis=basis)
    for name in ("argmax", "nonfinite", "fingerprint", "top_logits", "generated", "position"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(sliced, name), err_msg=name)
    if not masked:
        for name in ("logp", "projections", "fine"):
            np.testing.assert_allclose(
                getattr(sliced, name), getattr(whole, name), rtol=2e-5, atol=2e-5 * scale, err_msg=name
            )
    for name, atol in (("logsumexp", 4e-5 * max(1, scale)), ("entropy", 4e-5)):
        np.testing.assert_allclose(getattr(sliced, name), getattr(whole, name), rtol=2e-5, atol=atol, err_msg=name)


def test_the_first_of_equal_logits_is_the_best():
    """A tie across slices goes to the lower id, as argmax has it."""
    logits_NV = torch.zeros((2, COLUMNS))
    logits_NV[:, [9, 50]] = 3.0
    _, sliced = both(logits_NV, {20, 40})
    assert sliced.argmax.tolist() == [9, 9]
    assert sliced.top_ids[0, :2].tolist() == [9, 50]


def test_a_nan_is_counted_and_wins():
    """A NaN in any slice is seen: it is counted, is the argmax, and makes the sums NaN."""
    logits_NV = torch.zeros((1, COLUMNS))
    logits_NV[0, 30] = torch.nan
    for cuts in ({10, 20}, {10, 40}, {31, 50}):  # in the last slice, or with others behind it
        whole, sliced = both(logits_NV, cuts)
        assert sliced.nonfinite[0] == whole.nonfinite[0] == 1
        assert sliced.argmax[0] == whole.argmax[0] == 30
        assert np.isnan(sliced.logsumexp[0])


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.sets(st.integers(1, COLUMNS - 1), max_size=8),
    columns=st.lists(st.sets(st.integers(0, COLUMNS - 1), max_size=5), min_size=ROWS, max_size=ROWS),
)
def test_the_best_of_rows_with_nan_is_torch_s(cuts, columns):
    """Wherever the vocabulary is cut and NaN stand, the argmax is that of torch on whole rows."""
    logits_NV = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    for row, places in enumerate(columns):
        logits_NV[row, sorted(places)] = torch.nan
    _, sliced = both(logits_NV, cuts)
    assert sliced.argmax.tolist() == logits_NV.argmax(dim=-1).tolist()


def test_it_goes_on_where_another_stopped():
    """What one carried so far, another goes on from to the same bits; of other work it takes nothing."""
    logits_NV = torch.randn((3, COLUMNS), generator=torch.Generator().manual_seed(1))
    keys = {
        "request": np.zeros(3, dtype=np.int32),
        "position": np.arange(1, 4, dtype=np.int32),
        "generated": np.ones(3, dtype=np.bool_),
    }
    first, second, whole = (SlicedSketch(COLUMNS, COLUMNS, np.arange(3), **keys) for _ in range(3))
    first.add(0, 0, logits_NV[:, :20])
    second.restore(first.state())
    second.add(0, 20, logits_NV[:, 20:])
    whole.add(0, 0, logits_NV[:, :20])
    whole.add(0, 20, logits_NV[:, 20:])
    np.testing.assert_array_equal(second.rows().projections, whole.rows().projections)
    other = SlicedSketch(COLUMNS, COLUMNS, np.arange(2), **{name: array[:2] for name, array in keys.items()})
    with pytest.raises(ValueError, match="other work"):
        other.restore(first.state())

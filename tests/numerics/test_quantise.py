import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from harness.numerics import quantise

_LARGE = st.floats(2.0**-30, 8, width=32)
_VALUE = st.just(0.0) | _LARGE | _LARGE.map(lambda value: -value)
_WEIGHT = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=_VALUE)
_BITS = st.integers(2, 8)
_GROUP = st.none() | st.integers(1, 12)
_DIM = st.integers(0, 1)


def by_hand(weight, bits, group, input_dim):
    """Weight and scales after the rounding, one number after the other, in float64."""
    largest = 2 ** (bits - 1) - 1
    rows = np.moveaxis(weight.astype(np.float64), input_dim, -1)
    result, scales = np.zeros_like(rows), np.zeros_like(rows)
    for channel, row in enumerate(rows):
        for start in range(0, len(row), group or len(row)):
            part = slice(start, start + (group or len(row)))
            scale = max(abs(value) for value in row[part]) / largest
            scales[channel, part] = scale
            result[channel, part] = [round(value / scale) * scale if scale else 0.0 for value in row[part]]
    return np.moveaxis(result, -1, input_dim), np.moveaxis(scales, -1, input_dim)


def rounded(weight, bits, group, input_dim):
    """`round_to_nearest` of an array."""
    return quantise.round_to_nearest(torch.from_numpy(weight), bits, group, input_dim=input_dim).numpy()


# --- the rounding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [None, 32, 7, 1, 100])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("input_dim", [0, 1])
def test_is_what_a_loop_gives(bits, group, input_dim):
    """Codes times scales, group by group, as written down by hand; 70 inputs leave a last group that is shorter."""
    weight = np.random.default_rng(bits).normal(size=(70, 5) if input_dim == 0 else (5, 70)).astype(np.float32)
    expected, scales = by_hand(weight, bits, group, input_dim)
    found = rounded(weight, bits, group, input_dim)
    assert found.dtype == np.float32
    assert found.shape == weight.shape
    assert found == pytest.approx(expected, rel=1e-6)
    if group != 1:
        assert (np.abs(found - weight) > scales / 10).any(), "a rounding that changes nothing would pass"


@given(weight=_WEIGHT, bits=_BITS, group=_GROUP, input_dim=_DIM)
@settings(deadline=None)
def test_the_error_is_half_a_scale(weight, bits, group, input_dim):
    """No weight moves by more than half of its scale, but for the rounding of float32 itself."""
    _, scales = by_hand(weight, bits, group, input_dim)
    assert (np.abs(rounded(weight, bits, group, input_dim) - weight) <= scales * (0.5 + 1e-4)).all()


@given(weight=_WEIGHT, bits=_BITS, group=_GROUP, input_dim=_DIM)
@settings(deadline=None)
def test_is_idempotent(weight, bits, group, input_dim):
    """What is on the grid already stays there, up to the rounding of float32."""
    once = rounded(weight, bits, group, input_dim)
    assert rounded(once, bits, group, input_dim) == pytest.approx(once, rel=1e-6, abs=0)


@given(weight=_WEIGHT, bits=_BITS, group=_GROUP, input_dim=_DIM)
@settings(deadline=None)
def test_zero_stays_zero(weight, bits, group, input_dim):
    """A weight of zero is a code of zero, in a row of zeros too, where there is no scale."""
    found = rounded(weight, bits, group, input_dim)
    assert (found[weight == 0] == 0).all()
    assert not rounded(np.zeros_like(weight), bits, group, input_dim).any()


@given(weight=_WEIGHT, bits=_BITS, group=_GROUP, input_dim=_DIM, power=st.integers(-40, 40))
@settings(deadline=None)
def test_a_power_of_two_goes_through(weight, bits, group, input_dim, power):
    """Scaling the weight by a power of two scales the result, to the last bit."""
    factor = np.float32(2.0**power)
    scaled = rounded(weight * factor, bits, group, input_dim)
    assert (scaled == rounded(weight, bits, group, input_dim) * factor).all()


@given(weight=_WEIGHT, bits=_BITS, group=_GROUP)
@settings(deadline=None)
def test_the_input_dimension_is_all_that_a_transposed_weight_changes(weight, bits, group):
    """A Conv1D holds the transposed weight of a Linear, and gets the transposed result."""
    assert (rounded(weight.T.copy(), bits, group, 0) == rounded(weight, bits, group, 1).T).all()


def test_a_row_is_rounded_by_itself():
    """Each output channel has its own scale: a huge one does not coarsen its neighbours."""
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    loud = weight.clone()
    loud[1] *= 1e4
    plain, found = (quantise.dequantised(each, "int8", input_dim=1) for each in (weight, loud))
    assert torch.equal(found[[0, 2, 3]], plain[[0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_read_in_float32(dtype):
    """The weight is widened before it is rounded, and comes back in float32; the weight itself is left alone."""
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = weight.clone()
    found = quantise.dequantised(weight, "int4", input_dim=1)
    assert found.dtype == torch.float32
    assert torch.equal(found, quantise.dequantised(weight.float(), "int4", input_dim=1))
    assert torch.equal(weight, before)


def test_a_parameter_is_rounded_without_a_gradient():
    """A live parameter can be passed as it is, and a transposed one comes back in plain order."""
    layer = torch.nn.Linear(6, 5)
    found = quantise.dequantised(layer.weight.T, "int8", input_dim=0)
    assert not found.requires_grad
    assert found.is_contiguous()


def test_a_broken_weight_stays_broken():
    """NaN and infinity are not rounded away: their group is NaN, the others are what they were."""
    weight = torch.ones(1, 96)
    weight[0, 3], weight[0, 70] = torch.nan, torch.inf
    found = quantise.dequantised(weight, "int4", input_dim=1)
    assert found[0, :32].isnan().all()
    assert torch.equal(found[0, 32:64], torch.ones(32))
    assert found[0, 64:].isnan().all()


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "bits", "group"), [("int8", 8, None), ("int4", 4, 32)])
def test_schemes(scheme, bits, group):
    """int8 has a scale for each channel and 127 codes a side, int4 one for each 32 inputs and 7."""
    weight = np.random.default_rng(2).normal(size=(6, 70)).astype(np.float32)
    expected, scales = by_hand(weight, bits, group, 1)
    found = quantise.dequantised(torch.from_numpy(weight), scheme, input_dim=1).numpy()
    assert found == pytest.approx(expected, rel=1e-6)
    assert np.abs(found / scales).max() == pytest.approx({"int8": 127, "int4": 7}[scheme])
    assert quantise.parse(scheme) == quantise.SCHEMES[scheme] == (bits, group)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("int4-g32", (4, 32)), ("int4-g128", (4, 128)), ("int8-g64", (8, 64)), ("int3-g1", (3, 1)), ("int8", (8, None))],
)
def test_parses(text, expected):
    """A declared quantiser is its bits and the inputs of a scale."""
    assert quantise.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "int", "int3", "int16", "int9-g32", "int1-g32", "int4-g0", "int4-g", "int4-g032", "int4-g-1", "int4g32",
     "INT4", "int4-g32 ", "int4-g1234567", "int4-g٣", "fp8", "int4-g32-g32", "int4-g32\n"],
)  # fmt: skip
def test_refuses(text):
    """Anything else is refused with what it could have been."""
    with pytest.raises(ValueError, match="int8, int4, or bits"):
        quantise.parse(text)

import math
from dataclasses import replace

import numpy as np
import pytest

from harness.criteria.case import View
from harness.criteria.logits import _bfloat16_parts, _blocks
from tests.criteria.cases import alarms, forced, free, score, together

# --- relative errors of whole tensors ----------------------------------------------------------------


def test_nmse_by_hand():
    """Of the row behind the prompt alone: errors 0.1 of a variance of 1 score 0.01."""
    same = [[1.0, -1], [1, -1]]
    assert score("llamacpp-nmse", forced(same, [[1.1, -0.9], [9, 9]], prompt=3)) == pytest.approx(0.01)
    assert not alarms("llamacpp-nmse", forced(same, [[1.09, -0.9], [9, 9]]))
    assert alarms("llamacpp-nmse", forced(same, [[1.11, -0.9], [1, -1]]))
    assert score("llamacpp-nmse", forced([[2.0, 2]], [[2.0, 3]])) == math.inf


def test_relative_difference_by_hand():
    """For c = (4, 3) and r = (5, 0): 1 - 2 x 20 / 50; the worst tensor counts, and 0.001 is allowed."""
    assert score("sglang-rel", forced([[5.0, 0]], [[4.0, 3]])) == pytest.approx(0.2)
    assert score("sglang-rel", together(forced([[5.0, 0]]), forced([[5.0, 0]], [[4.0, 3]]))) == pytest.approx(0.2)
    # Scaling by 1 + e leaves e^2 / (1 + (1 + e)^2).
    assert not alarms("sglang-rel", forced([[1.0, 2]], [[1.045, 2.09]]))
    assert alarms("sglang-rel", forced([[1.0, 2]], [[1.047, 2.094]]))


def test_cosine_by_hand():
    """An angle whose cosine is 0.8 scores 0.2, a scale nothing; 0.003 is allowed."""
    assert score("polygraphy-cosine", forced([[5.0, 0]], [[4.0, 3]])) == pytest.approx(0.2)
    assert score("polygraphy-cosine", forced([[5.0, 1]], [[10.0, 2]])) == pytest.approx(0, abs=1e-15)
    for degrees, expected in ((4.4, False), (4.5, True)):
        turned = [[math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]]
        assert alarms("polygraphy-cosine", forced([[1.0, 0]], turned)) == expected


def test_polygraphy_takes_either_tolerance():
    """Large values pass by the relative tolerance and small ones by the absolute one."""
    assert score("polygraphy", forced([[100.0, 0]], [[100.002, 0]])) == pytest.approx(2, rel=1e-6)
    assert score("polygraphy", forced([[100.0, 0]], [[100.0009, 0.000009]])) == pytest.approx(0.9, rel=1e-6)
    assert score("polygraphy", forced([[100.0, 0.1]], [[100.0, 0.10002]])) == pytest.approx(2, rel=1e-6)


def test_mean_absolute_error_by_hand():
    """The mean is over one tensor, the worst of which counts; only float32 has a threshold."""
    case = together(forced([[0.0, 0]]), forced([[0.0, 0], [0, 0]], [[3e-6, 0], [0, 3e-6]]))
    assert score("reprod-log", case) == pytest.approx(1.5e-6)
    assert alarms("reprod-log", case)
    assert not alarms("reprod-log", forced([[0.0, 0]], [[1.9e-6, 0]]))


def test_allclose_by_hand():
    """At a logit of 9, 0.01 + 0.09 is allowed."""
    assert score("allclose-1e-2", forced([[9.0, 0]], [[9.05, 0]])) == pytest.approx(0.5)
    assert not alarms("allclose-1e-2", forced([[9.0, 0]], [[9.099, 0]]))
    assert alarms("allclose-1e-2", forced([[9.0, 0]], [[9.0, 0.0101]]))


@pytest.mark.parametrize("name", ["allclose-1e-2", "sglang-rel", "polygraphy", "reprod-log", "hf-80", "flash-2x"])
def test_prefill_alone_is_enough(name):
    """A prefill that differs alarms where decode is right, and the other way round."""
    case = forced(np.ones((2, 4)))
    one = case.same[0]
    for view in ("decode", "prefill"):
        wrong = replace(one, **{view: 1 + np.eye(4)[:2]})
        assert alarms(name, replace(case, candidate=(wrong,)))
    assert not alarms(name, case)


# --- transformers ------------------------------------------------------------------------------------


def test_first_difference_needs_equal_logits_before():
    """Logits up to the first different token are compared at 1e-5, what follows is ignored, equal tokens pass."""
    same = np.zeros((3, 4))
    for step, factor, expected in ((0, 0.9, 0.9), (1, 1.1, 1.1), (2, 5.0, 0)):
        candidate = same.copy()
        candidate[step, 2] = factor * 1e-5
        case = free([1, 2, 3], [1, 0, 3], same, candidate, width=4)
        assert score("hf-first-diff", case) == pytest.approx(expected)
        assert alarms("hf-first-diff", case) == (expected > 1)
    assert score("hf-first-diff", free([1, 2], [1, 2], same[:2], same[:2] + 9, width=4)) == 0
    assert score("hf-first-diff", free([1, 2], [1], width=4)) == math.inf


@pytest.mark.parametrize(("prompts", "bad", "expected"), [(5, 1, False), (5, 2, True), (10, 2, False), (4, 1, True)])
def test_four_fifths_of_the_sequences(prompts, bad, expected):
    """One of five prompts may be anything, two may not; one of four is more than a fifth."""
    right, wrong = forced([[1.0, 1]]), forced([[1.0, 1]], [[5.0, 1]])
    case = together(*[wrong] * bad, *[right] * (prompts - bad))
    assert alarms("hf-80", case) == expected
    assert (score("hf-80", case) > 0) == expected


def test_tolerances_by_precision():
    """An error of 0.005 at a logit of 0 passes in bfloat16, hits the limit in float16 and fails in float32."""
    case = forced([[0.0, 1]], [[0.005, 1]])
    found = {name: score("hf-80", replace(case, precision=name)) for name in ("float32", "float16", "bfloat16")}
    assert found == pytest.approx({"float32": 5000, "float16": 1, "bfloat16": 0.5})


# --- against a reference of high precision -----------------------------------------------------------


def test_dynamo_passes_by_either():
    """Far from its reference a candidate passes by its distance to float64, and near it without."""
    exact, same = [[0.0] * 4], [[0.01, 0, 0, 0]]
    # The rmse of the reference is 0.005; fewer than 1,000 elements, so 3 times that and 1e-5 are allowed.
    limit = 2 * (3 * 0.005 + 1e-5)
    near = forced(same, [[0, limit * 0.999, 0, 0]], exact)
    far = forced(same, [[0, limit * 1.001, 0, 0]], exact)
    assert score("dynamo-fp64", near) == pytest.approx(0.999)
    assert (alarms("dynamo-fp64", near), alarms("dynamo-fp64", far)) == (False, True)
    assert score("dynamo-fp64", forced([[1.0, 9]], [[1.0001, 9]])) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("width", "precision", "multiplier"), [(999, "float32", 3), (1000, "float32", 2), (1000, "float16", 3)]
)
def test_dynamo_multipliers(width, precision, multiplier):
    """Twice the reference's rmse in float32, three times for small tensors and for 16 bits."""
    same, candidate = np.ones((1, width)), np.full((1, width), -6.0)
    tolerance = 1e-4 if precision == "float32" else 1e-2
    case = forced(same, candidate, np.zeros((1, width)), precision=precision)
    assert score("dynamo-fp64", case) == pytest.approx(6 / (multiplier + tolerance / 10))


def test_dynamo_lets_equal_nan_pass():
    """NaN at the same places is equal; NaN of the candidate alone is not, and everywhere else NaN alarms."""
    nan, number = [[math.nan, 1]], [[0.0, 1]]
    both, alone = forced(nan, nan, number), forced(number, nan)
    assert score("dynamo-fp64", both) == 0
    assert score("dynamo-fp64", forced([[math.inf, 1]], [[math.inf, 1]], number)) == 0
    assert score("dynamo-fp64", forced([[math.inf, 1]], [[-math.inf, 1]], number)) == math.inf
    assert score("dynamo-fp64", alone) == math.inf
    assert score("flash-2x", both) == score("allclose-1e-2", both) == math.inf


def test_flash_by_hand():
    """Twice the reference's largest error and 1e-5 are allowed."""
    exact, same = [[0.0, 0]], [[0.01, 0]]
    assert score("flash-2x", forced(same, [[0, 0.02001]], exact)) == pytest.approx(1)
    assert not alarms("flash-2x", forced(same, [[-0.02, 0.02]], exact))
    assert alarms("flash-2x", forced(same, [[0, 0.0201]], exact))


# --- TOPLOC ------------------------------------------------------------------------------------------


def test_bfloat16_bits():
    """1 has exponent 127 and mantissa 0; 1 + 1/128 is one unit on; ties go to even, and the sign is left out."""
    exponent, mantissa = _bfloat16_parts(np.array([1.0, 1 + 1 / 128, -1.5, 4.0, 1 + 1 / 256, 1 + 3 / 256]))
    assert exponent.tolist() == [127, 127, 127, 129, 127, 127]
    assert mantissa.tolist() == [0, 1, 64, 0, 0, 2]


def test_toploc_blocks():
    """Decode goes in blocks of 32 rows; prefill has the prompt as one block and then 32 rows each."""
    view = View(case=forced(np.zeros((40, 2)), prompt=50))
    assert [(one.start, one.stop) for one in _blocks(view)] == [(0, 32), (32, 40), (40, 90), (90, 122), (122, 129)]
    view = View(case=together(forced(np.zeros((32, 2))), forced(np.zeros((0, 2)), prompt=3)))
    assert [(one.start, one.stop) for one in _blocks(view)] == [(0, 32), (32, 33), (33, 64), (64, 66)]


def block(change=None):
    """One row of 200 logits, 1.25 at the first 128 and 0.1 behind, with some of the candidate's changed."""
    same = np.full((1, 200), 0.1)
    same[0, :128] = 1.25
    candidate = same.copy()
    if change is not None:
        change(candidate[0])
    return forced(same, candidate)


@pytest.mark.parametrize("units", [7, 8, 9])
def test_toploc_mantissas(units):
    """All 128 values that many units off: the median may be 8."""

    def change(row):
        row[:128] += units / 128

    assert score("toploc", block(change)) == pytest.approx(units / 8)
    assert alarms("toploc", block(change)) == (units > 8)


@pytest.mark.parametrize(
    ("count", "units", "expected"), [(65, 9, 9 / 8), (60, 30, 60 * 30 / 128 / 10), (60, 9, 0.421875)]
)
def test_toploc_mean_and_median(count, units, expected):
    """The median of just over half wrong values counts, and the mean of less than half."""

    def change(row):
        row[:count] += units / 128

    assert score("toploc", block(change)) == pytest.approx(expected)


@pytest.mark.parametrize("count", [38, 39])
def test_toploc_exponents(count):
    """Of 128 exponents 90 must agree."""

    def change(row):
        row[:count] *= 2

    assert score("toploc", block(change)) == pytest.approx(count / 38)
    assert alarms("toploc", block(change)) == (count > 38)


def test_toploc_places():
    """A value that is no longer among the largest counts as another exponent; none in common is infinite."""

    def moved(row):
        row[:19], row[128:147] = 1.0, 1.5

    assert score("toploc", block(moved)) == pytest.approx(19 / 38)
    assert score("toploc", block()) == 0
    assert score("toploc", forced(np.eye(4)[:1] + 1, -np.eye(4)[:1] * 64 - 64)) == math.inf


# --- repeats -----------------------------------------------------------------------------------------


def test_bitwise_counts_rows():
    """Rows with any different bit are counted over all repeats; other shapes or NaN are infinite."""
    first = np.zeros((3, 4), dtype=np.float32)
    second = first.copy()
    second[1, 2] = np.nextafter(np.float32(0), np.float32(1))
    case = forced([[0.0, 0]])
    assert score("bitwise", case) == 0
    assert score("bitwise", replace(case, repeats=((first, first.copy()),))) == 0
    assert score("bitwise", replace(case, repeats=((first, second), (second, first), (first, first)))) == 2
    assert alarms("bitwise", replace(case, repeats=((first, second),)))
    assert score("bitwise", replace(case, repeats=((first, first[:2]),))) == math.inf
    assert score("bitwise", replace(case, repeats=((first * np.nan, first * np.nan),))) == math.inf

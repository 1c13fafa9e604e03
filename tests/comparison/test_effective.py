"""Effective precision: weights that were rounded and not declared so are named, and so is another precision."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.values import Scoring, Status
from harness.verdict import overall
from tests.comparison import literal

_FINE = literal.NOISES["float32"]
_TRUTH = literal.reference_logits()
#: What rounding the weights does: a little to a few times round-off.
_ROUNDED = {
    "int8": np.random.default_rng(8).normal(0, 1e-3, _TRUTH.shape),
    "int4": np.random.default_rng(4).normal(0, 2e-2, _TRUTH.shape),
}
_GOLDEN = literal.golden(precisions=("bfloat16", "float32"), directions=_ROUNDED)


@pytest.fixture(scope="module")
def golden():
    """A golden with both floors and two directions."""
    return _GOLDEN


def _shipped(error, **more):
    return literal.trace(_TRUTH + literal.noise(500) + error, **more)


def _declaring(trace, scheme):
    settings = {"weights": scheme}
    return replace(trace, declared={**trace.declared, **settings}, settings={**trace.settings, **settings})


def _named(comparison):
    return [finding for finding in comparison.findings if finding.check == "weights"]


def _directions(comparison):
    return {one.name: one for one in comparison.statistics if one.name.startswith("direction")}


# --- directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", sorted(_ROUNDED))
def test_an_error_along_a_direction_is_named(golden, scheme):
    """Weights rounded to few bits give their direction with the coefficient 1, and are named."""
    comparison = literal.judged(golden, _shipped(_ROUNDED[scheme]))
    (finding,) = _named(comparison)
    assert finding.status is Status.DEVIATES
    found = re.search(rf"{scheme} weights give \(coefficient ([0-9.]+),", finding.message)
    assert float(found[1]) == pytest.approx(1, abs=0.05)
    assert finding.measured > finding.allowed
    assert f"hf:weights={scheme}" in finding.fix
    assert comparison.answers[-1].status is Status.DEVIATES
    assert comparison.answers[-1].effective == f"bfloat16 on {scheme} weights"


def test_rounded_weights_far_below_round_off_are_named():
    """A direction of a fifth of round-off fails no magnitude, and is named all the same."""
    rounded = {"int8": 0.3 * _ROUNDED["int8"]}
    golden = literal.golden(directions=rounded)
    comparison = literal.judged(golden, _shipped(rounded["int8"]))
    assert literal.failing(comparison) == {("precision", "weights")}
    assert _directions(comparison)["direction int8"].z > 6


@pytest.mark.parametrize("coefficient", [0.0, 0.1, -1.0, 5.0])
def test_other_coefficients_are_not_named(golden, coefficient):
    """A tenth of a direction, its opposite or a multiple of it is not what rounded weights give."""
    assert not _named(literal.judged(golden, _shipped(coefficient * _ROUNDED["int8"])))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 9999))
def test_round_off_has_no_direction(seed):
    """Candidates like the replicas are never called rounded."""
    assert not _named(literal.judged(_GOLDEN, literal.trace(_TRUTH + literal.noise(2000 + seed))))


@pytest.mark.parametrize("size", [5.0, 50.0, 500.0])
def test_a_gross_error_is_not_called_rounded(golden, size):
    """A large error has a part along every direction, which does not explain it."""
    bug = size * literal.noise(77) + 0.8 * _ROUNDED["int8"]
    comparison = literal.judged(golden, _shipped(bug))
    assert not _named(comparison)
    assert comparison.answers[-1].status is Status.DEVIATES


def test_the_function_finds_rounded_weights_too(golden):
    """The widened copy of rounded weights shows them with far more power: both questions name them."""
    wide = _TRUTH + literal.noise(501, _FINE) + _ROUNDED["int8"]
    comparison = literal.judged(golden, literal.trace(_TRUTH + literal.noise(500) + _ROUNDED["int8"], upcast=wide))
    assert {finding.question for finding in _named(comparison)} == {"function", "precision"}


def test_declared_weights_are_their_own_centre(golden):
    """A candidate that declares int8 weights is judged about what these give, and that direction is not searched."""
    centre = literal.condense(_TRUTH + _ROUNDED["int8"])
    comparison = literal.judged(golden, _declaring(_shipped(_ROUNDED["int8"]), "int8"), scoring=Scoring(centre=centre))
    assert comparison.answers[-1].status.ok
    assert set(_directions(comparison)) == {"direction int4"}


def test_another_direction_is_held_against_its_own_replicas(golden):
    """Where int8 is declared and left out, int4 is still held against what the replicas show of int4."""
    centre = literal.condense(_TRUTH + _ROUNDED["int8"])
    declared = literal.judged(golden, _declaring(_shipped(_ROUNDED["int8"]), "int8"), scoring=Scoring(centre=centre))
    plain = _directions(literal.judged(golden, _shipped(0)))["direction int4"]
    one = _directions(declared)["direction int4"]
    assert one.centre == pytest.approx(plain.centre, rel=0.05)
    assert one.own == pytest.approx(plain.own, rel=0.05)


def test_three_directions_one_of_them_declared():
    """However many directions a golden has, a declared one is left out of all that is compared."""
    rounded = {**_ROUNDED, "int4-g8": _ROUNDED["int4"][::-1]}
    golden = literal.golden(directions=rounded)
    centre = literal.condense(_TRUTH + _ROUNDED["int8"])
    comparison = literal.judged(golden, _declaring(_shipped(_ROUNDED["int8"]), "int8"), scoring=Scoring(centre=centre))
    assert set(_directions(comparison)) == {"direction int4", "direction int4-g8"}


def test_declaring_other_weights_than_those_found_is_named(golden):
    """A candidate that declares int8 weights and has the checkpoint's own fails, about the centre of int8."""
    centre = literal.condense(_TRUTH + 20 * _ROUNDED["int8"])
    comparison = literal.judged(golden, _declaring(_shipped(0), "int8"), scoring=Scoring(centre=centre))
    assert comparison.answers[-1].status is Status.DEVIATES


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_direction_of_nan_names_nothing_and_passes_nothing(golden, bad):
    """NaN along a direction is no finding of weights: the error that has it fails."""
    trace = _shipped(0)
    (replay, prefill) = trace.passes
    broken = prefill.rows.projections.copy()
    broken[3, 2] = bad
    with np.errstate(all="ignore"):
        rows = replace(prefill.rows, projections=broken)
        comparison = literal.judged(golden, replace(trace, passes=(replay, replace(prefill, rows=rows))))
    assert not comparison.answers[-1].status.ok
    assert not _named(comparison)


# --- precisions ------------------------------------------------------------------------------------


def _told(comparison):
    return [finding for finding in comparison.findings if finding.check == "effective precision"]


def test_a_finer_precision_than_declared_is_drift(golden):
    """A candidate that says bf16 and computes in fp32 is told so; that is no failure."""
    comparison = literal.judged(golden, literal.trace(_TRUTH + literal.noise(500, _FINE)))
    (finding,) = _told(comparison)
    assert finding.status is Status.DRIFT
    assert "declares bfloat16, and its error is of the size of float32's round-off" in finding.message
    assert comparison.answers[-1].effective == "float32"
    assert comparison.answers[-1].status is Status.DRIFT


def test_a_coarser_precision_than_declared_deviates(golden):
    """A candidate that says fp32 and errs as bf16 does fails, and what it looks like is named."""
    comparison = literal.judged(golden, literal.trace(_TRUTH + literal.noise(500), dtype="float32"))
    (finding,) = _told(comparison)
    assert finding.status is Status.DEVIATES
    assert comparison.answers[-1].effective == "bfloat16"
    assert overall([f.status for f in comparison.findings]) is Status.DEVIATES


def test_a_cast_on_the_way_is_named_about_the_nearer_centre():
    """A candidate in fp32 on weights cast to bf16 errs about the centre of bf16, not about its own."""
    cast = _TRUTH + np.random.default_rng(5).normal(0, 5e-2, _TRUTH.shape)
    golden = replace(_GOLDEN, centres={"bfloat16": literal.centre(cast)})
    shipped = literal.trace(_TRUTH + literal.noise(500, _FINE))
    comparison = literal.judged(golden, shipped)
    # It declares bf16 and never cast its weights: as the checkpoint has them it is fp32.
    assert comparison.answers[-1].status is Status.DEVIATES
    assert comparison.answers[-1].effective == "float32"


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.2])
def test_the_declared_precision_is_not_told(golden, factor):
    """An error of the declared size looks like what was declared: nothing is said."""
    comparison = literal.judged(golden, literal.trace(_TRUTH + factor * literal.noise(500)))
    assert not _told(comparison)
    assert comparison.answers[-1].effective == ""


@pytest.mark.parametrize("size", [5.0, 500.0])
def test_a_bug_is_not_called_a_precision(golden, size):
    """An error of no floor's size looks like no precision."""
    comparison = literal.judged(golden, literal.trace(_TRUTH + size * literal.noise(500)))
    assert not _told(comparison)
    assert comparison.answers[-1].effective == ""


def test_a_floor_of_a_parallel_run_is_no_precision(golden):
    """Floors of tensor parallelism are variants of a precision, not another one."""
    floors = {**golden.floors, "float32/tp2": golden.floors["float32"]}
    only = {name: one for name, one in floors.items() if name != "float32"}
    comparison = literal.judged(replace(golden, floors=only), literal.trace(_TRUTH + literal.noise(500, _FINE)))
    assert comparison.answers[-1].effective == ""

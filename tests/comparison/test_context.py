"""The context of a question: which centre and floor, rows by their place, and why a number is missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.comparison.context import declared_precision, default_spreads
from harness.numerics.constants import SPREAD_DEFAULT, SPREADS
from harness.values import Scoring
from tests.comparison import literal
from tests.comparison.literal import Shape

_SHAPE = Shape(prompts=(1, 7, 4), steps=5)
_TRUTH = literal.reference_logits()


@pytest.fixture(scope="module")
def golden():
    """A golden with both floors."""
    return literal.golden(precisions=("bfloat16", "float32"))


def _set(trace, **settings):
    return replace(trace, settings={**trace.settings, **settings})


def test_rows_are_found_by_their_place():
    """A candidate's rows, of any view, stand where the golden has the same request and position."""
    golden, truth = literal.golden(shape=_SHAPE), literal.reference_logits(shape=_SHAPE)
    context = literal.context(golden, literal.trace(truth, shape=_SHAPE))
    for one in context.trace.passes:
        place = context.place(one.rows)
        assert (golden.rows.request[place] == one.rows.request).all()
        assert (golden.rows.position[place] == one.rows.position).all()
    assert [context.first_step(i) for i in range(3)] == [0, 5, 10]


@pytest.mark.parametrize(("dtype", "question"), [("bfloat16", "precision"), ("float32", "function")])
def test_the_precision_in_force_decides_the_question_and_the_floor(golden, dtype, question):
    """What the settings say it computes in names the question, the floor and the centre."""
    context = literal.context(golden, literal.trace(_TRUTH, dtype=dtype))
    assert (context.question, context.precision) == (question, dtype)
    assert context.floor is golden.floors[dtype]
    assert context.missing == ""
    assert all(part is not None for part in context.moments)


def test_a_declared_parallelism_has_a_floor_of_its_own(golden):
    """Where the golden has a floor of the declared tensor parallelism it is taken, else that of the precision."""
    tp = replace(golden, floors={**golden.floors, "bfloat16/tp2": golden.floors["float32"]})
    trace = literal.trace(_TRUTH)
    assert literal.context(tp, trace).floor is golden.floors["bfloat16"]
    assert literal.context(tp, _set(trace, tensor_parallel=2)).floor is golden.floors["float32"]
    assert literal.context(tp, _set(trace, tensor_parallel=4)).floor is golden.floors["bfloat16"]


def test_a_missing_floor_is_explained(golden):
    """What is missing says which floors there are, and why this one was left out when recording."""
    trace = _set(literal.trace(_TRUTH), dtype="float16")
    assert "no floor for float16 (floors: bfloat16, float32)" in literal.context(golden, trace).missing
    left_out = replace(golden, provenance={"left_out": {"float16": "it overflows"}})
    assert "it overflows" in literal.context(left_out, trace).missing
    bare = literal.context(replace(golden, floors={}), trace)
    assert "floors: none" in bare.missing
    assert bare.moments == ()
    assert not bare.decidable.any()


def test_settings_without_a_precision_have_no_floor(golden):
    """A candidate that does not say what it computes in cannot be judged by anything."""
    trace = replace(literal.trace(_TRUTH), settings={})
    assert declared_precision(trace.settings) == "unknown"
    assert "no floor for unknown" in literal.context(golden, trace).missing


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", None])
def test_plain_weights_need_no_reference(golden, weights):
    """Weights in a plain precision, or not spoken of, have the golden's own centre."""
    assert literal.context(golden, _set(literal.trace(_TRUTH), weights=weights)).missing == ""


def test_rounded_weights_need_their_centre(golden):
    """Rounded weights are judged about what they give, which only a live reference computes."""
    trace = _set(literal.trace(_TRUTH), weights="int4")
    assert "what int4 weights should give was not computed" in literal.context(golden, trace).missing
    assert "far away" in literal.context(golden, trace, scoring=Scoring(reason="it is far away")).missing
    centre = literal.condense(_TRUTH + 1)
    scored = literal.context(golden, trace, scoring=Scoring(centre=centre))
    assert scored.missing == ""
    assert scored.centre is centre


def test_the_centre_is_that_of_the_declared_weights(golden):
    """A widened copy is held against the centre of the precision that its weights were loaded in."""
    cast = replace(golden, centres={"bfloat16": literal.centre(_TRUTH + 0.01 * _TRUTH**2)})
    wide = literal.trace(_TRUTH, dtype="float32")
    assert (literal.context(cast, wide).centre.projections == golden.rows.projections).all()
    loaded = literal.context(cast, wide, declared="bfloat16")
    assert (loaded.centre.projections == cast.centres["bfloat16"].projections).all()
    assert loaded.floor is golden.floors["float32"]


def test_the_declared_weights_are_no_direction():
    """A direction that the candidate declares keeps its column of the replicas, and is not searched for."""
    rounded = {name: literal.noise(i) for i, name in enumerate(("int8", "int4"))}
    golden = literal.golden(directions=rounded)
    assert literal.context(golden, literal.trace(_TRUTH)).directions == ("int8", "int4")
    declared = _set(literal.trace(_TRUTH), weights="int8")
    context = literal.context(golden, declared, scoring=Scoring(centre=golden.rows))
    assert context.directions == ("int8", "int4")
    comparison = literal.judged(golden, declared, scoring=Scoring(centre=golden.rows))
    assert not [one for one in comparison.statistics if one.name == "direction int8"]
    assert len(context.scale.directions) == 2


def test_scatters_come_from_the_constants_unless_given(golden):
    """A statistic has the largest scatter over families; one that the table lacks has the default."""
    default = literal.context(golden, literal.trace(_TRUTH), spreads=None)
    for name, (largest, _, _) in SPREADS.get("bfloat16", {}).items():
        assert default.scatter_of(name) == default_spreads()["bfloat16"][name] == largest
    assert default.scatter_of("no such statistic") == SPREAD_DEFAULT
    assert literal.context(golden, literal.trace(_TRUTH), spreads={}).scatter_of("error") == SPREAD_DEFAULT
    given = {"bfloat16": {"error": 0.5}}
    assert literal.context(golden, literal.trace(_TRUTH), spreads=given).scatter_of("error") == 0.5


def test_a_tie_counts_every_token_that_is_tested(golden):
    """More tokens leave more room for each: the limit of a tie grows with all that the passes show."""
    trace = literal.trace(_TRUTH)
    ties = [literal.context(golden, replace(trace, passes=trace.passes[:n])).tie for n in range(len(trace.passes) + 1)]
    assert ties == sorted(ties)
    assert len(set(ties)) == len(ties)


def test_moments_are_those_of_the_passes_that_show_logits(golden):
    """Each pass with rows has moments, in its place; a free run has none."""
    trace = literal.trace(_TRUTH + literal.noise(5))
    free = literal.free_run(golden.continuations).passes[0]
    moments = literal.context(golden, replace(trace, passes=(free, *trace.passes))).moments
    assert moments[0] is None
    assert not moments[1].square[:, 0].any()
    assert moments[2].square[:, 0].all()
    assert np.isfinite(moments[2].square).all()

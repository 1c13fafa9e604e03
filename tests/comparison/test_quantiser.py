"""Unknown quantisers: held against plain round-to-nearest by how far they move the distributions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.numerics.constants import QUANTISER_BEST, QUANTISER_WORST
from harness.values import Pass, Scoring, Status
from tests.comparison import literal

_TRUTH = literal.reference_logits()
#: What plain round-to-nearest does to the logits: small, so that the divergence grows with its square.
_ROUNDING = np.random.default_rng(9).normal(0, 0.05, _TRUTH.shape)
_SCORING = Scoring(nearest=literal.condense(_TRUTH + _ROUNDING))


@pytest.fixture(scope="module")
def golden():
    """The literal golden, with both floors."""
    return literal.golden(precisions=("bfloat16", "float32"))


def _quantised(trace, scheme="int4-g32"):
    settings = {"quantised": scheme}
    wide = None if trace.upcast is None else _quantised(trace.upcast, scheme)
    return replace(
        trace,
        declared={**trace.declared, **settings},
        settings={**trace.settings, **settings},
        upcast=wide,
    )


def _candidate(ratio, **more):
    """A candidate whose divergence is about ``ratio`` times that of round-to-nearest."""
    return _quantised(literal.trace(_TRUTH + np.sqrt(ratio) * _ROUNDING, **more))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.1])
def test_a_usual_loss_is_ok(golden, ratio):
    """About the divergence of plain round-to-nearest is what a quantiser of these bits gives."""
    comparison = literal.judged(golden, _candidate(ratio), scoring=_SCORING)
    assert comparison.answers[-1].status.ok
    assert not comparison.findings
    power = comparison.answers[-1].power
    assert any("cannot be reproduced" in reason for reason in power.unmeasured)
    assert power.smallest is None


@pytest.mark.parametrize(("ratio", "allowed", "words"), [
    (1.5, QUANTISER_WORST, "1.5 x that of round-to-nearest at int4-g32"),
    (0.1, QUANTISER_BEST, "not quantised as declared"),
    (1e-6, QUANTISER_BEST, "not quantised as declared"),
])  # fmt: skip
def test_too_much_and_too_little_loss_deviate(golden, ratio, allowed, words):
    """More divergence than round-to-nearest is a bad quantiser, next to none is none at all."""
    comparison = literal.judged(golden, _candidate(ratio), scoring=_SCORING)
    assert comparison.answers[-1].status is Status.DEVIATES
    finding = comparison.findings[0]
    assert words in finding.message
    assert finding.allowed == allowed
    assert finding.measured == pytest.approx(ratio, rel=0.1, abs=1e-4)
    assert finding.where == "batched/replay"


def test_without_a_reference_it_is_unmeasured(golden):
    """What round-to-nearest gives is not in the golden: without a reference nothing is said."""
    for scoring, reason in ((None, "no live reference"), (Scoring(reason="it is far away"), "it is far away")):
        comparison = literal.judged(golden, _candidate(1.0), scoring=scoring)
        assert comparison.answers[-1].status is Status.UNMEASURED
        assert any(reason in finding.message for finding in comparison.findings)


def test_without_logits_it_is_unmeasured(golden):
    """Tokens alone have no divergence."""
    free = _quantised(literal.free_run(golden.continuations))
    comparison = literal.judged(golden, free, literal.FREE, scoring=_SCORING)
    assert comparison.answers[-1].status is Status.UNMEASURED
    assert any("shows no logits" in finding.message for finding in comparison.findings)


def test_flips_of_a_quantiser_are_no_bug(golden):
    """Quantised weights flip tokens far beyond round-off: the divergence alone is judged."""
    coarse = _TRUTH + 10 * _ROUNDING
    comparison = literal.judged(
        golden, _quantised(literal.trace(coarse)), scoring=Scoring(nearest=literal.condense(coarse))
    )
    assert all(one.flips for one in comparison.passes)
    assert comparison.answers[-1].status.ok


def test_both_questions_are_judged_by_divergence(golden):
    """The widened copy has the same weights, and is judged in the same way."""
    wide = _candidate(1.0, upcast=_TRUTH + _ROUNDING)
    assert [answer.status for answer in literal.judged(golden, wide, scoring=_SCORING).answers] == [
        Status.IDENTICAL
    ] * 2
    bad = _candidate(1.0, upcast=_TRUTH + 2 * _ROUNDING)
    statuses = {one.question: one.status for one in literal.judged(golden, bad, scoring=_SCORING).answers}
    assert statuses == {"function": Status.DEVIATES, "precision": Status.IDENTICAL}


def test_the_copy_is_held_against_what_float32_gives(golden):
    """Rounded weights in 16 bits diverge by the arithmetic too: the widened copy has a usual loss of its own."""
    trace = _candidate(1.0, upcast=_TRUTH + 0.5 * _ROUNDING)
    halved = literal.condense(_TRUTH + 0.5 * _ROUNDING)
    alone = {one.question: one.status for one in literal.judged(golden, trace, scoring=_SCORING).answers}
    assert alone == {"function": Status.IDENTICAL, "precision": Status.IDENTICAL}
    both = literal.judged(golden, trace, scoring=replace(_SCORING, nearest_wide=halved))
    assert [answer.status for answer in both.answers] == [Status.IDENTICAL] * 2
    # A quarter of the divergence is usual of the copy here: what is usual as shipped is four times too much.
    loud = _candidate(1.0, upcast=_TRUTH + _ROUNDING)
    statuses = {
        one.question: one.status
        for one in literal.judged(golden, loud, scoring=replace(_SCORING, nearest_wide=halved)).answers
    }
    assert statuses == {"function": Status.DEVIATES, "precision": Status.IDENTICAL}


def test_nan_never_passes(golden):
    """A divergence that is no number is outside the limits."""
    trace = _candidate(1.0)
    (replay, prefill) = trace.passes
    rows = replace(prefill.rows, logsumexp=np.full_like(prefill.rows.logsumexp, np.nan))
    with np.errstate(all="ignore"):
        broken = replace(trace, passes=(replay, replace(prefill, rows=rows)))
        assert not literal.judged(golden, broken, scoring=_SCORING).answers[-1].status.ok


def test_a_pass_over_one_prompt_is_held_against_that_prompt(golden):
    """In an A-B-A run the very rows of round-to-nearest have the ratio 1, however prompts differ in their loss."""
    request, _, generated = literal.row_keys()
    uneven = _TRUTH + np.where(request == 0, 2.0, 0.5)[:, None] * _ROUNDING
    passes = tuple(
        Pass(
            run="order", view="replay", repeat=repeat, requests=(index,),
            rows=literal.condense(uneven, generated & (request == index)),
        )
        for repeat, index in ((0, 0), (1, 1), (2, 0))
    )  # fmt: skip
    trace = _quantised(replace(literal.trace(uneven), passes=passes))
    scoring = Scoring(nearest=literal.condense(uneven))
    assert literal.judged(golden, trace, literal.ORDER, scoring=scoring).answers[-1].status.ok

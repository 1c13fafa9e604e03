"""Tokens: ties are excused with their margin, anything else fails, and nothing behind a flip is forgotten."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.compare import compare
from harness.values import Centre, Status
from tests.compare import literal


def _golden_with_tie(gap: float):
    """A golden whose row 14 (prompt p0, step 3) has its two best tokens ``gap`` apart."""
    truth = literal.reference_logits()
    row = np.flatnonzero(literal.row_keys()[2])[3]
    order = np.argsort(truth[row])[::-1]
    truth[row, order[1]] = truth[row, order[0]] - gap
    golden = literal.golden()
    rows = literal.condense(truth)
    return replace(golden, rows=rows), truth, row, order


def _token_findings(golden, logits):
    return [finding for finding in compare(golden, literal.trace(logits)).findings if finding.check == "tokens"]


def test_a_flip_within_the_noise_is_an_excused_tie():
    """Two tokens closer than the step's own noise may swap; position and margin are reported."""
    golden, truth, row, order = _golden_with_tie(0.2 * literal.NOISE)
    logits = truth + literal.noise(3) * 0
    logits[row, order[1]] += 0.5 * literal.NOISE
    findings = _token_findings(golden, logits)
    assert {finding.status for finding in findings} == {Status.DRIFT}
    assert "step 3" in findings[0].where
    assert findings[0].measured < findings[0].allowed


def test_a_flip_beyond_the_noise_deviates():
    """A flip that the reference holds clearly apart fails even if the logits moved little elsewhere."""
    golden, truth, row, order = _golden_with_tie(40 * literal.NOISE)
    logits = truth.copy()
    logits[row, order[1]] += 41 * literal.NOISE
    findings = _token_findings(golden, logits)
    assert Status.DEVIATES in {finding.status for finding in findings}


def test_what_follows_a_free_divergence_is_called_unmeasured():
    """Behind an unforced divergence the prefixes differ: the verdict counts these tokens as not seen."""
    golden, _, _, order = _golden_with_tie(0.1 * literal.NOISE)
    tokens = [list(given.tokens) for given in golden.generations]
    tokens[0][3] = int(order[1])
    comparison = compare(golden, literal.free_run([tuple(one) for one in tokens]), literal.FREE)
    assert any("6 free-running tokens behind" in reason for reason in comparison.power.unmeasured)
    assert any(f.status is Status.UNMEASURED and "no replay" in f.message for f in comparison.findings)


def test_tokens_alone_are_unmeasured():
    """Equal tokens without logits or scorer are too little evidence to say 'the same model'."""
    golden = literal.golden()
    comparison = compare(golden, literal.free_run([given.tokens for given in golden.generations]), literal.FREE)
    assert {finding.status for finding in comparison.findings} == {Status.UNMEASURED}


def test_a_token_outside_the_stored_top_is_bounded_from_below():
    """A token that the golden did not keep is at least as far away as the last one it kept."""
    golden = literal.golden()
    tokens = [list(given.tokens) for given in golden.generations]
    kept = set(golden.rows.top_ids[0].tolist())
    tokens[0][0] = next(token for token in range(literal.VOCABULARY) if token not in kept)
    comparison = compare(golden, literal.free_run([tuple(one) for one in tokens]), literal.FREE)
    assert Status.DEVIATES in {finding.status for finding in comparison.findings}


def test_an_unknown_distance_is_never_a_tie():
    """On flat logits even the last stored token is near: a token behind it is unmeasured, not excused."""
    golden = literal.golden()
    floor = golden.floors["bfloat16"]
    flat = replace(golden, floors={"bfloat16": replace(floor, pair=np.full_like(floor.pair, 1e3))})
    tokens = [list(given.tokens) for given in golden.generations]
    kept = set(golden.rows.top_ids[0].tolist())
    tokens[0][0] = next(token for token in range(literal.VOCABULARY) if token not in kept)
    findings = compare(flat, literal.free_run([tuple(one) for one in tokens]), literal.FREE).findings
    assert any(f.status is Status.UNMEASURED and "not among the 20 best" in f.message for f in findings)
    assert not any(f.status is Status.DRIFT and f.check == "tokens" for f in findings)


def test_the_centre_of_the_precision_decides():
    """Where a cast moves the reference's own best token, picking that token is right, not a bug."""
    golden = literal.golden()
    truth = literal.reference_logits()
    row = int(np.flatnonzero(literal.row_keys()[2])[3])
    order = np.argsort(truth[row])[::-1]
    truth[row, order[1]] = truth[row, order[0]] + 1.0
    cast = literal.condense(truth)
    centre = Centre(
        logsumexp=cast.logsumexp,
        token_logit=cast.token_logit,
        projections=cast.projections,
        top_ids=cast.top_ids,
        top_logits=cast.top_logits,
        shift=1.0,
        inexact_tensors=1,
    )
    findings = _token_findings(replace(golden, centres={"bfloat16": centre}), truth)
    assert {finding.status for finding in findings} == {Status.DRIFT}
    assert findings[0].measured == 0.0


@pytest.mark.parametrize("length", [0, 4])
def test_a_shorter_continuation_is_never_zipped(length):
    """A continuation that equals the golden as far as it goes is structural, not equal."""
    golden = literal.golden()
    cut = [given.tokens[:length] for given in golden.generations]
    assert {f.status for f in compare(golden, literal.free_run(cut), literal.FREE).findings} == {Status.STRUCTURAL}

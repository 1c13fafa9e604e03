"""A golden without any floor: exact repeats, and nothing else, are a pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.values import Generation, Pass, Status
from tests.comparison import literal

TRUTH = literal.reference_logits()


@pytest.fixture(scope="module")
def foreign():
    """A golden without floors."""
    return replace(literal.golden(truth=TRUTH), floors={}, centres={})


def status(golden, trace):
    """The only status, and the findings."""
    comparison = literal.judged(golden, trace)
    return comparison.answers[-1].status, comparison.findings


def test_an_exact_repeat_passes(foreign):
    """The reference's own logits, to the bit."""
    assert status(foreign, literal.trace(TRUTH)) == (Status.IDENTICAL, ())


@pytest.mark.parametrize("field", ["logsumexp", "logp", "entropy", "projections", "top_logits", "top_ids"])
def test_one_bit_anywhere_is_unmeasured(foreign, field):
    """Any stored number of any row that is another, by as little as it can be, is neither a pass nor a failure."""
    trace = literal.trace(TRUTH)
    one = next(one for one in trace.passes if one.rows is not None)
    values = getattr(one.rows, field).copy()
    place = (len(values) // 2,) + (0,) * (values.ndim - 1)
    if field == "top_ids":
        values[place] += 1
    else:
        values[place] = np.nextafter(values[place], np.float32(np.inf))
    passes = tuple(
        replace(other, rows=replace(other.rows, **{field: values})) if other is one else other for other in trace.passes
    )
    found, findings = status(foreign, replace(trace, passes=passes))
    assert found is Status.UNMEASURED
    assert "1 positions" in findings[0].message
    assert findings[0].where


def test_tokens_alone_are_unmeasured(foreign):
    """Equal tokens say nothing without a floor: a bug may have turned none of them."""
    trace = literal.trace(TRUTH)
    requests = tuple(range(len(foreign.requests)))
    free = Pass(
        run=trace.passes[0].run,
        view="generate",
        requests=requests,
        generations=tuple(Generation(tokens=one.tokens, finish=one.finish) for one in foreign.generations),
    )
    served = replace(trace, passes=(free,), capabilities=frozenset({"tokens"}))
    found, findings = status(foreign, served)
    assert found is Status.UNMEASURED, findings
    assert any("no floor" in one.message for one in findings)

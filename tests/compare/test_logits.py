"""Logits: the size of the error against measured round-off, over everything, a prompt, a position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.compare import compare
from harness.values import Status
from harness.verdict import overall
from tests.compare import literal


@pytest.fixture(scope="module")
def golden():
    """The literal golden."""
    return literal.golden()


def _status(golden, logits, prefill=None):
    return overall([finding.status for finding in compare(golden, literal.trace(logits, prefill)).findings])


def test_the_reference_itself_is_identical(golden):
    """No error at all is identical."""
    assert _status(golden, literal.reference_logits()) is Status.IDENTICAL


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(100, 10_000))
def test_round_off_like_the_replicas_never_fails(seed):
    """A candidate that errs as the replicas do is ok, whatever the draw."""
    assert _status(_GOLDEN, literal.reference_logits() + literal.noise(seed)).ok


_GOLDEN = literal.golden()


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50))
def test_a_constant_shift_changes_nothing(shift):
    """The softmax does not see a constant, and neither does the verdict."""
    assert _status(_GOLDEN, literal.reference_logits() + literal.noise(7) + shift).ok


@pytest.mark.parametrize("factor", [3.0, 30.0, 1e6])
def test_more_error_than_round_off_deviates(golden, factor):
    """An error of a few times the floor fails, and the finding says measured, allowed and why."""
    comparison = compare(golden, literal.trace(literal.reference_logits() + factor * literal.noise(5)))
    failing = [f for f in comparison.findings if f.status is Status.DEVIATES and f.check == "logits"]
    assert failing
    assert failing[0].measured > failing[0].allowed
    assert "replicas" in failing[0].why


def test_the_verdict_is_monotone_in_the_error(golden):
    """Once failed, a larger error of the same kind fails too."""
    failed = [
        not _status(golden, literal.reference_logits() + factor * literal.noise(5)).ok
        for factor in np.geomspace(0.5, 50, 12)
    ]
    assert failed == sorted(failed)
    assert failed[-1]
    assert not failed[0]


def test_one_wrong_prompt_is_found_and_named(golden):
    """An error in one prompt of four fails by that prompt, though most rows are clean."""
    request, _, _ = literal.row_keys()
    logits = literal.reference_logits() + literal.noise(8)
    logits[request == 2] += 6 * literal.noise(9)[request == 2]
    findings = compare(golden, literal.trace(logits)).findings
    assert any("'p2'" in finding.where and not finding.status.ok for finding in findings)


def test_one_wrong_position_is_found(golden):
    """A single position far out fails, though every mean is unmoved."""
    logits = literal.reference_logits() + literal.noise(8)
    logits[41] += 40 * literal.noise(9)[41]
    findings = compare(golden, literal.trace(logits)).findings
    assert any(finding.check == "one position" and not finding.status.ok for finding in findings)


def test_a_wrong_decode_path_is_found_beside_a_right_prefill(golden):
    """The replay is judged on its own: a prefill that is right does not average it away."""
    wrong = literal.reference_logits() + 5 * literal.noise(3)
    right = literal.reference_logits() + literal.noise(4)
    findings = [f for f in compare(golden, literal.trace(wrong, right)).findings if not f.status.ok]
    assert findings
    assert all(finding.where.startswith("batched/replay") for finding in findings)


def test_without_a_floor_nothing_is_ok(golden):
    """A precision that the golden has no floor for is unmeasured, never a pass."""
    bare = replace(golden, floors={})
    assert _status(bare, literal.reference_logits()) is Status.UNMEASURED


def test_few_independent_replicas_only_allow_the_effect_size(golden):
    """Copies are not evidence: with too few effective replicas the bound says so."""
    floor = replace(golden.floors["bfloat16"], effective=2.0)
    comparison = compare(
        replace(golden, floors={"bfloat16": floor}),
        literal.trace(literal.reference_logits() + 3 * literal.noise(5)),
    )
    failing = [finding for finding in comparison.findings if not finding.status.ok]
    assert "only 2.0 are independent" in failing[0].why


def test_power_counts_what_was_compared(golden):
    """The verdict says how many positions and decidable steps there were, and from where it fails."""
    power = compare(golden, literal.trace(literal.reference_logits())).power
    assert power.positions == literal.PROMPTS * (2 * literal.STEPS + literal.PROMPT - 1)
    assert power.steps == literal.PROMPTS * literal.STEPS
    assert 0.9 < power.coverage <= 1
    assert 1.5 <= power.smallest < 3

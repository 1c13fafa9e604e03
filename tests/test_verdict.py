"""From findings to a verdict: precedence, exit codes, and what counts as ok."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.compare import Comparison
from harness.values import PRECEDENCE, Finding, Status, Verdict
from harness.verdict import exit_code, failed, judge, overall


def _verdict(status: Status) -> Verdict:
    return failed(status, "m", golden="g", candidate="c", fix="f", check="t")


def test_every_status_has_a_place_and_an_exit_code():
    """No status is forgotten in the order of precedence or in the exit codes."""
    assert set(PRECEDENCE) == set(Status)
    assert {status: status.exit_code for status in Status} == {
        Status.IDENTICAL: 0,
        Status.DRIFT: 0,
        Status.DEVIATES: 1,
        Status.STRUCTURAL: 1,
        Status.NONDETERMINISTIC: 1,
        Status.UNMEASURED: 3,
        Status.STALE: 3,
        Status.ERROR: 4,
    }


def test_only_identical_and_drift_are_ok():
    """`unmeasured` and `stale` never count as a pass."""
    assert {status for status in Status if status.ok} == {Status.IDENTICAL, Status.DRIFT}


@given(st.lists(st.sampled_from(list(Status)), max_size=6))
def test_overall_is_the_first_in_the_order_of_precedence(statuses):
    """Whatever the order of the findings, the gravest one decides; none at all is identical."""
    expected = min(statuses, key=PRECEDENCE.index, default=Status.IDENTICAL)
    assert overall(statuses) is expected
    assert overall(list(reversed(statuses))) is expected


@pytest.mark.parametrize("pair", list(itertools.product(Status, Status)))
def test_exit_code_over_several_checks(pair):
    """1 if any failed, else 4, 3, 0."""
    codes = {status.exit_code for status in pair}
    expected = next((code for code in (1, 4, 3) if code in codes), 0)
    assert exit_code([_verdict(status) for status in pair]) == expected


def test_judge_keeps_every_finding():
    """A verdict forgets nothing: the findings that did not decide are still there."""
    findings = (
        Finding(status=Status.DRIFT, check="tokens", message="a"),
        Finding(status=Status.DEVIATES, check="logits", message="b"),
    )
    comparison = Comparison(findings=findings, power=None, passes=())
    verdict = judge(comparison, golden="g", candidate="c", settings={}, seconds=1.0)
    assert verdict.status is Status.DEVIATES
    assert verdict.findings == findings
    assert [finding.message for finding in verdict.failures] == ["b"]


def test_raise_if_failed_carries_the_report():
    """In a test, a failed verdict raises with its report; an ok one does not."""
    with pytest.raises(AssertionError, match="deviates"):
        _verdict(Status.DEVIATES).raise_if_failed()
    _verdict(Status.DRIFT).raise_if_failed()

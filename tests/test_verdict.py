"""From findings to a verdict: precedence, exit codes, and what counts as ok."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.comparison import Comparison
from harness.values import PRECEDENCE, Answer, Finding, PassSummary, Power, Status, Verdict, first_difference
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


_POWER = Power(precision="bfloat16", level="logits", positions=3, steps=2, decidable=1, smallest=2.0)


def _answered(function: Power | None, precision: Power | None) -> Verdict:
    answers = (
        Answer(question="function", status=Status.DRIFT, power=function),
        Answer(question="precision", status=Status.DRIFT, power=precision),
    )
    return Verdict(golden="g", candidate="c", status=Status.DRIFT, findings=(), answers=answers)


def test_judge_keeps_every_finding():
    """A verdict forgets nothing: the findings that did not decide are still there, and so is what was asked."""
    findings = (
        Finding(status=Status.DRIFT, check="tokens", message="a"),
        Finding(status=Status.DEVIATES, check="error", message="b", question="function"),
    )
    answers = _answered(None, _POWER).answers
    line = PassSummary(
        question="precision", run="r", view="replay", repeat=0, ratio=1.0, limit=2.0, flips=0, steps=2, seconds=0.1
    )
    comparison = Comparison(findings=findings, answers=answers, passes=(line,))
    verdict = judge(comparison, golden="g", candidate="c", settings={"dtype": "bfloat16"}, seconds=1.0)
    assert verdict.status is Status.DEVIATES
    assert not verdict.ok
    assert verdict.findings == findings
    assert [finding.message for finding in verdict.failures] == ["b"]
    assert verdict.answers == answers
    assert verdict.passes == (line,)
    assert (verdict.settings, verdict.seconds) == ({"dtype": "bfloat16"}, 1.0)


def test_a_comparison_without_findings_is_identical():
    """Where nothing was found, nothing was different."""
    verdict = judge(Comparison(findings=()), golden="g", candidate="c", settings={}, seconds=0.0)
    assert verdict.status is Status.IDENTICAL


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("question", ["function", "precision"])
def test_either_question_decides(status, question):
    """A finding of one question decides the verdict though the other found nothing worse than drift."""
    findings = tuple(
        Finding(status=one, check="c", message="m", question=of)
        for one, of in ((Status.DRIFT, "function"), (Status.DRIFT, "precision"), (status, question))
    )
    verdict = judge(Comparison(findings=findings), golden="g", candidate="c", settings={}, seconds=0.0)
    assert verdict.status is (Status.DRIFT if status is Status.IDENTICAL else status)


def test_power_is_that_of_the_run_as_shipped():
    """Of two questions the power of the shipped run is the verdict's, else that of the only one there is."""
    other = Power(precision="float32", level="logits", positions=9, steps=2, decidable=2, smallest=4.0)
    assert _answered(other, _POWER).power == _POWER
    assert _answered(other, None).power == other
    assert _answered(None, None).power is None


def test_coverage_is_a_share():
    """Coverage is the share of decidable steps, and none of no steps."""
    assert _POWER.coverage == 0.5
    nothing = Power(precision="bfloat16", level="nothing", positions=0, steps=0, decidable=0, smallest=None)
    assert nothing.coverage == 0


def test_raise_if_failed_carries_the_report():
    """In a test, a failed verdict raises with its report; an ok one does not."""
    with pytest.raises(AssertionError, match="deviates"):
        _verdict(Status.DEVIATES).raise_if_failed()
    _verdict(Status.DRIFT).raise_if_failed()


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_the_first_difference_is_where_sequences_part(one, other):
    """Before it all is equal; at it they differ, or one has ended; without it they are the same."""
    found = first_difference(one, other)
    if found is None:
        assert one == other
    else:
        assert one[:found] == other[:found]
        assert one[found : found + 1] != other[found : found + 1]

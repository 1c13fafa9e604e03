"""Findings -> Verdict: the first status in the order of precedence, and nothing forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.compare import Comparison
from harness.values import PRECEDENCE, Finding, Status, Verdict


def judge(
    comparison: Comparison, *, golden: str, candidate: str, settings: Mapping[str, Any], seconds: float
) -> Verdict:
    """The verdict on one comparison; without any finding everything was the same."""
    return Verdict(
        golden=golden,
        candidate=candidate,
        status=overall([finding.status for finding in comparison.findings]),
        findings=comparison.findings,
        power=comparison.power,
        passes=comparison.passes,
        settings=settings,
        seconds=seconds,
    )


def failed(status: Status, message: str, *, golden: str, candidate: str, fix: str, check: str) -> Verdict:
    """A verdict for work that never came to a comparison: a stale golden, an engine that failed."""
    finding = Finding(status=status, check=check, message=message, fix=fix)
    return Verdict(golden=golden, candidate=candidate, status=status, findings=(finding,), power=None)


def overall(statuses: Sequence[Status]) -> Status:
    """The first of PRECEDENCE that is there; `identical` where there is nothing."""
    return next((status for status in PRECEDENCE if status in statuses), Status.IDENTICAL)


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """Over several checks: 1 if any failed, else 4, 3, 0; without a single check 3, since nothing was seen."""
    if not verdicts:
        return Status.UNMEASURED.exit_code
    codes = {verdict.status.exit_code for verdict in verdicts}
    return next((code for code in (1, 4, 3) if code in codes), 0)

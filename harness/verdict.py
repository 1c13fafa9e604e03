"""Findings -> Verdict: the first status in the order of precedence, and nothing forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.comparison import Comparison
from harness.values import Difference, Finding, Status, Verdict, overall

__all__ = ["exit_code", "failed", "judge", "overall"]


def judge(
    comparison: Comparison,
    *,
    golden: str,
    candidate: str,
    settings: Mapping[str, Any],
    environment: tuple[Difference, ...] = (),
    seconds: float = 0.0,
) -> Verdict:
    """The verdict on one comparison; without any finding everything was the same."""
    return Verdict(
        golden=golden,
        candidate=candidate,
        status=overall([finding.status for finding in comparison.findings]),
        findings=comparison.findings,
        answers=comparison.answers,
        statistics=comparison.statistics,
        passes=comparison.passes,
        settings=settings,
        environment=environment,
        seconds=seconds,
    )


def failed(
    status: Status, message: str, *, golden: str, candidate: str, fix: str, check: str, details: str = ""
) -> Verdict:
    """A verdict for work that never came to a comparison: a stale golden, an engine that failed.

    ``details`` are lines that follow, such as a traceback.
    """
    told = f"{message}\n{details}" if details else message
    finding = Finding(status=status, check=check, message=told, fix=fix)
    return Verdict(golden=golden, candidate=candidate, status=status, findings=(finding,))


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """Over several checks: 1 if any failed, else 4, 3, 0; without a single check 3, since nothing was seen."""
    if not verdicts:
        return Status.UNMEASURED.exit_code
    codes = {verdict.status.exit_code for verdict in verdicts}
    return next((code for code in (1, 4, 3) if code in codes), 0)

"""Verdicts as text: one line when all is well, else what, how many, worst where, allowed and why, what next."""

from __future__ import annotations

from collections.abc import Sequence

from harness.values import Finding, PassSummary, Verdict

_STYLES = {"identical": "green", "drift": "green", "unmeasured": "yellow", "stale": "yellow"}


def style_of(verdict: Verdict) -> str:
    """Colour of a status."""
    return _STYLES.get(verdict.status.value, "red")


def verdict_to_text(verdict: Verdict) -> str:
    """The report of one check, plain text without a final newline."""
    lines = [f"{verdict.status.value}: {verdict.candidate} against {verdict.golden}: {summary(verdict)}"]
    shown = verdict.failures if not verdict.ok else verdict.findings
    for finding, others in _worst_of_each_kind(shown):
        lines += _finding(finding, others)
    if verdict.power is not None and (not verdict.ok or verdict.power.unmeasured):
        lines += [f"  not seen: {reason}" for reason in verdict.power.unmeasured]
    return "\n".join(lines)


def summary(verdict: Verdict) -> str:
    """What was measured, in one line: error against round-off, tokens, what could have been seen."""
    power = verdict.power
    if power is None:
        return "not compared"
    parts = []
    worst = worst_pass(verdict)
    if worst is not None:
        parts.append(f"error {worst.ratio:.2f} x round-off in {power.precision} (fails from {worst.limit:.2f})")
    parts.append(token_words(verdict))
    if power.steps:
        parts.append(f"{power.coverage:.1%} of {power.steps} steps decidable")
    return ", ".join(parts)


def worst_pass(verdict: Verdict) -> PassSummary | None:
    """The pass whose pooled error comes nearest to its own limit, None where none was measured."""
    measured = [one for one in verdict.passes if one.ratio is not None and one.limit]
    return max(measured, key=lambda one: (one.ratio or 0.0) / (one.limit or 1.0), default=None)


def token_words(verdict: Verdict) -> str:
    """Differing tokens of the passes that show them on the golden's prefix, else of the free runs."""
    forced = [one for one in verdict.passes if one.view != "generate"] or list(verdict.passes)
    flips, steps = sum(one.flips for one in forced), sum(one.steps for one in forced)
    return f"{flips} of {steps} tokens differ"


def _worst_of_each_kind(findings: Sequence[Finding]) -> list[tuple[Finding, int]]:
    """For each (status, check) the finding furthest beyond its bound, and how many more of the kind there are."""
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.status.value, finding.check), []).append(finding)
    return [(max(kind, key=_severity), len(kind) - 1) for kind in kinds.values()]


def _severity(finding: Finding) -> float:
    return (finding.measured or 0.0) / (finding.allowed or 1.0)


def _finding(finding: Finding, others: int) -> list[str]:
    lines = [f"  {finding.status.value}: {finding.check}: {finding.message}"]
    if finding.where:
        beside = f" ({others} more such findings; --json has all)" if others else ""
        lines.append(f"    worst at {finding.where}{beside}")
    if finding.measured is not None and finding.allowed is not None:
        lines.append(f"    measured {finding.measured:.3g}, allowed {finding.allowed:.3g}: {finding.why}")
    elif finding.why:
        lines.append(f"    why: {finding.why}")
    if finding.fix:
        lines.append(f"    next: {finding.fix}")
    return lines


#: Columns of the table of `check --all`: title and width.
_COLUMNS = (
    ("status", 16),
    ("golden", 22),
    ("candidate", 40),
    ("error/round-off", 20),
    ("tokens", 20),
    ("decidable", 10),
)


def table_header() -> str:
    """Titles of the table; rows are printed as they come, so widths are fixed."""
    return "".join(title.ljust(width) for title, width in _COLUMNS) + "seconds"


def table_row(verdict: Verdict) -> str:
    """One check as a row of the table."""
    worst, power = worst_pass(verdict), verdict.power
    ratio = "-" if worst is None else f"{worst.ratio:.2f} (limit {worst.limit:.2f})"
    decidable = "-" if power is None or not power.steps else f"{power.coverage:.1%}"
    tokens = "-" if power is None else token_words(verdict).removesuffix(" tokens differ") + " differ"
    cells: Sequence[str] = (verdict.status.value, verdict.golden, verdict.candidate, ratio, tokens, decidable)
    padded = "".join(cell.ljust(width - 1) + " " for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    return padded + f"{verdict.seconds:.1f}"

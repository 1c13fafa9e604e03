"""Verdicts as text: one line when all is well, else what, how many, worst where, allowed and why, what next."""

from __future__ import annotations

from collections.abc import Sequence

from harness.values import Answer, Finding, PassSummary, Status, Verdict

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
    if verdict.answers and not verdict.ok:
        lines += [f"  {line}" for line in _meaning(verdict)]
    unmeasured = [reason for one in verdict.answers if one.power is not None for reason in one.power.unmeasured]
    lines += [f"  not seen: {reason}" for reason in dict.fromkeys(unmeasured)]
    return "\n".join(lines)


def _meaning(verdict: Verdict) -> list[str]:
    """What it means which of the two questions failed."""
    by_question = {answer.question: answer.status for answer in verdict.answers}
    lines = [f"{_ASKED[answer.question]} {_said(answer)}" for answer in verdict.answers]
    function, precision = by_question.get("function"), by_question.get("precision")
    if function is None or precision is None or Status.UNMEASURED in (function, precision):
        return lines
    if function.ok and not precision.ok:
        lines.append(
            "meaning: the weights and the function are right, the path in the declared precision is not: "
            "a kernel, a mask value, an overflow, an accumulation or a missing upcast"
        )
    elif function is Status.DEVIATES and precision.ok:
        lines.append("meaning: the function is wrong, by less than round-off in the declared precision can show")
    return lines


_ASKED = {"function": "same function (float32 copy):", "precision": "error within its precision (as shipped):"}


def _said(answer: Answer) -> str:
    seen = answer.power.smallest if answer.power is not None else None
    could = "" if seen is None else f"; an error of {seen:.2g} x round-off would have been caught"
    looks = f"; its error looks like {answer.effective}" if answer.effective else ""
    return f"{answer.status.value}{could}{looks}"


def summary(verdict: Verdict) -> str:
    """What was measured, in one line: error against round-off, tokens, what could have been seen."""
    power = verdict.power
    if power is None:
        return "not compared"
    parts = []
    worst = worst_pass(verdict)
    if worst is not None:
        precision = _precision(verdict, worst)
        parts.append(f"error {worst.ratio:.2f} x round-off in {precision} (fails from {worst.limit:.2f})")
    parts.append(token_words(verdict))
    if power.steps:
        parts.append(f"{power.coverage:.1%} of {power.steps} steps decidable")
    if power.smallest is not None:
        parts.append(f"a bug of {power.smallest:.2g} x round-off would show")
    if power.level != "logits":
        parts.append(f"judged by {power.level}")
    return ", ".join(parts)


def _precision(verdict: Verdict, one: PassSummary) -> str:
    powers = {answer.question: answer.power for answer in verdict.answers}
    power = powers.get(one.question)
    return "?" if power is None else power.precision


def worst_pass(verdict: Verdict) -> PassSummary | None:
    """The pass whose pooled error comes nearest to its own limit, None where none was measured."""
    measured = [one for one in verdict.passes if one.ratio is not None and one.limit]
    return max(measured, key=lambda one: (one.ratio or 0.0) / (one.limit or 1.0), default=None)


def token_words(verdict: Verdict) -> str:
    """Differing tokens of the passes that show them on the golden's prefix, else of the free runs."""
    # The run as shipped is what users get; its float32 copy is for the other question.
    shipped = [one for one in verdict.passes if one.question == "precision"] or list(verdict.passes)
    forced = [one for one in shipped if one.view != "generate"] or shipped
    flips, steps = sum(one.flips for one in forced), sum(one.steps for one in forced)
    return f"{flips} of {steps} tokens differ"


def _worst_of_each_kind(findings: Sequence[Finding]) -> list[tuple[Finding, int]]:
    """For each (question, status, check) the finding furthest beyond its bound, and how many more there are."""
    kinds: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.question, finding.status.value, finding.check), []).append(finding)
    return [(max(kind, key=_severity), len(kind) - 1) for kind in kinds.values()]


def _severity(finding: Finding) -> float:
    return (finding.measured or 0.0) / (finding.allowed or 1.0)


def _finding(finding: Finding, others: int) -> list[str]:
    lines = [f"  {finding.status.value} ({finding.question}): {finding.check}: {finding.message}"]
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

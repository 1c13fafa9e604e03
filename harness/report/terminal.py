"""Verdicts as text: one line when all is well, else what, how many, worst where, allowed and why, what next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from harness.report.characters import legal, one_line
from harness.values import (
    Answer,
    Change,
    Changes,
    Difference,
    Finding,
    Kind,
    PassSummary,
    Status,
    Verdict,
    worst_of,
)

_STYLES = {"identical": "green", "drift": "green", "unmeasured": "yellow", "stale": "yellow"}


def style_of(verdict: Verdict) -> str:
    """Colour of a status."""
    return _STYLES.get(verdict.status.value, "red")


def verdict_to_text(verdict: Verdict) -> str:
    """The report of one check, plain text without a final newline."""
    lines = [headline(verdict)]
    if not verdict.ok:
        lines += _findings(verdict.failures)
        lines += _meaning(verdict)
        lines += _which_passes(verdict)
    if verdict.environment:
        lines.append(f"environment: {environment_words(verdict.environment)}")
    if verdict.blame is not None:
        lines.append(f"blame: {'not known: ' if verdict.blame.who == 'unknown' else ''}{verdict.blame.message}")
    unmeasured = [reason for one in verdict.answers if one.power is not None for reason in one.power.unmeasured]
    lines += [f"not seen: {reason}" for reason in dict.fromkeys(unmeasured)]
    command = None if verdict.ok else _next_command(verdict)
    if command is not None:
        lines.append(f"next: {command}")
    # A port's exception may be of several lines: they stay inside the block of the line that they belong to.
    return "\n  ".join(legal(line).replace("\n", "\n      ") for line in lines)


def _which_passes(verdict: Verdict) -> list[str]:
    """Which passes are right where not all are wrong, and what that says; nothing where it says nothing."""
    question = next((one.question for one in verdict.answers if one.status is Status.DEVIATES), None)
    measured = [one for one in verdict.passes if one.question == question and one.ratio is not None and one.limit]
    wrong = [one for one in measured if not (one.ratio or 0.0) <= (one.limit or 0.0)]
    right = [one for one in measured if one not in wrong]
    if not right or not wrong:
        return []
    views, runs = {one.view for one in wrong}, {one.run for one in wrong}
    if views == {"replay"} and {one.view for one in right} == {"prefill"}:
        says = "prefill is right and decode is wrong: look at the KV cache, and at positions and masks in decode"
    elif views == {"prefill"} and {one.view for one in right} == {"replay"}:
        says = (
            "decode is right and prefill is wrong: look at the causal mask and at what is done for many tokens at once"
        )
    elif not runs & {one.run for one in right}:
        says = "some runs are right throughout: look at what these differ in, batch size, padding, order of requests"
    else:
        says = ""
    lines = [f"passes: right {_pass_words(right)}; wrong {_pass_words(wrong)}"]
    return [*lines, f"meaning: {says}"] if says else lines


def _pass_words(passes: Sequence[PassSummary]) -> str:
    """Names with the largest error of each, "single/replay (1.13 x)"."""
    largest: dict[str, float] = {}
    for one in passes:
        name = f"{one.run}/{one.view}"
        largest[name] = max(largest.get(name, 0.0), one.ratio or 0.0)
    return ", ".join(f"{name} ({ratio:.3g} x)" for name, ratio in largest.items())


def headline(verdict: Verdict) -> str:
    """All of a check that is well in one line; of any other the status and the figures."""
    line = f"{verdict.status.value}: {verdict.candidate} against {verdict.golden}: {summary(verdict)}"
    seen = list(dict.fromkeys(finding.check for finding in verdict.findings)) if verdict.ok else []
    told = [finding.message for finding in verdict.findings if verdict.ok and finding.check == "effective precision"]
    return one_line("; ".join([line + (f", drift in {', '.join(seen)}" if seen else ""), *dict.fromkeys(told)]))


def environment_words(differences: Iterable[Difference]) -> str:
    """What is another today than when the golden was recorded: "torch 2.12 -> 2.13, threads 1 -> 2"."""
    return ", ".join(f"{one.name} {one.golden or 'not recorded'} -> {one.today or 'none'}" for one in differences)


def _next_command(verdict: Verdict) -> str | None:
    """What to run next; None where nothing was compared, since the finding's own fix is then all there is to do."""
    if not verdict.answers and any(finding.fix for finding in verdict.failures):
        return None
    blame, moved = verdict.blame, verdict.status in (Status.DEVIATES, Status.NONDETERMINISTIC)
    if moved and verdict.environment and blame is None:
        return (
            "the same check with --blame-environment (in Python blame_environment=True) says whether the environment "
            "did this or the change"
        )
    if blame is not None and blame.who == "environment":
        return (
            "the same check in the versions of the golden; to take today's for right, record it again "
            "(harness record ... --update --reason TEXT)"
        )
    return "the same check with --json FILE (in Python verdict.to_dict()) gives every finding, statistic and limit"


def _meaning(verdict: Verdict) -> list[str]:
    """Both answers, and what it means which of the two questions failed."""
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
    worst = worst_of(verdict.passes)
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
    ratio = (finding.measured or 0.0) / (finding.allowed or 1.0)
    return math.inf if math.isnan(ratio) else ratio


def _findings(findings: Sequence[Finding]) -> list[str]:
    """The worst of each kind; what to do is said once, under the last of those that share it."""
    kinds = _worst_of_each_kind(findings)
    last = {finding.fix: index for index, (finding, _) in enumerate(kinds)}
    lines = []
    for index, (finding, others) in enumerate(kinds):
        lines += _finding(finding, others)
        if finding.fix and last[finding.fix] == index:
            lines.append(f"  next: {finding.fix}")
    return lines


def _finding(finding: Finding, others: int) -> list[str]:
    lines = [f"{finding.status.value} ({finding.question}): {finding.check}: {finding.message}"]
    beside = f"{others} more such finding{'s' if others > 1 else ''}; --json has all" if others else ""
    if finding.where:
        lines.append(f"  worst at {finding.where}{f' ({beside})' if beside else ''}")
    elif beside:
        lines.append(f"  {beside}")
    if finding.measured is not None and finding.allowed is not None:
        lines.append(f"  measured {finding.measured:.3g}, allowed {finding.allowed:.3g}: {finding.why}")
    elif finding.why:
        lines.append(f"  why: {finding.why}")
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
    *cells, seconds = table_cells(verdict)
    return "".join(cell.ljust(width - 1) + " " for cell, (_, width) in zip(cells, _COLUMNS, strict=True)) + seconds


def table_titles() -> tuple[str, ...]:
    """Of the columns of a table of checks."""
    return (*(title for title, _ in _COLUMNS), "seconds")


def table_cells(verdict: Verdict) -> tuple[str, ...]:
    """One check, a cell for each of `table_titles`."""
    worst, power = worst_of(verdict.passes), verdict.power
    ratio = "-" if worst is None else f"{worst.ratio:.2f} (limit {worst.limit:.2f})"
    decidable = "-" if power is None or not power.steps else f"{power.coverage:.1%}"
    tokens = "-" if power is None else token_words(verdict).removesuffix(" tokens differ") + " differ"
    seconds = f"{verdict.seconds:.1f}"
    names = one_line(verdict.golden), one_line(verdict.candidate)
    return (verdict.status.value, *names, ratio, tokens, decidable, seconds)


# --- one golden against another ------------------------------------------------------------------


def changes_to_text(changes: Changes) -> str:
    """What an update would change: one line where it is nothing, else a line a prompt that is not the same."""
    if changes.worst is Kind.SAME and not changes.environment:
        return one_line(f"{changes.old} -> {changes.new}: nothing has changed in {len(changes.prompts)} prompts")
    counts = Counter(one.kind for one in changes.prompts)
    prompts = ", ".join(f"{counts[kind]} {kind.value}" for kind in reversed(Kind) if counts[kind]) or "none"
    header = f"{changes.old} -> {changes.new}: prompts: {prompts}; worst: {changes.worst.value}"
    shown = _by_severity(one for one in changes.prompts if one.kind is not Kind.SAME)
    lines = _aligned([_CHANGE_TITLES, *map(_change_cells, shown)]) if shown else []
    lines += [one_line(f"{one.prompt}: {one.kind.value}: {one.message}") for one in _by_severity(changes.general)]
    if changes.environment:
        lines.append(one_line(f"environment: {environment_words(changes.environment)}"))
    return "\n  ".join([one_line(header), *lines])


#: Columns of the prompts that changed.
_CHANGE_TITLES = ("prompt", "kind", "differs from", "margin", "deviation", "what")


def _by_severity(changes: Iterable[Change]) -> list[Change]:
    """Worst first; of one kind the one furthest beyond its limit."""
    kinds = list(Kind)
    return sorted(changes, key=lambda one: (-kinds.index(one.kind), -(one.deviation or 0.0) / (one.limit or 1.0)))


def _change_cells(one: Change) -> tuple[str, ...]:
    return (
        one.prompt,
        one.kind.value,
        "-" if one.step is None else f"step {one.step}",
        "-" if one.margin is None else f"{one.margin:.2g}",
        "-" if one.deviation is None else f"{one.deviation:.3g} (limit {one.limit:.3g})",
        one_line(one.message),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells of rows one under another; the last column is as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]])
        for row in rows
    ]

"""Verdicts as text: one line when all is well, else which question failed, what, worst where, allowed, what next."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from harness.numerics.statistics import MAGNITUDES, SIGNED
from harness.report.characters import legal, one_line
from harness.report.diagnosis import diagnosis_lines
from harness.report.sharding import sharding_lines
from harness.values import (
    Answer,
    Change,
    Changes,
    Difference,
    Finding,
    Kind,
    PassSummary,
    Question,
    Status,
    Verdict,
    worst_of,
)

_STYLES = {"identical": "green", "drift": "green", "unmeasured": "yellow", "stale": "yellow"}


def style_of(verdict: Verdict) -> str:
    """Colour of a status."""
    return _STYLES.get(verdict.status.value, "red")


def verdict_to_text(verdict: Verdict, *, verbose: bool = False) -> str:
    """The report of one check, plain text without a final newline.

    Of what is not ok each question has a line for each kind of finding; with ``verbose`` there is a block for each
    check that failed, with its limit and derivation, and what each question could have caught.
    """
    lines = [headline(verdict)]
    if not verdict.ok:
        lines += [*_findings(verdict.failures), *_answers(verdict)] if verbose else _questions(verdict)
        lines += [*_tokens(verdict), *_which_passes(verdict)]
        # What the passes say is nearer to the bug, so it stands where there is room for one meaning.
        meanings = [f"meaning: {one}" for one in (_meaning_of_passes(verdict), _meaning_of_answers(verdict)) if one]
        lines += meanings if verbose else meanings[:1]
    lines += [line for answer in verdict.answers for line in diagnosis_lines(answer)]
    lines += sharding_lines(verdict.sharding, ok=verdict.ok)
    if verdict.environment:
        lines.append(f"environment: {environment_words(verdict.environment)}")
    if verdict.blame is not None:
        lines.append(f"blame: {'not known: ' if verdict.blame.who == 'unknown' else ''}{verdict.blame.message}")
    unmeasured = [reason for one in verdict.answers if one.power is not None for reason in one.power.unmeasured]
    lines += [f"not seen: {reason}" for reason in dict.fromkeys(unmeasured)]
    if not verdict.ok:
        lines += [] if verbose else _fixes(verdict)
        lines += _next_command(verdict, verbose=verbose)
    # A port's exception may be of several lines: they stay inside the block of the line that they belong to.
    return "\n  ".join(legal(line).replace("\n", "\n      ") for line in lines)


def headline(verdict: Verdict) -> str:
    """One line: of a check that is well the figures, of any other what each question was answered."""
    line = f"{verdict.status.value}: {verdict.candidate} against {verdict.golden}: "
    if not verdict.ok:
        return one_line(line + (", ".join(map(_answer_words, verdict.answers)) or "not compared"))
    seen = list(dict.fromkeys(finding.check for finding in verdict.findings))
    told = [finding.message for finding in verdict.findings if finding.check == _EFFECTIVE]
    line += summary(verdict) + (f", drift in {', '.join(seen)}" if seen else "")
    return one_line("; ".join([line, *dict.fromkeys(told)]))


_EFFECTIVE = "effective precision"

_IN_WORDS = {
    Status.IDENTICAL: "ok",
    Status.DRIFT: "ok",
    Status.DEVIATES: "wrong",
    Status.STRUCTURAL: "not comparable",
    Status.NONDETERMINISTIC: "not repeatable",
    Status.UNMEASURED: "not measured",
}


def _answer_words(answer: Answer) -> str:
    return f"{answer.question} {_IN_WORDS.get(answer.status, answer.status.value)}"


# --- what is not ok, a line for each kind of finding -----------------------------------------------

#: Findings that are all of one thing: how far the logits are off, and the tokens.
_NUMBERS = MAGNITUDES | SIGNED
_TOKENS = frozenset({"tokens", "flips", "depth of flips"})


def _questions(verdict: Verdict) -> list[str]:
    """What was found of each question; what is found of both in the same words is one line."""
    lines: dict[str, list[Question]] = {}
    for question in _asked(verdict):
        for line in _question(verdict, question):
            lines.setdefault(line, []).append(question)
    # Where nothing was compared no question was asked.
    return [f"{' and '.join(names)}: {line}" if verdict.answers else line for line, names in lines.items()]


def _asked(verdict: Verdict) -> Iterable[Question]:
    answered = [one.question for one in verdict.answers]
    return dict.fromkeys([*answered, *(one.question for one in verdict.failures)])


def _question(verdict: Verdict, question: Question) -> list[str]:
    """A line for each kind of finding, or one with the figures where all is well."""
    answer = next((one for one in verdict.answers if one.question == question), None)
    lines = [_found(finding, others) for finding, others in _shown(verdict, question)]
    if not lines and answer is not None and answer.status.ok and (figures := _figures(verdict, question)):
        lines = [", ".join(["ok", *figures])]
    if lines and answer is not None and _is_of_a_size(answer):
        lines[0] += f"; {_size(answer)}"
    return lines


def _shown(verdict: Verdict, question: Question) -> list[tuple[Finding, int]]:
    """Of a question the worst finding of each kind, the logits' first, and how many more there are of it."""
    failures = [one for one in verdict.failures if one.question == question]
    if any(one.question == question and _is_of_a_size(one) for one in verdict.answers):
        # Said behind the worst of the others.
        failures = [one for one in failures if one.check != _EFFECTIVE] or failures
    kinds: dict[str, list[Finding]] = {}
    for one in sorted(failures, key=lambda one: _kind(one) != "logits"):
        kinds.setdefault(_kind(one), []).append(one)
    return [(max(kind, key=_rank), len(kind) - 1) for kind in kinds.values()]


def _kind(finding: Finding) -> str:
    """Findings of one kind share a line."""
    if finding.measured is not None and finding.check in _NUMBERS:
        return "logits"
    if finding.measured is not None and finding.check in _TOKENS:
        return "tokens"
    return f"{finding.status.value}: {finding.check}"


def _rank(finding: Finding) -> tuple[bool, float]:
    # A shift of 0.1 can be further beyond its limit than an error of 100, and ten flips than one token that is no
    # tie: errors and single tokens are what people know.
    return finding.check.startswith("error") or finding.check == "tokens", _severity(finding)


def _found(finding: Finding, others: int) -> str:
    line = legal(finding.message if _kind(finding) == "logits" else f"{finding.check}: {finding.message}")
    # Behind a message of several lines what was measured would look like part of it.
    line += "\n" if "\n" in line else ""
    if finding.measured is not None and finding.allowed is not None:
        measured = f"{finding.measured:.3g}"
        said = re.search(rf"(?<![\w.]){re.escape(measured)}(?![\w.])", finding.message)
        limit = f"{'' if said else f'measured {measured}, '}allowed {finding.allowed:.3g}"
        line = f"{line[:-1]}, {limit})" if line.endswith(")") else f"{line} ({limit})"
    elif finding.why:
        line += f" ({finding.why})"
    if finding.where:
        line += f", {'worst ' if others else ''}{'over' if finding.where.startswith('all ') else 'at'} {finding.where}"
    return line.rstrip("\n") + (f"; {others} more finding{'s' if others > 1 else ''}" if others else "")


def _figures(verdict: Verdict, question: Question) -> list[str]:
    """Error and tokens of one question, the tokens only where the report's own line has others."""
    worst = worst_of(verdict.passes, {question})
    figures = [] if worst is None else [f"error {worst.ratio:.2f} x round-off in {_precision(verdict, worst)}"]
    own = [one for one in verdict.passes if one.question == question]
    tokens = _token_counts(own)
    return [*figures, f"{tokens[0]} of {tokens[1]} tokens differ"] if own and own != _shipped(verdict) else figures


def _tokens(verdict: Verdict) -> list[str]:
    """The tokens of the run as shipped, and what they can tell; nothing where none was compared."""
    power = verdict.power
    if power is None:
        return []
    flips, steps = _token_counts(_shipped(verdict))
    parts = [f"{flips} of {steps} differ"] if steps else []
    parts += [f"{power.coverage:.1%} of {power.steps} steps decidable"] if power.steps else []
    parts += [f"judged by {power.level}"] if power.level != "logits" else []
    return [f"tokens: {', '.join(parts)}"] if parts else []


def _is_of_a_size(answer: Answer) -> bool:
    """Whether its error is of another precision's size; of rounded weights a finding says what they are."""
    return bool(answer.effective) and " on " not in answer.effective


def _size(answer: Answer) -> str:
    """An error of a size alone tells of no cast: any bug may be as large."""
    precision, _, weights = answer.effective.partition(" on ")
    return f"its error is of the size of {precision}'s round-off{f' on {weights}' if weights else ''}"


# --- where to look -----------------------------------------------------------------------------------


def _right_and_wrong(verdict: Verdict) -> tuple[list[PassSummary], list[PassSummary]]:
    """Passes of the first question that deviates: those within their limit and those beyond."""
    question = next((one.question for one in verdict.answers if one.status is Status.DEVIATES), None)
    measured = [one for one in verdict.passes if one.question == question and one.ratio is not None and one.limit]
    wrong = [one for one in measured if not (one.ratio or 0.0) <= (one.limit or 0.0)]
    return [one for one in measured if one not in wrong], wrong


def _which_passes(verdict: Verdict) -> list[str]:
    """Which passes are right where not all are wrong; nothing where it says nothing."""
    right, wrong = _right_and_wrong(verdict)
    return [f"passes: right {_pass_words(right)}; wrong {_pass_words(wrong)}"] if right and wrong else []


def _meaning_of_passes(verdict: Verdict) -> str:
    """What the wrong passes have in common and the right ones have not; empty where there is no such thing."""
    right, wrong = _right_and_wrong(verdict)
    if not right or not wrong:
        return ""
    views, runs = {one.view for one in wrong}, {one.run for one in wrong}
    if views == {"replay"} and {one.view for one in right} == {"prefill"}:
        return "prefill is right and decode is wrong: look at the KV cache, and at positions and masks in decode"
    if views == {"prefill"} and {one.view for one in right} == {"replay"}:
        return (
            "decode is right and prefill is wrong: look at the causal mask and at what is done for many tokens at once"
        )
    if not runs & {one.run for one in right}:
        return "some runs are right throughout: look at what these differ in, batch size, padding, order of requests"
    return ""


def _meaning_of_answers(verdict: Verdict) -> str:
    """What it means which of the two questions failed; empty where it means nothing."""
    by_question = {answer.question: answer.status for answer in verdict.answers}
    function, precision = by_question.get("function"), by_question.get("precision")
    if function is None or precision is None or Status.UNMEASURED in (function, precision):
        return ""
    if function.ok and not precision.ok:
        return (
            "the weights and the function are right, the path in the declared precision is not: "
            "a kernel, a mask value, an overflow, an accumulation or a missing upcast"
        )
    if function is Status.DEVIATES and precision.ok:
        return "the function is wrong, by less than round-off in the declared precision can show"
    return ""


def _pass_words(passes: Sequence[PassSummary]) -> str:
    """Names with the largest error of each, "single/replay (1.13 x)"."""
    largest: dict[str, float] = {}
    for one in passes:
        name = f"{one.run}/{one.view}"
        largest[name] = max(largest.get(name, 0.0), one.ratio or 0.0)
    return ", ".join(f"{name} ({ratio:.3g} x)" for name, ratio in largest.items())


def environment_words(differences: Iterable[Difference]) -> str:
    """What is another today than when the golden was recorded: "torch 2.12 -> 2.13, threads 1 -> 2"."""
    return ", ".join(f"{one.name} {one.golden or 'not recorded'} -> {one.today or 'none'}" for one in differences)


def _fixes(verdict: Verdict) -> list[str]:
    """What to do about the findings that are shown, each once; tokens are wrong because the logits are."""
    fixes = []
    for question in _asked(verdict):
        shown = {_kind(finding): finding.fix for finding, _ in _shown(verdict, question)}
        fixes += [fix for kind, fix in shown.items() if fix and not (kind == "tokens" and "logits" in shown)]
    return [f"next: {fix}" for fix in dict.fromkeys(fixes)]


def _next_command(verdict: Verdict, *, verbose: bool) -> list[str]:
    """What to run next; none where nothing was compared, since the finding's own fix is then all there is to do."""
    if not verdict.answers and any(finding.fix for finding in verdict.failures):
        return []
    blame, moved = verdict.blame, verdict.status in (Status.DEVIATES, Status.NONDETERMINISTIC)
    if moved and verdict.environment and blame is None:
        command = (
            "the same check with --blame-environment (in Python blame_environment=True) says whether the environment "
            "did this or the change"
        )
    elif blame is not None and blame.who == "environment":
        command = (
            "the same check in the versions of the golden; to take today's for right, record it again "
            "(harness record ... --update --reason TEXT)"
        )
    elif verbose:
        command = (
            "the same check with --json FILE (in Python verdict.to_dict()) gives every finding, statistic and limit"
        )
    else:
        looked = any(one.diagnosis is not None for one in verdict.answers)
        name = "--diagnose (in Python diagnose=True) looks for the bug in a catalogue, " if moved and not looked else ""
        command = (
            f"the same check with {name}--verbose gives limits and their derivation, "
            "--json FILE (in Python verdict.to_dict()) every finding and statistic"
        )
    return [f"next: {command}"]


# --- what is well -------------------------------------------------------------------------------------


def summary(verdict: Verdict) -> str:
    """What was measured, in one line: error against round-off, tokens, what could have been seen."""
    power = verdict.power
    if power is None:
        return "not compared"
    parts = []
    worst = worst_of(verdict.passes)
    if worst is not None:
        parts.append(_error_words(verdict, worst))
    parts.append(token_words(verdict))
    if power.steps:
        parts.append(f"{power.coverage:.1%} of {power.steps} steps decidable")
    if power.smallest is not None:
        parts.append(f"a bug of {power.smallest:.2g} x round-off would show")
    if power.level != "logits":
        parts.append(f"judged by {power.level}")
    return ", ".join(parts)


def _error_words(verdict: Verdict, one: PassSummary) -> str:
    return f"error {one.ratio:.2f} x round-off in {_precision(verdict, one)} (fails from {one.limit:.2f})"


def _precision(verdict: Verdict, one: PassSummary) -> str:
    powers = {answer.question: answer.power for answer in verdict.answers}
    power = powers.get(one.question)
    return "?" if power is None else power.precision


def token_words(verdict: Verdict) -> str:
    """Differing tokens of the run as shipped."""
    flips, steps = _token_counts(_shipped(verdict))
    return f"{flips} of {steps} tokens differ"


def _shipped(verdict: Verdict) -> list[PassSummary]:
    """The passes of what users get: the float32 copy is for the other question."""
    return [one for one in verdict.passes if one.question == "precision"] or list(verdict.passes)


def _token_counts(passes: Sequence[PassSummary]) -> tuple[int, int]:
    """(differing tokens, steps) of the passes that show them on the golden's prefix, else of the free runs."""
    forced = [one for one in passes if one.view != "generate"] or passes
    return sum(one.flips for one in forced), sum(one.steps for one in forced)


# --- what is not ok, with limits and derivations -------------------------------------------------------


def _answers(verdict: Verdict) -> list[str]:
    """What each question was answered, what it could have caught, and its error."""
    return [f"{_ASKED[answer.question]} {_said(verdict, answer)}" for answer in verdict.answers]


_ASKED = {"function": "same function (float32 copy):", "precision": "error within its precision (as shipped):"}


def _said(verdict: Verdict, answer: Answer) -> str:
    parts = [answer.status.value]
    if answer.power is not None and answer.power.smallest is not None:
        parts.append(f"an error of {answer.power.smallest:.2g} x round-off would have been caught")
    worst = worst_of(verdict.passes, {answer.question})
    if worst is not None:
        parts.append(_error_words(verdict, worst))
    return "; ".join([*parts, *([_size(answer)] if answer.effective else [])])


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

"""Golden + Trace [+ Scoring] -> Findings: structure first, then tokens and logits, each against a measured floor.

Two questions are asked (numerics.md 2.1): is it the same *function* (the candidate widened to float32), and is its
error in the declared *precision* within budget (the candidate as shipped)?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from harness.comparison import effective, entries, exact, likeness, logits, quantiser, structure, tokens
from harness.comparison.context import Comparison, Context, Spreads, compare_context, declared_precision
from harness.comparison.tokens import diverged
from harness.engines.runner import views_of
from harness.templates.layers import Maker
from harness.values import (
    NOT_USED,
    Answer,
    Finding,
    Golden,
    PassSummary,
    Power,
    Question,
    Run,
    Scoring,
    Statistic,
    Status,
    Templates,
    Trace,
    View,
    overall,
)

__all__ = ["FUNCTION_VIEWS", "Comparison", "Spreads", "compare", "diverged"]

#: The views of the first question: free runs would only repeat what the replay shows.
FUNCTION_VIEWS: tuple[View, ...] = ("replay", "prefill")

#: Settings in which the widened copy must equal the candidate: whatever else differs, it is another program.
_SAME = (
    "model",
    "attn",
    "compile",
    "batch",
    "threads",
    "device",
    "parameters",
    "chunk",
    "tensor_parallel",
    "pipeline_parallel",
    "micro_batches",
)


def compare(
    golden: Golden,
    trace: Trace,
    runs: Sequence[Run] | None = None,
    *,
    scoring: Scoring | None = None,
    spreads: Spreads | None = None,
    templates: Templates | None = None,
    maker: Maker | None = None,
) -> Comparison:
    """All findings of one trace against one golden, with what the comparison could have seen.

    Args:
        golden: what is believed.
        trace: what the candidate did, with the trace of its widened copy where there is one.
        runs: what the candidate was asked to do, the suite's own by default.
        scoring: what the live reference was asked at check time.
        spreads: scatters of the statistics between families, those of constants.py by default.
        templates: of the bug catalogue, where the trace was made with their basis.
        maker: makes what a bug does in single blocks, once one is named.

    Where the structure is wrong nothing numeric is compared: the numbers would be of another question.
    """
    runs = golden.suite.runs if runs is None else runs
    shipped = _one_question(
        golden, trace, runs, None, scoring=scoring, spreads=spreads, templates=templates, maker=maker
    )
    if declared_precision(trace.settings) in ("float32", "float64"):
        return shipped
    wide, reason = trace.upcast, trace.upcast_reason
    computes = None if wide is None else declared_precision(wide.settings)
    if computes not in (None, "float32"):
        wide, reason = None, f"its copy computes in {computes}"
    elif wide is not None and (changed := _changed(trace, wide)):
        wide, reason = None, f"widening changed {changed}, so it is another program"
    if wide is None:
        unasked = Answer(
            question="function",
            status=Status.UNMEASURED,
            power=Power(
                precision="float32",
                level="nothing",
                positions=0,
                steps=0,
                decidable=0,
                smallest=None,
                unmeasured=(f"the function: {reason or 'no float32 copy of the candidate was run'}",),
            ),
        )
        return Comparison(
            findings=shipped.findings,
            answers=(unasked, *shipped.answers),
            statistics=shipped.statistics,
            passes=shipped.passes,
        )
    declared = declared_precision(trace.settings)
    function = _one_question(
        golden,
        wide,
        runs,
        FUNCTION_VIEWS,
        declared=declared,
        scoring=scoring,
        spreads=spreads,
        templates=templates,
        maker=maker,
    )
    return Comparison(
        findings=(*function.findings, *shipped.findings),
        answers=(*function.answers, *shipped.answers),
        statistics=(*function.statistics, *shipped.statistics),
        passes=(*function.passes, *shipped.passes),
    )


def _changed(trace: Trace, wide: Trace) -> str:
    """The first setting, dtype apart, in which the widened copy differs; empty where there is none."""
    for key in _SAME:
        before, after = trace.settings.get(key), wide.settings.get(key)
        if before != after and NOT_USED not in (before, after):
            return f"{key} from {before} to {after}"
    return ""


def _one_question(
    golden: Golden,
    trace: Trace,
    runs: Sequence[Run],
    views: tuple[View, ...] | None,
    *,
    declared: str | None = None,
    scoring: Scoring | None,
    spreads: Spreads | None,
    templates: Templates | None,
    maker: Maker | None,
) -> Comparison:
    """Everything about one run of the candidate."""
    question: Question = "function" if declared_precision(trace.settings) == "float32" else "precision"
    asked = [run for run in runs if views is None or any(view in views for view in views_of(run, trace.capabilities))]
    findings = [_of(question, one) for one in structure.check(golden, trace, asked, views=views)]
    if any(not finding.status.ok for finding in findings):
        status = next(finding.status for finding in findings if not finding.status.ok)
        return Comparison(findings=tuple(findings), answers=(Answer(question=question, status=status, power=None),))
    context = compare_context(golden, trace, declared=declared, scoring=scoring, spreads=spreads)
    if quantiser.is_declared(context):
        return _unknown_quantiser(context, findings)
    more, found, smallest, seems = _numbers(context)
    diagnosis = None
    if templates is not None:
        diagnosis, named = likeness.diagnose(context, templates, maker)
        more = [*named, *more]
    findings += more
    return Comparison(
        findings=tuple(findings),
        answers=(
            Answer(
                question=question,
                status=_overall(findings),
                power=_power(context, smallest, *_unseen(context, asked, views)),
                effective=seems,
                diagnosis=diagnosis,
            ),
        ),
        statistics=tuple(found),
        passes=_summaries(context),
    )


def _numbers(context: Context) -> tuple[list[Finding], list[Statistic], float | None, str]:
    """Findings, statistics, the smallest error that would have been caught, the precision that the error looks like."""
    shows = tokens.level(context)
    if shows == "nothing":
        return [_nothing(context)], [], None, ""
    if exact.applies(context):
        return exact.judge(context), [], None, ""
    if context.missing and context.floor is not None:
        # Without its centre nothing can be said, about tokens either.
        return [_missing(context)], [], None, ""
    findings = tokens.check(context)
    if context.missing:
        return [*findings, _missing(context)], [], None, ""
    if shows == "top entries":
        judged = entries.judge(context)
        lacking = entries.missing(context)
        more = [] if lacking is None else [lacking]
        return [*findings, *judged.findings, *more], list(judged.statistics), judged.smallest, ""
    if shows != "logits":
        free, _ = tokens.every_free(context)
        parts = [steps for steps in free if len(steps)]
        smallest = tokens.smallest_caught(context, tokens.join(parts, "all tokens")) if parts else None
        return findings, [], smallest, ""
    judged = logits.judge(context)
    rounded, along = effective.judge(context, judged.statistics)
    found = [*judged.statistics, *along]
    seems = effective.effective_precision(context, found, rounded)
    failed = any(not finding.status.ok for finding in judged.findings)
    told = effective.finding(context, seems, failed)
    return [*findings, *judged.findings, *rounded, *told], found, judged.smallest, seems


def _nothing(context: Context) -> Finding:
    return Finding(
        status=Status.UNMEASURED,
        check="passes",
        question=context.question,
        message="nothing was shown, so nothing was compared",
        fix="Give the suite a run with a view that the candidate can show",
    )


def _missing(context: Context) -> Finding:
    return Finding(
        status=Status.UNMEASURED,
        check="logits",
        question=context.question,
        message=context.missing,
        fix="Record the golden with a floor for this precision, or name the reference with --reference",
    )


def _unknown_quantiser(context: Context, findings: list[Finding]) -> Comparison:
    """An unknown quantiser is no round-off: it is judged by how far it moves the distributions, and by no more."""
    findings = [*findings, *quantiser.judge(context)]
    power = _power(context, None, "everything but the divergence: the quantiser cannot be reproduced")
    return Comparison(
        findings=tuple(findings),
        answers=(Answer(question=context.question, status=_overall(findings), power=power),),
        passes=_summaries(context),
    )


def _overall(findings: Sequence[Finding]) -> Status:
    return overall([finding.status for finding in findings])


def _of(question: Question, finding: Finding) -> Finding:
    return replace(finding, question=question)


def _power(context: Context, smallest: float | None, *more: str) -> Power:
    golden, trace = context.golden, context.trace
    unmeasured = [context.missing] if context.missing else []
    unmeasured += more
    shows = tokens.level(context)
    if shows == "tokens":
        unmeasured.append("logits: the candidate shows tokens alone")
    if shows == "top entries":
        unmeasured.append("logits but for the highest few of each step, and the prompt's own positions")
    _, behind = tokens.every_free(context)
    if behind:
        reason = context.scoring.reason or "the live reference was not asked"
        unmeasured.append(f"{behind} free tokens behind a first divergence: {reason}")
    if trace.prompt_ids is None:
        unmeasured.append("the candidate's tokenizer: it brings none, and runs on the golden's prompt ids")
    unmeasured += trace.limits
    for name, value in trace.settings.items():
        if value == NOT_USED and name in trace.declared:
            unmeasured.append(f"the setting {name}: no view made use of it")
    rows = [one.rows for one in trace.passes if one.rows is not None]
    covered = {index for one in trace.passes for index in one.requests}
    shown = np.isin(golden.rows.request[golden.rows.generated], sorted(covered))
    return Power(
        precision=context.precision,
        level=shows,
        positions=sum(len(one) for one in rows),
        steps=int(shown.sum()),
        decidable=int((context.decidable & shown).sum()),
        smallest=smallest,
        unmeasured=tuple(unmeasured),
    )


def _unseen(context: Context, asked: Sequence[Run], views: tuple[View, ...] | None) -> Iterator[str]:
    """What logits were asked for and not shown, where the engine does not say so itself."""
    if tokens.level(context) != "logits":
        return
    wanted = {view for run in asked for view in run.views if views is None or view in views}
    lacking = wanted - {one.view for one in context.trace.passes}
    decode, said = wanted - {"prefill"}, " ".join(context.trace.limits)
    if decode and decode <= lacking and "the decode path" not in said:
        yield "the decode path: the candidate shows whole sequences alone"
    if "prefill" in lacking:
        yield "the prompt's own positions: the candidate shows the decode path alone"


def _summaries(context: Context) -> tuple[PassSummary, ...]:
    return tuple(
        PassSummary(
            question=context.question,
            run=one.run,
            view=one.view,
            repeat=one.repeat,
            ratio=logits.pooled_ratio(context, one),
            limit=logits.pooled_limit(context, one),
            flips=tokens.flips(context, one),
            steps=tokens.count(context, one),
            seconds=one.seconds,
        )
        for one in context.trace.passes
    )

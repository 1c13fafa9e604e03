"""Golden + Trace -> Findings: structure first, then tokens and logits, each against a measured floor."""

from __future__ import annotations

from harness.compare import logits, structure, tokens
from harness.compare.context import Comparison, compare_context
from harness.values import Finding, Golden, PassSummary, Power, Trace

__all__ = ["Comparison", "compare"]


def compare(golden: Golden, trace: Trace) -> Comparison:
    """All findings of one trace against one golden, with what the comparison could have seen.

    Where the structure is wrong nothing numeric is compared: the numbers would be of another question.
    """
    findings: list[Finding] = structure.check(golden, trace)
    if any(not finding.status.ok for finding in findings):
        return Comparison(findings=tuple(findings), power=None, passes=())
    context = compare_context(golden, trace)
    findings += tokens.check(context) + logits.check(context)
    return Comparison(findings=tuple(findings), power=_power(context), passes=_summaries(context))


def _power(context: logits.Context) -> Power:
    golden, floor = context.golden, context.floor
    unmeasured = list(logits.unmeasured(context)) + tokens.unmeasured(context)
    rows = [one.rows for one in context.trace.passes if one.rows is not None]
    return Power(
        precision=context.precision,
        positions=sum(len(one) for one in rows),
        steps=int(golden.rows.generated.sum()) if rows else 0,
        decidable=int(context.decidable.sum()) if rows else 0,
        smallest=None if floor is None or not rows else logits.smallest_seen(context),
        unmeasured=tuple(unmeasured),
    )


def _summaries(context: logits.Context) -> tuple[PassSummary, ...]:
    return tuple(
        PassSummary(
            run=one.run,
            view=one.view,
            repeat=one.repeat,
            ratio=logits.pooled_ratio(context, one),
            flips=tokens.flips(context, one),
            steps=tokens.steps(context, one),
            seconds=one.seconds,
        )
        for one in context.trace.passes
    )

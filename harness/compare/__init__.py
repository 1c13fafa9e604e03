"""Golden + Trace -> Findings: structure first, then tokens and logits, each against a measured floor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.compare import logits, structure, tokens
from harness.compare.context import Comparison, Context, compare_context
from harness.values import NOT_USED, Finding, Golden, PassSummary, Power, Run, Trace

__all__ = ["Comparison", "compare"]


def compare(golden: Golden, trace: Trace, runs: Sequence[Run] | None = None) -> Comparison:
    """All findings of one trace against one golden, with what the comparison could have seen.

    ``runs`` are what the candidate was asked to do, the suite's own by default. Where the structure is wrong
    nothing numeric is compared: the numbers would be of another question.
    """
    findings: list[Finding] = structure.check(golden, trace, runs)
    if any(not finding.status.ok for finding in findings):
        return Comparison(findings=tuple(findings), power=None, passes=())
    context = compare_context(golden, trace)
    findings += tokens.check(context) + logits.check(context)
    return Comparison(findings=tuple(findings), power=_power(context), passes=_summaries(context))


def _power(context: Context) -> Power:
    golden, floor = context.golden, context.floor
    unmeasured = list(logits.unmeasured(context)) + tokens.unmeasured(context)
    if context.trace.prompt_ids is None:
        unmeasured.append("the candidate's tokenizer: it brings none, and runs on the golden's prompt ids")
    for name, value in context.trace.settings.items():
        if value == NOT_USED and name in context.trace.declared:
            unmeasured.append(f"the setting {name}: no view made use of it")
    rows = [one.rows for one in context.trace.passes if one.rows is not None]
    covered = {index for one in context.trace.passes if one.rows is not None for index in one.requests}
    shown = np.isin(golden.rows.request[golden.rows.generated], sorted(covered))
    return Power(
        precision=context.precision,
        positions=sum(len(one) for one in rows),
        steps=int(shown.sum()),
        decidable=int((context.decidable & shown).sum()),
        smallest=None
        if floor is None or not rows
        else min(filter(None, (logits.pooled_limit(context, one) for one in context.trace.passes))),
        unmeasured=tuple(unmeasured),
    )


def _summaries(context: Context) -> tuple[PassSummary, ...]:
    return tuple(
        PassSummary(
            run=one.run,
            view=one.view,
            repeat=one.repeat,
            ratio=logits.pooled_ratio(context, one),
            limit=logits.pooled_limit(context, one),
            flips=tokens.flips(context, one),
            steps=tokens.steps(context, one),
            seconds=one.seconds,
        )
        for one in context.trace.passes
    )

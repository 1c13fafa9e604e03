"""Tokens alone, each on the candidate's own prefix as the reference scored it -> findings (numerics.md 2.6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harness.comparison import structure, tokens
from harness.comparison.context import Comparison, compare_context
from harness.values import Answer, Golden, Pass, PassSummary, Power, Run, Trace, overall


def verify(asked: Golden, scored: Golden, trace: Trace, runs: Sequence[Run], *, missing: Sequence[str]) -> Comparison:
    """What the candidate's own continuations say.

    Args:
        asked: the prompts that the candidate was given, of which no continuation is known.
        scored: as a golden whose continuations are the candidate's own, each once, with the reference's rows on them
            and the round-off of the candidate's precision as its floor.
        trace: what the candidate showed.
        runs: what it was asked to do.
        missing: what cannot be said, in words.
    """
    findings = structure.check(asked, trace, runs, views=("generate",))
    if any(not finding.status.ok for finding in findings):
        return Comparison(findings=tuple(findings))
    passes = [one for one in trace.passes if one.view == "generate"]
    own = Pass(
        run="free", view="generate", requests=tuple(range(len(scored.requests))), generations=scored.generations,
        seconds=sum(one.seconds for one in passes),
    )  # fmt: skip
    context = compare_context(scored, replace(trace, passes=(own,)))
    steps = tokens.own_steps(context, "free tokens")
    findings += tokens.judge_own(context, steps, len(passes))
    decidable = int((steps.margin > context.tie * steps.noise).sum()) if context.floor is not None else 0
    power = Power(
        precision=context.precision,
        level="tokens",
        positions=0,
        steps=len(steps),
        decidable=decidable,
        smallest=tokens.smallest_caught(context, steps) if context.floor is not None else None,
        unmeasured=("logits: the candidate shows tokens alone", *trace.limits, *missing),
    )
    status = overall([finding.status for finding in findings])
    summary = PassSummary(
        question=context.question, run=own.run, view=own.view, repeat=0, ratio=None, limit=None,
        flips=int(steps.flipped.sum()), steps=len(steps), seconds=own.seconds,
    )  # fmt: skip
    answer = Answer(question=context.question, status=status, power=power)
    return Comparison(findings=tuple(findings), answers=(answer,), passes=(summary,))

"""Top entries: the middle road for engines that show a few log-probabilities a step and no more (numerics.md 2.6)."""

from __future__ import annotations

import numpy as np

from harness.comparison import logits, tokens
from harness.comparison.context import Context
from harness.comparison.logits import Judged
from harness.numerics import bounds, statistics
from harness.numerics.constants import ALPHA_POOLED, MAX_SMALLEST
from harness.values import Finding, Status


def judge(context: Context) -> Judged:
    """Error among the reference's best entries, each step on its own prefix, against that of the replicas."""
    free, _ = tokens.every_free(context)
    parts = [steps for steps in free if len(steps)]
    if context.floor is None or context.norms is None or not parts:
        return Judged(findings=(), statistics=(), smallest=None)
    entry = np.concatenate([steps.entry for steps in parts])
    entry = entry[~np.isnan(entry)]
    if not len(entry):
        return Judged(findings=(), statistics=(), smallest=None)
    shown = np.zeros((len(context.golden.requests), 2), dtype=np.int64)
    for steps in parts:
        shown[np.unique(steps.request), 1] += 1
    unit = statistics.unit_of("all", [shown])
    replicas = statistics.tokens(context.floor.moments, context.norms, unit)
    with np.errstate(divide="ignore"):
        values = {
            statistics.TOP: 0.5 * float(np.log(np.mean(entry**2))),
            statistics.TOP_WORST: float(np.log(entry.max())),
        }
    found, smallest = [], None
    for name, value in values.items():
        spread = bounds.spread_of(replicas[name], context.floor.effective, context.scatter_of(name))
        kind = bounds.magnitude_bound if name == statistics.TOP else bounds.maximum_bound
        bound = kind(replicas[name], spread, alpha=ALPHA_POOLED, tests=len(values), precision=context.precision)
        found.append(logits.statistic(context, name, unit.name, value, bound))
        if name == statistics.TOP:
            smallest = bounds.smallest_caught(bound)
    findings = [finding for one in found if (finding := logits.finding_of(context, one)) is not None]
    if smallest is not None and smallest > MAX_SMALLEST and not findings:
        findings.append(logits.too_little(context, smallest))
    return Judged(findings=tuple(findings), statistics=tuple(found), smallest=smallest)


def missing(context: Context) -> Finding | None:
    """A finding where top entries were promised, and some steps do not show them."""
    free, _ = tokens.every_free(context)
    without = sum(int(np.isnan(steps.entry).sum()) for steps in free)
    if not without:
        return None
    return Finding(
        status=Status.UNMEASURED,
        check="top entries",
        question=context.question,
        message=f"{without} steps do not show their top entries",
        fix="Ask for as many log-probabilities at each step",
    )

"""Weights from a quantiser that cannot be reproduced: held against plain round-to-nearest (numerics.md 2.7)."""

from __future__ import annotations

import numpy as np

from harness.comparison.context import Context
from harness.numerics import metrics
from harness.numerics.constants import QUANTISER_BEST, QUANTISER_WORST
from harness.values import Finding, Status


def is_declared(context: Context) -> bool:
    """Whether the candidate says that its weights come out of an unknown quantiser."""
    return bool(context.trace.settings.get("quantised"))


def judge(context: Context) -> list[Finding]:
    """The divergence of the candidate against that of round-to-nearest at the same bits a group."""
    declared, nearest = context.trace.settings.get("quantised"), context.scoring.nearest
    if context.question == "function" and context.scoring.nearest_wide is not None:
        nearest = context.scoring.nearest_wide
    shown = [one for one in context.trace.passes if one.rows is not None]
    if nearest is None or not shown:
        reason = "it shows no logits" if not shown else context.scoring.reason or "no live reference"
        return [
            Finding(
                status=Status.UNMEASURED,
                check="quantiser",
                question=context.question,
                message=f"weights of an unknown quantiser ({declared}) were not judged: {reason}",
                fix="Name the reference with --reference, and let the engine show logits",
            )
        ]
    rows = context.golden.rows
    usual = np.full(len(rows), np.nan)
    usual[nearest.generated] = metrics.coarse_divergence(rows, nearest, np.arange(len(rows)))
    found = []
    for one in shown:
        assert one.rows is not None
        place = context.place(one.rows)
        value = float(metrics.coarse_divergence(rows, one.rows, place).mean())
        allowed = float(usual[place[one.rows.generated]].mean())
        ratio = value / allowed if allowed else float("inf")
        if QUANTISER_BEST <= ratio <= QUANTISER_WORST:
            continue
        found.append(
            Finding(
                status=Status.DEVIATES,
                check="quantiser",
                question=context.question,
                message=f"the divergence from the reference is {ratio:.2g} x that of round-to-nearest at {declared}"
                + (": the weights are not quantised as declared" if ratio < QUANTISER_BEST else ""),
                where=f"{one.run}/{one.view}",
                measured=ratio,
                allowed=QUANTISER_WORST if ratio > QUANTISER_BEST else QUANTISER_BEST,
                why=f"a quantiser worth its name gives {QUANTISER_BEST:g} to {QUANTISER_WORST:g} x what plain "
                "round-to-nearest gives, measured on the same positions",
                fix="Compare the dequantised weights with the checkpoint's, layer by layer",
            )
        )
    return found

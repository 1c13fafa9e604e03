"""Logits: error in units of the reference's own round-off, pooled, by prompt and by position (numerics.md 2.4, 2.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from harness.compare.context import Context, pass_name, request_name
from harness.numerics import bounds, metrics
from harness.numerics.constants import ALPHA_GROUPS, ALPHA_POOLED, BUCKETS
from harness.values import Finding, Floor, Pass, Status


def check(context: Context) -> list[Finding]:
    """Judge the size of the error of every pass that shows logits."""
    shown = [one for one in context.trace.passes if one.rows is not None]
    missing = unmeasured(context)
    if missing:
        return [
            Finding(
                status=Status.UNMEASURED,
                check="logits",
                message=reason,
                fix="Record the golden with a floor for this precision, or let the engine show logits",
            )
            for reason in missing
        ]
    assert context.floor is not None
    return [finding for one in shown for finding in _one_pass(context, context.floor, one, len(shown))]


def unmeasured(context: Context) -> tuple[str, ...]:
    """Why no error can be judged at all, in words; empty where it can."""
    if not any(one.rows is not None and len(one.rows) for one in context.trace.passes):
        return ("the candidate shows no logits, and no scorer was asked about its tokens",)
    if context.floor is None:
        known = ", ".join(context.golden.floors) or "none"
        left_out = context.golden.provenance.get("left_out") or {}
        reason = f": {left_out[context.precision]}" if context.precision in left_out else ""
        return (f"the golden has no floor for {context.precision}{reason} (floors: {known})",)
    return ()


def _ratios(context: Context, floor: Floor, one: Pass) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Error of each row in units of its round-off [n], and the row's place in the golden [n]."""
    assert one.rows is not None
    place = context.place(one.rows)
    norm = metrics.error_norm(one.rows.projections, context.centre.projections[place])
    return norm / np.maximum(floor.sigma[place], np.finfo(np.float32).tiny), place


def pooled_ratio(context: Context, one: Pass) -> float | None:
    """Root mean square error of a pass in units of round-off, None where there is no floor or no logits."""
    if context.floor is None or one.rows is None or not len(one.rows):
        return None
    ratios, _ = _ratios(context, context.floor, one)
    return float(np.sqrt(np.mean(ratios**2)))


def _one_pass(context: Context, floor: Floor, one: Pass, passes: int) -> Iterator[Finding]:
    ratios, place = _ratios(context, floor, one)
    if not len(ratios):
        return
    pooled = 0.5 * math.log(max(float(np.mean(ratios**2)), np.finfo(np.float64).tiny))
    bound = _pooled_bound(context, floor, one, passes)
    found = _judge(context, one, "logits", "all positions", pooled, bound)
    if found is not None:
        yield found
    yield from _groups(context, floor, one, ratios, place, passes)


def _groups(
    context: Context,
    floor: Floor,
    one: Pass,
    ratios: NDArray[np.float64],
    place: NDArray[np.int64],
    passes: int,
) -> Iterator[Finding]:
    """The worst prompt, the worst single position and the worst position bucket, each against its replicas."""
    rows = context.golden.rows
    prompts = len(context.golden.requests)
    tests = passes * (2 * prompts + BUCKETS)
    buckets = metrics.position_buckets(rows.position)
    families = [
        ("logits of a prompt", metrics.log_rms(ratios, rows.request[place], prompts), floor.log_rms, _prompt_place),
        ("one position", metrics.log_max(ratios, rows.request[place], prompts), floor.log_max, _prompt_place),
    ]
    if len(one.requests) == prompts:
        # The replicas' buckets are over all prompts: a pass that covers a few has no such null.
        by_bucket = metrics.log_rms(ratios, buckets[place], BUCKETS)
        families.append(("a range of positions", by_bucket, floor.log_rms_bucket, _bucket_place))
    for check_name, values, replicas, describe in families:
        findings = []
        # -inf marks a unit without rows or without any error; NaN must not be skipped with it.
        for unit in np.flatnonzero(~np.isneginf(values)):
            bound = bounds.replica_bound(
                replicas[:, unit].astype(np.float64),
                effective=floor.effective,
                precision=context.precision,
                alpha=ALPHA_GROUPS,
                tests=tests,
            )
            where = describe(context, int(unit))
            findings.append(_judge(context, one, check_name, where, float(values[unit]), bound))
        flagged = [finding for finding in findings if finding is not None]
        if flagged:
            yield _worst(flagged)


def _worst(findings: list[Finding]) -> Finding:
    """The finding furthest beyond its bound, with the number of others beside it."""
    worst = max(findings, key=lambda found: (not found.status.ok, (found.measured or 0) / (found.allowed or 1)))
    others = sum(found.status == worst.status for found in findings) - 1
    if not others:
        return worst
    return replace(worst, message=f"{worst.message} (and {others} more like it)")


def _prompt_place(context: Context, unit: int) -> str:
    return f"prompt {request_name(context.golden, unit)!r}"


def _bucket_place(context: Context, unit: int) -> str:
    position = context.golden.rows.position
    inside = position[metrics.position_buckets(position) == unit]
    return f"positions {inside.min()} to {inside.max()}"


def _judge(
    context: Context, one: Pass, check_name: str, place: str, value: float, bound: bounds.Bound
) -> Finding | None:
    """None within the bound; `drift` beyond chance; `deviates` beyond chance and beyond the effect size."""
    if value <= bound.significant:
        return None
    failed = not value <= bound.failing
    return Finding(
        status=Status.DEVIATES if failed else Status.DRIFT,
        check=check_name,
        message=f"the error is {math.exp(value):.3g} x the reference's own round-off in "
        f"{context.precision}" + ("" if failed else ", more than chance but too little to be called a bug"),
        where=f"{pass_name(one)}, {place}",
        measured=math.exp(value),
        allowed=math.exp(bound.failing),
        why=bound.why,
        fix="Compare module by module, first in float32" if failed else "",
    )


def pooled_limit(context: Context, one: Pass) -> float | None:
    """Root mean square error from which this pass fails, in units of round-off; None as for `pooled_ratio`."""
    if context.floor is None or one.rows is None or not len(one.rows):
        return None
    shown = sum(other.rows is not None for other in context.trace.passes)
    return math.exp(_pooled_bound(context, context.floor, one, shown).failing)


def _pooled_replicas(context: Context, floor: Floor, one: Pass) -> NDArray[np.float64]:
    """S1 of each replica over the prompts of a pass, [K]."""
    chosen = list(one.requests)
    rows_of_prompt = np.bincount(context.golden.rows.request, minlength=len(context.golden.requests))
    return metrics.pooled(floor.log_rms[:, chosen].astype(np.float64), rows_of_prompt[chosen])


def _pooled_bound(context: Context, floor: Floor, one: Pass, passes: int) -> bounds.Bound:
    return bounds.replica_bound(
        _pooled_replicas(context, floor, one),
        effective=floor.effective,
        precision=context.precision,
        alpha=ALPHA_POOLED,
        tests=passes,
    )

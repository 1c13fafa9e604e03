"""Logits: errors in units of the reference's own round-off, pooled and by group (numerics.md 2.4, 2.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from harness.comparison.context import Context, pass_name, request_name
from harness.numerics import bounds, metrics, statistics
from harness.numerics.bounds import Bound
from harness.numerics.constants import ALPHA_GROUPS, ALPHA_POOLED, BUCKETS, MAX_SMALLEST
from harness.numerics.moments import measure, norms_of, scale_of
from harness.numerics.statistics import Unit
from harness.values import Finding, Floor, Moments, Pass, Rows, Statistic, Status

Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What the logits say: the statistics, what follows from them, and the smallest error they would have caught."""

    findings: tuple[Finding, ...]
    statistics: tuple[Statistic, ...]
    smallest: float | None


def judge(context: Context) -> Judged:
    """Hold every statistic of a trace against the replicas."""
    shown = context.measured
    if not shown or context.floor is None:
        return Judged(findings=(), statistics=(), smallest=None)
    pooled, smallest = _pooled(context, context.floor, shown)
    groups = list(_groups(context, context.floor, shown))
    found = [*pooled, *groups]
    findings = [finding for one in found if (finding := finding_of(context, one)) is not None]
    if smallest > MAX_SMALLEST and all(finding.status.ok for finding in findings):
        findings.append(too_little(context, smallest))
    return Judged(findings=tuple(findings), statistics=tuple(found), smallest=smallest)


def too_little(context: Context, smallest: float) -> Finding:
    """The finding that a comparison could not have seen even a gross error."""
    return Finding(
        status=Status.UNMEASURED,
        check="power",
        question=context.question,
        message=f"an error of {smallest:.3g} x round-off would have passed: too little was compared",
        measured=smallest,
        allowed=MAX_SMALLEST,
        why="the smallest error of a bug that fails with a probability of 99 %",
        fix="Check more or longer prompts, or record the golden with more replicas",
    )


def shown_by(context: Context, one: Pass) -> NDArray[np.int64]:
    """Which (prompt, prompt or generated) rows a pass shows, [P, 2]: a replay shows generated rows alone."""
    shown = np.zeros((len(context.golden.requests), 2), dtype=np.int64)
    shown[list(one.requests), 1] = 1
    if one.view == "prefill":
        shown[list(one.requests), 0] = 1
    return shown


def unit_of(context: Context, passes: Sequence[Pass], name: str) -> Unit:
    """The rows of some passes as one unit."""
    return statistics.unit_of(name, [shown_by(context, one) for one in passes])


def candidate_moments(context: Context, shown: Sequence[tuple[Pass, Moments]], unit: Unit) -> Moments:
    """The candidate's passes averaged into one."""
    return statistics.averaged([part for _, part in shown], [shown_by(context, one) for one, _ in shown], unit)


# --- the pooled unit -----------------------------------------------------------------------------


def _pooled(context: Context, floor: Floor, shown: Sequence[tuple[Pass, Moments]]) -> tuple[list[Statistic], float]:
    """All passes together: one value of each statistic, each with its share of half the false-alarm rate."""
    unit = unit_of(context, [one for one, _ in shown], "all")
    replicas, values = _both(context, floor, shown, unit)
    limits = _bounds(context, floor, replicas, ALPHA_POOLED, len(values))
    smallest = bounds.smallest_caught(limits[statistics.ERROR]) if statistics.ERROR in limits else math.inf
    return [statistic(context, name, unit.name, value, limits[name]) for name, value in values.items()], smallest


def pooled_under(context: Context, precision: str, centre: Rows) -> list[Statistic]:
    """The pooled statistics if the candidate had declared another precision, about ``centre``."""
    golden = context.golden
    floor = golden.floors[precision]
    scale = scale_of(centre, floor.sigma, floor.pair, [], len(golden.requests), golden.vocabulary)
    rows = [(one, one.rows) for one in context.trace.passes if one.rows is not None]
    other = replace(context, precision=precision, floor=floor, centre=centre, scale=scale, norms=norms_of(scale))
    return _pooled(other, floor, [(one, measure(shown, scale, other.place(shown))) for one, shown in rows])[0]


def _both(
    context: Context, floor: Floor, shown: Sequence[tuple[Pass, Moments]], unit: Unit
) -> tuple[dict[str, Float64], dict[str, float]]:
    """Every statistic of a unit: of the replicas [K], and of the candidate."""
    assert context.norms is not None
    replicas = statistics.logits(floor.moments, context.norms, unit)
    values = statistics.logits(candidate_moments(context, shown, unit), context.norms, unit)
    return replicas, {name: float(value) for name, value in values.items()}


def _bounds(
    context: Context, floor: Floor, replicas: Mapping[str, Float64], alpha: float, tests: int
) -> dict[str, Bound]:
    found = {}
    for name, column in replicas.items():
        spread = bounds.spread_of(column, floor.effective, context.scatter_of(name))
        if name in statistics.SIGNED:
            found[name] = bounds.signed_bound(column, spread, alpha=alpha, tests=tests)
        else:
            found[name] = bounds.magnitude_bound(
                column, spread, alpha=alpha, tests=tests, precision=context.precision, hull=name == statistics.SHIFT
            )
    return found


def pooled_limit(context: Context, one: Pass) -> float | None:
    """Root mean square error from which this pass alone fails, in units of round-off; None as for `pooled_ratio`."""
    found = _one_error(context, one)
    return None if found is None else bounds.exponential(found[1].failing[1])


def pooled_ratio(context: Context, one: Pass) -> float | None:
    """Root mean square error of a pass in units of round-off, None where there is no floor or no logits."""
    found = _one_error(context, one)
    return None if found is None else bounds.exponential(found[0])


def _one_error(context: Context, one: Pass) -> tuple[float, Bound] | None:
    part = next((moments for other, moments in context.measured if other is one), None)
    if part is None or context.floor is None:
        return None
    unit = unit_of(context, [one], pass_name(one))
    replicas, values = _both(context, context.floor, [(one, part)], unit)
    if statistics.ERROR not in values:
        return None
    limits = _bounds(context, context.floor, replicas, ALPHA_GROUPS, _tests(context))
    return values[statistics.ERROR], limits[statistics.ERROR]


# --- groups --------------------------------------------------------------------------------------


def _tests(context: Context) -> int:
    """Tests that share a quarter of the rate: statistics of each pass, its prompts, its ranges of positions."""
    shown = [one for one, _ in context.measured]
    whole = [one for one in shown if len(one.requests) == len(context.golden.requests)]
    by_pass = len(shown) * (
        1 + len(statistics.SIGNED) + len(statistics.MAGNITUDES & {statistics.ERROR, statistics.SHIFT})
    )
    return by_pass + sum(len(one.requests) for one in shown) + BUCKETS * len(whole)


def _groups(context: Context, floor: Floor, shown: Sequence[tuple[Pass, Moments]]) -> Iterator[Statistic]:
    """Every pass by itself: its statistics, its worst position, its prompts, its ranges of positions.

    Holm's correction, which the note asks for, differs from Bonferroni's only after a first rejection, and one
    rejection decides a verdict.
    """
    assert context.norms is not None
    tests = _tests(context)
    for one, part in shown:
        unit = unit_of(context, [one], pass_name(one))
        replicas, values = _both(context, floor, [(one, part)], unit)
        limits = _bounds(context, floor, replicas, ALPHA_GROUPS, tests)
        yield from (statistic(context, name, unit.name, value, limits[name]) for name, value in values.items())
        yield _worst_position(context, floor, part, unit, tests)
        of_prompts = statistics.by_prompt(floor.moments, context.norms, unit)
        by_prompt = statistics.by_prompt(part, context.norms, unit)
        names = [f"{unit.name}, prompt {request_name(context.golden, i)!r}" for i in range(len(by_prompt))]
        yield from _family(context, floor, statistics.PROMPT, of_prompts, by_prompt, names, tests)
        if len(one.requests) == len(context.golden.requests):
            of_buckets = statistics.by_bucket(floor.moments, context.norms, unit)
            by_bucket = statistics.by_bucket(part, context.norms, unit)
            names = [f"{unit.name}, {_bucket_name(context, i)}" for i in range(len(by_bucket))]
            yield from _family(context, floor, statistics.RANGE, of_buckets, by_bucket, names, tests)


def _worst_position(context: Context, floor: Floor, part: Moments, unit: Unit, tests: int) -> Statistic:
    replicas = statistics.worst(floor.moments, unit)
    spread = bounds.spread_of(replicas, floor.effective, context.scatter_of(statistics.WORST))
    bound = bounds.maximum_bound(replicas, spread, alpha=ALPHA_GROUPS, tests=tests, precision=context.precision)
    return statistic(context, statistics.WORST, unit.name, float(statistics.worst(part, unit)), bound)


def _family(
    context: Context,
    floor: Floor,
    kind: str,
    replicas: Float64,
    values: Float64,
    names: Sequence[str],
    tests: int,
) -> Iterator[Statistic]:
    """Log rms of several units of one kind, whose spreads are drawn towards each other."""
    spreads = bounds.moderated(replicas, floor.effective, context.scatter_of(kind))
    for index, spread in enumerate(spreads):
        # -inf marks a unit without rows or without any error; NaN must not be skipped with it.
        if np.isneginf(values[index]):
            continue
        bound = bounds.magnitude_bound(
            replicas[:, index], spread, alpha=ALPHA_GROUPS, tests=tests, precision=context.precision
        )
        yield statistic(context, kind, names[index], float(values[index]), bound)


def _bucket_name(context: Context, bucket: int) -> str:
    position = context.golden.rows.position
    inside = position[metrics.position_buckets(position) == bucket]
    return f"positions {inside.min()} to {inside.max()}" if len(inside) else "no position"


# --- in words --------------------------------------------------------------------------------------


def statistic(context: Context, name: str, unit: str, value: float, bound: Bound) -> Statistic:
    """A value with its bound."""
    return Statistic(
        question=context.question,
        precision=context.precision,
        name=name,
        unit=unit,
        value=value,
        centre=bound.centre,
        own=bound.own,
        spread=bound.spread,
        z=bound.z(value),
        significant=bound.significant,
        failing=bound.failing,
        why=bound.why,
    )


_SIGNED_WORDS = {
    statistics.GAIN: "the logits are scaled",
    statistics.LOGP: "the log-probability of the next token is shifted",
    statistics.ENTROPY: "the entropy is shifted",
    statistics.MARGIN: "the margin between the two best tokens is shifted",
}


def finding_of(context: Context, one: Statistic) -> Finding | None:
    """None within chance; `drift` beyond chance; `deviates` beyond chance and beyond the effect size."""
    # Written so that NaN fails.
    if one.significant[0] <= one.value <= one.significant[1]:
        return None
    failed = not one.failing[0] <= one.value <= one.failing[1]
    signed = one.name in statistics.SIGNED
    if signed:
        message = f"{_SIGNED_WORDS[one.name]} by {one.value:+.3g} of round-off in {context.precision} (z = {one.z:.1f})"
        side = one.failing[1] if one.value > one.centre else one.failing[0]
        measured, allowed = abs(one.value - one.centre), abs(side - one.centre)
    else:
        what = {
            statistics.ERROR: "the error",
            statistics.PROMPT: "the error",
            statistics.RANGE: "the error",
            statistics.WORST: "the error of one position",
            statistics.SHIFT: "a shift that all positions have in common",
        }.get(one.name, f"the {one.name}")
        message = (
            f"{what} is {bounds.exponential(one.value):.3g} x the reference's own round-off in {context.precision}"
        )
        measured, allowed = bounds.exponential(one.value), bounds.exponential(one.failing[1])
    return Finding(
        status=Status.DEVIATES if failed else Status.DRIFT,
        check=one.name,
        question=context.question,
        message=message + ("" if failed else ", more than chance but too little to be called a bug"),
        where="all passes together" if one.unit == "all" else one.unit,
        measured=measured,
        allowed=allowed,
        why=one.why,
        fix="Run `harness locate` on it: it compares module by module, first in float32" if failed else "",
    )

"""Effective precision: which precision a candidate's error looks like, whatever it declares (numerics.md 2.7)."""

from __future__ import annotations

from collections.abc import Sequence

from harness.comparison import logits
from harness.comparison.context import Context
from harness.numerics import bounds, statistics
from harness.numerics.constants import ALPHA_DIRECTIONS, CATCH, COEFFICIENT, EXPLAINED
from harness.values import Finding, Rows, Statistic, Status


def judge(context: Context, pooled: Sequence[Statistic]) -> tuple[list[Finding], list[Statistic]]:
    """A finding for each direction that the error lies along: weights that were rounded, and not declared so.

    ``pooled`` holds the statistic of the whole error. Any large error has a part along any direction; one that is
    named must also explain what the error has beyond round-off.
    """
    error = next((one for one in pooled if one.name == statistics.ERROR and one.unit == "all"), None)
    shown = context.measured
    if not shown or not context.directions or context.floor is None or context.norms is None:
        return [], []
    unit = logits.unit_of(context, [one for one, _ in shown], "all")
    replicas, _ = statistics.directions(context.floor.moments, context.norms, unit)
    shares, coefficients = statistics.directions(logits.candidate_moments(context, shown, unit), context.norms, unit)
    findings, found = [], []
    declared = context.trace.settings.get("weights")
    for index, name in enumerate(context.directions):
        if name == declared:
            continue
        column = replicas[:, index]
        spread = bounds.spread_of(column, context.floor.effective, context.scatter_of(f"direction {name}"))
        bound = bounds.signed_bound(column, spread, alpha=ALPHA_DIRECTIONS, tests=len(context.directions))
        one = logits.statistic(context, f"direction {name}", unit.name, float(shares[index]), bound)
        found.append(one)
        low, high = COEFFICIENT
        likely = one.value > one.failing[1] and low <= coefficients[index] <= high
        if likely and error is not None and _explains(one.value, error):
            findings.append(_rounded(context, one, name, float(coefficients[index])))
    return findings, found


def _explains(share: float, error: Statistic) -> bool:
    """Whether the part along a direction accounts for what the error has beyond round-off."""
    usual = error.centre + bounds.normal_quantile(CATCH) * error.spread
    excess = bounds.exponential(2 * error.value) - bounds.exponential(2 * usual)
    return share**2 >= EXPLAINED * excess


def _rounded(context: Context, one: Statistic, name: str, coefficient: float) -> Finding:
    return Finding(
        status=Status.DEVIATES,
        check="weights",
        question=context.question,
        message=f"the error is what {name} weights give (coefficient {coefficient:.2f}, z = {one.z:.1f}), "
        f"and the candidate does not declare them",
        where="all passes together",
        measured=one.value - one.centre,
        allowed=one.failing[1] - one.centre,
        why=one.why,
        fix=f"Declare it (hf:weights={name}), or load the weights as they are",
    )


def effective_precision(context: Context, found: Sequence[Statistic], rounded: Sequence[Finding]) -> str:
    """What the error looks like, in words; empty where it is what was declared, or nothing can be said.

    Nothing is said while the error is of the size that the declared precision gives. Otherwise the candidate is held
    against the floor of every other precision, with the weights as declared or as the checkpoint has them: one
    under which nothing pooled fails, on either side, is what it computes in.
    """
    error = next((one for one in found if one.name == statistics.ERROR and one.unit == "all"), None)
    if rounded:
        return f"{context.precision} on {_scheme(rounded[0])} weights"
    if error is None or not _unlike(error):
        return ""
    others = [name for name in context.golden.floors if name != context.precision and "/" not in name]
    for name in others:
        for centre in (context.centre, context.golden.rows):
            if _fits(context, name, centre):
                return name
    return ""


def _scheme(finding: Finding) -> str:
    return finding.message.partition("is what ")[2].partition(" ")[0]


def _unlike(error: Statistic) -> bool:
    """Beyond the limits of the declared precision on either side, the effect size included."""
    return error.is_failing or error.value < 2 * error.centre - error.failing[1]


def _fits(context: Context, name: str, centre: Rows) -> bool:
    """Whether the candidate would pass as one that computes in another precision, and is not finer than it."""
    other = logits.pooled_under(context, name, centre)
    error = next((one for one in other if one.name == statistics.ERROR), None)
    return error is not None and not _unlike(error) and not any(one.is_failing for one in other)


def finding(context: Context, effective: str, error_failed: bool) -> list[Finding]:
    """Tell a candidate that computes in another precision than it says; a finer one is no failure."""
    if not effective or " on " in effective:
        return []
    return [
        Finding(
            status=Status.DEVIATES if error_failed else Status.DRIFT,
            check="effective precision",
            question=context.question,
            message=f"declares {context.precision}, and its error is of the size of {effective}'s round-off",
            why="held against the floor of that precision, nothing fails",
            fix="Declare what it computes in" if not error_failed else "Look for a cast on the way",
        )
    ]

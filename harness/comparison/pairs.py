"""Two traces of one golden against each other: how far apart, in units of round-off, and which tokens differ."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import numpy as np

from harness.comparison.context import Context, compare_context
from harness.numerics import metrics
from harness.values import Golden, PairRow, Pass, Rows, Trace


def rows_of(golden: Golden, first: Trace, second: Trace) -> tuple[PairRow, ...]:
    """A line for each pass that both traces hold.

    Args:
        golden: which both were made of; its floors are the unit.
        first: of one candidate.
        second: of the other.
    """
    contexts = compare_context(golden, first), compare_context(golden, second)
    others = {_name(one): one for one in second.passes}
    found = []
    for one in first.passes:
        other = others.get(_name(one))
        if other is not None and one.requests == other.requests:
            found.append(_row(contexts, one, other))
    return tuple(found)


def _name(one: Pass) -> tuple[str, str, int]:
    return one.run, one.view, one.repeat


def _row(contexts: tuple[Context, Context], one: Pass, other: Pass) -> PairRow:
    found = PairRow(run=one.run, view=one.view, repeat=one.repeat)
    if one.rows is None or other.rows is None:
        pairs = list(zip(one.generations, other.generations, strict=True))
        differ = sum(x != y for a, b in pairs for x, y in zip_longest(a.tokens, b.tokens))
        return replace(found, differ=differ, steps=sum(max(len(a.tokens), len(b.tokens)) for a, b in pairs))
    place, generated = contexts[0].place(one.rows), one.rows.generated
    differ = int((one.rows.argmax[generated] != other.rows.argmax[generated]).sum())
    found = replace(found, equal=_equal(one.rows, other.rows), differ=differ, steps=int(generated.sum()))
    floors = [context.floor for context in contexts]
    if floors[0] is None or floors[1] is None:
        return found
    # The coarser precision's round-off is the unit: what two correct candidates are apart is of its size.
    unit = np.maximum(floors[0].sigma[place], floors[1].sigma[place]).astype(np.float64)
    return replace(
        found,
        first=metrics.rms(metrics.error_norm(one.rows.projections, contexts[0].centre.projections[place]) / unit),
        second=metrics.rms(metrics.error_norm(other.rows.projections, contexts[1].centre.projections[place]) / unit),
        apart=metrics.rms(metrics.error_norm(one.rows.projections, other.rows.projections) / unit),
    )


def _equal(one: Rows, other: Rows) -> float:
    same = (one.projections == other.projections).all(axis=1) & (one.logsumexp == other.logsumexp)
    return float(np.mean(same)) if len(same) else 1.0

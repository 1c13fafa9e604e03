"""A tensor-parallel candidate against the reference with the same partial sums (numerics.md 2.3).

What is left beside round-off's usual size is the candidate's own code. It is told and not judged: another library's
ranks may sum in another order, and be as right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.comparison.context import compare_context
from harness.numerics import metrics
from harness.values import Golden, Pass, Sharding, Trace


def measure(golden: Golden, trace: Trace, emulated: Sequence[Pass]) -> Sharding:
    """How far a candidate is from the reference as it is, and from it with the sums of as many ranks.

    Args:
        golden: what is believed.
        trace: what the candidate did.
        emulated: passes of the reference with those sums; the candidate's of the same run and view are compared.
    """
    ranks = int(trace.settings["tensor_parallel"])
    context = compare_context(golden, trace)
    by_name = {(one.run, one.view): one for one in emulated}
    plain, other, equal = [], [], []
    for one in trace.passes:
        like = by_name.get((one.run, one.view))
        if one.rows is None or like is None or like.rows is None or context.floor is None:
            continue
        place = context.place(one.rows)
        unit = context.floor.sigma[place].astype(np.float64)
        plain.append(metrics.error_norm(one.rows.projections, context.centre.projections[place]) / unit)
        other.append(metrics.error_norm(one.rows.projections, like.rows.projections) / unit)
        same = (one.rows.projections == like.rows.projections).all(axis=1) & (one.rows.argmax == like.rows.argmax)
        equal.append(same & (one.rows.logsumexp == like.rows.logsumexp))
    if not plain:
        return Sharding(ranks=ranks)
    return Sharding(
        ranks=ranks,
        plain=metrics.rms(np.concatenate(plain)),
        emulated=metrics.rms(np.concatenate(other)),
        equal=float(np.mean(np.concatenate(equal))),
    )

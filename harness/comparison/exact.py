"""A golden without floors (a foreign reference): only an exact repeat can pass, whatever else is `unmeasured`.

How much round-off is harmless was never measured, so no difference can be called drift, and none a bug.
"""

from __future__ import annotations

import numpy as np

from harness.comparison.context import Context, pass_name, request_name
from harness.values import Finding, Pass, Status, first_difference

#: What a golden holds of each row, and of each generated row.
_OF_ROWS = ("argmax", "logsumexp", "logp", "entropy", "projections")
_OF_STEPS = ("top_ids", "top_logits")


def applies(context: Context) -> bool:
    """Whether the golden has no floor at all."""
    return not context.golden.floors


def judge(context: Context) -> list[Finding]:
    """Nothing where every pass repeats the golden to the bit; else one finding, with the first difference.

    Equal tokens alone are no repeat: what they would have let pass is not known without a floor.
    """
    if all(one.rows is None for one in context.trace.passes):
        return [
            Finding(
                status=Status.UNMEASURED,
                check="repeat",
                question=context.question,
                message="the candidate shows no logits, and the golden has no floor to say what its tokens can tell",
                fix="Show logits, or record a golden from a transformers reference of the same weights",
            )
        ]
    differing = [(one, found) for one in context.trace.passes if (found := _differing(context, one))]
    if not differing:
        return []
    one, found = differing[0]
    total = sum(len(places) for _, places in differing)
    request, place = found[0]
    return [
        Finding(
            status=Status.UNMEASURED,
            check="repeat",
            question=context.question,
            message=f"{total} positions or tokens are not the golden's to the bit, and it has no floor to say how much "
            "of that is round-off",
            where=f"{pass_name(one)}, prompt {request_name(context.golden, request)!r}, position {place}",
            why="the golden is of a foreign reference, whose round-off nobody has measured",
            fix="Record a golden from a transformers reference of the same weights; it gets floors",
        )
    ]


def _differing(context: Context, one: Pass) -> list[tuple[int, int]]:
    """(request, position) of what is not as recorded."""
    if one.rows is None:
        return [
            (index, len(context.golden.requests[index].prompt_ids) + step)
            for index, given in zip(one.requests, one.generations, strict=True)
            if (step := first_difference(given.tokens, context.golden.generations[index].tokens)) is not None
        ]
    rows, golden = one.rows, context.golden.rows
    place = context.place(rows)
    same = np.ones(len(rows), dtype=np.bool_)
    for name in _OF_ROWS:
        equal = getattr(rows, name) == getattr(golden, name)[place]
        same &= equal if equal.ndim == 1 else equal.all(axis=1)
    step_of = (np.cumsum(golden.generated) - 1)[place[rows.generated]]
    for name in _OF_STEPS:
        same[rows.generated] &= (getattr(rows, name) == getattr(golden, name)[step_of]).all(axis=1)
    return [(int(rows.request[i]), int(rows.position[i])) for i in np.flatnonzero(~same)]

"""The smallest case in which a candidate fails, from a golden and an opener of the candidate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from harness.repro.cases import Case, Judgement, Kind
from harness.repro.judging import Judge
from harness.repro.roundoff import Allowed
from harness.repro.shrinking import Shrunk, shrink
from harness.repro.starting import Suspect, suspects
from harness.values import Golden

Progress = Callable[[str], None]

#: Positions of a case that are written down: the worst ones say it all.
PLACES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A small failing case, and what is right there; ``allowed`` is None for a failure that no number shows."""

    case: Case
    judgement: Judgement
    allowed: Allowed | None
    tried: int
    finished: bool
    seconds: float


def smallest_failing(
    golden: Golden,
    judge: Judge,
    *,
    dtype: str,
    declared: str,
    kinds: tuple[Kind, ...],
    seconds: float,
    progress: Progress,
) -> Found | None:
    """Look for a failing case and shrink it; None where no single position of a few prompts fails by itself.

    Args:
        golden: whose prompts are where the search begins.
        judge: with the candidate.
        dtype: that it computes in.
        declared: that its weights were loaded in.
        kinds: of the failure that is looked for, in this order.
        seconds: after which the best case so far is taken.
        progress: called with a few words.
    """
    started = time.monotonic()
    until = started + seconds
    progress("looking for a failing prompt")
    for suspect in suspects(golden, judge, dtype=dtype, declared=declared, kinds=kinds):
        progress("the smallest failing case")
        found = _shrunk(judge, suspect, until)
        if found is not None:
            return _written_down(judge, found, time.monotonic() - started)
        if time.monotonic() > until:
            break
    return None


def _written_down(judge: Judge, found: Shrunk, seconds: float) -> Found:
    """With what is right at the worst places, and the limit on these alone."""
    judgement, allowed = found.judgement, None
    judgement = replace(judgement, places=judgement.places[:PLACES])
    if judgement.kind == "logits":
        allowed = judge.ruler.allowed([row.ids for row in found.case.batch.rows], judgement.places)
        judgement = replace(judgement, limit=allowed.limit, why=allowed.why)
    return Found(
        case=found.case,
        judgement=judgement,
        allowed=allowed,
        tried=found.tried,
        finished=found.finished,
        seconds=seconds,
    )


def _shrunk(judge: Judge, suspect: Suspect, until: float) -> Shrunk | None:
    """Shrunk in one open candidate where that is enough, else in one that is opened for each case.

    A candidate that keeps something of an earlier request fails in cases that alone are right: then the earlier
    requests are part of the case.
    """
    case, kind = suspect.case, suspect.kind
    judge.renew()
    first = judge.judge(replace(case, before=()), kind)
    if first is not None:
        found = shrink(replace(case, before=()), first, lambda one: judge.judge(one, kind), until=until)
        judge.renew()
        again = judge.judge(found.case, kind)
        if again is not None:
            return replace(found, judgement=again)
    judge.fresh = True
    try:
        first = judge.judge(case, kind)
        return None if first is None else shrink(case, first, lambda one: judge.judge(one, kind), until=until)
    finally:
        judge.fresh = False

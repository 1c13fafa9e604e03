"""Where a candidate fails on a golden's own work: the cases to begin with, the simplest way of running them first.

What the golden holds is enough to look: the reference itself need not run.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from harness.engines.decoding import plan_batches
from harness.errors import HarnessError
from harness.numerics import metrics
from harness.numerics.sketch import signs
from harness.repro.cases import Batch, Case, Kind, Row
from harness.repro.judging import Judge
from harness.repro.trying import Shown, run_batch
from harness.values import Floor, Golden, Rows

#: Ways of running all prompts: alone or together, in one pass or decoded, one after another; simplest first.
_WAYS = (("alone", False), ("alone", True), ("together", False), ("together", True), ("again", True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """A case to begin with, how it fails, and the largest error in it, in units of the golden's round-off."""

    case: Case
    kind: Kind
    ratio: float = np.inf


def suspects(golden: Golden, judge: Judge, *, dtype: str, declared: str, kinds: Container[Kind]) -> Iterator[Suspect]:
    """Cases that fail, or in which an error is larger than any replica's, those that are run most simply first.

    Each comes with all that ran before it in the same candidate: what is left over from there may be the reason.

    Args:
        golden: whose prompts are run.
        judge: with the candidate, opened anew for each way.
        dtype: that it computes in.
        declared: that its weights were loaded in.
        kinds: of failures that are looked for.
    """
    floor = golden.floors[dtype]
    centre = golden.centre_rows(declared)
    for together, decode in _WAYS:
        judge.renew()
        capabilities = judge.engine.capabilities
        if ("replay" if decode else "logits") not in capabilities:
            continue
        if together == "together" and "batch" not in capabilities:
            continue
        before: list[Batch] = []
        found: list[Suspect] = []
        for asked in _asked(golden, together):
            batch = _batch(golden, asked, decode)
            case = Case(batch=batch, before=tuple(before))
            try:
                shown = run_batch(judge.engine, batch, golden.vocabulary)
                again = run_batch(judge.engine, batch, golden.vocabulary) if "repeat" in kinds else shown
            except HarnessError:
                raise
            except Exception:  # a candidate can raise anything, and that it does is what is looked for
                if "raises" not in kinds:
                    raise
                yield Suspect(case=case, kind="raises")
                break
            before.append(batch)
            suspect = _suspect(golden, case, asked, shown, again, floor, centre)
            if suspect is not None and suspect.kind in kinds:
                found.append(suspect)
        yield from sorted(found, key=lambda one: (-min(one.ratio, _GROSS), one.case.batch.tokens))


#: From this ratio on an error is gross, and the shorter of two cases is looked at first: a choice of where to begin.
_GROSS = 100.0


def _asked(golden: Golden, together: str) -> list[Sequence[int]]:
    lengths = [len(request.prompt_ids) for request in golden.requests]
    if together == "together":
        # All in one where padding is what it takes, in the suite's order, as many as a batch of the suite has.
        sizes = [run.batch_size for run in golden.suite.runs]
        largest = None if None in sizes or not sizes else max(size for size in sizes if size is not None)
        return [batch for batch in plan_batches(lengths, largest) if len(batch) > 1]
    alone = sorted(range(len(lengths)), key=lengths.__getitem__)
    if together == "again":
        return [(alone[0],), (alone[-1],), (alone[0],)]
    return [(index,) for index in alone]


def _batch(golden: Golden, asked: Sequence[int], decode: bool) -> Batch:
    """Prompts with what the reference goes on with, its last token left out: nothing is asked behind it."""
    prompts = [golden.requests[index].prompt_ids for index in asked]
    tokens = [golden.continuations[index][:-1] for index in asked]
    if not decode:
        rows = (Row(prompt=(*prompt, *more)) for prompt, more in zip(prompts, tokens, strict=True))
        return Batch(rows=tuple(rows), decode=False)
    steps = min(map(len, tokens))
    return Batch(
        rows=tuple(Row(prompt=prompt, fed=more[:steps]) for prompt, more in zip(prompts, tokens, strict=True)),
        decode=True,
    )


def _suspect(
    golden: Golden, case: Case, asked: Sequence[int], shown: Shown, again: Shown, floor: Floor, centre: Rows
) -> Suspect | None:
    places = sorted(shown)
    logits_NV = np.stack([shown[place] for place in places])
    if not np.isfinite(logits_NV).all():
        return Suspect(case=case, kind="finite")
    if not all(np.array_equal(shown[place], again[place]) for place in places):
        return Suspect(case=case, kind="repeat")
    starts = np.searchsorted(centre.request, asked)
    index_N = np.array([starts[row] + seen - 1 for row, seen in places])
    projections_NJ = (logits_NV @ signs(golden.vocabulary).T).astype(np.float32)
    norms_N = metrics.error_norm(projections_NJ, centre.projections[index_N])
    ratio = float((norms_N / floor.sigma[index_N]).max())
    if ratio <= float(floor.moments.largest.max()):
        return None
    return Suspect(case=case, kind="logits", ratio=ratio)

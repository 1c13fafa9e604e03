"""Was it the environment, or the change? The recorded reference, run again today, against the same golden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import scorer
from harness.comparison.context import declared_precision
from harness.errors import HarnessError
from harness.flow.references import reference_of
from harness.flow.running import forced_trace, silent
from harness.numerics.constants import EFFECT
from harness.values import Blame, Golden, PassSummary, Status, Verdict, Who, worst_of

Progress = Callable[[str], None]


def blame(
    golden: Golden,
    verdict: Verdict,
    *,
    reference: str | Path | None = None,
    quick: bool = False,
    progress: Progress = silent,
) -> Blame:
    """Run the reference's own model in the candidate's precision, and see whether it too left the golden.

    The environment is to blame for what the reference shows as well; the change for what only the candidate shows, or
    shows larger by more than the effect size of its precision.

    Args:
        golden: what was recorded.
        verdict: on the candidate.
        reference: the golden's model, as `check` takes it.
        quick: only the quick runs.
        progress: called with a few words before each pass.
    """
    from harness.flow.checking import check

    found = reference_of(golden, reference)
    if found is None:
        return _unknown("the golden's model is not at hand to run again: name it with --reference")
    dtype = declared_precision(verdict.settings)
    if dtype not in golden.floors:
        return _unknown(f"the golden has no floor for {dtype}")
    try:
        with scorer.open_scorer(str(found.directory), dtype, stream=found.stream) as engine:
            trace = forced_trace(
                engine, golden, quick=quick, progress=lambda text: progress(f"reference, to blame: {text}")
            )
        again = check(golden, trace, reference=reference, quick=quick)
    except HarnessError as error:
        return _unknown(f"the recorded reference cannot run today ({error.problem})")
    return _judged(verdict, again, EFFECT[dtype])


def _unknown(reason: str) -> Blame:
    return Blame(who="unknown", message=reason, status=Status.UNMEASURED)


def _judged(verdict: Verdict, again: Verdict, effect: float) -> Blame:
    shared = {one.question for one in again.passes} & {one.question for one in verdict.passes}
    reference, candidate = worst_of(again.passes, shared), worst_of(verdict.passes, shared)
    figures = f"reference today {_figure(reference)}, candidate {_figure(candidate)}"
    who, words = _who(verdict, again, _more(candidate, reference, effect))
    return Blame(
        who=who,
        message=f"{words} ({figures})",
        status=again.status,
        ratio=None if reference is None else reference.ratio,
        limit=None if reference is None else reference.limit,
    )


def _who(verdict: Verdict, again: Verdict, more: bool) -> tuple[Who, str]:
    if again.ok:
        if verdict.ok:
            return "nobody", "both stay within round-off of the golden"
        return "change", "your change did this: the recorded reference still gives the golden today"
    if again.status.exit_code != Status.DEVIATES.exit_code:
        return "unknown", f"the recorded reference is {again.status.value} today"
    if verdict.ok or not more:
        return "environment", "the environment did this: the recorded reference leaves the golden today as well"
    return "both", "the environment moved the reference as well, and your change moves the candidate further"


def _more(candidate: PassSummary | None, reference: PassSummary | None, effect: float) -> bool:
    """Whether the candidate is off by more than the reference; where nothing was measured, it may be."""
    if candidate is None or candidate.ratio is None or reference is None or reference.ratio is None:
        return True
    return not candidate.ratio <= effect * reference.ratio


def _figure(one: PassSummary | None) -> str:
    if one is None or one.ratio is None or one.limit is None:
        return "not measured"
    return f"{one.ratio:.3g} x round-off (fails from {one.limit:.3g})"

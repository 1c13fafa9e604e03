"""What every comparison needs for one question: centre, floor and scale of its precision, rows found by place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from harness.errors import UsageError
from harness.numerics import metrics
from harness.numerics.bounds import tie_factor
from harness.numerics.constants import ALPHA_TOKENS, SPREAD_DEFAULT, SPREADS
from harness.numerics.moments import Norms, Scale, measure, norms_of, scale_of
from harness.values import (
    Answer,
    Finding,
    Floor,
    Golden,
    Moments,
    Pass,
    PassSummary,
    Question,
    Rows,
    Scoring,
    Statistic,
    Trace,
)

#: Precision -> statistic -> scatter between families: that of constants.py, unless the null bench leaves one out.
Spreads = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What `compare` found, what it could have found, and a line for each pass."""

    findings: tuple[Finding, ...]
    answers: tuple[Answer, ...] = ()
    statistics: tuple[Statistic, ...] = ()
    passes: tuple[PassSummary, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """A golden and a trace made ready to be compared on one question.

    Attributes:
        precision: that of the run; it names the effect size.
        declared: that the weights were loaded in, which the function's float32 copy has widened.
        floor: None where the golden has none for that precision.
        centre: what a correct implementation computes, but for round-off.
        scale, norms: units of errors; None without a floor.
        directions: names of the directions in ``scale``.
        tie: a flip is a tie up to this multiple of its step's noise.
        decidable: generated steps whose margin exceeds that, [G].
        moments: of each pass that shows logits, in the order of the trace; None for the others.
        missing: why no error can be judged, in words; empty where it can.
    """

    golden: Golden
    trace: Trace
    question: Question
    precision: str
    declared: str
    floor: Floor | None
    centre: Rows
    scale: Scale | None
    norms: Norms | None
    directions: tuple[str, ...]
    scoring: Scoring
    spreads: Spreads
    tie: float
    decidable: NDArray[np.bool_]
    moments: tuple[Moments | None, ...] = field(default=())
    missing: str = ""

    def place(self, rows: Rows) -> NDArray[np.int64]:
        """Index in the golden of each row of the candidate, [n]."""
        starts = np.searchsorted(self.golden.rows.request, rows.request, side="left")
        return starts + rows.position - 1

    def first_step(self, request: int) -> int:
        """Index among generated rows of a request's first one."""
        return sum(len(given.tokens) for given in self.golden.generations[:request])

    @property
    def measured(self) -> list[tuple[Pass, Moments]]:
        """The passes that show logits, each with its moments; none where no error can be judged."""
        return [(one, part) for one, part in zip(self.trace.passes, self.moments, strict=False) if part is not None]

    def scatter_of(self, name: str) -> float:
        """Scatter of a statistic between families of correct implementations in this precision."""
        return self.spreads.get(self.precision, {}).get(name, SPREAD_DEFAULT)


def default_spreads() -> Spreads:
    """The scatters of constants.py: for each statistic the largest over families."""
    return {
        precision: {name: largest for name, (largest, _, _) in by_name.items()}
        for precision, by_name in SPREADS.items()
    }


def refuse_wider(spreads: Spreads) -> None:
    """Scatters are measured and not chosen: what is left out makes a check stricter, and nothing is added by hand.

    Raises:
        UsageError: for a scatter that is larger than that of constants.py.
    """
    known = default_spreads()
    for precision, by_name in spreads.items():
        for name, scatter in by_name.items():
            largest = known.get(precision, {}).get(name, SPREAD_DEFAULT)
            if not scatter <= largest:
                problem = f"a scatter of {scatter:g} for {name!r} in {precision} is wider than the measured {largest:g}"
                raise UsageError(problem, fix="Leave spreads out: limits come from measurements alone")


def compare_context(
    golden: Golden,
    trace: Trace,
    *,
    declared: str | None = None,
    scoring: Scoring | None = None,
    spreads: Spreads | None = None,
) -> Context:
    """Look up centre and floor of what the candidate computes in.

    Args:
        golden: the golden.
        trace: the run to judge.
        declared: the precision that the weights were loaded in, where that is not the one computed in (question F).
        scoring: what the live reference was asked.
        spreads: scatters of the statistics between families.
    """
    scoring = scoring or Scoring()
    precision = declared_precision(trace.settings)
    floor = golden.floors.get(_floor_name(golden, trace.settings, precision))
    centre = golden.centre_rows(declared or precision) if scoring.centre is None else scoring.centre
    generated = golden.rows.generated
    factor = tie_factor(_steps(trace, golden), ALPHA_TOKENS / 2)
    margins = metrics.margins(centre.top_logits)
    names = tuple(golden.directions)
    scale = norms = None
    missing = _missing(golden, trace, precision, floor, scoring)
    if floor is not None and not missing:
        scale = scale_of(
            centre,
            floor.sigma,
            floor.pair,
            [golden.directions[name] for name in names],
            len(golden.requests),
            golden.vocabulary,
        )
        norms = norms_of(scale)
    context = Context(
        golden=golden,
        trace=trace,
        question="function" if precision == "float32" else "precision",
        precision=precision,
        declared=declared or precision,
        floor=floor,
        centre=centre,
        scale=scale,
        norms=norms,
        directions=names,
        scoring=scoring,
        spreads=default_spreads() if spreads is None else spreads,
        tie=factor,
        decidable=np.zeros(int(generated.sum()), dtype=np.bool_) if floor is None else margins > factor * floor.pair,
        missing=missing,
    )
    if scale is None:
        return context
    moments = tuple(
        measure(one.rows, scale, context.place(one.rows)) if one.rows is not None else None for one in trace.passes
    )
    return replace(context, moments=moments)


def _floor_name(golden: Golden, settings: Mapping[str, object], precision: str) -> str:
    """A floor of the declared tensor parallelism where the golden has one, else that of the precision."""
    parallel = f"{precision}/tp{settings.get('tensor_parallel', 1)}"
    return parallel if parallel in golden.floors else precision


def _missing(golden: Golden, trace: Trace, precision: str, floor: Floor | None, scoring: Scoring) -> str:
    if floor is None:
        known = ", ".join(golden.floors) or "none"
        left_out = golden.provenance.get("left_out") or {}
        reason = f": {left_out[precision]}" if precision in left_out else ""
        return f"the golden has no floor for {precision}{reason} (floors: {known})"
    scheme = trace.settings.get("weights")
    if scheme not in (None, "float32", "bfloat16", "float16") and scoring.centre is None:
        return f"what {scheme} weights should give was not computed: {scoring.reason or 'no live reference'}"
    return ""


def _steps(trace: Trace, golden: Golden) -> int:
    """Tokens that are tested, over all passes: the number that the limit of a tie is for."""
    forced = sum(int(one.rows.generated.sum()) for one in trace.passes if one.rows is not None)
    return max(1, forced + sum(len(given.tokens) for one in trace.passes for given in one.generations))


def declared_precision(settings: Mapping[str, object]) -> str:
    """The precision that a candidate computes in, as its live settings say it."""
    return str(settings.get("dtype", "unknown"))


def request_name(golden: Golden, index: int) -> str:
    """The prompt's id, as the suite gives it."""
    return golden.requests[index].id


def pass_name(one: Pass) -> str:
    """``run/view``, and which visit of an A-B-A run."""
    return f"{one.run}/{one.view}" + (f" visit {one.repeat + 1}" if one.repeat else "")

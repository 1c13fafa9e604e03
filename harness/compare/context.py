"""What both numeric comparisons need: the centre and floor of the declared precision, rows found by place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.numerics import metrics
from harness.numerics.bounds import tie_factor
from harness.numerics.constants import ALPHA_TOKENS
from harness.values import Finding, Floor, Golden, Pass, PassSummary, Power, Rows, Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What `compare` found, what it could have found, and a line for each pass."""

    findings: tuple[Finding, ...]
    power: Power | None
    passes: tuple[PassSummary, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """A golden and a trace made ready to be compared.

    Attributes:
        precision: the declared precision, which names centre and floor.
        floor: None where the golden has none for that precision.
        centre: what a correct implementation computes, but for round-off.
        steps_of: index among generated rows of each row of the golden, -1 for prompt rows, [N].
        tie: a flip is a tie up to this multiple of its step's noise.
        decidable: generated steps whose margin exceeds that, [G].
    """

    golden: Golden
    trace: Trace
    precision: str
    floor: Floor | None
    centre: Rows
    steps_of: NDArray[np.int64]
    tie: float
    decidable: NDArray[np.bool_]

    def place(self, rows: Rows) -> NDArray[np.int64]:
        """Index in the golden of each row of the candidate, [n]."""
        starts = np.searchsorted(self.golden.rows.request, rows.request, side="left")
        return starts + rows.position - 1


def compare_context(golden: Golden, trace: Trace) -> Context:
    """Look up the centre and floor of what the candidate declares to compute in."""
    precision = declared_precision(trace.settings)
    floor = golden.floors.get(precision)
    centre = golden.centre_rows(precision)
    generated = golden.rows.generated
    factor = tie_factor(int(generated.sum()), ALPHA_TOKENS)
    margins = metrics.margins(centre.top_logits)
    return Context(
        golden=golden,
        trace=trace,
        precision=precision,
        floor=floor,
        centre=centre,
        steps_of=np.where(generated, np.cumsum(generated) - 1, -1),
        tie=factor,
        decidable=np.zeros(len(margins), dtype=np.bool_) if floor is None else margins > factor * floor.pair,
    )


def declared_precision(settings: Mapping[str, object]) -> str:
    """The precision that a candidate computes in, as its live settings say it."""
    return str(settings.get("dtype", "unknown"))


def request_name(golden: Golden, index: int) -> str:
    """The prompt's id, as the suite gives it."""
    return golden.requests[index].id


def pass_name(one: Pass) -> str:
    """``run/view``, and which visit of an A-B-A run."""
    return f"{one.run}/{one.view}" + (f" visit {one.repeat + 1}" if one.repeat else "")

"""What `locate` answers: the first wrong module, why it is thought to be, and under which conditions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.locate.clues import Clue

#: How far a fault reaches. "local": one module. "configuration": the same module of every block, so one number or
#: function of all of them. "several": more than that. "outside": what the model is handed, or what is done with its
#: logits. "nowhere": nothing was found. "unseen": nothing could be looked at.
Scope = Literal["local", "configuration", "several", "outside", "nowhere", "unseen"]
Question = Literal["function", "precision"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One measurement beyond what correct implementations show.

    Attributes:
        module: the reference's name.
        part: what of it: "output", "input hidden_states", "argument alibi", "cache 3".
        statistic: which number.
        ratio: of the error to what is usual in that precision; of a gain the shift itself.
        limit: of that, beyond which it is no round-off.
        z: how many standard deviations it lies from what is usual.
        unit: where it was measured: "all", or a presentation with its phase.
    """

    module: str
    part: str
    statistic: str
    ratio: float
    limit: float
    z: float
    unit: str

    @property
    def line(self) -> str:
        """As a report says it."""
        if self.statistic == "equal":
            return f"{self.module or 'the model'}: its {self.part} differs ({self.unit})"
        sized = f"{self.ratio:+.3g}" if self.statistic == "gain" else f"{self.ratio:.3g} x round-off"
        return (
            f"{self.module or 'the model'}, {self.part}: {self.statistic} {sized} (limit {self.limit:.3g}; {self.unit})"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """Where a candidate first goes wrong.

    Attributes:
        golden: its name.
        candidate: its SPEC or what it is.
        module: the reference's name of the first wrong module; "" where nothing is wrong, or where it is the model's
            own forward or what drives it, as ``part`` says.
        part: what of it, in words; "" for its result as a whole.
        scope: how far the fault reaches.
        conditions: when it shows, "only in decode"; empty where it always does.
        others: further modules that are wrong on their own inputs, in order.
        question: asked of a float32 copy ("function") or of the candidate as shipped ("precision").
        precision: in which it was seen.
        evidence: measurements, the telling ones first.
        clues: what weights, settings and tables say.
        modules: how many modules were tested.
        tests: how many statistics.
        notes: what could not be looked at, and what is only known otherwise.
        repro: what came of writing the smallest failing case; "" where it was not asked for.
        seconds: it took.
    """

    golden: str
    candidate: str
    module: str = ""
    part: str = ""
    scope: Scope = "nowhere"
    conditions: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    question: Question = "function"
    precision: str = ""
    evidence: tuple[Evidence, ...] = ()
    clues: tuple[Clue, ...] = ()
    modules: int = 0
    tests: int = 0
    notes: tuple[str, ...] = ()
    repro: str = ""
    seconds: float = 0.0

    @property
    def found(self) -> bool:
        """Whether a place is named."""
        return self.scope not in ("nowhere", "unseen")

    @property
    def exit_code(self) -> int:
        """0 where nothing is wrong, 1 where a place is named, 3 where nothing could be looked at."""
        return 1 if self.found else 3 if self.scope == "unseen" else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        from harness.report.locate import where_to_dict

        return where_to_dict(self)

    def __str__(self) -> str:
        from harness.report.locate import where_to_text

        return where_to_text(self)


Settings = Mapping[str, Any]

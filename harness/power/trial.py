"""One trial: an implementation, wrong or correct, and what every rule said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["bug", "control", "benign"]

#: `Trial.group` of the prompts whose texts may end, and of a few short ones; the others are numbered from 0.
ENDS, QUICK = -1, -2


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What every rule said of one implementation on one host.

    Attributes:
        kind: a bug, a negative control of the catalogue, or a family of correct implementations.
        name: id in the catalogue, or the family's name.
        host: the model that it is put into.
        precision: that the candidate computes in; float32 asks about its function, 16 bits about its precision.
        strength: of the bug, 1.0 as reported.
        group: which prompts.
        version: of the rule.
        status: of the verdict on all that was shown.
        finding: the first failure, or why it was not run.
        levels: status of the verdict when less is shown: "tokens", "top" (tokens and a few log-probabilities).
        signal: S/N, the root mean square of what it changes in float64 logits over the pooled round-off of this
            precision (numerics.md 2.2); None where that is unknown.
        error: of all passes together, in units of round-off; None where no logits were judged.
        tokens: how many of the tokens that it gave on its own are not the reference's.
        scores: of the peers' rules (harness/criteria), which alarm above their thresholds; inf alarms at any.
        seconds: the candidate's run and the verdict on all of it.
        cost: seconds of all the peers' rules.
    """

    kind: Kind
    name: str
    host: str
    precision: str
    strength: float
    group: int
    version: str
    status: str
    finding: str = ""
    levels: Mapping[str, str] = field(default_factory=dict)
    signal: float | None = None
    error: float | None = None
    tokens: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cost: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, str, float, int, str]:
        """What is not done twice."""
        return (self.kind, self.name, self.host, self.precision, self.strength, self.group, self.version)


def parse_trial(data: dict[str, Any]) -> Trial:
    """A trial from its line, in which infinities are words.

    Raises:
        TypeError, ValueError, KeyError: for anything else.
    """
    numbers = {name: None if data[name] is None else float(data[name]) for name in ("signal", "error")}
    scores = {str(name): float(score) for name, score in data["scores"].items()}
    return Trial(**{**data, **numbers, "scores": scores})

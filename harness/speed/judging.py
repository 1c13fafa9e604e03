"""Verdicts, samples and limits -> for each measure a ratio with its interval, and what all of it decides."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from harness.numerics.ratios import Interval, interval, shares
from harness.speed.clock import Sample
from harness.speed.roofline import Limit, Roofline
from harness.speed.sampling import Rounds

#: How often a gate may pass what is beyond a limit, and how often it may call a candidate beyond one that is not: over
#: all measures and looks together.
ERROR = 0.05

_PARTS: Mapping[str, Callable[[Sample], float]] = {"prefill": lambda one: one.prefill, "decode": lambda one: one.step}
PARTS = tuple(_PARTS)


class Outcome(Enum):
    """What the interval of a ratio decides."""

    WITHIN = "within the limit"
    BEYOND = "beyond the limit"
    UNSURE = "too noisy to tell"
    SHOWN = "no limit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is asked of the candidate's time as a share of the base's.

    Attributes:
        slowdown: the largest ratio that passes; None asks nothing.
        speedup: base over candidate that must be reached; None asks nothing.
        speedup_in: parts ("prefill", "decode") of which the speed-up is asked.
    """

    slowdown: float | None = None
    speedup: float | None = None
    speedup_in: tuple[str, ...] = PARTS

    def of(self, part: str) -> float | None:
        """The largest ratio of candidate to base that passes."""
        asked = [] if self.slowdown is None else [self.slowdown]
        if self.speedup is not None and part in self.speedup_in:
            asked.append(1 / self.speedup)
        return min(asked, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One part of one shape.

    Attributes:
        part: "prefill" or "decode".
        batch: prompts at once.
        prompt: tokens of each.
        base: typical seconds of the base: of the first tokens of a batch, or of one later step of it.
        candidate: the same of the candidate.
        ratio: candidate over base, with its interval.
        limit: the largest ratio that passes, None for none.
        outcome: what the interval decides.
        rounds: behind it.
        base_memory: highest bytes in use, the median over the rounds; of prefill and decode together.
        candidate_memory: the same of the candidate.
        base_limit: the shortest time that the base could take here, None where it is not known.
        candidate_limit: the same of the candidate.
    """

    part: str
    batch: int
    prompt: int
    base: float
    candidate: float
    ratio: Interval
    limit: float | None
    outcome: Outcome
    rounds: int
    base_memory: int
    candidate_memory: int
    base_limit: Limit | None = None
    candidate_limit: Limit | None = None

    @property
    def tokens(self) -> int:
        """Tokens that go in at once: the prompts', or one a row."""
        return self.batch * (self.prompt if self.part == "prefill" else 1)


def measures(rounds: Sequence[Rounds], limits: Limits) -> tuple[Measure, ...]:
    """Each part of each shape, judged on the rounds that there are."""
    errors = shares(ERROR, len(rounds) * len(_PARTS))
    return tuple(_measure(one, part, limits, errors) for one in rounds for part in _PARTS)


def _measure(rounds: Rounds, part: str, limits: Limits, errors: Mapping[str, float]) -> Measure:
    value = _PARTS[part]
    base, candidate = ([one for turns in side for one in turns] for side in (rounds.base, rounds.candidate))
    ratio = interval(np.array(rounds.ratios(value)), **errors)
    limit = limits.of(part)
    return Measure(
        part=part,
        batch=rounds.shape.batch,
        prompt=rounds.shape.prompt,
        base=statistics.median(value(one) for one in base),
        candidate=statistics.median(value(one) for one in candidate),
        ratio=ratio,
        limit=limit,
        outcome=_outcome(ratio, limit),
        rounds=len(rounds.base),
        base_memory=round(statistics.median(one.memory for one in base)),
        candidate_memory=round(statistics.median(one.memory for one in candidate)),
    )


def _outcome(ratio: Interval, limit: float | None) -> Outcome:
    if limit is None:
        return Outcome.SHOWN
    if ratio.high <= limit:
        return Outcome.WITHIN
    return Outcome.BEYOND if ratio.low > limit else Outcome.UNSURE


def limited(found: Sequence[Measure], base: Roofline, candidate: Roofline) -> tuple[Measure, ...]:
    """The measures beside the shortest times that are possible."""
    return tuple(
        replace(
            one,
            base_limit=base.limit(one.part, one.batch, one.prompt),
            candidate_limit=candidate.limit(one.part, one.batch, one.prompt),
        )
        for one in found
    )


def kept(before: Sequence[Measure], now: Sequence[Measure]) -> tuple[Measure, ...]:
    """The measures of a look; one that was within its limit at an earlier one is decided, and stays as it was then."""
    decided = {(one.batch, one.part): one for one in before if one.outcome is Outcome.WITHIN}
    return tuple(decided.get((one.batch, one.part), one) for one in now)


def unsure(found: Sequence[Measure]) -> frozenset[int]:
    """Batch sizes of which more rounds may tell something."""
    return frozenset(one.batch for one in found if one.outcome is Outcome.UNSURE)


def settled(found: Sequence[Measure]) -> bool:
    """Whether more rounds would change nothing: one measure is beyond its limit, or none is unsure."""
    outcomes = {one.outcome for one in found}
    return Outcome.BEYOND in outcomes or Outcome.UNSURE not in outcomes


def precision(one: Measure) -> float:
    """Half the width of a ratio's interval, as a share."""
    return math.sqrt(one.ratio.high / one.ratio.low) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """Whether a candidate may take the base's place.

    Attributes:
        golden: that both were judged by.
        base: SPEC of the base, with its revision where that is another.
        candidate: SPEC of the candidate.
        base_verdict: on the base, as serving.Server.check tells it.
        verdict: on the candidate.
        measures: their speeds; none where the base is not the golden's model.
        rounds: of A and B behind them.
        settings: of base and candidate while they were timed.
        rooflines: of base and candidate, with the machine as each found it.
    """

    golden: str
    base: str
    candidate: str
    base_verdict: Mapping[str, Any]
    verdict: Mapping[str, Any]
    measures: tuple[Measure, ...] = ()
    rounds: int = 0
    settings: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
    rooflines: tuple[Roofline, Roofline] = (Roofline(), Roofline())

    @property
    def exit_code(self) -> int:
        """That of a verdict that is not ok, the base's first; else 1 for a limit passed, 3 where it is not known."""
        for one in (self.base_verdict, self.verdict):
            if not one["ok"]:
                return int(one["exit_code"])
        outcomes = {one.outcome for one in self.measures}
        return 1 if Outcome.BEYOND in outcomes else 3 if Outcome.UNSURE in outcomes else 0

    @property
    def ok(self) -> bool:
        """Whether it may."""
        return self.exit_code == 0

"""What a bench measures of each candidate, and what came of it: values, and the exit code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.errors import EngineError
from harness.speed.kinds.burst import Burst, Size
from harness.speed.kinds.completion import Completion
from harness.speed.kinds.latency import Latency
from harness.speed.kinds.modules import Modules
from harness.speed.kinds.scaling import Scaling
from harness.speed.roofline import Limit

KINDS = ("latency", "completion", "burst", "scaling", "modules")

#: What is said where no golden judges: speed says nothing of what is computed.
NO_VERDICT = "verdict: none; nothing says that this is the right model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is asked for.

    Attributes:
        kinds: those that are measured.
        asked: whether the user named them; then one that cannot be measured is a result of its own.
        prompt: tokens of the prompt of latency, scaling and modules.
        new: tokens that these add.
        repeats: of latency, scaling and completion.
        batch: rows at once of completion and burst.
        burst: its size.
        ranks: numbers of ranks of scaling.
    """

    kinds: tuple[str, ...] = KINDS
    asked: bool = False
    prompt: int = 7
    new: int = 100
    repeats: int = 5
    batch: int = 32
    burst: Size = field(default_factory=lambda: Size(count=1000, prompt=512, new=20))
    ranks: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmeasured:
    """A kind without a number.

    Attributes:
        reason: why.
        failed: whether the engine failed, rather than cannot be measured so.
    """

    reason: str
    failed: bool = False


Result = Latency | Completion | Burst | Scaling | Modules | Unmeasured


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One candidate.

    Attributes:
        spec: SPEC of it.
        verdict: as serving.Server.check tells it, None without a golden.
        results: by kind; none where the verdict is not ok.
        settings: of the engine while it was timed.
        limits: the shortest time of a first and of a later forward of the latency, where they are known.
    """

    spec: str
    verdict: Mapping[str, Any] | None = None
    results: Mapping[str, Result] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Limit] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        """Whether its verdict is not ok."""
        return self.verdict is not None and not self.verdict["ok"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """All candidates.

    Attributes:
        golden: that they were judged by, None for none.
        model: name of the model.
        plan: what was asked for.
        subjects: one a SPEC.
    """

    golden: str | None
    model: str
    plan: Plan
    subjects: tuple[Subject, ...]

    @property
    def exit_code(self) -> int:
        """That of the first verdict that is not ok; else 4 for an engine that failed, 3 for a kind unmeasured."""
        for one in self.subjects:
            if one.verdict is not None and not one.verdict["ok"]:
                return int(one.verdict["exit_code"])
        results = [found for one in self.subjects for found in one.results.values()]
        points = [point for one in results if isinstance(one, Scaling) for point in one.points]
        for point in points:
            if point.exit_code:
                return point.exit_code
        missing = [one for one in results if isinstance(one, Unmeasured)]
        if any(one.failed for one in missing):
            return EngineError.exit_code
        return 3 if self.plan.asked and (missing or any(one.latency is None for one in points)) else 0

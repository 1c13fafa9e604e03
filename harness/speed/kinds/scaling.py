"""How much of N ranks is used: their speed over N times the speed of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.engines.spec import parse_spec
from harness.errors import UsageError
from harness.speed.kinds.latency import Latency

#: The key of a SPEC that says how many ranks there are, by engine.
_KEYS = {"tp": "size", "pp": "stages"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One number of ranks.

    Attributes:
        ranks: how many.
        spec: SPEC that ran.
        latency: what it took, None where it did not run.
        threads: of each rank, None where it is not known.
        reason: why it did not run, "" where it did.
        exit_code: of the verdict that refused it, 0 for none.
        status: of its verdict, "" where it has none.
    """

    ranks: int
    spec: str
    latency: Latency | None = None
    threads: int | None = None
    reason: str = ""
    exit_code: int = 0
    status: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """All numbers of ranks of one engine.

    Attributes:
        points: that of one rank first.
    """

    points: tuple[Point, ...]

    def efficiency(self, point: Point) -> float | None:
        """Speed at N over N times the speed at 1, where a speed is tokens a second; None where one of them is missing.

        The strong scaling efficiency: the work is the same for each N.
        """
        one = self.points[0].latency
        if one is None or point.latency is None:
            return None
        return one.token.middle / (point.ranks * point.latency.token.middle)


def counts(asked: Sequence[int]) -> tuple[int, ...]:
    """Numbers of ranks, sorted.

    Raises:
        UsageError: without 1, and for what is no number of ranks.
    """
    found = tuple(sorted(set(asked)))
    if not found or found[0] != 1:
        problem = f"the ranks {', '.join(map(str, asked))} do not begin with 1, which the others are compared with"
        raise UsageError(problem, fix="Give e.g. --ranks 1,2,3")
    return found


def why_not(text: str) -> str:
    """Why the ranks of a SPEC cannot be varied, in words; "" where they can."""
    parsed = parse_spec(text)
    if parsed.engine not in _KEYS:
        return f"{parsed.engine} has no ranks; give tp:size=2 or pp:stages=2"
    if len([key for key in _KEYS.values() if parsed.options.get(key, "1") != "1"]) > 1:
        return f"{text} divides the model in two ways; give one of size and stages"
    return ""


def at_ranks(text: str, ranks: int) -> str:
    """The SPEC of the same engine with so many ranks."""
    parsed = parse_spec(text)
    options = {**parsed.options, _KEYS[parsed.engine]: str(ranks)}
    return f"{parsed.engine}:" + ",".join(f"{key}={_quoted(value)}" for key, value in options.items())


def _quoted(value: str) -> str:
    """As spec.parse_spec reads it."""
    if not any(mark in value for mark in ",'\""):
        return value
    mark = "'" if '"' in value else '"'
    return f"{mark}{value}{mark}"

"""The measurements of one engine, by name; each takes an engine that is open and runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.engines.base import Engine


def measure(kind: str, engine: Engine, work: Any, pulse: Callable[[str], None]) -> Any:
    """Do one measurement.

    Args:
        kind: "latency", "completion", "burst" or "modules". Scaling is latency at several numbers of ranks.
        engine: open.
        work: the kind's Work.
        pulse: called with a few words whenever it has got somewhere.
    """
    from harness.speed.kinds import burst, completion, latency, modules

    known: dict[str, Callable[..., Any]] = {
        "latency": latency.measure,
        "completion": completion.measure,
        "burst": burst.measure,
        "modules": modules.measure,
    }
    return known[kind](engine, work, pulse)

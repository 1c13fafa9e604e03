"""Rows a second of a data set whose rows are continued in batches.

The measurement of data set completion on Gaudi2 (https://huggingface.co/blog/habana-gaudi-2-bloom).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from harness.engines.base import Engine
from harness.speed import clock
from harness.speed.kinds.spread import Spread, spread
from harness.values import Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is done.

    Attributes:
        requests: the rows, each with the tokens that it asks for.
        batch: rows at once.
        repeats: of all of it.
        name: of the suite that they are of.
    """

    requests: tuple[Request, ...]
    batch: int
    repeats: int
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What it took, over the repeats.

    Attributes:
        name: of the suite.
        rows: of it.
        tokens: that were added, to all rows together.
        batch: rows at once.
        repeats: runs behind the spread.
        seconds: of all rows.
        memory: bytes at the highest; 0 where the system does not tell.
    """

    name: str
    rows: int
    tokens: int
    batch: int
    repeats: int
    seconds: Spread
    memory: int


def measure(engine: Engine, work: Work, pulse: Callable[[str], None]) -> Completion:
    """Continue all rows several times, after one time that is not counted.

    No row ends early, whatever it says: every engine adds the same number of tokens.

    Raises:
        EngineError: when the engine gives fewer tokens than it was asked for.
    """
    batches = [work.requests[start : start + work.batch] for start in range(0, len(work.requests), work.batch)]
    taken = []
    memory = clock.Peak()
    for _ in range(1 + work.repeats):
        start = time.perf_counter()
        for number, batch in enumerate(batches):
            clock.complete(engine, batch)
            pulse(f"completion, batch {number + 1} of {len(batches)}")
        taken.append(time.perf_counter() - start)
    return Completion(
        name=work.name,
        rows=len(work.requests),
        tokens=sum(one.max_new_tokens for one in work.requests),
        batch=work.batch,
        repeats=work.repeats,
        seconds=spread(taken[1:]),
        memory=memory.bytes(),
    )

"""Seconds a token of one prompt that is continued greedily, the first forward apart from the later ones.

The measurement of BLOOMZ on Gaudi2: 100 greedy tokens after a prompt of 7 (https://huggingface.co/blog/habana-gaudi-2-bloom).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.engines.base import Engine
from harness.speed import clock
from harness.speed.kinds.spread import Spread, spread

#: Runs whose times are thrown away: kernels are chosen, caches filled, clocks raised.
WARM_UP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is done.

    Attributes:
        prompt: token ids.
        new: tokens that are added, two at least.
        repeats: of all of it.
    """

    prompt: tuple[int, ...]
    new: int
    repeats: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """What it took, over the repeats.

    Attributes:
        prompt: tokens of the prompt.
        new: tokens that were added.
        repeats: runs behind the spreads.
        first: seconds until the first token.
        later: seconds of each later token.
        token: seconds of a token, the first and the later ones together.
        memory: bytes at the highest; 0 where the system does not tell.
    """

    prompt: int
    new: int
    repeats: int
    first: Spread
    later: Spread
    token: Spread
    memory: int


def measure(engine: Engine, work: Work, pulse: Callable[[str], None]) -> Latency:
    """Continue the prompt alone, several times, after a warm-up.

    Raises:
        EngineError: while a profiler is on, or when the engine gives fewer tokens than it was asked for.
    """
    samples = []
    for number in range(WARM_UP + work.repeats):
        samples.append(clock.sample(engine, [work.prompt], work.new, repeats=1))
        pulse(f"latency, run {number + 1} of {WARM_UP + work.repeats}")
    kept = samples[WARM_UP:]
    return Latency(
        prompt=len(work.prompt),
        new=work.new,
        repeats=work.repeats,
        first=spread([one.prefill for one in kept]),
        later=spread([one.step for one in kept]),
        token=spread([(one.prefill + (work.new - 1) * one.step) / work.new for one in kept]),
        memory=max(one.memory for one in kept),
    )

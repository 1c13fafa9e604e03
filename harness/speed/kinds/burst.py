"""Many requests that arrive at once and are served in batches: throughput, how long each waits, memory.

The measurement of inference servers in arXiv:2311.03687: 1,000 synthetic prompts of 512 tokens in one burst.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.engines.base import Engine
from harness.errors import UsageError
from harness.speed import clock
from harness.speed.shapes import requests_of

#: Shares of the requests whose waiting time is told.
SHARES = (50, 90, 99)
_LARGEST = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How large a burst is.

    Attributes:
        count: requests.
        prompt: tokens of each.
        new: tokens that each asks for.
    """

    count: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.count}x{self.prompt}+{self.new}"


def parse_size(text: str) -> Size:
    """Read COUNTxPROMPT or COUNTxPROMPT+NEW, where 20 new tokens are asked for unless it says so.

    Raises:
        UsageError: for another form, and for a number that is 0 or beyond 2^20.
    """
    found = re.fullmatch(r"([0-9]{1,7})x([0-9]{1,7})(?:\+([0-9]{1,7}))?", text.strip())
    numbers = [int(one) for one in found.groups(default="20")] if found else [0]
    if min(numbers) < 1 or max(numbers) > _LARGEST:
        fix = "Write requests x tokens of each prompt + tokens to add, e.g. 1000x512+20"
        raise UsageError(f"{text!r} is no size of a burst", fix=fix)
    return Size(count=numbers[0], prompt=numbers[1], new=numbers[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is done.

    Attributes:
        prompts: token ids; as many different ones as there are, taken in turns.
        size: of the burst.
        batch: requests at once.
    """

    prompts: tuple[tuple[int, ...], ...]
    size: Size
    batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Burst:
    """What it took.

    Attributes:
        size: of the burst.
        batch: requests at once.
        seconds: until the last request was done.
        waits: seconds in which so many per cent of the requests were done, for each of SHARES.
        memory: bytes at the highest; 0 where the system does not tell.
    """

    size: Size
    batch: int
    seconds: float
    waits: tuple[float, ...]
    memory: int


def measure(engine: Engine, work: Work, pulse: Callable[[str], None]) -> Burst:
    """Serve the burst once, in the order of arrival, after one batch that is not counted.

    All requests are there at the beginning, so a request waits until its batch is done.

    Raises:
        EngineError: when the engine gives fewer tokens than it was asked for.
    """
    size = work.size
    prompts = [work.prompts[number % len(work.prompts)] for number in range(size.count)]
    requests = requests_of(prompts, size.new)
    clock.complete(engine, requests[: work.batch])
    memory = clock.Peak()
    waits: list[float] = []
    start = time.perf_counter()
    for first in range(0, size.count, work.batch):
        batch = requests[first : first + work.batch]
        clock.complete(engine, batch)
        waits += [time.perf_counter() - start] * len(batch)
        pulse(f"burst, {len(waits)} of {size.count} requests done")
    return Burst(
        size=size,
        batch=work.batch,
        seconds=waits[-1],
        # The time by which a share is done is that of a request, and no mean of two.
        waits=tuple(float(one) for one in np.percentile(waits, SHARES, method="inverted_cdf")),
        memory=memory.bytes(),
    )

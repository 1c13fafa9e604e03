"""On which processors of the machine both sides of a round run: the same.

Two processors of one machine differ in speed for seconds at a time, by a factor where each shares its core with another
one's work, and a process with fewer threads than there are processors stays where it is. Sides on processors of
their own would be told apart by those.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence


def needed(threads: int | None) -> int | None:
    """Processors that the open engine of this process can use at once, None where that is not known.

    Args:
        threads: of each of its processes.
    """
    import psutil

    return None if threads is None else threads * max(1, len(psutil.Process().children()))


def drawn(counts: tuple[int | None, int | None], number: int) -> tuple[int, ...] | None:
    """Processors for both sides of a round, None for all that there are.

    Args:
        counts: how many each side can use.
        number: of the round; each draws its own.
    """
    if not hasattr(os, "sched_getaffinity") or None in counts:
        return None
    here = sorted(os.sched_getaffinity(0))
    most = max(count for count in counts if count is not None)
    return tuple(random.Random(number).sample(here, most)) if most < len(here) else None


def use(which: Sequence[int]) -> None:
    """Run this process, and what it starts from now on, on these alone."""
    os.sched_setaffinity(0, which)

"""A worker that starts anew in milliseconds: a process that has the libraries forks for each of its lives.

A fork has its parent's libraries, and the addresses of its memory too. Where those happen to lie makes a process faster
than another of the same code, so each life first moves where its own memory will be (Curtsinger and Berger, Stabilizer:
statistically sound performance evaluation, ASPLOS 2013, do so for code and stack as well).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import mmap
import os
import random
import select
import signal

#: The exit code by which a life asks for the next one.
RENEWED = 75
#: Seconds between two looks where the system has no file for a process.
_LOOK = 0.02
#: Bytes, at most, by which memory moves: the large blocks (a huge page is 2 MiB), and those of the heap.
_LARGE, _SMALL = 2**21, 2**16
#: Bytes of gaps that are moved too, the largest first. What is never touched is an address, and no memory.
_GAPS = tuple(2**power for power in range(27, 20, -1))

_moved: list[mmap.mmap | bytearray] = []


def live(lifeline: int) -> None:
    """Return in a fork, and in another one whenever that has ended with RENEWED; the process itself ends as its last.

    Args:
        lifeline: a file that can be read from when the process is to end.
    """
    gc.collect()
    gc.freeze()  # a fork whose collector touches what it was given copies all of it
    while (child := os.fork()) != 0:
        _follow(child, lifeline)
    faulthandler.register(signal.SIGUSR1, all_threads=False)


def _follow(child: int, lifeline: int) -> None:
    """Return where a life asks for the next one; end as it does otherwise."""
    faulthandler.unregister(signal.SIGUSR1)
    # Who asks what this worker does means its life.
    signal.signal(signal.SIGUSR1, lambda _number, _frame: _send(child, signal.SIGUSR1))
    code = _ended(child, lifeline)
    if code == RENEWED:
        return
    if code < 0:
        faulthandler.disable()
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)


def _ended(child: int, lifeline: int) -> int:
    """Its exit code, negative for a signal; it is killed when the lifeline ends."""
    watched = _watched(child)
    try:
        while True:
            files = [lifeline] if watched is None else [lifeline, watched]
            ready = select.select(files, [], [], _LOOK if watched is None else None)[0]
            if lifeline in ready:
                _send(child, signal.SIGKILL)
                os.waitpid(child, 0)
                os._exit(1)
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
    finally:
        if watched is not None:
            os.close(watched)


def _watched(child: int) -> int | None:
    """A file that can be read from when it has ended; None where the system has none, or refuses it."""
    try:
        return os.pidfd_open(child)
    except (AttributeError, OSError):
        return None


def _send(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def move() -> None:
    """Take a random amount of memory for good, so that what comes later lies elsewhere than in the life before.

    To be called after the last thread is started: its heap lies at a multiple of 64 MiB, and what follows below that.
    """
    drawn = random.SystemRandom()
    for gap in _GAPS:
        _moved.append(mmap.mmap(-1, gap + drawn.randrange(1, _LARGE // mmap.PAGESIZE) * mmap.PAGESIZE))
    _moved.append(bytearray(drawn.randrange(1, _SMALL)))

"""A spawned rank: `python -m harness.engines.ranks.worker`, started by spawned.py and by nobody else.

It answers requests from one pipe, and dies with the process that holds the other end of the second one.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from harness.engines.ranks.serving import Setup

#: A pulse is sent at most this often, in seconds.
_PULSE = 0.2
_PR_SET_PDEATHSIG = 1


class Pulse:
    """Tells the parent that this rank gets on, from where the work is done: what hangs there is silent."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._next, self._count = pipe, 0.0, 0

    def __call__(self, what: str) -> None:
        self._count += 1
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PULSE
            self._pipe.send(("pulse", f"{what}, {self._count} blocks done"))


def main(pipe_fd: int, lifeline_fd: int, rank: int) -> None:
    """Answer requests until the pipe is closed."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    _die_with_parent(lifeline_fd)
    pipe = Connection(pipe_fd)
    from harness.engines.ranks.serving import Server

    pulse = Pulse(pipe)
    server = Server(rank, _store, pulse)
    pipe.send(("ready", None))
    while True:
        try:
            request, arguments = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            answer: tuple[str, Any] = ("done", server.answer(request, *arguments))
        except BaseException as error:  # noqa: BLE001  # the parent tells it
            answer = ("failed", _told(rank, error))
        pipe.send(answer)
    # Neither threads of a group nor a peer that is gone may hold this process up.
    sys.stderr.flush()
    os._exit(0)


def _told(rank: int, error: BaseException) -> Any:
    from harness.engines.ranks.failure import Failure
    from harness.errors import HarnessError, first_line

    known = isinstance(error, HarnessError)
    return Failure(
        rank=rank,
        kind="" if known else type(error).__name__,
        message=error.problem if isinstance(error, HarnessError) else first_line(error, "no message"),
        fix=error.fix if isinstance(error, HarnessError) else "",
        trace="" if known else "".join(traceback.format_exception(error)).strip(),
    )


def _store(setup: Setup) -> Store:
    """A file that all ranks of this machine open: no port, and nothing to clean up but the file."""
    from torch._C._distributed_c10d import FileStore

    return FileStore(str(Path(setup.meeting)), setup.layout.world)


def _die_with_parent(lifeline_fd: int) -> None:
    """End at once when the parent does, however it ends; a stopped process needs the kernel for that."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(lifeline_fd, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))

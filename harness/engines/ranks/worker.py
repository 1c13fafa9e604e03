"""A spawned rank: `python -m harness.engines.ranks.worker`, started by spawned.py and by nobody else.

It answers requests from one socket, and dies with the process that holds the other end of a pipe. Where what answers
has a method `prepare`, that is called once, and the request RENEW starts from there again, in a new process.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engines.ranks import forks
from harness.engines.ranks.failure import raised
from harness.engines.ranks.wire import Wire

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from harness.engines.ranks.serving import Setup

#: A pulse is sent at most this often, in seconds.
_PULSE = 0.2
_PR_SET_PDEATHSIG = 1
#: The request that is answered by ending, and starting anew.
RENEW = "renew"


class Pulse:
    """Tells the parent that this rank gets on, from where the work is done: what hangs there is silent."""

    def __init__(self, send: Callable[[tuple[str, str]], None]) -> None:
        self._send, self._next = send, 0.0

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PULSE
            self._send(("pulse", what))


def main(wire_fd: int, lifeline_fd: int, rank: int, server: str) -> None:
    """Answer requests until the parent has no more.

    Args:
        wire_fd: a socket; pairs (request, arguments) come, pairs (kind, value) go.
        lifeline_fd: the end of a pipe that the parent holds the other end of, and never writes to.
        rank: this rank's number.
        server: MODULE:CLASS of what answers, made as serving.Server.
    """
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    _die_with(os.getppid())
    os.set_inheritable(wire_fd, False)
    os.set_inheritable(lifeline_fd, False)
    wire = Wire(socket.socket(fileno=wire_fd))
    try:
        module, _, name = server.partition(":")
        made = getattr(importlib.import_module(module), name)
        renews = hasattr(made, "prepare")
        if renews:
            made.prepare()
            started = os.getpid()
            forks.live(lifeline_fd)
            _die_with(started)
        _watch(lifeline_fd)
        if renews:
            forks.move()
        answering = made(rank, _store, Pulse(wire.send))
        wire.send(("ready", renews or None))
        while (asked := _asked(wire)) is not None:
            request, arguments = asked
            if request == RENEW:
                answering.close()
                wire.send(("done", None))
                os._exit(forks.RENEWED)
            wire.send(("done", answering.answer(request, *arguments)))
    except BaseException as error:  # noqa: BLE001  # the parent tells it
        # This rank stays, and keeps its connections, until the parent ends it: the others' complaints of a closed one
        # would hide what has happened.
        with contextlib.suppress(OSError):
            wire.send(("failed", raised(rank, error)))
            _asked(wire)
    # Neither threads of a group nor a peer that is gone may hold this process up.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _asked(wire: Wire) -> tuple[str, tuple[Any, ...]] | None:
    """The next request, None when there is none left."""
    try:
        found: tuple[str, tuple[Any, ...]] = wire.receive()
    except (EOFError, OSError):
        return None
    return found


def _store(setup: Setup) -> Store:
    """A file that all ranks of this machine open: no port, and nothing to clean up but the file."""
    from torch._C._distributed_c10d import FileStore

    return FileStore(str(Path(setup.meeting)), setup.layout.world)


def _die_with(parent: int) -> None:
    """Let the kernel end this process with its parent, however that ends: it ends a stopped one too."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _watch(lifeline_fd: int) -> None:
    """End at once when the other end of the pipe is closed."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(lifeline_fd, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

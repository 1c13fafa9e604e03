"""Share a run of the bench among processes of its own: one part each, watched, and ended with this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from harness.errors import EngineError

#: Seconds without a single result after which the parts are taken to hang: to compile a model takes a minute.
PATIENCE = 900.0
_POLL = 0.5
#: The process that started a part, by its id.
_PARENT = "GOLDEN_HARNESS_PARENT"
_SET_DEATH_SIGNAL = 1
#: Waits this many times as long as a look took: thousands of results take a second to read, on cores that have work.
_REST = 20.0
#: Seconds that a part has to end by itself when it is told to.
_GRACE = 10.0


def run_parts(
    arguments: Sequence[str], jobs: int, done: Callable[[], int], *, patience: float = PATIENCE, poll: float = _POLL
) -> None:
    """Run ``harness ARGUMENTS --shard I/JOBS`` for every I, each in a process of its own with one thread.

    Args:
        arguments: of `harness`, but for the shard.
        jobs: processes.
        done: how many results are there; called again and again while they run.
        patience: seconds without a further result after which all are ended.
        poll: least seconds between looks.

    Raises:
        EngineError: when a part fails, with the last line that it said, or when nothing comes of them.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(_part([*arguments, "--shard", f"{index}/{jobs}"])) for index in range(jobs)]
        seen, since = done(), time.monotonic()
        while True:
            codes = [process.poll() for process, _ in parts]
            begun = time.monotonic()
            now = done()
            took = time.monotonic() - begun
            if now != seen:
                seen, since = now, time.monotonic()
            for (_, said), code in zip(parts, codes, strict=True):
                if code:
                    raise EngineError(
                        f"a part of the run ended with code {code}: {_last_line(said())}",
                        fix="Run it again, it goes on where it was; with --jobs 1 the error shows in full",
                    )
            if all(code == 0 for code in codes):
                return
            if time.monotonic() - since > patience:
                raise EngineError(
                    f"no result came within {patience:.0f} s",
                    fix="Run it again with --jobs 1 to see where it stays; what is done is kept",
                )
            time.sleep(max(poll, _REST * took))


def end_with_parent() -> None:
    """Let the kernel end this process, if it is a part of a run, with the one that started it, however that ends.

    A parent that is killed cleans up nothing. Only Linux can do that (prctl(2), PR_SET_PDEATHSIG).
    """
    parent = os.environ.get(_PARENT)
    if parent is None or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit("what started this part of a run has ended")


@contextmanager
def _part(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """One process in a group of its own, with what it says; the group is ended with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", _PARENT: str(os.getpid())}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "harness", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

        def said() -> str:
            output.seek(0)
            return output.read().decode(errors="replace")

        try:
            yield process, said
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        # The group, too, of a leader that is gone: it may have left something behind.
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"

"""Processes to be killed: one server imports what is needed and forks, so that a round costs milliseconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parent.parent

_SERVER = """
import os, signal, sys, traceback

{setup}

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)  # nothing is left behind when the test that should kill it fails
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 70
        if "torch" in sys.modules:
            # Threads of a fork that compute at once race for the pool that replaces its parent's (docs/findings.md).
            sys.modules["torch"].set_num_threads(sys.modules["torch"].get_num_threads())
        try:
            work(line.rstrip("\\n"))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()  # not reaped before it is asked for, so that the id stays its own
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """Runs ``work(line)``, which ``setup`` defines, in a fork for each line.

    Args:
        setup: Python source, run once.
        directory: working directory of the server and its forks; beside it lies what the last fork printed.
    """

    def __init__(self, setup: str, directory: Path) -> None:
        self._log = directory.parent / "fork.log"
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER.format(setup=setup, log=str(self._log))],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.kill()
        self._server.communicate()

    def start(self, line: str = "") -> int:
        """Process id of a new fork that works on ``line``."""
        self._log.unlink(missing_ok=True)
        self._say(line)
        return int(self._answer())

    def signal(self, pid: int, number: signal.Signals) -> int:
        """Send a signal to the fork, which may have ended by then; its exit code, negative for a signal."""
        os.kill(pid, number)
        return self.ended()

    def ended(self) -> int:
        """Wait for the fork; its exit code, negative for a signal."""
        self._say("")
        return int(self._answer())

    @property
    def log(self) -> str:
        """What the last fork printed."""
        return self._log.read_text(encoding="utf-8") if self._log.exists() else ""

    def _say(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(f"{line}\n")
        self._server.stdin.flush()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

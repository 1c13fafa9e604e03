"""A team of ranks in processes of this machine: started, asked, watched, and gone afterwards.

A rank that fails, dies, hangs or is stopped ends the team within a bounded time: exceptions and deaths at once, silence
when no rank at work has got anywhere for ``timeout`` seconds. Whatever happens, no process, port or file is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from harness.engines.ranks.failure import Failure, error_of, killed

#: Starting a rank and loading a model may take this many times the limit of silence.
_LOADING = 10
#: Seconds in which the others may tell their side after one rank failed.
_GRACE = 1.0
_TAIL = 4000
#: Frames in which a rank only waits for another.
_WAITING = ("all_reduce", "all_gather", "broadcast", "receive", "from_last", "flush", "wait_tensor", "barrier")


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    pipe: Connection
    lifeline: int
    log: Path
    heard: float = 0.0
    said: str = ""
    ready: bool = False
    busy: bool = False
    answer: Any = None
    failure: Failure | None = field(default=None)

    def tail(self) -> str:
        """The end of what it wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()


class SpawnedTeam:
    """Ranks 0 to ``size - 1``, as processes.

    Args:
        size: how many.
        threads: of each; None shares the cores of the machine among them.
    """

    def __init__(self, size: int, *, threads: int | None = None) -> None:
        self.size = size
        self.spec = ""
        self.timeout = 60.0
        self.progress: Callable[[str], None] = lambda _text: None
        self._directory = Path(tempfile.mkdtemp(prefix="harness-ranks-"))
        self._meetings = 0
        self._ranks: list[_Rank] = []
        try:
            for number in range(size):
                self._ranks.append(self._started(number, threads or max(1, (os.cpu_count() or 1) // size)))
        except BaseException:
            self.close()
            raise

    def _started(self, number: int, threads: int) -> _Rank:
        import socket

        ours, theirs = socket.socketpair()
        lifeline_theirs, lifeline_ours = os.pipe()
        log = self._directory / f"rank-{number}.log"
        # What an outer launcher or a debugger set is not for these ranks.
        kept = {key: value for key, value in os.environ.items() if key not in _OUTER}
        environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path) or os.getcwd(),
            "OMP_NUM_THREADS": str(threads),
            "LOCAL_RANK": str(number),
            # All are on this machine: nothing listens where another one could reach it.
            "GLOO_SOCKET_IFNAME": _loopback(),
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    f"{__package__}.worker",
                    str(theirs.fileno()),
                    str(lifeline_theirs),
                    str(number),
                ],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                pass_fds=(theirs.fileno(), lifeline_theirs),
                start_new_session=True,
            )
        theirs.close()
        os.close(lifeline_theirs)
        return _Rank(
            number=number, process=process, pipe=Connection(ours.detach()), lifeline=lifeline_ours, log=log,
            heard=time.monotonic(),
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether every rank still runs."""
        return bool(self._ranks) and all(rank.process.poll() is None for rank in self._ranks)

    def meeting(self) -> str:
        """A new file where ranks can meet."""
        self._meetings += 1
        return str(self._directory / f"meeting-{self._meetings}")

    def call(self, request: str, *arguments: Any, world: int, loading: bool = False) -> list[Any]:
        """Ask the first ``world`` ranks for the same, and wait for all answers, in their order.

        Args:
            request: a method of serving.Server.
            arguments: of it.
            world: how many ranks.
            loading: allow more silence.

        Raises:
            EngineError: when a rank failed, died or hung; the whole team is gone then.
        """
        asked = self._ranks[:world]
        try:
            self._await(asked, lambda rank: rank.ready, _LOADING * self.timeout)
            now = time.monotonic()
            for rank in asked:
                rank.busy, rank.heard, rank.answer = True, now, None
                rank.pipe.send((request, arguments))
            self._await(asked, lambda rank: not rank.busy, self.timeout * (_LOADING if loading else 1))
        except (OSError, EOFError):
            self._fail(asked)
        except BaseException:
            self.close()
            raise
        return [rank.answer for rank in asked]

    def _await(self, asked: Sequence[_Rank], done: Callable[[_Rank], bool], limit: float) -> None:
        while waiting := [rank for rank in asked if not done(rank)]:
            # A rank that has answered may still die, and is then missed by those that wait for it.
            watched = {rank.pipe: rank for rank in asked}
            ready = wait(list(watched), timeout=0.2)
            for pipe in ready:
                self._hear(watched[pipe])  # type: ignore[index]  # only pipes were given
            if any(rank.failure for rank in asked) or any(rank.process.poll() is not None for rank in asked):
                self._fail(asked)
            latest = max(rank.heard for rank in waiting)
            if time.monotonic() - latest > limit:
                self._fail(asked, silent=limit)
            self.progress(_in_words(asked, done))

    def _hear(self, rank: _Rank) -> None:
        try:
            kind, value = rank.pipe.recv()
        except (EOFError, OSError):
            # Its process has ended, or is about to.
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(_GRACE)
            if rank.process.poll() is None:
                rank.failure = Failure(rank=rank.number, message="closed its pipe", trace=rank.tail())
            return
        rank.heard = time.monotonic()
        if kind == "pulse":
            rank.said = value
        elif kind == "ready":
            rank.ready = True
        elif kind == "failed":
            rank.failure, rank.busy = value, False
        else:
            rank.answer, rank.busy = value, False

    def _fail(self, asked: Sequence[_Rank], silent: float | None = None) -> None:
        """Find out which rank failed, end all, and say so.

        Raises:
            EngineError: always.
        """
        failures = self._silent(asked, silent) if silent is not None else self._told(asked)
        self.close()
        raise error_of(self.spec, failures)

    def _told(self, asked: Sequence[_Rank]) -> list[Failure]:
        """The failures of all ranks, of which one may have brought the others down."""
        end = time.monotonic() + _GRACE
        while (left := end - time.monotonic()) > 0:
            open_ = {rank.pipe: rank for rank in asked if rank.busy and rank.failure is None and _runs(rank)}
            if not open_:
                break
            for pipe in wait(list(open_), timeout=left):
                self._hear(open_[pipe])  # type: ignore[index]  # only pipes were given
        found = []
        for rank in asked:
            code = rank.process.poll()
            if rank.failure is not None:
                found.append(rank.failure)
            elif code is not None:
                found.append(killed(rank.number, code, rank.tail()))
        # A death comes before what others say of it.
        return sorted(found, key=lambda one: (one.is_echo, bool(one.kind)))

    def _silent(self, asked: Sequence[_Rank], limit: float) -> list[Failure]:
        """Who of those that are silent does not just wait for another."""
        silent = [rank for rank in asked if rank.busy or not rank.ready]
        stopped = [rank for rank in silent if _state(rank.process.pid) == "T"]
        before = {rank.number: rank.log.stat().st_size for rank in silent}
        for rank in silent:
            with contextlib.suppress(ProcessLookupError):
                rank.process.send_signal(signal.SIGUSR1)
        time.sleep(_GRACE / 2)
        stacks = {rank.number: rank.log.read_bytes()[before[rank.number] :].decode(errors="replace") for rank in silent}
        busy = [rank for rank in silent if not any(word in stacks[rank.number] for word in _WAITING)]
        guilty = stopped or busy or silent
        return [
            Failure(
                rank=rank.number,
                message=f"is stopped (SIGSTOP), and nothing moved for {limit:g} s"
                if rank in stopped
                else f"got nowhere for {limit:g} s{f' after {rank.said}' if rank.said else ''}",
                trace=stacks[rank.number].strip(),
                fix="Where a step really takes longer, write timeout=SECONDS",
            )
            for rank in guilty
        ]

    def close(self) -> None:
        """End every rank and remove what the team wrote; a rank that does not end is killed."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.pipe.close()
        end = time.monotonic() + _GRACE
        for rank in self._ranks:
            idle = not rank.busy and rank.failure is None and _state(rank.process.pid) != "T"
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, end - time.monotonic()) if idle else 0.0)
            if rank.process.poll() is None:
                # The whole session of the rank: what it may have started goes with it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.wait()
            os.close(rank.lifeline)
        self._ranks = []
        shutil.rmtree(self._directory, ignore_errors=True)


#: What an outer launcher tells its processes.
_OUTER = frozenset(
    {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "GROUP_RANK",
        "TORCHELASTIC_USE_AGENT_STORE",
    }
)


def _runs(rank: _Rank) -> bool:
    return rank.process.poll() is None


def _state(pid: int) -> str:
    """The kernel's letter for a process: "T" is stopped; "" where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _loopback() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def _in_words(asked: Sequence[_Rank], done: Callable[[_Rank], bool]) -> str:
    left = [rank for rank in asked if not done(rank)]
    if any(not rank.ready for rank in asked):
        return f"starting {len(asked)} ranks, {sum(rank.ready for rank in asked)} ready"
    first = next((rank for rank in left if rank.said), None)
    return f"rank {first.number}: {first.said}" if first is not None else ""


# --- kept for several engines ----------------------------------------------------------------------


class _Kept:
    """A team that outlives the engines that use it, inside `kept`."""

    wanted = 0
    team: SpawnedTeam | None = None


@contextmanager
def kept() -> Iterator[None]:
    """Inside, engines that are opened one after another use the same processes; starting them costs seconds."""
    _Kept.wanted += 1
    try:
        yield
    finally:
        _Kept.wanted -= 1
        if _Kept.wanted == 0 and _Kept.team is not None:
            _Kept.team.close()
            _Kept.team = None


def team_of(world: int, threads: int | None) -> SpawnedTeam:
    """A team of at least ``world`` ranks, to be handed to `release`."""
    team, _Kept.team = _Kept.team, None
    if team is not None and team.alive and team.size >= world and threads is None:
        return team
    if team is not None:
        team.close()
    return SpawnedTeam(world, threads=threads)


def release(team: SpawnedTeam) -> None:
    """Give a team back whose engine is closed: it ends, unless it is to be kept."""
    if _Kept.wanted and _Kept.team is None and team.alive:
        _Kept.team = team
    else:
        team.close()

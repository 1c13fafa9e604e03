"""A team of ranks in processes of this machine: started, asked, watched, and gone afterwards.

A rank that fails, dies, hangs or is stopped ends the team within a bounded time: exceptions and deaths at once, silence
when no rank has got anywhere for ``timeout`` seconds. Whatever happens, no process, port or file is left.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.engines.ranks.failure import Failure, error_of, killed, waits_in
from harness.engines.ranks.scratch import Scratch
from harness.engines.ranks.serving import LOADING
from harness.engines.ranks.wire import Wire
from harness.errors import EngineError

#: A rank that loads works where it comes to this many seconds of processor time, or megabytes read, a second.
_WORK = 0.05
#: Seconds in which the others may tell their side after one rank failed.
_GRACE = 1.0
_MOMENT = 0.3
#: Seconds between two looks at the ranks' processes.
_LOOK = 0.2
_TAIL = 4000


@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    wire: Wire
    lifeline: int
    log: Path
    heard: float = 0.0
    said: str = ""
    ready: bool = False
    # Whether it can start anew by itself.
    renews: bool = False
    busy: bool = False
    answer: Any = None
    failure: Failure | None = field(default=None)
    # What it had come to when it was last looked at, when that was, and when it was last seen to work.
    effort: float = 0.0
    looked: float = 0.0
    worked: float = 0.0

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs.

        One that has ended is reaped by `close`: until then its id, which is its session's too, stays its own.
        """
        try:
            found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except (AttributeError, ChildProcessError):
            return self.process.poll()
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    @property
    def runs(self) -> bool:
        """Whether its process runs."""
        return self.code is None

    def written(self, start: int | None = None) -> str:
        """What it wrote from byte ``start`` on; None is its last lines."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL) if start is None else start)
            return file.read().decode(errors="replace").strip()

    def look(self, now: float) -> None:
        """See whether it has worked since the last look."""
        effort = _effort(self.process.pid)
        if effort - self.effort >= _WORK * (now - self.looked):
            self.worked = now
        self.effort, self.looked = effort, now


class SpawnedTeam:
    """Ranks 0 to ``size - 1``, as processes.

    Args:
        size: how many.
        threads: of each; None shares the cores of the machine among them.
        device: that they compute on; those of "cpu" see no other one.
        server: MODULE:CLASS of what answers requests in a rank.
        path: where they look for modules; None is where this process does.
        directory: that they run in; None is this process'.
        environment: what is set for them beside what this process has.
    """

    def __init__(
        self,
        size: int,
        *,
        threads: int | None = None,
        device: str = "cpu",
        server: str = f"{__package__}.serving:Server",
        path: Sequence[str] | None = None,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.size = size
        self.environment = dict(environment or {})
        self.device = device
        self.threads = _threads(threads, size)
        self.spec = ""
        self.timeout = 60.0
        self.progress: Callable[[str], None] = lambda _text: None
        self._server = server
        self._path, self._working = path, directory
        self._scratch = Scratch()
        self._directory = self._scratch.path
        self._meetings = 0
        self._ranks: list[_Rank] = []
        self._closed = threading.Event()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._start_ranks()
            return
        # The kernel ends a rank with the *thread* that started it, so that must be one that stays as long as the team.
        started: Future[None] = Future()

        def stay() -> None:
            try:
                self._start_ranks()
            except BaseException as error:  # noqa: BLE001  # raised again where it is waited for
                started.set_exception(error)
            else:
                started.set_result(None)
                self._closed.wait()

        threading.Thread(target=stay, daemon=True).start()
        started.result()

    def _start_ranks(self) -> None:
        for number in range(self.size):
            self._ranks.append(self._started(number))

    def _started(self, number: int) -> _Rank:
        ours, theirs = socket.socketpair()
        lifeline_theirs, lifeline_ours = os.pipe()
        log = self._directory / f"rank-{number}.log"
        # What an outer launcher or a debugger set is not for these ranks.
        kept = {key: value for key, value in os.environ.items() if key not in _OUTER}
        environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join(path for path in self._path or sys.path if path) or os.getcwd(),
            **(_NO_ACCELERATOR if self.device == "cpu" else {}),
            "OMP_NUM_THREADS": str(self.threads),
            "LOCAL_RANK": str(number),
            # All are on this machine: nothing listens where another one could reach it.
            "GLOO_SOCKET_IFNAME": _loopback(),
            # What a rank has printed before it was killed is in its log.
            "PYTHONUNBUFFERED": "1",
            # No address: ranks meet in a file. Libraries name by it what they share in this machine's memory.
            "MASTER_ADDR": self._directory.name,
            "MASTER_PORT": "0",
            **self.environment,
        }
        numbers = [str(one) for one in (theirs.fileno(), lifeline_theirs, number)]
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", f"{__package__}.worker", *numbers, self._server],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=environment,
                    cwd=self._working,
                    pass_fds=(theirs.fileno(), lifeline_theirs),
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            os.close(lifeline_ours)
            raise
        finally:
            theirs.close()
            os.close(lifeline_theirs)
        now = time.monotonic()
        wire = Wire(ours)
        wire.watch()
        return _Rank(
            number=number, process=process, wire=wire, lifeline=lifeline_ours, log=log,
            heard=now, looked=now, worked=now,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether every rank still runs."""
        return bool(self._ranks) and all(rank.runs for rank in self._ranks)

    @property
    def renews(self) -> bool:
        """Whether every rank starts anew at the request worker.RENEW, which is faster than a new team."""
        return self.alive and all(rank.renews for rank in self._ranks)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the ranks, each also that of a session."""
        return tuple(rank.process.pid for rank in self._ranks)

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
            loading: allow more silence, where the ranks are seen to work.

        Raises:
            EngineError: when a rank failed, died or hung, and the whole team is gone then; or where it is gone already.
        """
        asked = self._ranks[:world]
        if len(asked) < world:
            problem = f"{self.spec} asks {world} ranks, and its team has {len(asked)}"
            raise EngineError(problem, fix="Open it anew: a team whose rank has failed is gone")
        try:
            self._await(asked, lambda rank: rank.ready, loading=True)
            now = time.monotonic()
            for rank in asked:
                rank.busy, rank.answer = True, None
                rank.heard = rank.worked = now
                rank.wire.put((request, arguments))
            self._await(asked, lambda rank: not rank.busy, loading=loading)
        except BaseException:
            # Also where the user interrupts: ranks in the middle of a request are of no use to anyone.
            self.close()
            raise
        return [rank.answer for rank in asked]

    def _await(self, asked: Sequence[_Rank], done: Callable[[_Rank], bool], *, loading: bool) -> None:
        while not all(done(rank) for rank in asked):
            # A rank that has answered may still die, and is then missed by those that wait for it.
            self._listen(asked, _LOOK)
            if any(rank.failure is not None or not rank.runs for rank in asked):
                self._fail(asked, self._told(asked))
            if quiet := self._quiet(asked, loading):
                self._fail(asked, self._silent(asked, quiet))
            self.progress(_in_words(asked, done))

    def _quiet(self, asked: Sequence[_Rank], loading: bool) -> float:
        """Seconds in which no rank has got anywhere, where these are too many; else 0.0."""
        now = time.monotonic()
        heard = max(rank.heard for rank in asked)
        if not loading:
            return self.timeout if now - heard > self.timeout else 0.0
        # All of it where a rank is seen to work, or where the system does not show that.
        if now - heard > LOADING * self.timeout:
            return LOADING * self.timeout
        # Looks further apart than the system's clock of processor time is coarse.
        for rank in asked:
            if now - rank.looked > min(1.0, self.timeout / 4):
                rank.look(now)
        worked = max(heard, *(rank.worked for rank in asked))
        return self.timeout if any(rank.effort for rank in asked) and now - worked > self.timeout else 0.0

    def _listen(self, asked: Sequence[_Rank], seconds: float) -> None:
        """Exchange what there is to be exchanged; at most so many seconds pass before there is something."""
        open_ = {rank.wire.fileno(): rank for rank in asked if not rank.wire.ended}
        poll = select.poll()
        for number, rank in open_.items():
            poll.register(number, select.POLLIN | (select.POLLOUT if rank.wire.wants_to_write else 0))
        if not open_:
            time.sleep(seconds)
        for number, _ in poll.poll(1000 * seconds) if open_ else []:
            self._hear(open_[number])

    def _hear(self, rank: _Rank) -> None:
        for kind, value in rank.wire.exchange():
            rank.heard = time.monotonic()
            if kind == "pulse":
                rank.said = value
            elif kind == "ready":
                rank.ready, rank.renews = True, bool(value)
            elif kind == "failed":
                rank.failure, rank.busy = value, False
            else:
                rank.answer, rank.busy = value, False
        if rank.wire.ended and rank.failure is None:
            # Its process has ended, or is about to.
            end = time.monotonic() + _GRACE
            while rank.runs and time.monotonic() < end:
                time.sleep(0.01)
            if rank.runs:
                rank.failure = Failure(rank=rank.number, message="closed its connection", trace=rank.written())

    def _fail(self, asked: Sequence[_Rank], failures: Sequence[Failure]) -> None:
        """End all, and say which rank failed.

        Raises:
            EngineError: always.
        """
        self.close()
        raise error_of(self.spec, failures)

    def _told(self, asked: Sequence[_Rank]) -> list[Failure]:
        """The failures of all ranks, of which one may have brought the others down."""
        begun = time.monotonic()
        while open_ := [rank for rank in asked if rank.busy and rank.failure is None and rank.runs]:
            # Where one has told of itself, and not of another that has gone, the others are heard for a moment only.
            own = any(not rank.runs or (rank.failure is not None and not rank.failure.is_echo) for rank in asked)
            left = begun + (_MOMENT if own else _GRACE) - time.monotonic()
            if left <= 0:
                break
            self._listen(open_, min(left, _LOOK))
        found = []
        for rank in asked:
            if rank.failure is not None:
                found.append(rank.failure)
            elif (code := rank.code) is not None:
                found.append(killed(rank.number, code, rank.written()))
        # A death comes before what others say of it.
        return sorted(found, key=lambda one: (one.is_echo, bool(one.kind)))

    def _silent(self, asked: Sequence[_Rank], seconds: float) -> list[Failure]:
        """Who of those that are silent does not just wait for another."""
        silent = [rank for rank in asked if rank.busy or not rank.ready]
        if stopped := [rank for rank in silent if _is_stopped(rank)]:
            what = f"is stopped (SIGSTOP), and nothing moved for {seconds:g} s"
            fix = "Let nothing stop its process, such as Ctrl-Z, a debugger or a batch system"
            return [Failure(rank=rank.number, message=what, fix=fix) for rank in stopped]
        stacks = _stacks(silent)
        waiting = {rank.number: waits_in(stacks[rank.number]) for rank in silent}
        return [
            Failure(
                rank=rank.number,
                message=_stillness(rank, waiting[rank.number], seconds),
                trace=stacks[rank.number],
                fix="Where a step really takes longer, write timeout=SECONDS",
            )
            for rank in [rank for rank in silent if not waiting[rank.number]] or silent
        ]

    def close(self) -> None:
        """End every rank and remove what the team wrote; a rank that does not end is killed."""
        for rank in self._ranks:
            rank.wire.finish()
        end = time.monotonic() + _GRACE
        while self._ranks:
            # Taken off the list when it is gone: one who is interrupted here can close again.
            _end(self._ranks[-1], end)
            self._ranks.pop()
        self._scratch.remove()
        self._closed.set()


def _end(rank: _Rank, end: float) -> None:
    """End a rank: until ``end`` by itself where it has nothing to do, else at once."""
    idle = rank.ready and not rank.busy and rank.failure is None and not _is_stopped(rank)
    while idle and rank.runs and time.monotonic() < end:
        time.sleep(0.01)
    # The whole session of the rank: what it may have started goes with it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.process.pid, signal.SIGKILL)
    # One that waits in the kernel, for a disk that does not answer, ends when that does.
    with contextlib.suppress(subprocess.TimeoutExpired):
        rank.process.wait(10 * _GRACE)
    # A life of it is no child of this process: it can only be seen to be gone.
    end = time.monotonic() + _MOMENT
    while rank.renews and time.monotonic() < end and _is_left(rank.process.pid):
        time.sleep(0.005)
    rank.wire.close()
    with contextlib.suppress(OSError):
        os.close(rank.lifeline)


def _is_left(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _stacks(ranks: Sequence[_Rank]) -> dict[int, str]:
    """What each rank's main thread is doing, in faulthandler's words; "" for one that does not say."""
    before = {rank.number: rank.log.stat().st_size for rank in ranks}
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.process.send_signal(signal.SIGUSR1)
    end = time.monotonic() + _GRACE
    while time.monotonic() < end and any(rank.log.stat().st_size == before[rank.number] for rank in ranks):
        time.sleep(0.05)
    time.sleep(0.1)  # a stack is written in several pieces
    return {rank.number: rank.written(before[rank.number]) for rank in ranks}


def _stillness(rank: _Rank, waiting: str, seconds: float) -> str:
    if waiting:
        return f"waits in {waiting} for a rank that does not come, since {seconds:g} s"
    where = f" after {rank.said}" if rank.said else "" if rank.ready else " while it started"
    return f"got nowhere for {seconds:g} s{where}"


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


#: transformers shards a model on whatever accelerator torch sees, whichever device is asked for.
_NO_ACCELERATOR = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def _threads(threads: int | None, size: int) -> int:
    """Threads of each of so many ranks."""
    return threads or max(1, (os.cpu_count() or 1) // size)


def _is_stopped(rank: _Rank) -> bool:
    """Whether its process is stopped, by a signal or by a debugger; false where the system does not tell.

    Or the one that it lives in, where it can start anew.
    """
    pids = [rank.process.pid, *(_children(rank.process.pid) if rank.renews else [])]
    return any(_stat(pid)[0] in ("T", "t") for pid in pids)


def _effort(pid: int) -> float:
    """Seconds of processor time and megabytes read that a process and its children have come to.

    0.0 where the system does not tell.
    """
    return sum(_own_effort(one) for one in (pid, *_children(pid)))


def _children(pid: int) -> list[int]:
    """Its children by their ids: a worker that can start anew lives in one. None where the system does not tell."""
    with contextlib.suppress(OSError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    return []


def _own_effort(pid: int) -> float:
    fields = _stat(pid)
    if len(fields) < 15:
        return 0.0
    pages, ticks = int(fields[9]), int(fields[11]) + int(fields[12])
    read = pages * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError):
        read += int(Path(f"/proc/{pid}/io").read_text(encoding="ascii").split()[1])
    return ticks / os.sysconf("SC_CLK_TCK") + read / 1e6


def _stat(pid: int) -> list[str]:
    """Linux' /proc/PID/stat from the state on; one empty text where the system has none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return [""]
    return text.rpartition(")")[2].split() or [""]


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


def team_of(
    world: int, threads: int | None, *, device: str = "cpu", environment: Mapping[str, str] | None = None
) -> SpawnedTeam:
    """A team of at least ``world`` ranks, to be handed to `release`.

    A kept team serves where it has ranks enough, the same device, environment and threads a rank; else it is ended.

    Args:
        world: how many ranks are needed.
        threads: of each; None shares the cores among all ranks of the team, which are more than ``world`` where a
            larger one is kept.
        device: that they compute on.
        environment: what is set for them beside what this process has.
    """
    team, _Kept.team = _Kept.team, None
    if team is not None:
        asked = (_threads(threads, team.size), device, dict(environment or {}))
        alike = (team.threads, team.device, team.environment) == asked
        if alike and team.alive and team.size >= world:
            return team
        team.close()
    return SpawnedTeam(world, threads=threads, device=device, environment=environment)


def release(team: SpawnedTeam) -> None:
    """Give a team back whose engine is closed: it ends, unless it is to be kept."""
    if _Kept.wanted and _Kept.team is None and team.alive:
        _Kept.team = team
    else:
        team.close()

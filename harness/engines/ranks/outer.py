"""A team that an outer launcher started: torchrun, deepspeed, srun or mpirun run the same command once a rank.

Rank 0 reads goldens, judges and prints; every other rank follows it and does its part of the model. They meet in the
launcher's store, so that several nodes work with what a site already has.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import itertools
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harness.engines.ranks.failure import Failure, error_of, raised
from harness.engines.ranks.serving import Server, Setup
from harness.errors import EngineError, UsageError, first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

#: What launchers call rank, number of ranks and rank on this node: torchrun and deepspeed; Slurm; Open MPI; PMI.
#: Slurm's are those of a step: a batch script itself is told a rank and a number of tasks too, and is no rank.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_PREFIX = "golden-harness"
#: A rank that follows waits this long for the next request: as long as a verdict takes.
_PATIENCE = timedelta(days=1)
#: The others are waited for so long at the start.
_ARRIVAL = timedelta(minutes=10)
#: Seconds in which the others may tell their side after one rank failed, and end after rank 0 has.
_GRACE = 5.0
#: As spawned.py: loading may take this many times the limit of silence.
_LOADING = 10


class Followed(SystemExit):
    """The end of a rank that has followed rank 0 to its end: there is nothing for it to judge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """This process among those that were launched."""

    rank: int
    world: int


def launched(environment: Mapping[str, str] | None = None) -> Outer | None:
    """What an outer launcher says of this process, None where there is no other one.

    Raises:
        UsageError: for a rank that is not below the number of ranks.
    """
    given = os.environ if environment is None else environment
    for rank, world, _ in _NAMES:
        try:
            found = Outer(rank=int(given[rank]), world=int(given[world]))
        except (KeyError, ValueError):
            continue
        if found.world > 1 and not 0 <= found.rank < found.world:
            problem = f"{rank}={found.rank} is no rank of {world}={found.world}"
            raise UsageError(problem, fix=f"Unset {rank}, or launch all ranks with one launcher")
        return found if found.world > 1 else None
    return None


def _local_rank() -> str:
    return next((os.environ[local] for _, _, local in _NAMES if local in os.environ), "0")


@lru_cache(maxsize=1)
def _store(rank: int, world: int) -> Store:
    """The store that the launcher's environment names.

    Raises:
        UsageError: where it names none, or the others are not there.
    """
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UsageError(
            f"rank {rank} of {world} was launched, and does not know where the others are",
            fix="Export MASTER_ADDR (the first node) and MASTER_PORT (a free port) on all ranks, as torchrun does",
        )
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    os.environ.setdefault("LOCAL_RANK", _local_rank())
    try:
        store, _, _ = next(iter(rendezvous("env://", rank=rank, world_size=world, timeout=_ARRIVAL)))
    except (RuntimeError, ValueError, OSError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(
            f"rank {rank} of {world} cannot meet the others at {place} ({first_line(error)})",
            fix="MASTER_ADDR must be the node of rank 0, MASTER_PORT free there, and every rank started",
        ) from error
    return PrefixStore(_PREFIX, store)


class OuterTeam:
    """All launched ranks, seen from rank 0, which is one of them."""

    spec = ""
    timeout = 60.0

    def __init__(self, outer: Outer) -> None:
        self.size = outer.world
        self.progress: Callable[[str], None] = lambda _text: None
        self._shared = _store(outer.rank, outer.world)
        self._watch = _Watch()
        self._own = Server(0, lambda setup: _meeting(self._shared, setup), self._pulse)
        self._failed = False

    def _pulse(self, what: str) -> None:
        self._watch.beat()
        self.progress(f"rank 0: {what}")

    def meeting(self) -> str:
        """A name under which the ranks' groups meet."""
        return f"meeting-{_Requests.number}"

    def call(self, request: str, *arguments: Any, world: int, loading: bool = False) -> list[Any]:
        """As `SpawnedTeam.call`; these ranks wait for each other as long as their groups do."""
        if self._failed and request == "close":
            return []  # it is closed, and a rank that hangs would not answer
        if _Requests.lost is not None:
            raise error_of(self.spec, [_Requests.lost])
        number = _Requests.next()
        _put(self._shared, f"{number}/request", (request, arguments))
        failures: list[Failure] = []
        answers: list[Any] = []
        # A rank that waits gives up after twice the time and half a minute (Setup.timeout): what is silent for longer
        # than that hangs by itself.
        limit = self.timeout * (2 + (_LOADING if loading else 0)) + 30 + 2 * _GRACE
        try:
            with self._watch.over(limit, self.spec):
                answers.append(self._own.answer(request, *arguments))
        except Exception as error:  # noqa: BLE001  # whatever it was, the others' side is to be told too
            failures.append(raised(0, error))
            self._failed = True
            self._leave()
        end = time.monotonic() + (_GRACE if failures else self.timeout * (_LOADING if loading else 1))
        for rank in range(1, world):
            found = self._answer(number, rank, end)
            if isinstance(found, Failure):
                failures.append(found)
                end = min(end, time.monotonic() + _GRACE)
            else:
                answers.extend(found)
        if failures:
            self._failed = True
            raise error_of(self.spec, sorted(failures, key=lambda one: (one.is_echo, one is _Requests.lost)))
        return answers

    def _answer(self, number: int, rank: int, end: float) -> list[Any] | Failure:
        """What a rank has answered, in a list of one."""
        key = f"{number}/{rank}"
        patience = max(0.1, end - time.monotonic())
        try:
            self._shared.wait([key], timedelta(seconds=patience))
        except RuntimeError:
            _Requests.lost = Failure(
                rank=rank,
                message="did not answer",
                fix="Look at what the launcher says of it",
            )
            return _Requests.lost
        kind, value = _got(self._shared, key)
        self._shared.delete_key(key)
        found: list[Any] | Failure = [value] if kind == "done" else value
        return found

    def _leave(self) -> None:
        """Leave the groups: a rank that waits for this one sees that it has gone."""
        with contextlib.suppress(Exception):
            self._own.close()

    def close(self) -> None:
        """Nothing: the ranks follow until this process ends."""


class _Watch:
    """Ends this process when its main thread gets nowhere: nobody else can tell of rank 0."""

    def __init__(self) -> None:
        self._last = 0.0

    def beat(self) -> None:
        """It gets somewhere."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def over(self, seconds: float, spec: str) -> Iterator[None]:
        """Inside, at most so many seconds pass between two beats."""
        done = threading.Event()
        self.beat()

        def watch() -> None:
            while not done.wait(min(1.0, seconds / 4)):
                if time.monotonic() - self._last > seconds:
                    sys.stderr.write(f"error: rank 0 of {spec}: got nowhere for {seconds:g} s\n")
                    sys.stderr.flush()
                    faulthandler.dump_traceback(file=2)
                    os._exit(EngineError.exit_code)

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            done.set()


class _Requests:
    """Numbers of the requests of this process, over all teams."""

    number = 0
    #: A rank that did not answer: there is no use in asking it for more.
    lost: Failure | None = None
    _ending = False

    @classmethod
    def next(cls) -> int:
        cls.number += 1
        return cls.number

    @classmethod
    def end_at_exit(cls, store: Store, world: int) -> None:
        """Tell the other ranks to end when this process does, and wait a little until they have heard it.

        Rank 0 may be where the store is: what it has not said before it ends is never heard.
        """
        if cls._ending:
            return
        cls._ending = True

        def tell() -> None:
            with contextlib.suppress(RuntimeError):
                _put(store, f"{cls.next()}/request", ("end", ()))
                end = time.monotonic() + _GRACE
                while store.add("ended", 0) < world - 1 and time.monotonic() < end:
                    time.sleep(0.02)

        atexit.register(tell)


def _meeting(shared: Store, setup: Setup) -> Store:
    from torch._C._distributed_c10d import PrefixStore

    return PrefixStore(setup.meeting, shared)


def _put(store: Store, key: str, value: Any) -> None:
    store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes, whatever its stub says


def _got(store: Store, key: str) -> Any:
    # What ranks of this launch wrote there, as torch's own object collectives do; never a file.
    return pickle.loads(store.get(key))  # noqa: S301


def follow() -> None:
    """Where several ranks were launched, meet them; every one but rank 0 does what rank 0 asks until it ends, and ends.

    Raises:
        Followed: at the end of a rank that is not 0.
        UsageError: where they cannot meet.
        EngineError: where rank 0 has gone without a word.
    """
    outer = launched()
    if outer is None:
        return
    store = _store(outer.rank, outer.world)
    if outer.rank == 0:
        _Requests.end_at_exit(store, outer.world)
        return
    _do_as_asked(store, outer.rank, Server(outer.rank, lambda setup: _meeting(store, setup), lambda _what: None))
    raise Followed(0)


def _do_as_asked(store: Store, rank: int, server: Server) -> None:
    """Answer rank 0's requests until it ends."""
    for number in itertools.count(1):
        try:
            store.wait([f"{number}/request"], _PATIENCE)
            request, arguments = _got(store, f"{number}/request")
            if request == "end":
                store.add("ended", 1)
                return
            kind, value = _answered(server, rank, request, arguments)
            _put(store, f"{number}/{rank}", (kind, value))
        except RuntimeError as error:
            raise EngineError(f"rank {rank} lost rank 0", fix="See what rank 0 says") from error
        if kind == "failed":
            # Said before it leaves the groups, so that the complaint of a rank that waits for it is not heard first.
            with contextlib.suppress(Exception):
                server.close()


def _answered(server: Server, rank: int, request: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "done", server.answer(request, *arguments)
    except Exception as error:  # noqa: BLE001  # rank 0 tells it
        return "failed", raised(rank, error)

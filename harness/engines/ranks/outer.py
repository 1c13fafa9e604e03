"""A team that an outer launcher started: torchrun, deepspeed, srun or mpirun run the same command once a rank.

Rank 0 reads goldens, judges and prints; every other rank follows it and does its part of the model. They meet in the
launcher's store, so that several nodes work with what a site already has. Rank 0 meets the others when it opens an
engine of several ranks; the others wait for that from their start.

Who fails ends the run within these bounds, T being `timeout` (60 s):

- a rank that raises, or whose process ends: at once, plus 5 s in which the others tell their side;
- a rank that hangs or is stopped, where rank 0 waits for it in a collective: 2 T + 30 s (150 s), after which a rank
  gives up, plus those 5 s; where it does not: T after rank 0 has done its own part, 10 T while a model is loaded;
- rank 0 itself, by its own watch: 2 T + 40 s (160 s) without a block, 12 T + 40 s while a model is loaded;
- ranks that do not come: 10 minutes from when rank 0 needs them; the others wait as long for rank 0's store.
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
from harness.engines.ranks.serving import LOADING, Server, Setup, patience
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
#: Where ranks other than 0 are counted when they come, and when they have heard of the end.
_HERE, _ENDED = "here", "ended"
#: A rank that follows waits this long for the next request: as long as a verdict takes.
_PATIENCE = timedelta(days=1)
#: The others are waited for so long at the start.
_ARRIVAL = timedelta(minutes=10)
#: Seconds in which the others may tell their side after one rank failed, and end after rank 0 has.
_GRACE = 5.0
#: Seconds between two looks for an answer.
_LOOK = 0.02
#: torch's store drops a connection that brings it more than 8 MiB at once.
_PIECE = 2**21


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


def refuse_accelerator(device: str | None, tensor: int) -> None:
    """Refuse shards on the CPU where this rank's torch sees an accelerator: transformers would put them there.

    Args:
        device: of the SPEC; None is the CPU.
        tensor: number of shards.

    Raises:
        UsageError: that says how to start the ranks.
    """
    if tensor == 1 or (device or "cpu") != "cpu":
        return
    import torch

    if (found := torch._C._get_accelerator().type) != "cpu":
        raise UsageError(
            f"device=cpu with {tensor} shards needs ranks that see no accelerator, and these see {found}",
            fix="Start them with no device (CUDA_VISIBLE_DEVICES= torchrun ...), or write device=cuda",
        )


def _place(rank: int, world: int) -> str:
    """HOST:PORT where the ranks meet.

    Raises:
        UsageError: where the environment names none.
    """
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UsageError(
            f"rank {rank} of {world} was launched, and does not know where the others are",
            fix="Export MASTER_ADDR (the first node) and MASTER_PORT (a free port) on all ranks, as torchrun does",
        )
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


@lru_cache(maxsize=1)
def _store(rank: int, world: int) -> Store:
    """The store that the launcher's environment names: the launcher's own, or else rank 0's.

    Rank 0 does not wait for the others here, and they wait for it.

    Raises:
        UsageError: where it names none, or the store is not there.
    """
    place = _place(rank, world)
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    os.environ.setdefault("LOCAL_RANK", _local_rank())
    host, _, port = place.rpartition(":")
    is_own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            # Its own is not held up by a name that nobody knows.
            "localhost" if is_own else host,
            int(port),
            world,
            is_master=is_own,
            # For rank 0 it is on this machine, or that of the launcher which has started this process.
            timeout=timedelta(seconds=_GRACE) if rank == 0 else _ARRIVAL,
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set_timeout(_ARRIVAL)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UsageError(
            f"rank {rank} of {world} cannot meet the others at {place} ({first_line(error)})",
            fix="MASTER_ADDR must be the node of rank 0, MASTER_PORT free there, and every rank started",
        ) from error
    return PrefixStore(_PREFIX, store)


def _gather(store: Store, world: int, seconds: float) -> int:
    """On rank 0, wait at most so long until all ranks are there; how many are."""
    end = time.monotonic() + seconds
    while (there := store.add(_HERE, 0) + 1) < world and time.monotonic() < end:
        time.sleep(_LOOK)
    return there


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

    @property
    def alive(self) -> bool:
        """Whether no rank has failed; one that hangs would not answer."""
        return not self._failed and _Requests.lost is None

    def meeting(self) -> str:
        """A name under which the ranks' groups meet."""
        return f"meeting-{_Requests.number}"

    def call(self, request: str, *arguments: Any, world: int, loading: bool = False) -> list[Any]:
        """As `SpawnedTeam.call`; these ranks wait for each other as long as their groups do."""
        if _Requests.lost is not None:
            raise error_of(self.spec, [_Requests.lost])
        if self._failed:
            # It has left the groups: the others would wait for it.
            raise EngineError(f"a rank of {self.spec} has failed", fix="Open it anew")
        data = pickle.dumps((request, arguments))  # before anything is told of it: it may be what cannot be sent
        try:
            answers, failures = self._asked(data, request, arguments, world, loading)
        except BaseException:
            # Ctrl-C, or what a hook does to this process: nothing more is asked or waited for.
            self._fail()
            raise
        if failures:
            self._fail()
            raise error_of(self.spec, sorted(failures, key=lambda one: (one.is_echo, one is _Requests.lost)))
        return answers

    def _asked(
        self, data: bytes, request: str, arguments: tuple[Any, ...], world: int, loading: bool
    ) -> tuple[list[Any], list[Failure]]:
        """What the ranks answered, and how those failed that did not."""
        key = f"{_Requests.next()}/request"
        try:
            _put(self._shared, key, data)
        except RuntimeError as error:
            what = f"cannot reach the store of the ranks ({first_line(error)})"
            _Requests.lost = Failure(rank=0, message=what, fix="See whether the launcher and the first node are alive")
            return [], [_Requests.lost]
        answers: list[Any] = []
        failures: list[Failure] = []
        # What is silent for longer than a rank waits for another hangs by itself.
        limit = patience(self.timeout) + (LOADING * self.timeout if loading else 0) + 2 * _GRACE
        try:
            with self._watch.over(limit, self.spec):
                answers.append(self._own.answer(request, *arguments))
        except Exception as error:  # noqa: BLE001  # whatever it was, the others' side is to be told too
            failures.append(raised(0, error))
            self._fail()
        end = time.monotonic() + (_GRACE if failures else self.timeout * (LOADING if loading else 1))
        for rank in range(1, world):
            found = self._answer(f"{_Requests.number}/{rank}", rank, end)
            if isinstance(found, Failure):
                failures.append(found)
                end = min(end, time.monotonic() + _GRACE)
            else:
                answers.extend(found)
        if _Requests.lost is None:
            # Who has answered has read it.
            with contextlib.suppress(RuntimeError):
                _delete(self._shared, key)
        return answers, failures

    def _answer(self, key: str, rank: int, end: float) -> list[Any] | Failure:
        """What a rank has answered, in a list of one."""
        why = ""
        try:
            # Looked for and not waited for: Ctrl-C is not heard inside the store.
            while not (there := self._shared.check([key])) and time.monotonic() < end:
                time.sleep(_LOOK)
            if there:
                kind, value = pickle.loads(_got(self._shared, key))  # noqa: S301  # as in _do_as_asked
                _delete(self._shared, key)
                found: list[Any] | Failure = [value] if kind == "done" else value
                return found
        except RuntimeError as error:
            why = f" ({first_line(error)})"
        _Requests.lost = Failure(rank=rank, message=f"did not answer{why}", fix="Look at what the launcher says of it")
        return _Requests.lost

    def _fail(self) -> None:
        """Leave the groups, once: a rank that waits for this one sees that it has gone."""
        if not self._failed:
            self._failed = True
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
        """Tell the other ranks to end when this process does."""
        if not cls._ending:
            cls._ending = True
            atexit.register(cls.end, store, world)

    @classmethod
    def end(cls, store: Store, world: int) -> None:
        """Tell the other ranks to end, and wait a little until they have heard it.

        Rank 0 may be where the store is: what it has not said before it ends is never heard.
        """
        cls._ending = True
        with contextlib.suppress(RuntimeError):
            _put(store, f"{cls.next()}/request", pickle.dumps(("end", ())))
            end = time.monotonic() + _GRACE
            while store.add(_ENDED, 0) < world - 1 and time.monotonic() < end:
                time.sleep(_LOOK)

    @classmethod
    def met(cls) -> bool:
        """Whether the other ranks have been met, and are told of the end."""
        return cls._ending


def _meeting(shared: Store, setup: Setup) -> Store:
    from torch._C._distributed_c10d import PrefixStore

    return PrefixStore(setup.meeting, shared)


def _put(store: Store, key: str, data: bytes) -> None:
    """Write data of any size; the key itself comes last, and says in how many pieces."""
    pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
    for number, piece in enumerate(pieces):
        store.set(f"{key}/{number}", piece)  # type: ignore[arg-type]  # it takes bytes, whatever its stub says
    store.set(key, str(len(pieces)))


def _got(store: Store, key: str) -> bytes:
    """What `_put` has written."""
    return b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key))))


def _delete(store: Store, key: str) -> None:
    """Remove what `_put` has written."""
    for number in range(int(store.get(key))):
        store.delete_key(f"{key}/{number}")
    store.delete_key(key)


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
    place = _place(outer.rank, outer.world)
    if outer.rank == 0:
        store = _store(outer.rank, outer.world)
        if not _Requests.met() and (there := _gather(store, outer.world, _ARRIVAL.total_seconds())) < outer.world:
            problem = f"{there} of {outer.world} ranks came to {place} in {_ARRIVAL.total_seconds():g} s"
            fix = "Start the command on every rank, with MASTER_ADDR the node of rank 0, or unset the names of a rank"
            raise UsageError(problem, fix=fix)
        _Requests.end_at_exit(store, outer.world)
        return
    # To whoever only inherited a rank's environment, this tells what holds the command up.
    sys.stderr.write(f"rank {outer.rank} of {outer.world} follows rank 0 at {place} ...\n")
    sys.stderr.flush()
    store = _store(outer.rank, outer.world)
    with _losing(outer.rank):
        store.add(_HERE, 1)
    _do_as_asked(store, outer.rank, Server(outer.rank, lambda setup: _meeting(store, setup), lambda _what: None))
    raise Followed(0)


@contextlib.contextmanager
def led() -> Iterator[None]:
    """On rank 0, let others come inside, without waiting for them; at the end let those go that were not needed.

    Where there is no store that they could come to, it is missed by `follow`.
    """
    outer = launched()
    store, begun = None, time.monotonic()
    if outer is not None and outer.rank == 0:
        with contextlib.suppress(UsageError):
            store = _store(outer.rank, outer.world)
    try:
        yield
    finally:
        if outer is not None and store is not None and not _Requests.met():
            # Those that were started with this one may still be on their way.
            with contextlib.suppress(RuntimeError):
                there = _gather(store, outer.world, begun + _GRACE - time.monotonic())
                _Requests.end(store, there)


@contextlib.contextmanager
def _losing(rank: int) -> Iterator[None]:
    """What the store complains of inside means that rank 0 has gone.

    Raises:
        EngineError: that says so.
    """
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"rank {rank} lost rank 0", fix="See what rank 0 says") from error


def _do_as_asked(store: Store, rank: int, server: Server) -> None:
    """Answer rank 0's requests until it ends."""
    for number in itertools.count(1):
        with _losing(rank):
            store.wait([f"{number}/request"], _PATIENCE)
            # What ranks of this launch wrote there, as torch's own object collectives do; never a file.
            request, arguments = pickle.loads(_got(store, f"{number}/request"))  # noqa: S301
            if request == "end":
                store.add(_ENDED, 1)
                return
            failed, data = _answered(server, rank, request, arguments)
            _put(store, f"{number}/{rank}", data)
        if failed:
            # Said before it leaves the groups, so that the complaint of a rank that waits for it is not heard first.
            with contextlib.suppress(Exception):
                server.close()


def _answered(server: Server, rank: int, request: str, arguments: tuple[Any, ...]) -> tuple[bool, bytes]:
    """(whether it failed, what rank 0 is told)."""
    try:
        return False, pickle.dumps(("done", server.answer(request, *arguments)))
    except (Exception, SystemExit) as error:  # noqa: BLE001  # rank 0 tells it
        return True, pickle.dumps(("failed", raised(rank, error)))

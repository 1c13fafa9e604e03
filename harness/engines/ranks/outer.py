"""A team that an outer launcher started: torchrun, deepspeed, srun or mpirun run the same command once a rank.

Rank 0 reads goldens, judges and prints; every other rank follows it and does its part of the model. They meet in the
launcher's store, so that several nodes work with what a site already has.
"""

from __future__ import annotations

import atexit
import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harness.engines.ranks.failure import Failure, error_of
from harness.engines.ranks.serving import Server, Setup
from harness.errors import EngineError, HarnessError, UsageError, first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

#: What launchers call rank, number of ranks and rank on this node: torchrun and deepspeed; Slurm; Open MPI; PMI.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_PREFIX = "golden-harness"
#: A rank that follows waits this long for the next request: as long as a verdict takes.
_PATIENCE = timedelta(days=1)
_GRACE = timedelta(seconds=10)


class Followed(SystemExit):
    """The end of a rank that has followed rank 0 to its end: there is nothing for it to judge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """This process among those that were launched."""

    rank: int
    world: int


def launched(environment: Mapping[str, str] | None = None) -> Outer | None:
    """What an outer launcher says of this process, None where there is no other one."""
    given = os.environ if environment is None else environment
    for rank, world, _ in _NAMES:
        try:
            found = Outer(rank=int(given[rank]), world=int(given[world]))
        except (KeyError, ValueError):
            continue
        return found if found.world > 1 else None
    return None


def _local_rank() -> str:
    return next((os.environ[local] for _, _, local in _NAMES if local in os.environ), "0")


@lru_cache(maxsize=1)
def _store(rank: int, world: int) -> Store:
    """The store that the launcher's environment names."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UsageError(
            f"rank {rank} of {world} was launched, and does not know where the others are",
            fix="Export MASTER_ADDR (the first node) and MASTER_PORT (a free port) on all ranks, as torchrun does",
        )
    os.environ.setdefault("LOCAL_RANK", _local_rank())
    store, _, _ = next(iter(rendezvous("env://", rank=rank, world_size=world, timeout=timedelta(minutes=10))))
    return PrefixStore(_PREFIX, store)


class OuterTeam:
    """All launched ranks, seen from rank 0, which is one of them."""

    spec = ""
    timeout = 60.0

    def __init__(self, outer: Outer) -> None:
        self.size = outer.world
        self.progress: Callable[[str], None] = lambda _text: None
        self._shared = _store(outer.rank, outer.world)
        self._own = Server(0, lambda setup: _meeting(self._shared, setup), lambda _what: None)
        _Requests.end_at_exit(self._shared)

    def meeting(self) -> str:
        """A name under which the ranks' groups meet."""
        return f"meeting-{_Requests.number}"

    def call(self, request: str, *arguments: Any, world: int, loading: bool = False) -> list[Any]:
        """As `SpawnedTeam.call`; an outer launcher's ranks wait for each other as long as their groups do."""
        import torch

        number = _Requests.next()
        _put(self._shared, f"{number}/request", (request, arguments))
        failures, answers = [], []
        try:
            answers.append(self._own.answer(request, *arguments))
        except Exception as error:  # noqa: BLE001  # whatever it was, the others' side is to be told too
            failures.append(_failure(0, error))
        for rank in range(1, world):
            key = f"{number}/{rank}"
            patience = _GRACE if failures else timedelta(seconds=self.timeout * (10 if loading else 1))
            try:
                self._shared.wait([key], patience)
            except (RuntimeError, torch.distributed.DistError):
                failures.append(Failure(rank=rank, message=f"did not answer within {patience.total_seconds():g} s"))
                continue
            kind, value = _got(self._shared, key)
            (answers if kind == "done" else failures).append(value)
            self._shared.delete_key(key)
        if failures:
            raise error_of(self.spec, sorted(failures, key=lambda one: (one.is_echo, not one.kind)))
        return answers

    def close(self) -> None:
        """Nothing: the ranks follow until this process ends."""


class _Requests:
    """Numbers of the requests of this process, over all teams."""

    number = 0
    _ending = False

    @classmethod
    def next(cls) -> int:
        cls.number += 1
        return cls.number

    @classmethod
    def end_at_exit(cls, store: Store) -> None:
        """Tell the other ranks to end when this process does."""
        if not cls._ending:
            cls._ending = True
            atexit.register(lambda: _put(store, f"{cls.next()}/request", ("end", ())))


def _meeting(shared: Store, setup: Setup) -> Store:
    from torch._C._distributed_c10d import PrefixStore

    return PrefixStore(setup.meeting, shared)


def _put(store: Store, key: str, value: Any) -> None:
    store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes, whatever its stub says


def _got(store: Store, key: str) -> Any:
    # What ranks of this launch wrote there, as torch's own object collectives do; never a file.
    return pickle.loads(store.get(key))  # noqa: S301


def _failure(rank: int, error: BaseException) -> Failure:
    known = isinstance(error, HarnessError)
    return Failure(
        rank=rank,
        kind="" if known else type(error).__name__,
        message=error.problem if isinstance(error, HarnessError) else first_line(error, "no message"),
        fix=error.fix if isinstance(error, HarnessError) else "",
        trace="" if known else "".join(traceback.format_exception(error)),
    )


def follow() -> None:
    """On every launched rank but 0: do what rank 0 asks until it ends, then end too; elsewhere nothing.

    Raises:
        Followed: at the end.
    """
    outer = launched()
    if outer is None or outer.rank == 0:
        return
    store = _store(outer.rank, outer.world)
    server = Server(outer.rank, lambda setup: _meeting(store, setup), lambda _what: None)
    while True:
        number = _Requests.next()
        try:
            store.wait([f"{number}/request"], _PATIENCE)
            request, arguments = _got(store, f"{number}/request")
        except RuntimeError as error:
            raise EngineError(f"rank {outer.rank} lost rank 0", fix="See what rank 0 says") from error
        if request == "end":
            raise Followed(0)
        try:
            answer: tuple[str, Any] = ("done", server.answer(request, *arguments))
        except Exception as error:  # noqa: BLE001  # rank 0 tells it
            answer = ("failed", _failure(outer.rank, error))
        _put(store, f"{number}/{outer.rank}", answer)

"""Prompts spread over ranks: each makes a pass over the weights of its own, with its share of the sequences.

Ranks are those of an outer launcher, on one machine or several, else processes of this one. What is divided is
arithmetic; each machine reads the whole checkpoint, from a disk of its own or through its page cache. Blocks are not
divided: a rank that holds one of them at a time would wait until the ranks before it had finished theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import EngineError, UsageError
from harness.numerics.sketch import concatenate, sort_rows
from harness.values import Rows

if TYPE_CHECKING:
    from harness.engines.ranks.engine import Team
    from harness.engines.streaming.engine import Options
    from harness.engines.streaming.passes import Took, Variant


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A pass that all ranks make together; the other fields are those of `StreamEngine.score`.

    Attributes:
        options, text, widens: of the engine that each rank opens.
        shares: for each rank the indices of its sequences.
        local: ranks on each machine, 0 where only their launcher knows.
    """

    options: Options
    text: str
    widens: bool
    shares: tuple[tuple[int, ...], ...]
    local: int
    sequences: Sequence[Sequence[int]]
    starts: Sequence[int]
    vocabulary: int | None
    variants: Sequence[Variant | None]
    basis: NDArray[np.float64] | None
    fingerprints: bool
    part: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What one rank made of its share: rows of each variant, what it took, and the dtype and device that it ran in."""

    rows: list[Rows]
    took: list[Took]
    ran: dict[str, str]


def shares(sequences: Sequence[Sequence[int]], ranks: int) -> tuple[tuple[int, ...], ...]:
    """For each rank the indices of its sequences: the longest first, each to the rank with the fewest tokens so far."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i)):
        rank = min(range(ranks), key=lambda one: (tokens[one], one))
        found[rank].append(index)
        tokens[rank] += len(sequences[index])
    return tuple(tuple(sorted(one)) for one in found)


class Ranks:
    """The ranks of one engine, from entering to leaving; processes of this machine are started when first asked.

    Args:
        world: how many.
        spec: of the engine, for messages.
        threads: of each; None shares the cores of this machine.
        device: that they compute on, None is the CPU.
        timeout: seconds without progress after which a rank has failed.
    """

    def __init__(self, world: int, *, spec: str, threads: int | None, device: str | None, timeout: float) -> None:
        self._world, self._spec, self._threads = world, spec, threads
        self._device, self._timeout = (device or "cpu").partition(":")[0], timeout
        self._stack = ExitStack()
        self._team: Team | None = None
        self.local = 0

    def join(self) -> None:
        """Meet those that an outer launcher started.

        Raises:
            UsageError: where it started another number.
            Followed: on every rank but rank 0, at its end.
        """
        from harness.engines.ranks import outer

        outer.follow()
        launched = outer.launched()
        if launched is None:
            return
        if launched.world != self._world:
            problem = f"{self._spec} needs {self._world} ranks, and the launcher started {launched.world}"
            raise UsageError(problem, fix=f"Launch {self._world}, or leave out ranks=")
        self._team = outer.OuterTeam(launched)

    def ask(self, asked: Asked, progress: Callable[[str], None]) -> list[Scored]:
        """What each rank made of its share.

        Raises:
            EngineError: where one failed, or was not heard of in time.
        """
        from harness.engines.ranks import spawned

        if self._team is None:
            team = spawned.team_of(self._world, self._threads, device=self._device)
            self._stack.callback(spawned.release, team)
            self._team, self.local = team, self._world
        self._team.spec, self._team.timeout, self._team.progress = self._spec, self._timeout, progress
        asked = replace(asked, local=self.local)
        found: list[Scored] = self._team.call("score", asked, world=self._world)
        return found

    @property
    def lost(self) -> bool:
        """Whether a rank has failed."""
        return self._team is not None and not self._team.alive

    def close(self) -> None:
        """End the processes that were started here."""
        self._team = None
        self._stack.close()


def answer(rank: int, asked: Asked, pulse: Callable[[str], None]) -> Scored:
    """In a rank: one pass over the weights with its share."""
    from harness.engines.streaming.engine import StreamEngine

    mine = asked.shares[rank]
    local = asked.local or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with StreamEngine(_of_rank(asked.options, rank, local), text=asked.text, widens=asked.widens) as engine:
        engine.progress, engine.beside = pulse, local
        rows = engine.score(
            [asked.sequences[index] for index in mine],
            [asked.starts[index] for index in mine],
            vocabulary=asked.vocabulary,
            variants=asked.variants,
            basis=asked.basis,
            fingerprints=asked.fingerprints,
            part=asked.part,
        )
        if engine.options.work is not None:
            with suppress(OSError):  # there is more in it
                (Path(engine.options.work) / asked.part).rmdir()
        ran = {key: str(engine.settings[key]) for key in ("dtype", "device")}
        return Scored(rows=rows, took=engine.took, ran=ran)


def _of_rank(options: Options, rank: int, local: int) -> Options:
    """One process, its own part of the directory, its own GPU; files through the cache that ranks of a machine share.

    What one of them has read, the next one need not: they are at the same block at about the same time.
    """
    changes: dict[str, Any] = {"ranks": 1}
    if options.work is not None:
        changes["work"] = str(Path(options.work) / f"rank-{rank}")
    if options.read is None and local > 1:
        changes["read"] = "cached"
    if options.device == "cuda":
        changes["device"] = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return replace(options, **changes)


def merged(asked: Asked, found: Sequence[Scored], vocabulary: int) -> list[Rows]:
    """The rows of all ranks as those of one pass.

    Raises:
        EngineError: where a rank answered for other sequences than its own.
    """
    together = []
    for number in range(len(asked.variants)):
        parts = []
        for share, one in zip(asked.shares, found, strict=True):
            rows = one.rows[number]
            if len(rows) != sum(max(0, len(asked.sequences[index]) - 1) for index in share):
                raise EngineError(f"a rank of {asked.text} did not score its share", fix="Start the ranks anew")
            if len(rows):
                parts.append(replace(rows, request=np.asarray(share, dtype=np.int32)[rows.request]))
        together.append(sort_rows(concatenate(parts, vocabulary)))
    return together

"""Bugs of sharding in real ranks (mutations/ranks.py): whether they are found, and which ranks the report names.

Each bug is put into `tp` or `pp`, which is checked against a golden in float32 on its quick runs; beside them each
SPEC runs without a bug. All share one team of processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from harness import flow
from harness.engines import build_engine
from harness.engines.ranks import spawned
from harness.engines.ranks.engine import ParallelEngine
from harness.mutations.ranks import RANK_MUTATIONS
from harness.power.ledger import SKIPPED, Progress
from harness.power.trials import known
from harness.values import Verdict

#: Stands for a run without a bug.
CORRECT = "correct"
#: The engines that run without a bug, each once.
SPECS = tuple(dict.fromkeys(one.spec for one in RANK_MUTATIONS))
#: The models, in the order in which they are run.
HOSTS = tuple(sorted(frozenset().union(*(one.hosts for one in RANK_MUTATIONS))))

_PRECISION = "float32"
_BY_ID = {one.id: one for one in RANK_MUTATIONS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharded:
    """What a check said of one bug of sharding on one host, or of a SPEC without one.

    Attributes:
        id: of the bug; "correct" where there is none.
        host: the model that it is put into.
        spec: of the engine, without dtype and prepare.
        where: the ranks that are wrong; of `pp` a rank is a stage.
        status: of the verdict.
        named: the ranks that the report names, in order.
        first_wrong: the first wrong place, in the report's words; "" where the structure is wrong already.
        finding: the message of the first finding that failed, its candidate called "the SPEC"; "" where none did.
        seconds: of the check.
    """

    id: str
    host: str
    spec: str
    where: Literal["all"] | tuple[int, ...]
    status: str = SKIPPED
    named: tuple[int, ...] = ()
    first_wrong: str = ""
    finding: str = ""
    seconds: float = 0.0

    @property
    def correct(self) -> bool:
        """Whether there is no bug in it."""
        return self.id == CORRECT

    @property
    def alone(self) -> bool:
        """Whether one rank or stage is wrong, and the others are right."""
        return self.where != "all" and len(self.where) == 1

    @property
    def right(self) -> bool:
        """Whether exactly the wrong ranks are named; without meaning where all are wrong."""
        return self.named == self.where


# --- what is asked -----------------------------------------------------------------------------


def planned(places: Iterable[str] | None = None, names: Iterable[str] | None = None) -> list[Sharded]:
    """Blanks of every bug on every host that has the part, and of every SPEC without one, host by host.

    Args:
        places: hosts, all by default.
        names: ids, and "correct"; all by default.

    Raises:
        UsageError: for a name or a host that there is not.
    """
    chosen = known(names, [CORRECT, *_BY_ID], "bug of sharding", "harness/mutations/ranks.py, or correct")
    where = known(places, HOSTS, "host of these", ", ".join(HOSTS))
    return [
        blank
        for host in HOSTS
        if host in where
        for blank in (
            *(Sharded(id=CORRECT, host=host, spec=spec, where=()) for spec in SPECS),
            *(
                Sharded(id=one.id, host=host, spec=one.spec, where=one.where)
                for one in RANK_MUTATIONS
                if host in one.hosts
            ),
        )
        if blank.id in chosen
    ]


# --- running -----------------------------------------------------------------------------------


def run(
    asked: Sequence[Sharded], progress: Progress, *, goldens: Path = Path("golden"), suite: str = "core"
) -> list[Sharded]:
    """The blanks, filled, in their order.

    Args:
        asked: blanks.
        progress: called with how many are done, of how many, and what is being done.
        goldens: directory of HOST/SUITE.
        suite: name of the goldens.

    Raises:
        HarnessError: where a golden is missing.
    """
    found: list[Sharded] = []
    with spawned.kept():
        # The largest team first: a smaller one that was started before it would be of no use to it.
        spawned.release(spawned.team_of(max(_world(blank) for blank in asked), None))
        for blank in asked:

            def report(text: str, blank: Sharded = blank) -> None:
                progress(len(found), len(asked), f"{blank.host} {blank.id}: {text}")

            found.append(_checked(blank, goldens / blank.host / suite, report))
    return found


def _candidate(blank: Sharded) -> str:
    if blank.correct:
        return f"{blank.spec},dtype={_PRECISION}"
    return _BY_ID[blank.id].candidate(_PRECISION)


def _world(blank: Sharded) -> int:
    engine = build_engine(_candidate(blank))
    assert isinstance(engine, ParallelEngine)
    return engine.options.layout.world


def _checked(blank: Sharded, golden: Path, report: Callable[[str], None]) -> Sharded:
    candidate = _candidate(blank)
    verdict = flow.check(golden, candidate, quick=True, progress=report)
    return replace(
        blank,
        status=verdict.status.value,
        named=named_ranks(verdict),
        first_wrong="" if verdict.sharding is None else verdict.sharding.first_wrong,
        finding=verdict.failures[0].message.replace(candidate, "the SPEC") if verdict.failures else "",
        seconds=round(verdict.seconds, 3),
    )


# --- who is named ------------------------------------------------------------------------------


def named_ranks(verdict: Verdict) -> tuple[int, ...]:
    """The ranks that a verdict names, in order; a rank counts where a finding or the first wrong place tells of it."""
    ranks: Sequence[Mapping[str, Any]] = verdict.settings.get("ranks") or []
    stages: dict[int, list[int]] = {}
    for one in ranks:
        stages.setdefault(one["stage"], []).append(one["rank"])
    failed = {one.check for one in verdict.failures}
    found: set[int] = set()
    if "ranks' weights" in failed:
        found |= {one["rank"] for one in ranks if one["unlike_checkpoint"]}
    if "stages" in failed:
        found |= _out_of_line(ranks, int(verdict.settings["blocks"]))
    if "ranks agree" in failed:
        # The report shows the first place alone.
        found |= ranks_in(verdict.settings["differing"][0], stages)
    if verdict.sharding is not None:
        found |= ranks_in(verdict.sharding.first_wrong, stages)
    return tuple(sorted(found))


def _out_of_line(ranks: Sequence[Mapping[str, Any]], total: int) -> set[int]:
    """Ranks whose blocks do not begin where those of the stage before end, and last ones that do not end the model."""
    found: set[int] = set()
    for shard in {one["shard"] for one in ranks}:
        stop = 0
        own = sorted((one for one in ranks if one["shard"] == shard), key=lambda one: one["stage"])
        for one in own:
            if one["blocks"][0] != stop:
                found.add(one["rank"])
            stop = one["blocks"][1]
        if stop != total:
            found.add(own[-1]["rank"])
    return found


_SENT = re.compile(r"^what stage (\d+) is sent\b")
_RANKS = re.compile(r"(?:^|: |, on )ranks? (\d+(?:, \d+)*)")
_STAGE = re.compile(r" of stage (\d+)\b")


def ranks_in(text: str, stages: Mapping[int, Sequence[int]]) -> frozenset[int]:
    """The ranks that a line about ranks calls wrong: none where it names a sum, or cannot tell who is.

    Args:
        text: of `culprits.first_wrong` or of `engine.difference`.
        stages: the ranks of each.
    """
    if sent := _SENT.search(text):
        # What arrives wrong from a stage that computes rightly was handed over wrongly by it.
        return frozenset(stages[int(sent[1]) - 1])
    if "unlike each other" in text:
        return frozenset()
    if own := _RANKS.search(text):
        return frozenset(map(int, own[1].split(", ")))
    if stage := _STAGE.search(text):
        return frozenset(stages[int(stage[1])])
    return frozenset(rank for own in stages.values() for rank in own) if ", on every rank" in text else frozenset()

"""What checks said of bugs of sharding, as a table and in three numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.power.nulls import ALARMS, PASSES
from harness.power.sharded import Sharded

_WIDTH = 72
_HEADS = ("bug", "host", "SPEC", "status", "wrong", "named", "the report says")


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """(right, of how many), and what is not.

    Attributes:
        found: bugs that are structural or deviate.
        named: bugs of one rank or stage alone whose report names exactly it.
        correct: runs without a bug that are ok.
        missed: bugs that are not found.
        unnamed: bugs of one rank or stage that are not named right.
        alarms: runs without a bug that are not ok.
    """

    found: tuple[int, int]
    named: tuple[int, int]
    correct: tuple[int, int]
    missed: tuple[Sharded, ...]
    unnamed: tuple[Sharded, ...]
    alarms: tuple[Sharded, ...]

    @property
    def ok(self) -> bool:
        """Whether every bug is found, and every run without one is ok."""
        return not (self.missed or self.alarms)


def summarise(records: Sequence[Sharded]) -> Summary:
    """Of all that were run."""
    bugs = [one for one in records if not one.correct]
    correct = [one for one in records if one.correct]
    alone = [one for one in bugs if one.alone]
    missed = tuple(one for one in bugs if one.status not in ALARMS)
    unnamed = tuple(one for one in alone if not one.right)
    alarms = tuple(one for one in correct if one.status not in PASSES)
    return Summary(
        found=(len(bugs) - len(missed), len(bugs)),
        named=(len(alone) - len(unnamed), len(alone)),
        correct=(len(correct) - len(alarms), len(correct)),
        missed=missed,
        unnamed=unnamed,
        alarms=alarms,
    )


# --- as text and as plain types ----------------------------------------------------------------


def summary_to_text(summary: Summary, records: Sequence[Sharded]) -> str:
    """The numbers, what is not right, and a row for each bug and host; about 160 columns, without a final newline."""
    lines = [
        f"found                                                    {_of(summary.found)}",
        f"one rank or stage alone is wrong: exactly it is named    {_of(summary.named)}",
        f"correct runs that are ok                                 {_of(summary.correct)}",
    ]
    for title, members in (("not found", summary.missed), ("not named", summary.unnamed), ("alarms", summary.alarms)):
        lines += [f"{title}: {one.id} on {one.host}, {one.spec}: {one.status}" for one in members]
    return "\n".join([*lines, "", *_table(one for one in records if not one.correct)])


def _of(share: tuple[int, int]) -> str:
    return f"{share[0]} of {share[1]}"


def _table(bugs: Iterable[Sharded]) -> list[str]:
    rows = [
        (one.id, one.host, one.spec, one.status, ranks_to_text(one.where), ranks_to_text(one.named), _words(one))
        for one in bugs
    ]
    if not rows:
        return ["no bug was run"]
    widths = [max(map(len, column)) for column in zip(_HEADS, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (_HEADS, *rows)
    ]


def ranks_to_text(ranks: str | tuple[int, ...]) -> str:
    """The numbers, "all" as it is, or "none"."""
    return ranks if isinstance(ranks, str) else ", ".join(map(str, ranks)) or "none"


def _words(one: Sharded) -> str:
    """What the report says first, on one line; what is cut off is marked."""
    said = " ".join((one.first_wrong or one.finding).split())
    return said if len(said) <= _WIDTH else f"{said[: _WIDTH - 3]}..."


def summary_to_dict(summary: Summary, records: Sequence[Sharded]) -> dict[str, Any]:
    """Everything as plain JSON types."""
    return {
        **{name: list(getattr(summary, name)) for name in ("found", "named", "correct")},
        "records": [asdict(one) for one in records],
    }

"""Shrink a failing case for as long as it fails in the same way: delta debugging over rows, steps and tokens.

Every move is one that makes the case smaller in one respect. They are tried in a fixed order, the largest savings
first, and after each that still fails all are tried again, so that nothing is drawn and a repeat gives the same case.
Source of the idea: Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from harness.numerics.constants import CLEAR
from harness.repro.cases import Batch, Case, Judgement, Row

T = TypeVar("T")

#: Judges a case; None where it does not fail in the way that is looked for.
Fails = Callable[[Case], Judgement | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shrunk:
    """The smallest case that was found.

    Attributes:
        case: as small as the moves make it, or as they had made it when time was up.
        judgement: on it.
        tried: how many cases were judged.
        finished: whether no move was left; False where time was up.
    """

    case: Case
    judgement: Judgement
    tried: int
    finished: bool


def shrink(case: Case, judgement: Judgement, fails: Fails, *, until: float) -> Shrunk:
    """Make a case smaller until no move is left, or until `time.monotonic` passes ``until``.

    A smaller case is taken only where it fails by CLEAR, or by as much as the first one where that is less: what is
    written is to fail on another machine too.
    """
    needed = min(CLEAR, judgement.margin)
    known = {case}
    moving = True
    while moving:
        moving = False
        for smaller in moves(case, judgement):
            if smaller in known:
                continue
            if time.monotonic() > until:
                return Shrunk(case=case, judgement=judgement, tried=len(known) - 1, finished=False)
            known.add(smaller)
            found = fails(smaller)
            if found is not None and found.margin >= needed:
                case, judgement, moving = smaller, found, True
                break
    return Shrunk(case=case, judgement=judgement, tried=len(known) - 1, finished=True)


def moves(case: Case, judgement: Judgement) -> Iterator[Case]:
    """Smaller cases, the largest savings first."""
    yield from (replace(case, before=before) for before in _fewer_before(case.before))
    yield from (replace(case, batch=batch) for batch in _fewer_rows(case.batch, judgement))
    yield from (replace(case, batch=batch) for batch in _shorter_path(case.batch, judgement))
    yield from (replace(case, batch=batch) for batch in _shorter_rows(case.batch))
    for index, batch in enumerate(case.before):
        for smaller in (*_fewer_rows(batch, None), *_one_pass(batch), *_shorter_rows(batch)):
            yield replace(case, before=(*case.before[:index], smaller, *case.before[index + 1 :]))


def _fewer_before(before: tuple[Batch, ...]) -> Iterator[tuple[Batch, ...]]:
    """Nothing before, then less and less taken away."""
    if before:
        yield ()
    yield from _without_pieces(before)


def _fewer_rows(batch: Batch, judgement: Judgement | None) -> Iterator[Batch]:
    """The failing row alone, then it with one other, then all but one."""
    rows = batch.rows
    if len(rows) == 1:
        return
    failing = judgement.places[0][0] if judgement is not None and judgement.places else 0
    yield replace(batch, rows=(rows[failing],))
    if len(rows) > 2:
        for other in range(len(rows)):
            if other != failing:
                kept = sorted((failing, other))
                yield replace(batch, rows=tuple(rows[index] for index in kept))
        for left_out in range(len(rows)):
            yield replace(batch, rows=rows[:left_out] + rows[left_out + 1 :])


def _shorter_path(batch: Batch, judgement: Judgement) -> Iterator[Batch]:
    """One pass instead of decode steps, nothing behind the failing position, fewer steps to get there."""
    yield from _one_pass(batch)
    if not judgement.places:
        return
    row, seen = judgement.places[0]
    ids = batch.rows[row].ids
    if not batch.decode:
        if seen < len(ids):
            yield _with_row(batch, row, Row(prompt=ids[:seen]))
        return
    steps = seen - len(batch.rows[row].prompt)
    if steps < batch.steps:
        yield replace(batch, rows=tuple(replace(one, fed=one.fed[:steps]) for one in batch.rows))
    for fewer in (1, 2, 4, 8, 16, 32, 64):
        if fewer < batch.steps:
            # The steps that are left out become part of the prompt: the position that fails has seen the same.
            cut = batch.steps - fewer
            moved = (Row(prompt=(*one.prompt, *one.fed[:cut]), fed=one.fed[cut:]) for one in batch.rows)
            yield replace(batch, rows=tuple(moved))


def _one_pass(batch: Batch) -> Iterator[Batch]:
    if batch.decode:
        yield Batch(rows=tuple(Row(prompt=row.ids) for row in batch.rows), decode=False)


def _shorter_rows(batch: Batch) -> Iterator[Batch]:
    """Shorter prompts: their last 1, 2, 4 ... tokens, then without a half, a quarter ... a token."""
    for index, row in enumerate(batch.rows):
        for prompt in (*_endings(row.prompt), *_without_pieces(row.prompt)):
            if prompt:
                yield _with_row(batch, index, replace(row, prompt=prompt))


def _with_row(batch: Batch, index: int, row: Row) -> Batch:
    return replace(batch, rows=(*batch.rows[:index], row, *batch.rows[index + 1 :]))


def _endings(items: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    kept = 1
    while kept < len(items):
        yield items[-kept:]
        kept *= 2


def _without_pieces(items: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    """Without each half, then each quarter, down to each single one."""
    size = len(items) // 2
    while size:
        for start in range(0, len(items), size):
            yield items[:start] + items[start + size :]
        size //= 2

"""Which blocks have a bug: what it changes where one block alone has it, by runs of the reference made when asked for.

Two references are opened, and the bug is put into the second. That one is run with the first one's blocks, which are
right, and with one of its own at a time. What a bug does outside the blocks (embedding, head, last norm, positions,
cache, the decode loop) is in force throughout, and is a part of its own.

Shape legend: M rows, R coordinates, L blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.mutations.catalogue import CATALOGUE
from harness.mutations.mutation import Mutation, blocks
from harness.scorer import open_reference
from harness.templates import making
from harness.values import Golden, Templates

if TYPE_CHECKING:
    from torch import nn

Float64 = NDArray[np.float64]
Progress = Callable[[str], None]

#: Runs that are made of one bug: blocks of a deeper model are taken together, neighbours first.
MOST = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Layered:
    """One bug, part by part.

    Attributes:
        blocks: of each part its blocks, from 0; none for what the bug does outside them.
        bank: a template of each part, in the order of ``blocks``, on the rows and in the frame of the golden's own.
    """

    blocks: tuple[tuple[int, ...], ...]
    bank: Templates


#: What makes them of a bug at a strength: None where no block has a part of it.
Maker = Callable[[str, float], Layered | None]


def layered(
    golden: Golden, model: Path, bank: Templates, name: str, strength: float, progress: Progress
) -> Layered | None:
    """What a bug does in each block alone, and outside of them; None for a bug that no block has a part of.

    Args:
        golden: whose work is done.
        model: directory of its model.
        bank: the golden's templates.
        name: id of the bug in the catalogue.
        strength: of its knob.
        progress: called with a few words before each run.
    """
    work = making.Work(
        golden=golden,
        run=making.diagnosed_run(golden),
        views=bank.views,
        view=bank.view,
        place=bank.place,
        basis=bank.basis,
        turn=bank.turn,
    )
    try:
        found = list(_changes(work, model, CATALOGUE[name], strength, progress))
    except Exception:  # noqa: BLE001  # a model whose blocks cannot be exchanged: nothing a bug raises may end a check
        return None
    found = [(part, change) for part, change in found if not making.is_nothing(work, change)]
    if not any(part for part, _ in found) or not all(np.isfinite(change).all() for _, change in found):
        return None
    coded = [making.coded(change, bank.frame) for _, change in found]
    parts = replace(
        bank,
        names=((name, strength),) * len(found),
        wrong=(CATALOGUE[name].wrong,) * len(found),
        places=(),
        codes=np.stack([codes for codes, _ in coded]),
        scales=np.stack([scales for _, scales in coded]),
        noises={},
        left_out={},
    )
    return Layered(blocks=tuple(part for part, _ in found), bank=parts)


def _changes(
    work: making.Work, model: Path, bug: Mutation, strength: float, progress: Progress
) -> Iterator[tuple[tuple[int, ...], Float64]]:
    """Each part with what it changes [M, R], what is outside the blocks first.

    Raises:
        LookupError: for a model whose blocks are not found, and a bug that leaves one out.
    """
    with ExitStack() as stack:
        plain = stack.enter_context(open_reference(str(model), making.PRECISION))
        right = work.shown(plain)
        wrong = stack.enter_context(making.opened(model, bug))
        stack.enter_context(bug.applied(wrong, strength))
        progress(f"{bug.id} outside the blocks")
        with _only(blocks(wrong.model), blocks(plain.model), ()):
            outside = work.shown(wrong)
        yield (), outside - right
        parts = grouped(len(blocks(plain.model)))
        for number, part in enumerate(parts, start=1):
            progress(f"{bug.id} in some blocks alone: {number} of {len(parts)}")
            with _only(blocks(wrong.model), blocks(plain.model), part):
                yield part, work.shown(wrong) - outside


@contextlib.contextmanager
def _only(own: nn.ModuleList, others: nn.ModuleList, kept: Sequence[int]) -> Iterator[None]:
    """Blocks of one model in the place of another's, but for some that stay.

    Raises:
        LookupError: where one model has another number of blocks.
    """
    if len(own) != len(others):
        raise LookupError(f"{len(own)} blocks, and {len(others)} in the right model")
    table: dict[str, Any] = own._modules
    before = dict(table)
    try:
        table.update({name: others._modules[name] for number, name in enumerate(before) if number not in kept})
        yield
    finally:
        table.update(before)


def grouped(count: int) -> list[tuple[int, ...]]:
    """Blocks in groups of neighbours, at most MOST of them."""
    step = -(-count // MOST)
    return [tuple(range(first, min(first + step, count))) for first in range(0, count, step or 1)]

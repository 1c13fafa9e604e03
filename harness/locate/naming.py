"""Which tensors of the reference a tensor of a port is made of: names, fused parts, transposition."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """How one tensor of a candidate is made from tensors of the reference.

    A fused QKV is ``Made(parts=(q, k, v))``, one whose rows go head by head, as BLOOM's, has ``heads=H`` beside it, a
    merged gate and up is ``Made(parts=(gate, up))``. What a Linear makes of a Conv1D is ``transposed``. Where the
    reference is fused and the candidate is not, each of the candidate's is a ``piece``.

    Attributes:
        parts: names in the reference, in the order in which they are joined.
        dim: along which they are joined, or the piece is taken; of the reference's own orientation.
        heads: they are joined head by head, [heads, parts, D]; 0: one behind the other, [parts, N].
        piece: (index, of how many): that part alone of the one tensor of the reference, which is laid out as ``heads``
            says.
        transposed: the result is turned over.
    """

    parts: tuple[str, ...]
    dim: int = 0
    heads: int = 0
    piece: tuple[int, int] | None = None
    transposed: bool = False


#: From names in the candidate to what they are made of; a name alone is the same tensor under another name. In a table
#: of patterns ``{}`` stands for a number (of a layer, of an expert), the same on both sides.
Names = Mapping[str, "str | Made"]

_HOLE = "{}"


def expanded(names: Names, candidate: Iterable[str]) -> dict[str, Made]:
    """A table of patterns for the names that there are; those that no pattern fits are left out.

    Raises:
        UsageError: where a line has holes on one side only, a piece of several parts, or no part.
    """
    tables = [(_pattern(theirs), _made(theirs, given)) for theirs, given in names.items()]
    found: dict[str, Made] = {}
    for name in candidate:
        for pattern, made in tables:
            match = pattern.fullmatch(name)
            if match:
                found[name] = replace(made, parts=tuple(_filled(part, match.groups()) for part in made.parts))
                break
    return found


def _pattern(theirs: str) -> re.Pattern[str]:
    return re.compile("([0-9]+)".join(re.escape(piece) for piece in theirs.split(_HOLE)))


def _made(theirs: str, given: str | Made) -> Made:
    made = Made(parts=(given,)) if isinstance(given, str) else given
    holes = theirs.count(_HOLE)
    if not made.parts or (made.piece is not None and len(made.parts) != 1):
        raise UsageError(f"the name map's line {theirs!r} joins nothing, or takes a piece of several", fix="Give parts")
    if any(part.count(_HOLE) != holes for part in made.parts):
        raise UsageError(
            f"the name map's line {theirs!r} has {holes} places {{}}, and what it is made of has not",
            fix="Write {} as often on both sides",
        )
    return made


def _filled(part: str, values: Iterable[str]) -> str:
    for value in values:
        part = part.replace(_HOLE, value, 1)
    return part


# --- tensors -----------------------------------------------------------------------------------


def taken_apart(made: Made, held: torch.Tensor, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The candidate's tensor as views that stand for the parts it is made of, in the reference's orientation.

    Args:
        made: how it is made.
        held: the candidate's tensor.
        read: gives a tensor of the reference; only shapes are used.

    Returns:
        By the reference's names; empty where the shapes do not fit. A piece stands under its own name.
    """
    held = held.T if made.transposed and held.ndim > 1 else held
    if len(made.parts) == 1:
        return {made.parts[0]: held}
    dim = made.dim if held.ndim > 1 else 0
    sizes = [int(read(part).shape[dim]) for part in made.parts]
    if sum(sizes) != held.shape[dim]:
        return {}
    if not made.heads:
        return dict(zip(made.parts, held.split(sizes, dim=dim), strict=True))
    if any(size % made.heads for size in sizes):
        return {}
    each = held.unflatten(dim, (made.heads, -1)).split([size // made.heads for size in sizes], dim=dim + 1)
    return {part: piece.flatten(dim, dim + 1) for part, piece in zip(made.parts, each, strict=True)}


def piece_of(made: Made, stored: torch.Tensor) -> torch.Tensor:
    """What a candidate's tensor has of a tensor of the reference: all of it, or its piece.

    Raises:
        UsageError: where the tensor cannot be cut so.
    """
    import torch

    if made.piece is None:
        return stored
    index, count = made.piece
    dim = made.dim if stored.ndim > 1 else 0
    if stored.shape[dim] % (count * max(1, made.heads)):
        raise UsageError(
            f"{made.parts[0]} has {stored.shape[dim]} rows, which are not {count} parts of {made.heads or 'any'} heads",
            fix="Correct the name map",
        )
    if not made.heads:
        return stored.chunk(count, dim=dim)[index]
    by_head = stored.chunk(made.heads, dim=dim)
    return torch.cat([head.chunk(count, dim=dim)[index] for head in by_head], dim=dim)

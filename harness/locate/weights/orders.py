"""Rows or columns in another order: finding the order, and saying what it is.

An order is a tuple p with held[i] = right[p[i]].
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.locate.weights.layouts import Layout

if TYPE_CHECKING:
    import torch

Order = tuple[int, ...]
#: (part, head, lane).
Label = tuple[str, int, int]
_FEW = 4
#: Bytes: two of 2^32 rows are taken for one another with a chance of 2^-65.
_DIGEST = 16


def row_keys(rows: torch.Tensor) -> list[bytes]:
    """Each row of a tensor [N, ...] as its bytes, or as a digest of these where that is shorter; two zeros are one."""
    import torch

    flat = (rows + 0.0).flatten(1) if rows.ndim > 1 else (rows + 0.0)[:, None]
    raw = flat.contiguous().view(torch.uint8).numpy()
    if raw.shape[1] <= _DIGEST:
        return [row.tobytes() for row in raw]
    return [hashlib.blake2b(row.data, digest_size=_DIGEST).digest() for row in raw]


def order_of(right: torch.Tensor, held: torch.Tensor, dim: int) -> Order | None:
    """The order along one dimension that makes ``right`` what is ``held``; None where none does, or it changes nothing.

    Equal rows stay where they can.
    """
    before, after = row_keys(right.movedim(dim, 0)), row_keys(held.movedim(dim, 0))
    if len(before) != len(after) or sorted(before) != sorted(after):
        return None
    places: dict[bytes, list[int]] = defaultdict(list)
    for index, row in enumerate(before):
        if after[index] != row:
            places[row].append(index)
    for each in places.values():
        each.reverse()
    order = tuple(index if before[index] == row else places[row].pop() for index, row in enumerate(after))
    return None if order == tuple(range(len(order))) else order


# --- in words ----------------------------------------------------------------------------------


def in_words(order: Order, what: str, layout: Layout | None = None) -> str:
    """An order of rows, columns or elements (``what``) as a line."""
    moved = [index for index, source in enumerate(order) if index != source]
    if layout is not None:
        said = _of_heads(order, what, layout) or (_twice(order, what) if layout.parts in ("q", "k") else "")
        said = said or (_joined_otherwise(order, what, layout) if len(layout.parts) > 1 else "")
        if said:
            return said
    if len(moved) == 2:
        return f"{what} {moved[0]} and {moved[1]} swapped"
    return _regular(order, what) or _shifted(order, what) or _any(order, moved, what)


def _of_heads(order: Order, what: str, layout: Layout) -> str:
    labels = layout.labels()
    pairs = [(labels[index], labels[source]) for index, source in enumerate(order)]
    if all(here[0] == there[0] and here[2] == there[2] for here, there in pairs):
        return _heads_moved(pairs, what, layout)
    if all(here[1:] == there[1:] for here, there in pairs):
        return _parts_moved(pairs, what)
    if all(here[:2] == there[:2] for here, there in pairs):
        return _lanes_moved(pairs, what, layout)
    return ""


def _parts_moved(pairs: Sequence[tuple[Label, Label]], what: str) -> str:
    parts = {here[0]: there[0] for here, there in pairs}
    if any(parts[here[0]] != there[0] for here, there in pairs):
        return ""
    return f"{what} of " + ", ".join(f"{there} where {here} belongs" for here, there in parts.items() if here != there)


def _lanes_moved(pairs: Sequence[tuple[Label, Label]], what: str, layout: Layout) -> str:
    lanes = {here[2]: there[2] for here, there in pairs if here[2] != there[2]}
    inner = tuple(lanes.get(lane, lane) for lane in range(layout.head_size))
    moved = {here[:2] for here, there in pairs if here != there}
    if any(inner[here[2]] != there[2] for here, there in pairs if here[:2] in moved):
        return ""
    parts = "".join(part for part in layout.parts if any(part == one for one, _ in moved))
    count = sum(number for part, number in zip(layout.parts, layout.heads, strict=True) if part in parts)
    heads = sorted({head for _, head in moved})
    of = "each head" if len(moved) == count else f"head{'s' * (len(heads) > 1)} {listed(heads)}"
    return f"{what} of {of}{_of_parts(parts, layout)}: {_lanes(inner)}"


def _joined_otherwise(order: Order, what: str, layout: Layout) -> str:
    """Fused parts in the other of the two usual orders."""
    if len(set(layout.heads)) != 1:
        return ""
    heads, parts, size = layout.heads[0], len(layout.parts), layout.head_size
    names = ", ".join(layout.parts)
    if layout.by_head and order == _swapped_axes(1, heads, parts, size):
        return f"{what} in whole blocks of {names}, where they belong head by head ([{heads}, {parts}, {size}])"
    if not layout.by_head and order == _swapped_axes(1, parts, heads, size):
        return f"{what} head by head, where they belong in whole blocks of {names} ([{parts}, {heads}, {size}])"
    return ""


def _heads_moved(pairs: Sequence[tuple[Label, Label]], what: str, layout: Layout) -> str:
    maps: dict[str, dict[int, int]] = defaultdict(dict)
    for here, there in pairs:
        if maps[here[0]].setdefault(here[1], there[1]) != there[1]:
            return ""
    moved = {part: {to: source for to, source in one.items() if to != source} for part, one in maps.items()}
    moved = {part: one for part, one in moved.items() if one}
    if len({tuple(sorted(one.items())) for one in moved.values()}) != 1:
        return (
            f"{what} of heads in another order ({'; '.join(f'{part}: {_heads(one)}' for part, one in moved.items())})"
        )
    parts = "".join(moved)
    return f"{what} of {_heads(next(iter(moved.values())))}".replace("#", _of_parts(parts, layout))


def _heads(moved: dict[int, int]) -> str:
    if len(moved) == 2:
        first, second = sorted(moved)
        return f"heads {first} and {second}# swapped"
    return f"heads {listed(sorted(moved))}# are those of heads {listed([moved[head] for head in sorted(moved)])}"


def _of_parts(parts: str, layout: Layout) -> str:
    return f" of {' and '.join(parts)}" if len(layout.parts) > 1 and len(parts) < len(layout.parts) else ""


def _lanes(inner: Order) -> str:
    half = len(inner) // 2
    if len(inner) % 2 == 0 and inner == _swapped_axes(1, half, 2, 1):
        return "the even lanes, then the odd ones: pairs for a rotation turned into halves"
    if len(inner) % 2 == 0 and inner == _swapped_axes(1, 2, half, 1):
        return "a lane of either half in turn: halves for a rotation turned into pairs"
    if inner == (*range(half, len(inner)), *range(half)):
        return "the two halves swapped"
    return "lanes in another order"


def _swapped_axes(outer: int, first: int, second: int, inner: int) -> Order:
    """arange(N) as [outer, first, second, inner] with the two in the middle exchanged."""
    return tuple(
        ((o * first + a) * second + b) * inner + c
        for o in range(outer)
        for b in range(second)
        for a in range(first)
        for c in range(inner)
    )


def _regular(order: Order, what: str) -> str:
    """[A, B, C] read as [B, A, C], in each of so many groups."""
    outer, first, second, inner = _shape_of(order)
    if min(outer, first, second) < 1 or order != _swapped_axes(outer, first, second, inner):
        return ""
    groups = f" in each of {outer} groups" if outer > 1 else ""
    size = f", {inner}" if inner > 1 else ""
    return f"{what} of [{first}, {second}{size}] laid out as [{second}, {first}{size}]{groups}"


def _shape_of(order: Order) -> tuple[int, int, int, int]:
    """The one shape that such an order may come from: the length of its first run, its first step, its first wrap."""
    size = len(order)
    inner = next((index for index, source in enumerate(order) if index != source), size)
    if not inner or inner == size or size % inner or order[inner] % inner:
        return 0, 0, 0, 0
    second = order[inner] // inner
    first = next((run for run in range(size // inner) if order[run * inner] != run * second * inner), 0)
    return (size // (first * second * inner) if first and second else 0), first, second, inner


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _shifted(order: Order, what: str) -> str:
    size, shift = len(order), order[0]
    if order == tuple((index + shift) % size for index in range(size)):
        return f"{what} shifted by {min(shift, size - shift)}"
    return f"{what} in reverse" if order == tuple(reversed(range(size))) else ""


def _twice(order: Order, what: str) -> str:
    """Halves to pairs for one number of heads, and back for another."""
    size = len(order)
    heads = _divisors(size // 2) if size % 2 == 0 else []
    for there in heads:
        paired = _swapped_axes(there, 2, size // there // 2, 1)
        for back in heads:
            halved = _swapped_axes(back, size // back // 2, 2, 1)
            if order == tuple(paired[index] for index in halved):
                return f"{what} turned into rotary pairs for {there} heads, and back for {back}"
    return ""


def _any(order: Order, moved: Sequence[int], what: str) -> str:
    if len(moved) == len(order):
        return f"{what} in another order"
    return f"{len(moved)} of {len(order)} {what} in another order ({listed(moved)})"


def listed(indices: Sequence[int]) -> str:
    """Indices in few words: "3", "0 and 1", "4-7", "0, 5, 9, 12 and 3 more"."""
    if len(indices) > 2 and list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}-{indices[-1]}"
    if len(indices) <= _FEW + 1:
        words = [str(index) for index in indices]
        return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{', '.join(map(str, indices[:_FEW]))} and {len(indices) - _FEW} more"

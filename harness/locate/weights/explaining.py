"""What makes a tensor another one than it should be, in words: the first explanation that fits to the last bit.

Shape legend: R rows, C columns, of a tensor as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from harness.locate.weights import gains, orders
from harness.locate.weights.layouts import Layout
from harness.locate.weights.rounding import rounded_to

if TYPE_CHECKING:
    import torch

#: Singular values take the longer side times the square of the shorter: as many operations as for a side of 2048,
#: some seconds on one core.
_LARGEST_WORK = 2048**3
#: Elements that are explained at once: half a GiB for each copy in float64.
_MOST = 1 << 26
_GROUPS = (32, 64, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How one tensor differs from what it should be.

    Attributes:
        text: in words.
        size: relative, as in `Clue`.
        exact: the words explain every bit; otherwise they describe.
        order: the permutation behind it, (dim, order), where that is all.
        parts: which of query, key and value differ, where heads are known: "kv".
        evidence: plain numbers.
    """

    text: str
    size: float
    exact: bool = True
    order: tuple[int, orders.Order] | None = None
    parts: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    """Two tensors to be compared.

    Attributes:
        stored: of the checkpoint, in its own dtype.
        right: what should be held: the stored one after the declared cast, in ``held``'s dtype and shape.
        held: the candidate's, of the same shape.
        layout: heads along one dimension.
        input_dim: that is summed over, 1 for a Linear, 0 for a Conv1D.
    """

    stored: torch.Tensor
    right: torch.Tensor
    held: torch.Tensor
    layout: Layout | None = None
    input_dim: int = 1


def explain(sides: Sides, hint: tuple[int, orders.Order] | None = None) -> Difference:
    """What is different; ``hint`` is the order of the rows of the weight that this is the bias of."""
    return replace(_explained(sides, hint), parts=_parts(sides))


def _parts(sides: Sides) -> str:
    if sides.layout is None:
        return ""
    rows = (sides.held != sides.right).movedim(sides.layout.dim, 0).flatten(1) if sides.held.ndim > 1 else None
    changed = (sides.held != sides.right) if rows is None else rows.any(dim=1)
    hit = {label[0] for label, one in zip(sides.layout.labels(), changed.tolist(), strict=True) if one}
    return "".join(part for part in sides.layout.parts if part in hit)


def _explained(sides: Sides, hint: tuple[int, orders.Order] | None) -> Difference:
    numbers = _numbers(sides.right, sides.held)
    size = numbers.pop("size")
    if numbers["not finite"]:
        return Difference(text=f"{numbers['not finite']:.0f} elements are not finite", size=math.inf, evidence=numbers)
    found = _order(sides, hint)
    if found is not None:
        return Difference(text=found[0], size=size, order=found[1], evidence=numbers)
    where, whole, sides = _narrowed(sides)
    right, held = sides.right.double(), sides.held.double()
    words = next(_exact(sides, right, held), "")
    if words:
        return Difference(text=f"{where}{words}", size=size, exact=whole, evidence=numbers)
    words = _rank(right, held) or _described(sides, right, held)
    return Difference(text=f"{where}{words}", size=size, exact=False, evidence=numbers)


def _narrowed(sides: Sides, most: int | None = None) -> tuple[str, bool, Sides]:
    """Of a large matrix the rows that differ, and as many of these as can be looked at.

    Returns:
        Where that is, in words; whether nothing differs elsewhere; what is left of both sides.
    """
    most = _MOST if most is None else most
    if sides.held.ndim != 2 or sides.held.numel() <= most:
        return "", True, sides
    rows = (sides.held != sides.right).any(dim=1).nonzero()[:, 0]
    chosen = rows[: max(1, most // sides.held.shape[1])]
    if len(chosen) == len(sides.held):
        return "", True, sides
    left = replace(
        sides,
        stored=sides.stored[chosen],
        right=sides.right[chosen],
        held=sides.held[chosen],
        layout=None if _along(sides, 0) else sides.layout,
    )
    whole = len(chosen) == len(rows)
    place = _place(chosen.tolist(), "row", _along(sides, 0))
    return f"{place}: " if whole else f"{place}, the first of {len(rows)} that differ: ", whole, left


def _numbers(right: torch.Tensor, held: torch.Tensor) -> dict[str, float]:
    norm = difference = 0.0
    rows = max(1, _MOST // max(1, held[:1].numel())) if held.ndim else 1
    for one, other in zip(right.split(rows), held.split(rows), strict=True) if held.ndim else ((right, held),):
        wide = one.double()
        norm = math.hypot(norm, float(wide.norm()))
        difference = math.hypot(difference, float((other.double() - wide).norm()))
    return {
        "size": difference / norm if norm else math.inf,
        "elements": held.numel(),
        "changed": int((held != right).sum()),
        "not finite": int((~held.isfinite()).sum()),
    }


# --- the same numbers elsewhere --------------------------------------------------------------------


def _order(sides: Sides, hint: tuple[int, orders.Order] | None) -> tuple[str, tuple[int, orders.Order] | None] | None:
    right, held = sides.right, sides.held
    for words, turned in _turned(right):
        if turned.shape == held.shape and bool((turned == held).all()):
            return words, None
    if right.ndim == 1:
        if hint is not None and len(hint[1]) == len(right) and bool((right[list(hint[1])] == held).all()):
            return orders.in_words(hint[1], "elements", _along(sides, 0)) + ", as in the weight", (0, hint[1])
        order = orders.order_of(right, held, 0)
        return None if order is None else (orders.in_words(order, "elements", _along(sides, 0)), (0, order))
    for dim, what in ((0, "rows"), (1, "columns")):
        order = orders.order_of(right, held, dim)
        if order is not None:
            return orders.in_words(order, what, _along(sides, dim)), (dim, order)
    return None


def _turned(right: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if right.ndim != 2:
        return
    yield "transposed", right.T
    yield "reshaped where it should be transposed", right.reshape(right.shape[::-1]).T
    yield "reshaped where it should be transposed", right.T.reshape(right.shape)


def _along(sides: Sides, dim: int) -> Layout | None:
    """The layout, where it is of this dimension; a bias has that of the rows of its weight."""
    return sides.layout if sides.layout is not None and sides.layout.dim == dim else None


# --- other numbers that one rule gives ---------------------------------------------------------------


def _exact(sides: Sides, right: torch.Tensor, held: torch.Tensor) -> Iterator[str]:
    slack = gains.spacing(held, gains.narrowest(sides.held))
    yield from _constants(right, held)
    words = rounded_to(sides.stored, sides.held, input_dim=sides.input_dim)
    if words:
        yield words
    yield from _one_number(right, held, slack)
    for place, mine, theirs, width in _pieces(sides, right, held, slack):
        yield from (f"{place} {words}" for words in _constants(mine, theirs))
        yield from (f"{place} {words}" for words in _one_number(mine, theirs, width))
    yield from _many_numbers(sides, right, held, slack)


def _constants(right: torch.Tensor, held: torch.Tensor) -> Iterator[str]:
    if bool((held == 0).all()):
        yield "all zero"
    elif held.numel() > 1 and bool((held == held.flatten()[0]).all()):
        yield f"all {float(held.flatten()[0]):.4g}, as a fresh module has it"
    elif bool((held == -right).all()):
        yield "of the other sign"


def _one_number(right: torch.Tensor, held: torch.Tensor, slack: torch.Tensor) -> Iterator[str]:
    found = gains.factor(right, held, slack)
    if found:
        yield f"scaled by {found[0].text}"
    found = gains.summand(right, held, slack)
    if found:
        yield f"{found[0].text} added to each element"


def _pieces(
    sides: Sides, right: torch.Tensor, held: torch.Tensor, slack: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The rows, and then the columns, outside of which nothing differs."""
    changed = held != right
    for dim, what in ((0, "row"), (1, "column")) if held.ndim > 1 else ((0, "element"),):
        others = tuple(one for one in range(held.ndim) if one != dim)
        hit = changed.any(dim=others) if others else changed
        if bool(hit.all()):
            continue
        indices = hit.nonzero()[:, 0].tolist()
        name = _place(indices, what, _along(sides, dim))
        places = hit.nonzero()[:, 0]
        yield name, right.index_select(dim, places), held.index_select(dim, places), slack.index_select(dim, places)


def _place(indices: list[int], what: str, layout: Layout | None) -> str:
    whats = what if len(indices) == 1 else f"{what}s"
    if layout is not None:
        labels = layout.labels()
        hit = sorted({labels[index][:2] for index in indices})
        if len(indices) == len(hit) * layout.head_size:
            parts = sorted({part for part, _ in hit})
            per_part = {part: [head for one, head in hit if one == part] for part in parts}
            if all(len(per_part[part]) == layout.heads[layout.parts.index(part)] for part in parts):
                return f"all {what}s of {' and '.join(parts)}"
            if len({tuple(heads) for heads in per_part.values()}) == 1:
                heads = next(iter(per_part.values()))
                of = f" of {' and '.join(parts)}" if len(layout.parts) > 1 else ""
                return f"{what}s of head{'s' * (len(heads) > 1)} {orders.listed(heads)}{of}"
    return f"{whats} {orders.listed(indices)}"


def _many_numbers(sides: Sides, right: torch.Tensor, held: torch.Tensor, slack: torch.Tensor) -> Iterator[str]:
    """A factor for each row or column, a summand for each group of inputs."""
    if held.ndim != 2:
        return
    for dim, what in ((1, "row"), (0, "column")):
        found = gains.factor(right, held, slack, dim)
        if found:
            values = [one.value for one in found]
            head = _head_factors(sides, values, 1 - dim)
            yield head or f"each {what} scaled by a factor of its own, {min(values):.4g} to {max(values):.4g}"
    rows, before, width = (tensor.movedim(sides.input_dim, 1) for tensor in (held, right, slack))
    for group in (None, *_GROUPS):
        if group is not None and rows.shape[1] <= group:
            continue
        if _summands_in_groups(before, rows, width, group):
            inputs = "its inputs" if group is None else f"each group of {group} inputs"
            yield f"each output shifted by one number in {inputs}, as by a wrong zero point"


def _head_factors(sides: Sides, values: list[float], dim: int) -> str:
    """The factors, where they are the same within each head."""
    layout = _along(sides, dim)
    if layout is None:
        return ""
    by_head: dict[tuple[str, int], list[float]] = {}
    for (part, head, _), value in zip(layout.labels(), values, strict=True):
        by_head.setdefault((part, head), []).append(round(value, 3))
    if all(len(set(one)) == 1 for one in by_head.values()):
        said = [f"{part} {head} by {one[0]:.4g}" for (part, head), one in by_head.items() if one[0] != 1]
        return f"heads scaled: {', '.join(said[:4])}{' and others' * (len(said) > 4)}" if said else ""
    return ""


def _summands_in_groups(right: torch.Tensor, held: torch.Tensor, slack: torch.Tensor, group: int | None) -> bool:
    group = group or held.shape[1]
    whole = held.shape[1] // group * group
    before, after, width = (tensor[:, :whole].reshape(-1, group) for tensor in (right, held, slack))
    if gains.summand(before, after, width, 1) is None:
        return False
    rest = slice(whole, None)
    short = held.shape[1] - whole < gains.FEWEST
    return short or gains.summand(right[:, rest], held[:, rest], slack[:, rest], 1, idle=True) is not None


# --- what can only be described ----------------------------------------------------------------------


def _rank(right: torch.Tensor, held: torch.Tensor) -> str:
    """The rank of what was added, where it says more than it takes: an adapter, merged otherwise.

    A rank r has r (R + C) numbers, which must be fewer than the elements that differ. What the rounding of what is held
    may amount to is noise: the rank is the least that leaves no more than that.
    """
    if held.ndim != 2 or min(held.shape) < 2 or held.numel() * min(held.shape) > _LARGEST_WORK:
        return ""
    import torch

    noise = float(gains.spacing(held, gains.narrowest(held)).norm())
    values = torch.linalg.svdvals(held - right)
    rank = next(rank for rank in range(len(values) + 1) if float(values[rank:].norm()) <= noise)
    return f"differs by an update of rank {rank}" if 0 < rank * sum(held.shape) < int((held != right).sum()) else ""


def _described(sides: Sides, right: torch.Tensor, held: torch.Tensor) -> str:
    changed = held != right
    count = int(changed.sum())
    where = ""
    for dim, what in ((0, "row"), (1, "column")) if held.ndim > 1 else ():
        others = tuple(one for one in range(held.ndim) if one != dim)
        hit = changed.any(dim=others)
        if not bool(hit.all()):
            where = f", in {_place(hit.nonzero()[:, 0].tolist(), what, _along(sides, dim))} alone"
            break
    flat = (held - right).abs().flatten()
    worst = int(flat.argmax())
    at = _coordinates(worst, tuple(held.shape))
    one = f"{float(held.flatten()[worst]):.6g} for {float(right.flatten()[worst]):.6g} at {at}"
    return f"{count} of {held.numel()} elements differ{where}, most: {one}"


def _coordinates(flat: int, shape: tuple[int, ...]) -> list[int]:
    found: list[int] = []
    for size in reversed(shape):
        flat, here = divmod(flat, size)
        found.append(here)
    return found[::-1]

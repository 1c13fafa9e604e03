"""Whether one number explains all that differs: a factor or a summand.

No tolerance: with the round-off of what is held, each element allows an interval of such numbers, and they explain the
tensor if one number lies in all of the intervals. A factor that may be 1 and a summand that may be 0 explain nothing:
they lie in the intervals of whatever is off by less than a rounding.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Fewer elements than this fit one number by chance: one always does, and two leave a single condition.
FEWEST = 3


@dataclass(frozen=True, slots=True)
class Number:
    """The number, and how closely the elements fix it."""

    value: float
    spread: float

    @property
    def text(self) -> str:
        return f"{self.value:.4g}"


def spacing(held: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of each element in a dtype, float64: the product and its cast are a rounding each."""
    import torch

    info = torch.finfo(dtype)
    return held.double().abs().clamp(min=info.tiny) * info.eps


def narrowest(held: torch.Tensor) -> torch.dtype:
    """The shortest dtype that holds all of these numbers: what is widened after it was rounded stays as coarse."""
    import torch

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype.itemsize < held.dtype.itemsize and bool((held.to(dtype).to(held.dtype) == held).all()):
            return dtype
    return held.dtype


def factor(right: torch.Tensor, held: torch.Tensor, slack: torch.Tensor, dim: int | None = None) -> list[Number] | None:
    """One factor for the whole (dim None), or for each row (1) or column (0): what is reduced over is ``dim``.

    Args:
        right: what should be held, float64, [R, C] or [N].
        held: what is held, of the same shape.
        slack: by how much each element of it may be off by rounding.
        dim: over which one number holds.

    Returns:
        One number, or one for each row or column; None where they do not explain what is held, or need not be there.
    """
    return _common(right, held, slack, dim, neutral=1.0)


def summand(
    right: torch.Tensor, held: torch.Tensor, slack: torch.Tensor, dim: int | None = None, *, idle: bool = False
) -> list[Number] | None:
    """As `factor`, for a number that is added; with ``idle`` also one that need not be there."""
    import torch

    return _common(torch.ones_like(right), held - right, slack, dim, neutral=None if idle else 0.0)


def _common(
    right: torch.Tensor, held: torch.Tensor, slack: torch.Tensor, dim: int | None, *, neutral: float | None
) -> list[Number] | None:
    import torch

    if not right.numel():
        return None
    if dim is None:
        right, held, slack, dim = right.reshape(1, -1), held.reshape(1, -1), slack.reshape(1, -1), 1
    nonzero = right != 0
    if bool((~nonzero & (held.abs() > slack)).any()):
        return None
    safe = torch.where(nonzero, right, torch.ones_like(right))
    centre, width = held / safe, slack / safe.abs()
    low = torch.where(nonzero, centre - width, torch.full_like(centre, -torch.inf)).amax(dim=dim)
    high = torch.where(nonzero, centre + width, torch.full_like(centre, torch.inf)).amin(dim=dim)
    counted = nonzero.sum(dim=dim)
    if bool((counted < FEWEST).any()) or not bool((low <= high).all()):
        return None
    if neutral is not None:
        # Most of the rows that are others must need their number, and a number that is needed changes most elements.
        changed = (held != neutral * right).sum(dim=dim)
        needed = ((low > neutral) | (high < neutral)) & (2 * changed > counted)
        if 2 * int(needed.sum()) <= int((changed > 0).sum()):
            return None
    middle, spread = (low + high) / 2, (high - low) / 2
    return [Number(float(value), float(width)) for value, width in zip(middle, spread, strict=True)]

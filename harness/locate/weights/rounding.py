"""Whether what is held is what is right, rounded: to a shorter float, twice, or to the grid of a quantiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.numerics.quantise import round_to_nearest

if TYPE_CHECKING:
    import torch

#: Inputs that share a scale, as quantisers in use have them; None is all of them.
_GROUPS = (None, 32, 64, 128)


def rounded_to(stored: torch.Tensor, held: torch.Tensor, *, input_dim: int) -> str:
    """What the stored tensor was rounded to, in words; "" where no rounding known here gives what is held."""
    for words, value in _floats(stored):
        if _same(value, held):
            return words
    if stored.ndim == 2:
        for words, value in _grids(stored, input_dim):
            if _same(value, held):
                return words
    return _few_levels(stored, held, input_dim)


def _same(value: torch.Tensor, held: torch.Tensor) -> bool:
    return bool((value.to(held.dtype) == held).all())


def _floats(stored: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    wide = stored.float() if stored.dtype.itemsize < 4 else stored
    for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"):
        yield f"rounded to {name}", wide.to(getattr(torch, name)).to(wide.dtype)
    for first, second in (("float16", "bfloat16"), ("bfloat16", "float16")):
        yield (
            f"rounded to {first}, and then to {second}",
            wide.to(getattr(torch, first)).to(getattr(torch, second)).to(wide.dtype),
        )
    bits = wide.float().view(torch.int32)
    yield "cut to the bits of bfloat16, not rounded", (bits & ~0xFFFF).view(torch.float32)


def _grids(stored: torch.Tensor, input_dim: int) -> Iterator[tuple[str, torch.Tensor]]:
    for dim in (input_dim, 1 - input_dim):
        for group in _GROUPS:
            for bits in (8, 4):
                if group is not None and group >= stored.shape[dim]:
                    continue
                shared = "one scale an output" if group is None else f"a scale for {group} inputs"
                if dim != input_dim:
                    shared = (
                        shared.replace("output", "input").replace("inputs", "outputs") + ", which is the wrong side"
                    )
                yield f"rounded to int{bits}, {shared}", round_to_nearest(stored, bits, group, input_dim=dim)


def _few_levels(stored: torch.Tensor, held: torch.Tensor, input_dim: int) -> str:
    """A row of few values, where the stored one has many, is on some quantiser's grid."""
    if stored.ndim != 2:
        return ""
    rows, before = held.movedim(input_dim, 1), stored.movedim(input_dim, 1)
    levels = max(len(row.unique()) for row in rows[: min(len(rows), 64)])
    usual = min(len(row.unique()) for row in before[: min(len(before), 64)])
    # Half of the values are gone in every row: rounding to a shorter float does that to long rows only.
    return f"on a grid of {levels} values a row at most (quantised)" if 2 * levels <= usual and levels <= 256 else ""

"""Where else in a checkpoint the rows of a tensor are, in one pass for all tensors that are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.locate.weights.casting import Casts
from harness.locate.weights.orders import listed, row_keys
from harness.locate.weights.stored import Stored

if TYPE_CHECKING:
    import torch

#: Rows of one tensor that are looked for at first: if none of them is elsewhere, the others are not either.
_SAMPLE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is kept of a tensor [R, ...] whose rows are looked for.

    Attributes:
        name: its own, in the checkpoint.
        shape: of what is held.
        dtype: of what is held.
        rows: a key of each row; a vector is one row. None for a constant, which is equal to many and made of none.
        sample: some of them that are not constant.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: tuple[bytes, ...] | None
    sample: frozenset[bytes]


def asked(name: str, held: torch.Tensor) -> Asked:
    """What is to be kept of a tensor."""
    varied = held.numel() > 1 and bool((held != held.flatten()[0]).any())
    rows = _keys(held) if varied else None
    return Asked(name=name, shape=tuple(held.shape), dtype=held.dtype, rows=rows, sample=frozenset(_sample(held)))


def origins(stored: Stored, wanted: Mapping[str, Asked], casts: Casts) -> dict[str, str]:
    """What other tensors' rows the tensors that are asked about hold, in words, by their keys.

    Args:
        stored: the checkpoint.
        wanted: by any key, what is asked about.
        casts: as what a tensor of the checkpoint may be held.

    Returns:
        Such as "holds model.layers.2.self_attn.v_proj.weight"; keys without any such row are left out.
    """
    found: dict[str, str] = {}
    for name, shape in stored.shapes.items():
        todo = {
            key: one
            for key, one in wanted.items()
            if key not in found and one.rows is not None and one.name != name and _comparable(shape, one.shape)
        }
        tensor = stored.read(name) if todo else None
        if tensor is None or not tensor.is_floating_point():
            continue
        for dtype in {one.dtype for one in todo.values()}:
            for cast in casts(name, tensor, dtype):
                rows = _keys(cast)
                places = {row: index for index, row in enumerate(rows)}
                for key, one in todo.items():
                    words = _from(name, rows, places, one) if one.dtype == dtype and key not in found else ""
                    if words:
                        found[key] = words
    return found


def _keys(tensor: torch.Tensor) -> tuple[bytes, ...]:
    return tuple(row_keys(tensor if tensor.ndim > 1 else tensor.reshape(1, -1)))


def _comparable(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(shape) == len(other) and (shape[1:] == other[1:] if len(shape) > 1 else shape == other)


def _sample(tensor: torch.Tensor) -> set[bytes]:
    """Some rows; constant ones are those of many tensors, and a vector has no rows."""
    if tensor.ndim < 2 or tensor.shape[1] < 2:
        return set()
    rows = tensor[:: max(1, len(tensor) // _SAMPLE)]
    return {row for row, plain in zip(row_keys(rows), rows, strict=True) if bool((plain != plain.flatten()[0]).any())}


def _from(name: str, rows: tuple[bytes, ...], places: Mapping[bytes, int], one: Asked) -> str:
    """In words, what of a tensor comes from another one with these rows."""
    if one.rows == rows:
        return f"holds {name}"
    if one.rows is None or not any(row in places for row in one.sample):
        return ""
    hits = [(index, places[row]) for index, row in enumerate(one.rows) if row in places]
    here, there = [index for index, _ in hits], [index for _, index in hits]
    whole = f"all {len(one.rows)} rows" if len(here) == len(one.rows) else f"rows {listed(here)}"
    return f"{whole} are rows {listed(there)} of {name}"

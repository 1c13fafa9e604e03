"""Where else in a checkpoint the rows of a tensor are, in one pass for all tensors that are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.locate.weights.orders import listed, row_bytes
from harness.locate.weights.stored import Stored

if TYPE_CHECKING:
    import torch

#: Rows of one tensor that are looked for at first: if none of them is elsewhere, the others are not either.
_SAMPLE = 16


def origins(stored: Stored, asked: Mapping[str, torch.Tensor], own: Mapping[str, str]) -> dict[str, str]:
    """What other tensors' rows the tensors that are asked about hold, in words, by their keys.

    Args:
        stored: the checkpoint.
        asked: by any key, a tensor [R, ...] of rows.
        own: by key, its own name in the checkpoint.

    Returns:
        Such as "holds model.layers.2.self_attn.v_proj.weight"; keys without any such row are left out.
    """
    samples = {key: _sample(tensor) for key, tensor in asked.items()}
    found: dict[str, str] = {}
    for name in stored.shapes:
        todo = [key for key in asked if key not in found and own[key] != name and _comparable(stored, name, asked[key])]
        if not todo:
            continue
        tensor = stored.read(name)
        for key in todo:
            if not tensor.is_floating_point():
                continue
            cast = tensor.to(asked[key].dtype)
            if cast.shape == asked[key].shape and bool((cast == asked[key]).all()):
                found[key] = f"holds {name}"
                continue
            if samples[key] and samples[key] & set(row_bytes(cast)):
                words = _rows_of(cast, asked[key], name)
                if words:
                    found[key] = words
    return found


def _comparable(stored: Stored, name: str, tensor: torch.Tensor) -> bool:
    shape = stored.shapes[name]
    return len(shape) == tensor.ndim and (
        shape[1:] == tuple(tensor.shape[1:]) if tensor.ndim > 1 else shape == tuple(tensor.shape)
    )


def _sample(tensor: torch.Tensor) -> set[bytes]:
    """Some rows; constant ones are those of many tensors, and a vector has no rows."""
    if tensor.ndim < 2 or tensor.shape[1] < 2:
        return set()
    rows = tensor[:: max(1, len(tensor) // _SAMPLE)]
    return {row for row, plain in zip(row_bytes(rows), rows, strict=True) if bool((plain != plain.flatten()[0]).any())}


def _rows_of(other: torch.Tensor, tensor: torch.Tensor, name: str) -> str:
    places = {row: index for index, row in enumerate(row_bytes(other))}
    hits = [(index, places[row]) for index, row in enumerate(row_bytes(tensor)) if row in places]
    here, there = [index for index, _ in hits], [index for _, index in hits]
    whole = f"all {len(tensor)} rows" if len(here) == len(tensor) else f"rows {listed(here)}"
    return f"{whole} are rows {listed(there)} of {name}" if here else ""
